"""Preprocessing on a Dask cluster: one task per case, committed by its worker; tables and weak labels at the end.

A run may be killed at any time: finished cases are in the cache, and the next run goes on with the others. A case
that fails is listed and stops nothing. Called by `supercl preprocess` and, as `preprocess.run`, from Python.
"""

from __future__ import annotations

import dataclasses
import queue
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from preprocess.ccl import store_weak_labels
from preprocess.cluster import Cluster, SlurmConfig, connect, software
from preprocess.pipeline import PreprocessConfig
from preprocess.plan import Plan, failed_row, make_plan
from preprocess.worker import compute_case
from supercl_core import provenance
from supercl_core.cache.cases import CaseRow, identical_cases
from supercl_core.cache.reader import open_cache
from supercl_core.cache.writer import (
    create_cache,
    remove_cases,
    restamp_case,
    set_root_attributes,
    write_tables,
)
from supercl_core.cache.zarr_files import read_attributes
from supercl_core.checks.verification import Verification, num_committed, verify
from supercl_core.config import from_dict
from supercl_core.errors import (
    CacheError,
    PreemptedError,
    StorageError,
    SuperCLError,
    UsageError,
    storage_error,
)
from supercl_core.files import sync
from supercl_core.locks import check_lock, hold
from supercl_core.machine import num_cores
from supercl_core.messages import note
from supercl_core.progress import progress
from supercl_core.sources import CaseSource, discover

