"""What a case costs beside its computation, and whether that grows with the number of cases.

    python -m benchmarks.scaling --data DIR [--quick]

Writes tiny cases cut from a volume of DIR (a folder in MSD layout). On one core, which client, scheduler and worker
share, a whole run with one worker is compared with a plain loop over the same cases in this process: the difference is
the overhead, with everything in it (start of the cluster, discovery, planning, scheduling, tables, weak labels).
Then whole runs on all cores, for several numbers of cases and workers. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import SimpleITK as sitk

if not __package__:  # run by its path: beside it lies a script that has the name of a package
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.machine import as_text, conditions
from preprocess import run
from preprocess.cluster import software
from preprocess.pipeline import PreprocessConfig
from preprocess.worker import compute_case
from supercl_core.cache.writer import create_cache
from supercl_core.formats.case_files import read_image
from supercl_core.sources import CaseSource, DataSource, discover

SHAPE_ZYX = (2, 24, 24)
NUM_CASES = (100, 1_000, 10_000)
NUM_CASES_QUICK = (30, 300)


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="A data set in MSD layout.")
@click.option("--quick", is_flag=True, help=f"{NUM_CASES_QUICK[-1]} cases at most.")
def main(data: Path, quick: bool) -> None:
    """Print the table for people, then the figures as JSON."""
    run_with = conditions(data, "numpy", "numba", "zarr", "distributed", "SimpleITK", quick=quick)
    print(as_text(run_with))
    counts = NUM_CASES_QUICK if quick else NUM_CASES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in counts:
            write_cases(folder / str(count), discover(data), count)
        cores = os.sched_getaffinity(0)
        run(folder / str(counts[0]), folder / "warm.zarr", num_workers=1)  # compiles the kernels
        os.sched_setaffinity(0, {min(cores)})
        loop_s = time_loop(folder / str(counts[-1]), folder / "loop.zarr")
        one_core_s = time_run(folder / str(counts[-1]), folder / "core.zarr", 1)
        os.sched_setaffinity(0, cores)
        print(f"{'cases':>8} {'workers':>8} {'seconds':>9} {'ms a case':>10}")
        rows = []
        for count in counts:
            for workers in sorted({1, min(2, len(cores))}):
                seconds = time_run(folder / str(count), folder / f"{count}-{workers}.zarr", workers)
                rows.append({"cases": count, "slices": count * 2, "workers": workers, "seconds": seconds})
                print(f"{count:8} {workers:8} {seconds:9.2f} {seconds / count * 1e3:10.2f}", flush=True)
    count = counts[-1]
    overhead_s = (one_core_s - loop_s) / count
    print(
        f"one core, {count} cases: run {one_core_s:.1f} s, loop {loop_s:.1f} s; {overhead_s * 1e3:.2f} ms a case"
    )
    figures: dict[str, Any] = {
        "overhead_seconds_per_case": overhead_s,
        "overhead_covers": "whole run minus plain loop, on one core: start, planning, scheduling, tables, weak labels",
        "run_seconds_per_case": one_core_s / count,
        "loop_seconds_per_case": loop_s / count,
        "num_cases": count,
        "shape_zyx": SHAPE_ZYX,
        "runs": rows,
        **run_with,
    }
    print(json.dumps(figures))


def write_cases(path: Path, source: DataSource, count: int) -> None:
    """Write `count` cases of SHAPE_ZYX, each another corner of the first readable volume of `source`."""
    volume = read_image(source.cases[0]).array_CZYX[0]
    padded = np.pad(
        volume, [(0, max(0, size - have)) for size, have in zip(SHAPE_ZYX, volume.shape, strict=True)]
    )
    room = np.subtract(padded.shape, SHAPE_ZYX) + 1
    generator = np.random.default_rng(0)
    (path / "imagesTr").mkdir(parents=True)
    names = [f"case_{index:05}.nii.gz" for index in range(count)]
    for name in names:
        z, y, x = generator.integers(room)
        depth, height, width = SHAPE_ZYX
        corner = np.ascontiguousarray(padded[z : z + depth, y : y + height, x : x + width])
        sitk.WriteImage(sitk.GetImageFromArray(corner), str(path / "imagesTr" / name), useCompression=True)
    declared = {
        "name": "scaling",
        "modality": {"0": "MRI"},
        "labels": {"0": "background"},
        "training": [],
        "test": [f"./imagesTr/{name}" for name in names],
    }
    (path / "dataset.json").write_text(json.dumps(declared))


def time_run(source: Path, cache: Path, num_workers: int) -> float:
    """Seconds of a whole run of preprocessing."""
    start = time.perf_counter()
    run(source, cache, num_workers=num_workers)
    return time.perf_counter() - start


def time_loop(source: Path, cache: Path) -> float:
    """Seconds of reading, computing and committing every case in this process, one after the other."""
    create_cache(cache, {"channel_names": ["MRI"], "class_names": ["background"]})
    cases: tuple[CaseSource, ...] = discover(source).cases
    start = time.perf_counter()
    for case in cases:
        row = compute_case(
            case,
            cache,
            config=PreprocessConfig(),
            num_channels=1,
            num_classes=1,
            config_digest="",
            token="",
            versions=software(),
        )
        assert row.state == "done", row.reason
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
