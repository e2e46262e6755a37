"""Preprocessing on a Dask cluster: one task per case, committed by its worker; tables and weak labels at the end.

A run may be killed at any time: finished cases are in the cache, and the next run goes on with the others. A case
that fails is listed and stops nothing. Called by `supercl preprocess` and, as `preprocess.run`, from Python.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from preprocess.ccl import weak_labels
from preprocess.pipeline import PreprocessConfig, process_case
from preprocess.plan import Plan, failed_row, make_plan, source_stamp
from supercl_core import provenance
from supercl_core.cache_reader import open_cache
from supercl_core.cache_writer import (
    create_cache,
    set_root_attributes,
    write_case,
    write_tables,
)
from supercl_core.cases import CaseRow
from supercl_core.errors import SuperCLError
from supercl_core.files import wip_path
from supercl_core.progress import progress
from supercl_core.sources import CaseSource, discover
from supercl_core.volumes import read_volume

TASKS_PER_WORKER: Final = 4
"""Cases handed to the scheduler at a time for each worker, so that it stays small whatever the data set."""


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
) -> RunResult:
    """Turn a folder of volumes into a cache, or go on with one.

    `num_workers` processes on this machine (default: one a core), or a running Dask `scheduler` such as
    `tcp://host:8786`. Raises SuperCLError when no case can be computed, and what discovery and planning raise.
    """
    config = config or PreprocessConfig()
    cache_path = cache_path.resolve()
    plan = make_plan(discover(input_path), cache_path, config)
    new = not (cache_path / "zarr.json").is_file()
    if new and not plan.todo:
        raise _nothing_done(input_path, plan.failed)
    if new:
        create_cache(cache_path, {**plan.attributes, "provenance": provenance.record()})
    elif plan.todo:
        set_root_attributes(cache_path, {"complete": False})
    rows = {row.id: row for row in (*plan.kept, *plan.failed)}
    if plan.todo:
        rows |= {row.id: row for row in _compute(plan, cache_path, config, num_workers, scheduler)}
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


def compute_case(
    case: CaseSource,
    cache_path: Path,
    *,
    config: PreprocessConfig,
    num_channels: int,
    num_classes: int,
    digest: str,
) -> CaseRow:
    """Compute one case and commit it; runs in a worker. A failure becomes the row's reason.

    `digest`: of the settings, stored with the case.
    """
    try:
        stamp = source_stamp(case)
        label = None if case.label_path is None else read_volume(case.label_path)
        computed = process_case(
            read_volume(case.image_path),
            label,
            config=config,
            num_channels=num_channels,
            num_classes=num_classes,
        )
        row = CaseRow(id=case.id, digest=_file_digest(case), source=str(case.image_path), **computed.row)
        attributes = {**computed.attributes, "config_digest": digest, "source_stamp": stamp}
        write_case(cache_path, row, computed.arrays, attributes=attributes)
    except Exception as error:  # one case, whatever is wrong with it, must not stop the others
        return failed_row(case, error)
    return row


def _compute(
    plan: Plan, cache_path: Path, config: PreprocessConfig, num_workers: int | None, scheduler: str | None
) -> Iterator[CaseRow]:
    """Compute the cases of the plan on the cluster and yield their rows as they finish."""
    from distributed import KilledWorker, as_completed

    with (
        _client(num_workers, scheduler) as client,
        progress(
            "preprocess",
            total=len(plan.todo) + len(plan.kept),
            unit="cases",
            done=len(plan.kept),
        ) as advance,
    ):
        waiting = iter(plan.todo)
        cases: dict[str, CaseSource] = {}
        futures = as_completed()
        num_failed = 0

        def submit_next() -> None:
            case = next(waiting, None)
            if case is None:
                return
            future = client.submit(
                compute_case,
                case,
                cache_path,
                config=config,
                num_channels=plan.num_channels,
                num_classes=plan.num_classes,
                digest=plan.attributes["config_digest"],
                pure=False,
                retries=0,
            )
            cases[future.key] = case
            futures.add(future)

        for _ in range(TASKS_PER_WORKER * max(1, len(client.scheduler_info(n_workers=-1)["workers"]))):
            submit_next()
        for future in futures:
            case = cases.pop(future.key)
            try:
                row: CaseRow = future.result()
            except KilledWorker as error:
                row = failed_row(case, error)
            submit_next()
            num_failed += row.state == "failed"
            advance(note=f"{num_failed} failed" if num_failed else "")
            yield row


@contextmanager
def _client(num_workers: int | None, scheduler: str | None) -> Iterator[Any]:
    """A Dask client of the given scheduler, or of a cluster of processes on this machine."""
    from distributed import Client, LocalCluster

    if scheduler is not None:
        try:
            with Client(scheduler, timeout=20) as client:
                yield client
        except OSError as error:
            raise SuperCLError(
                "The Dask scheduler does not answer.",
                where=scheduler,
                found=error,
                next_step="Check the address, or leave --scheduler out to run on this machine.",
            ) from error
        return
    with (
        LocalCluster(
            n_workers=num_workers or os.cpu_count(),
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        print(f"Dask dashboard: {cluster.dashboard_link}", file=sys.stderr)
        yield client


def _finish(cache_path: Path, rows: list[CaseRow], plan: Plan) -> None:
    """Write the tables and the weak labels; the cache is complete with the last write."""
    record = provenance.record()
    set_root_attributes(cache_path, {"complete": False})
    write_tables(cache_path, rows, num_channels=plan.num_channels)
    weak_labels(open_cache(cache_path, unfinished=True))
    set_root_attributes(cache_path, {"complete": True, "provenance": record})
    shutil.rmtree(wip_path(cache_path), ignore_errors=True)


def _file_digest(case: CaseSource) -> str:
    """SHA-256 (hex) over the bytes of the case's source files, in order."""
    total = hashlib.sha256()
    for path in case.paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _nothing_done(input_path: Path, failed: tuple[CaseRow, ...]) -> SuperCLError:
    return SuperCLError(
        "No case could be computed; nothing was written.",
        where=input_path,
        expected="at least one readable volume",
        found="; ".join(f"{row.id}: {row.reason}" for row in failed[:3])
        + (f"; and {len(failed) - 3} more" if len(failed) > 3 else ""),
        next_step="Mend the files named above and run again.",
    )