TASKS_PER_THREAD: Final = 3
"""Cases at the scheduler for each thread of the workers, so that it stays small whatever the data set."""
MIN_TASKS: Final = 32
"""Cases at the scheduler where no worker is there yet: a scheduler that starts workers by itself must see work."""
POLL_S: Final = 1.0
"""How long a case or its row may be waited for before somebody looks whether scheduler and workers are there."""
DEADLY: Final = (
    "Every worker that computes it dies, also with this case alone; most likely memory (or, on Slurm, a job's time) is "
    "too small for it: give each worker more, or preprocess it on a larger machine"
)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run of preprocessing left behind."""

    cache_path: Path
    num_computed: int
    num_kept: int
    """Cases that an earlier run had finished."""
    failed: tuple[CaseRow, ...]
    changed: tuple[str, ...]
    """Cases computed again because their files hold something else by now."""
    vanished: tuple[str, ...]
    """Cases of the cache that the input no longer has."""
    identical: tuple[tuple[str, ...], ...]
    """Groups of cases with identical content."""


def run(
    input_path: Path,
    cache_path: Path,
    *,
    config: PreprocessConfig | None = None,
    num_workers: int | None = None,
    scheduler: str | None = None,
    slurm: SlurmConfig | None = None,
    retry_failed: bool = False,
    layout: str | None = None,
) -> RunResult:
    """Turn a folder of volumes into a cache, or go on with one.

    `layout`: the name of the folder's layout (`supercl_core.sources`), instead of the one that it is recognised by.
    `num_workers` processes on this machine (default: one a core), or a running Dask `scheduler` such as
    `tcp://host:8786`, or jobs of `slurm`. A case whose worker is lost is run again; one that takes its worker down
    every time is listed as failed. Cases that failed in a run that came to its end are computed again where their files
    have changed, or with `retry_failed`.

    Raises SuperCLError when no case can be computed or the scheduler is lost, StorageError when the cache cannot be
    written, CacheError when another process changes the cache, PreemptedError after SIGTERM, and what discovery,
    planning and `cluster.connect` raise.
    """
    cache_path = cache_path.resolve()
    source = discover(input_path, layout)
    note(*source.notes(input_path))
    with hold(cache_path) as token:
        plan = make_plan(source, cache_path, config or PreprocessConfig(), retry_failed=retry_failed)
        workers = partial(connect, scheduler=scheduler, slurm=slurm)
        record = _record(input_path, layout)
        return _carry_out(plan, input_path, cache_path, token, num_workers, workers, record)


def repair(
    cache_path: Path, input_path: Path | None = None, *, num_workers: int | None = None
) -> tuple[Verification, RunResult | None]:
    """Find all damage of a cache and mend it by computing damaged cases, and only those, again.

    `input_path`: the data set, where it is not any more where the cache was made from. Returns the damage found, and
    what was done about it (None where there was none).

    Raises CacheError when damage is left: of a case that the input does not have any more, or of the root, whose
    settings only `run` knows. Raises what `run` raises too.
    """
    cache_path = cache_path.resolve()
    num_workers = num_workers or num_cores()
    with hold(cache_path) as token:
        before = _verified(cache_path, num_workers)
        if not before.damages:
            return before, None
        root = read_attributes(cache_path, "/")
        input_path = input_path or _stored_input(cache_path, root["provenance"])
        layout = root["provenance"].get("layout")
        plan = make_plan(
            discover(input_path, layout),
            cache_path,
            from_dict(PreprocessConfig, root["config"]),
            recompute={damage.case_id for damage in before.damages},
        )
        plan = dataclasses.replace(plan, is_finished=False)
        record = _record(input_path, layout)
        result = _carry_out(plan, input_path, cache_path, token, num_workers, connect, record)
        left = _verified(cache_path, num_workers).damages
    if left:
        raise CacheError(
            "Some damage could not be mended.",
            where=cache_path,
            found="\n" + "\n".join(f"    {damage.where}: {damage.problem}" for damage in left),
            next_step=f"See that {input_path} holds these cases, or name their folder: supercl repair CACHE INPUT. "
            "Descriptors, and labels made of them, come from `supercl describe` and `supercl weak-labels`.",
        )
    return before, result


def _stored_input(cache_path: Path, record: Mapping[str, Any]) -> Path:
    """The folder that the cache was made from, as its provenance says."""
    stored = record.get("input")
    if isinstance(stored, str):
        return Path(stored)
    raise UsageError(
        "The cache does not say which volumes it was made from.",
        where=cache_path,
        expected="`input` in the provenance",
        found="none",
        next_step="Name their folder: supercl repair CACHE INPUT.",
    )


def _verified(cache_path: Path, num_workers: int) -> Verification:
    with progress("verify", total=num_committed(cache_path), unit="cases") as advance:
        return verify(cache_path, num_workers=num_workers, on_case=advance)


def _carry_out(
    plan: Plan,
    input_path: Path,
    cache_path: Path,
    token: str,
    num_workers: int | None,
    connect_to: Callable[..., AbstractContextManager[Cluster]],
    record: Mapping[str, Any],
) -> RunResult:
    """Do what is planned, under the lock of the cache; `record` becomes its provenance."""
    if plan.is_new and not plan.todo and not plan.kept:
        raise _nothing_done(input_path, plan.failed)
    rows = {row.id: row for row in (*plan.kept, *plan.failed)}
    with _stoppable(cache_path, rows, len(rows) + len(plan.todo)):
        for case_id, stamp in plan.restamped.items():
            restamp_case(cache_path, case_id, {"source_stamp": stamp})
        if plan.todo:
            with connect_to(num_workers=min(num_workers or num_cores(), len(plan.todo))) as cluster:
                _open(plan, cache_path, record)
                for row in _compute(plan, cache_path, token, cluster):
                    rows[row.id] = row
        elif not plan.is_finished:
            _open(plan, cache_path, record)
        check_lock(cache_path, token)
        ordered = [rows[case_id] for case_id in sorted(rows)]
        failed = tuple(row for row in ordered if row.state == "failed")
        if len(failed) == len(ordered):
            if plan.is_new:
                shutil.rmtree(cache_path)
            raise _nothing_done(input_path, failed)
        if not plan.is_finished:
            _finish(cache_path, token, ordered, plan, record)
    return RunResult(
        cache_path=cache_path,
        num_computed=len(ordered) - len(failed) - len(plan.kept),
        num_kept=len(plan.kept),
        failed=failed,
        changed=plan.changed,
        vanished=plan.vanished,
        identical=tuple(identical_cases(ordered)),
    )


def _record(input_path: Path, layout: str | None) -> dict[str, Any]:
    """Provenance of a run: what `repair` needs to find the same cases again is part of it."""
    named = {} if layout is None else {"layout": layout}
    return {**provenance.record(), "input": str(input_path.resolve()), **named}


def _open(plan: Plan, cache_path: Path, record: Mapping[str, Any]) -> None:
    """Make the cache, or mark it as not complete while it is changed."""
    if plan.is_new:
        create_cache(cache_path, {**plan.attributes, "provenance": record})
    else:
        set_root_attributes(cache_path, {**plan.attributes, "complete": False})


def _compute(plan: Plan, cache_path: Path, token: str, cluster: Cluster) -> Iterator[CaseRow]:
    """Compute the cases of the plan on the cluster and yield their rows as they finish.

    When a worker dies, Dask blames every case that it had been given. Those that it gives up are put aside and, after
    all others, run again one at a time: what then takes its worker down has done so itself.
    """
    from distributed import CancelledError, KilledWorker

    waiting, suspects = deque(plan.todo), deque[CaseSource]()
    running: dict[str, CaseSource] = {}
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    num_submitted = num_failed = 0
    config = from_dict(PreprocessConfig, plan.attributes["config"])

    def submit(case: CaseSource) -> None:
        nonlocal num_submitted
        future = cluster.client.submit(
            compute_case,
            case,
            cache_path,
            config=config,
            num_channels=plan.num_channels,
            num_classes=plan.num_classes,
            config_digest=plan.attributes["config_digest"],
            token=token,
            versions=software(),
            pure=False,
            priority=-num_submitted,  # Dask keeps no order among tasks submitted within a tenth of a second
        )
        num_submitted += 1
        running[future.key] = case
        future.add_done_callback(ended.put)

    with progress(
        "preprocess", total=len(plan.todo) + len(plan.kept), unit="cases", done=len(plan.kept)
    ) as advance:
        while waiting or running or suspects:
            while waiting and len(running) < max(TASKS_PER_THREAD * cluster.num_threads(), MIN_TASKS):
                submit(waiting.popleft())
            alone = not waiting and not running
            if alone:
                submit(suspects.popleft())
            future = _next_ended(ended, cluster)
            case = running.pop(future.key)
            try:
                row: CaseRow = future.result(timeout=POLL_S)
            except TimeoutError:  # its worker died before the row was fetched: Dask computes the case again
                running[future.key] = case
                future.add_done_callback(ended.put)
                cluster.check()
                continue
            except (CancelledError, OSError):  # what the client says when it loses the scheduler
                raise cluster.lost() from None
            except KilledWorker:
                if not alone:
                    suspects.append(case)
                    continue
                row = failed_row(case, DEADLY)
            cluster.case_ended()
            num_failed += row.state == "failed"
            advance(note=f"{num_failed} failed" if num_failed else "")
            yield row


def _next_ended(ended: queue.SimpleQueue[Any], cluster: Cluster) -> Any:
    """The next future that ended, as long as there are a scheduler and workers to wait for."""
    while True:
        try:
            return ended.get(timeout=POLL_S)
        except queue.Empty:
            cluster.check()


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run the way Ctrl-C does: through every `finally`."""


