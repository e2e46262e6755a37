"""Preprocessing on a Dask cluster: one task per case, committed by its worker; tables and weak labels at the end.

A run may be killed at any time: finished cases are in the cache, and the next run goes on with the others. A case
that fails is listed and stops nothing. Called by `supercl preprocess` and, as `preprocess.run`, from Python.
"""

from __future__ import annotations

import queue
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from preprocess.ccl import weak_labels
from preprocess.cluster import Cluster, SlurmConfig, connect, software
from preprocess.pipeline import PreprocessConfig
from preprocess.plan import Plan, make_plan
from preprocess.worker import compute_case
from supercl_core import provenance
from supercl_core.cache_reader import open_cache
from supercl_core.cache_writer import (
    create_cache,
    set_root_attributes,
    write_tables,
)
from supercl_core.cases import CaseRow
from supercl_core.errors import PreemptedError, SuperCLError
from supercl_core.files import wip_path
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
    vanished: tuple[str, ...]
    """Cases of the cache that the input no longer has."""


def run(
    input_path: Path,
    cache_path: Path,
    *,
    config: PreprocessConfig | None = None,
    num_workers: int | None = None,
    scheduler: str | None = None,
    slurm: SlurmConfig | None = None,
) -> RunResult:
    """Turn a folder of volumes into a cache, or go on with one.

    `num_workers` processes on this machine (default: one a core), or a running Dask `scheduler` such as
    `tcp://host:8786`, or jobs of `slurm`. A case whose worker is lost is run again; one that takes its worker down
    every time is listed as failed.

    Raises SuperCLError when no case can be computed or the scheduler is lost, PreemptedError after SIGTERM, and what
    discovery, planning and `cluster.connect` raise.
    """
    config = config or PreprocessConfig()
    cache_path = cache_path.resolve()
    plan = make_plan(discover(input_path), cache_path, config)
    new = not (cache_path / "zarr.json").is_file()
    if new and not plan.todo:
        raise _nothing_done(input_path, plan.failed)
    rows = {row.id: row for row in (*plan.kept, *plan.failed)}
    if plan.todo:
        num_workers = min(num_workers or num_cores(), len(plan.todo))
        with (
            _stoppable(rows, len(rows) + len(plan.todo)),
            connect(num_workers=num_workers, scheduler=scheduler, slurm=slurm) as cluster,
        ):
            if new:
                create_cache(cache_path, {**plan.attributes, "provenance": provenance.record()})
            else:
                set_root_attributes(cache_path, {"complete": False})
            for row in _compute(plan, cache_path, config, cluster):
                rows[row.id] = row
    ordered = [rows[case_id] for case_id in sorted(rows)]
    failed = tuple(row for row in ordered if row.state == "failed")
    if len(failed) == len(ordered):
        if new:
            shutil.rmtree(cache_path)
            shutil.rmtree(wip_path(cache_path))
        raise _nothing_done(input_path, failed)
    if not plan.nothing_to_do:
        _finish(cache_path, ordered, plan)
    return RunResult(
        cache_path=cache_path,
        num_computed=len(ordered) - len(failed) - len(plan.kept),
        num_kept=len(plan.kept),
        failed=failed,
        vanished=plan.vanished,
    )


def _compute(plan: Plan, cache_path: Path, config: PreprocessConfig, cluster: Cluster) -> Iterator[CaseRow]:
    """Compute the cases of the plan on the cluster and yield their rows as they finish.

    When a worker dies, Dask blames every case that it had been given. Those that it gives up are put aside and, after
    all others, run again one at a time: what then takes its worker down has done so itself.
    """
    from distributed import CancelledError, KilledWorker

    waiting, suspects = deque(plan.todo), deque[CaseSource]()
    running: dict[str, CaseSource] = {}
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    num_submitted = num_failed = 0

    def submit(case: CaseSource) -> None:
        nonlocal num_submitted
        future = cluster.client.submit(
            compute_case,
            case,
            cache_path,
            config=config,
            num_channels=plan.num_channels,
            num_classes=plan.num_classes,
            digest=plan.attributes["config_digest"],
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
                row = CaseRow(id=case.id, state="failed", reason=DEADLY, source=str(case.image_path))
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
def _stoppable(rows: Mapping[str, CaseRow], num_cases: int) -> Iterator[None]:
    """Tell how far the run got when it is stopped; SIGTERM becomes a PreemptedError, Ctrl-C stays what it is."""

    def terminate(signum: int, frame: object) -> None:
        raise _Terminated

    handled = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, terminate) if handled else None
    try:
        yield
    except KeyboardInterrupt as stopped:
        num_done = sum(row.state == "done" for row in rows.values())
        finished = f"{num_done} of {num_cases} cases are finished"
        if isinstance(stopped, _Terminated):
            raise PreemptedError(
                "Preprocessing was told to stop.",
                found=finished,
                next_step="Run the same command again; it goes on with the others.",
            ) from None
        print(f"{finished}; the same command goes on with the others.", file=sys.stderr)
        raise
    finally:
        if handled:
            signal.signal(signal.SIGTERM, previous)


def _finish(cache_path: Path, rows: list[CaseRow], plan: Plan) -> None:
    """Write the tables and the weak labels; the cache is complete with the last write."""
    record = provenance.record()
    set_root_attributes(cache_path, {"complete": False})
    write_tables(cache_path, rows, num_channels=plan.num_channels)
    weak_labels(open_cache(cache_path, unfinished=True))
    set_root_attributes(cache_path, {"complete": True, "provenance": record})
    shutil.rmtree(wip_path(cache_path), ignore_errors=True)


def _nothing_done(input_path: Path, failed: tuple[CaseRow, ...]) -> SuperCLError:
    return SuperCLError(
        "No case could be computed; nothing was written.",
        where=input_path,
        expected="at least one readable volume",
        found="; ".join(f"{row.id}: {row.reason}" for row in failed[:3])
        + (f"; and {len(failed) - 3} more" if len(failed) > 3 else ""),
        next_step="Mend the files named above and run again.",
    )


def num_cores() -> int:
    """Cores that this process may use."""
    from dask.system import CPU_COUNT

    return CPU_COUNT
