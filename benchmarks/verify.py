"""`supercl verify` beside merely reading the same files: GB/s of one core and of all.

    python -m benchmarks.verify --data DIR [--quick]        (part of make bench)

DIR is a data set in the layout of the Medical Segmentation Decathlon. Two caches are made of it in a temporary folder:
of the data set as it is, where a case has a few megabytes and metadata counts, and of its slices enlarged to 512 x 512
as for `benchmarks.preprocess`. Every file is read into one buffer of a megabyte, and verified with one process and
with one for every core; these take turns, and medians are printed. Warm means that all lies in memory; cold, that the
system was told to forget the files before (what lies below it, such as a host of virtual machines, may not).
The last line of the output is one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

if not __package__:  # run by its path: beside it lies a script that has the name of a package
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.machine import as_text, conditions
from supercl_core.checks.verification import verify
from supercl_core.errors import SuperCLError


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="A data set in MSD layout.")
@click.option("--quick", is_flag=True, help="Fewer cases and rounds.")
def main(data: Path, quick: bool) -> None:
    """Print all figures for one data set."""
    # Not at the top, as every process that `verify` starts imports this file again; `supercl` has little to import.
    from benchmarks.preprocess import make_data

    run_with = conditions(data, "numpy", "google-crc32c", quick=quick)
    print(as_text(run_with))
    with tempfile.TemporaryDirectory() as folder:
        try:
            make_data(data, Path(folder), num_cases=4 if quick else 64)
            figures = {
                name: measure(
                    name, _cache(volumes, Path(folder) / f"{name}.zarr"), num_rounds=3 if quick else 9
                )
                for name, volumes in (("native", data), ("enlarged", Path(folder) / "volumes"))
            }
        except SuperCLError as error:
            sys.exit(f"error: {error.message()}")
    print(json.dumps({**run_with, **figures}))


def _cache(volumes: Path, path: Path) -> Path:
    from preprocess.pipeline import PreprocessConfig
    from preprocess.runner import run

    # Whatever the spacing: data sets whose files state it wrongly are as good for this as others.
    return run(volumes, path, config=PreprocessConfig(spacing="unknown")).cache_path


def measure(name: str, cache_path: Path, *, num_rounds: int) -> dict[str, Any]:
    """GB/s of reading and of verifying one cache, warm and cold."""
    files = [file for file in cache_path.rglob("*") if file.is_file()]
    num_bytes = sum(file.stat().st_size for file in files)
    turns: dict[str, Callable[[], None]] = {
        "reading": lambda: read_files(files),
        "one_process": lambda: check(cache_path, 1),
        "all_cores": lambda: check(cache_path, os.cpu_count() or 1),
    }
    os.sync()  # what is not on the disk yet cannot be forgotten
    figures: dict[str, Any] = {
        "num_cases": len(list((cache_path / "cases").iterdir())) - 1,
        "num_bytes": num_bytes,
    }
    for temperature in ("warm", "cold"):
        speeds: dict[str, list[float]] = {turn: [] for turn in turns}
        if temperature == "warm":
            read_files(files)
        for _ in range(num_rounds if temperature == "warm" else 3):
            for turn, work in turns.items():
                if temperature == "cold":
                    forget(files)
                start = time.perf_counter()
                work()
                speeds[turn].append(num_bytes / 1e9 / (time.perf_counter() - start))
        for turn, found in speeds.items():
            figures[f"{turn}_{temperature}_gb_per_s"] = statistics.median(found)
            print(
                f"{name:9} {turn:12} {temperature}  {statistics.median(found):6.2f} GB/s   "
                f"(median of {len(found)}, {min(found):.2f} to {max(found):.2f}; {num_bytes / 1e9:.2f} GB)"
            )
    return figures


def check(cache_path: Path, num_workers: int) -> None:
    """Verify a cache that must be whole."""
    found = verify(cache_path, num_workers=num_workers, on_case=lambda: None)
    if found.damages:
        raise AssertionError(found.damages[0])


def read_files(files: list[Path]) -> None:
    """Read every file into the same buffer, and do nothing with it."""
    buffer = memoryview(bytearray(1 << 20))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def forget(files: list[Path]) -> None:
    """Have the system drop its copies of the files, where it can be told to."""
    for path in files if hasattr(os, "posix_fadvise") else ():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