@contextmanager
def _stoppable(cache_path: Path, rows: Mapping[str, CaseRow], num_cases: int) -> Iterator[None]:
    """Tell how far the run got when it is stopped, by a user, a scheduler of jobs, or a disk that takes no more.

    SIGTERM becomes a PreemptedError, Ctrl-C stays what it is.
    """

    def terminate(signum: int, frame: object) -> None:
        raise _Terminated

    def finished() -> str:
        num_done = sum(row.state == "done" for row in rows.values())
        return f"{num_done} of {num_cases} cases are finished"

    handled = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, terminate) if handled else None
    try:
        yield
    except (OSError, StorageError) as error:
        refused = error if isinstance(error, StorageError) else storage_error(error, where=cache_path)
        raise refused.with_saved(f"{finished()} and safe in the cache") from None
    except _Terminated:
        raise PreemptedError(
            "Preprocessing was told to stop.",
            found=finished(),
            next_step="Run the same command again; it goes on with the others.",
        ) from None
    except KeyboardInterrupt:
        print(f"{finished()}; the same command goes on with the others.", file=sys.stderr)
        raise
    finally:
        if handled:
            signal.signal(signal.SIGTERM, previous)


def _finish(cache_path: Path, token: str, rows: list[CaseRow], plan: Plan, record: Mapping[str, Any]) -> None:
    """Write the tables and the weak labels; the cache is complete with the last write."""
    remove_cases(cache_path, keep={row.id for row in rows if row.state == "done"})
    write_tables(cache_path, rows, num_channels=plan.num_channels)
    store_weak_labels(open_cache(cache_path, unfinished=True), token)
    sync()  # no case may be less durable than the word that all are there
    set_root_attributes(cache_path, {"complete": True, "provenance": record})


def _nothing_done(input_path: Path, failed: tuple[CaseRow, ...]) -> SuperCLError:
    return SuperCLError(
        "No case could be computed; nothing was written.",
        where=input_path,
        expected="at least one readable volume",
        found="; ".join(f"{row.id}: {row.reason}" for row in failed[:3])
        + (f"; and {len(failed) - 3} more" if len(failed) > 3 else ""),
        next_step="Mend the files named above and run again.",
    )
