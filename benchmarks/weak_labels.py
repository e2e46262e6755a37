"""Weak labels at the size of real data sets: exact and approximate neighbours, connected components, a training step.

    python -m benchmarks.weak_labels --data DIR [--quick]        (part of make bench)

DIR is a data set in the layout of the Medical Segmentation Decathlon; a cache of it, in a temporary folder, gives
the real descriptors. All other rows are made up, as there is no free data set of a million slices: smooth walks, one
for each case of 20 to 120 slices, around the common course of one of eight anatomies, in 32 dimensions that are mixed
into d, with noise on top. The nearest row is one of the same case, the nearest of another case much farther away.

Every part runs in a fresh process that is bound to one core, or to two for the approximate index. Its peak is all the
memory that the process ever held: Python, the libraries, the rows, mapped or not, and the result. Times leave out
making the rows and compiling. For 10,000,000 rows the time of the million is multiplied by 10 ** e, where e is the
slope of the CPU times for 250,000, 500,000 and 1,000,000 rows in logarithms (least squares). --quick leaves these
rows out. The last line of the output is one JSON object.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

if not __package__:  # run by its path: beside it lies a script that has the name of a package
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.machine import as_text, conditions, peak_bytes
from supercl_core.errors import SuperCLError

NUM_ANATOMIES: Final = 8
NUM_DIMENSIONS: Final = 32
RECALL_SAMPLE: Final = 2000
GROWTH: Final = (250_000, 500_000, 1_000_000)

Figures = dict[str, Any]


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="A data set in MSD layout.")
@click.option("--quick", is_flag=True, help="Without the million rows.")
def main(data: Path, quick: bool) -> None:
    """Print all figures."""
    packages = ("numpy", "numba", "faiss-cpu")
    run_with = conditions(data, *packages, quick=quick)
    print(as_text(run_with))
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        parts: list[tuple[int, Callable[..., Figures], tuple[object, ...]]] = [
            (1, exact, ()),
            (1, union_find, ()),
            (2, approximate_on_real_slices, (data, folder)),
            (1, pairs_in_training, ()),
        ]
        if not quick:
            parts.append((2, write_rows, (GROWTH[-1], folder)))
            parts += [(2, approximate, (num_rows, folder)) for num_rows in GROWTH]
        try:
            for num_cores, part, arguments in parts:
                figures |= in_fresh_process(num_cores, part, *arguments)
        except SuperCLError as error:
            sys.exit(f"error: {error.message()}")
    if not quick:
        figures |= projection(
            [figures.pop(f"approximate_{num_rows}_cpu_seconds") for num_rows in GROWTH],
            figures["approximate_1m_seconds"],
        )
    print(json.dumps({**run_with, **figures}))


def in_fresh_process(num_cores: int, part: Callable[..., Figures], *arguments: object) -> Figures:
    """Run one part by itself on the first cores of this machine, and show what it found."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_bind, initargs=(num_cores,)) as executor:
        figures = executor.submit(part, *arguments).result()
    for name, value in figures.items():
        print(f"{name:40} {value:,.4g}", flush=True)
    return figures


def _bind(num_cores: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(num_cores)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])


# ---------------------------------------------------------------- the offline stage


def exact() -> Figures:
    """Exact neighbours of 40,000 rows with d = 1024."""
    from preprocess.neighbours import nearest_neighbours

    rows, _ = walks(40_000, 1024)
    nearest_neighbours(rows[:1000])
    cpu_seconds = -time.process_time()
    seconds = _seconds(lambda: nearest_neighbours(rows))
    return {
        "exact_40k_seconds": seconds,
        "exact_40k_cpu_seconds": cpu_seconds + time.process_time(),
        "exact_40k_peak_bytes": peak_bytes(),
    }


def union_find() -> Figures:
    """Components of 10,000,000 nodes, each linked to another: the slower of random links and of a chain."""
    from preprocess.kernels.union_find import connected_components

    nodes = np.arange(10_000_000, dtype=np.int32)
    connected_components(2, nodes[:2], nodes[:2])
    random = np.random.default_rng(0).integers(0, len(nodes), len(nodes), dtype=np.int32)
    turns = {"random": random, "chain": np.minimum(nodes + 1, len(nodes) - 1)}
    seconds = {
        name: statistics.median(
            _seconds(lambda ends=ends: connected_components(len(nodes), nodes, ends)) for _ in range(3)
        )
        for name, ends in turns.items()
    }
    return {
        **{f"union_find_10m_{name}_seconds": value for name, value in seconds.items()},
        "union_find_10m_seconds": max(seconds.values()),
    }


def pairs_in_training() -> Figures:
    """What cached and online pairs cost in a step of pre-training."""
    from benchmarks.igcp_cost import cached_pairs_share

    found = cached_pairs_share(num_rounds=3)
    return {key: found[key] for key in ("cached_pairs_share_of_step", "online_pairs_share_of_step")}


