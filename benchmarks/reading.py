"""How fast slices come out of a cache, whether the map gives Zarr's bytes, and how fast the command line starts.

    python -m benchmarks.reading [CACHE]        (make bench CACHE=...)

Without CACHE a small phantom is preprocessed first. Every pair of figures is taken interleaved in one run.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

if not __package__:  # run by its path: beside it lies a script that has the name of a package
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.machine import as_text, machine
from supercl_core.cache_reader import Cache, open_cache
from supercl_core.schema import CASE_ARRAYS

BATCH = 16
ROUNDS = 15


def main() -> None:
    """Print all figures for one cache."""
    print(as_text(machine("numpy", "zarr")))
    with tempfile.TemporaryDirectory() as folder:
        cache = open_cache(Path(sys.argv[1]) if len(sys.argv) > 1 else _phantom_cache(Path(folder)))
        shapes = sorted({row.shape for row in cache.done})
        print(
            f"cache {cache.name}: {cache.num_slices} slices, (c, z, y, x) {shapes[0]} to {shapes[-1]}, warm"
        )
        compare_bytes(cache)
        compare_reading(cache)
    start_up()


def compare_bytes(cache: Cache) -> None:
    """Compare every mapped array of every case with what plain Zarr reads."""
    root: Any = zarr.open_group(cache.path, mode="r")
    num_arrays = num_equal = 0
    for row in cache.done:
        for spec in CASE_ARRAYS:
            if spec.name == "ground_truth" and not row.has_ground_truth:
                continue
            stored = root[spec.path.format(case=row.id)][...]
            mapped = cache.mapped(row, spec.name)
            stored = stored.swapaxes(0, 1) if spec.axes == "czyx" else stored
            num_arrays += 1
            num_equal += stored.dtype == mapped.dtype and stored.tobytes() == mapped.tobytes()
    print(f"memory map equals zarr: {num_equal} of {num_arrays} arrays")


def compare_reading(cache: Cache) -> None:
    """Random batches of image and superpixels: memory map, memcpy of the same bytes, zarr-python."""
    generator = np.random.default_rng(0)
    root: Any = zarr.open_group(cache.path, mode="r")
    cases = {row.id: cache.case(row.id) for row in cache.done}
    arrays = {
        case_id: (root[f"cases/{case_id}/image"], root[f"cases/{case_id}/labels/superpixels/0"])
        for case_id in cases
    }
    ids = [row.id for row in cache.rows]
    copies: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def from_map(index: int) -> None:
        case, z = cases[ids[cache.slice_case[index]]], cache.slice_z[index]
        copies[index] = case.image_ZCYX[z].copy(), case.superpixels_ZYX[z].copy()

    def from_memory(index: int) -> None:
        for array in copies[index]:
            array.copy()

    def from_zarr(index: int) -> None:
        (image, superpixels), z = arrays[ids[cache.slice_case[index]]], cache.slice_z[index]
        _ = image[:, z], superpixels[z]

    times: dict[str, list[float]] = {"memory map": [], "memcpy": [], "zarr-python": []}
    for _ in range(ROUNDS):
        batch = generator.integers(cache.num_slices, size=BATCH)
        for name, read in zip(times, (from_map, from_memory, from_zarr), strict=True):
            times[name].append(_seconds(read, batch))
    for name, values in times.items():
        print(
            f"{name:12} {BATCH / statistics.median(values):10,.0f} slices/s (median of {ROUNDS} batches of {BATCH})"
        )


def start_up() -> None:
    """Time `supercl --help` in a process of its own."""
    command = [str(Path(sys.executable).with_name("supercl")), "--help"]
    times = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    print(f"supercl --help: {statistics.median(times):.3f} s (median of 7 processes)")


def _seconds(read: Callable[[int], None], batch: np.ndarray) -> float:
    start = time.perf_counter()
    for index in batch:
        read(int(index))
    return time.perf_counter() - start


def _phantom_cache(folder: Path) -> Path:
    from preprocess import run
    from preprocess.phantom import write_phantom

    write_phantom(folder / "phantom", num_cases=8)
    return run(folder / "phantom", folder / "cache.zarr", num_workers=1).cache_path


if __name__ == "__main__":
    main()