def approximate_on_real_slices(data: Path, folder: str) -> Figures:
    """Recall for the intensity descriptors of a real data set."""
    from preprocess.approximate import approximate_neighbours, measured_recall
    from preprocess.ccl import INTENSITY, descriptor_blocks, normalise
    from preprocess.pipeline import PreprocessConfig
    from preprocess.runner import run
    from supercl_core.cache.reader import open_cache

    # Whatever the spacing: data sets whose files state it wrongly are as good for this as others.
    result = run(data, Path(folder) / "real.zarr", config=PreprocessConfig(spacing="unknown"))
    cache = open_cache(result.cache_path)
    rows = normalise(np.concatenate(list(descriptor_blocks(cache, INTENSITY))))
    figures: Figures = {"real_slices": len(rows)}
    for name, groups in (("", None), ("_other_cases", cache.slice_case)):
        found = approximate_neighbours(rows, groups)
        figures[f"approximate_real{name}_recall"] = measured_recall(rows, found, groups, sample=RECALL_SAMPLE)
    return figures


def approximate(num_rows: int, folder: str) -> Figures:
    """Time, recall and peak of the approximate index for the first rows of a file."""
    from preprocess.approximate import approximate_neighbours, measured_recall

    rows = np.load(Path(folder) / "rows.npy", mmap_mode="r")[:num_rows]
    seconds, cpu_seconds = -time.perf_counter(), -time.process_time()
    found = approximate_neighbours(rows)
    seconds, cpu_seconds = seconds + time.perf_counter(), cpu_seconds + time.process_time()
    figures: Figures = {f"approximate_{num_rows}_cpu_seconds": cpu_seconds}
    if num_rows == GROWTH[-1]:
        figures["approximate_1m_seconds"] = seconds
        figures["approximate_1m_peak_bytes"] = peak_bytes()
        figures["approximate_1m_recall"] = measured_recall(rows, found, sample=RECALL_SAMPLE)
    return figures


def projection(cpu_seconds: list[float], seconds: float) -> Figures:
    """The exponent of growth with the number of rows, and the time for 10,000,000 rows from that of a million."""
    exponent = float(np.polyfit(np.log(GROWTH), np.log(cpu_seconds), 1)[0])
    return {"approximate_growth_exponent": exponent, "projected_10m_seconds": seconds * 10**exponent}


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---------------------------------------------------------------- rows


def write_rows(num_rows: int, folder: str) -> Figures:
    """Write `walks` with d = 256 to a file that parts map."""
    rows, case_of_row = walks(num_rows, 256)
    np.save(Path(folder) / "rows.npy", rows)
    return {"approximate_1m_cases": int(case_of_row[-1]) + 1}


def walks(num_rows: int, num_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Made-up descriptors as told at the top: float32 (num_rows, num_columns) of length 1, and the case of each row."""
    generator = np.random.default_rng(0)
    waves = np.arange(1, 7)
    amplitudes = generator.normal(size=(NUM_ANATOMIES, 6, NUM_DIMENSIONS)) / waves[:, None]
    phases = generator.normal(size=(NUM_ANATOMIES, 6, NUM_DIMENSIONS)) * 3
    mixing = generator.normal(size=(NUM_ANATOMIES, NUM_DIMENSIONS, num_columns)).astype(np.float32)
    offsets = generator.normal(size=(NUM_ANATOMIES, num_columns)).astype(np.float32) * 3
    rows = np.empty((num_rows, num_columns), np.float32)
    case_of_row = np.empty(num_rows, np.int32)
    start = case = 0
    while start < num_rows:
        size = min(int(generator.integers(20, 121)), num_rows - start)
        anatomy = case % NUM_ANATOMIES
        positions = np.linspace(generator.uniform(0, 0.1), generator.uniform(0.9, 1), size)
        angles = np.pi * positions[:, None, None] * waves[:, None] + phases[anatomy]
        course = (amplitudes[anatomy] * np.sin(angles)).sum(axis=1)
        course += 0.5 * generator.normal(size=NUM_DIMENSIONS)
        course += 0.08 * generator.normal(size=(size, NUM_DIMENSIONS)).cumsum(axis=0)
        values = offsets[anatomy] + course.astype(np.float32) @ mixing[anatomy]
        values += 0.3 * generator.standard_normal((size, num_columns), dtype=np.float32)
        values -= values.mean(axis=1, keepdims=True)
        rows[start : start + size] = values / np.linalg.norm(values, axis=1, keepdims=True)
        case_of_row[start : start + size] = case
        start, case = start + size, case + 1
    return rows, case_of_row


if __name__ == "__main__":
    main()
