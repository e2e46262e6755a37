"""Packing and unpacking a cache: how small it gets, and MB/s of the cache both ways.

    python -m benchmarks.forms --data DIR [--data DIR] [--quick]        (part of make bench)

Each DIR is a data set in the layout of the Medical Segmentation Decathlon, of which a cache is made in a temporary
folder first. Packing and unpacking, as a folder and as a zip file, with one thread and with one for every core, take
turns with copying the files of the cache; medians are printed. All lies in memory, as far as there is room; the time
until the disk has it is counted, as commands wait for that. What comes back must equal the cache in every byte.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
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

from benchmarks.machine import as_text, machine
from supercl_core.archive.forms import Conversion, pack, unpack
from supercl_core.errors import SuperCLError


@click.command(help=__doc__)
@click.option("--data", "folders", required=True, multiple=True, type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Fewer rounds.")
def main(folders: tuple[Path, ...], quick: bool) -> None:
    """Print all figures."""
    run_with = {**machine("numpy", "numcodecs", "google-crc32c"), "quick": quick}
    print(as_text(run_with))
    figures = {}
    for data in map(Path.resolve, folders):
        with tempfile.TemporaryDirectory() as folder:
            try:
                cache_path = _cache(data, Path(folder) / "cache.zarr")
                figures[data.name] = measure(data.name, cache_path, num_rounds=1 if quick else 5)
            except SuperCLError as error:
                sys.exit(f"error: {error.message()}")
    print(json.dumps({**run_with, "caches": figures}))


def measure(name: str, cache_path: Path, *, num_rounds: int) -> dict[str, Any]:
    """Size of the archive of one cache, and MB/s of the cache's arrays both ways and of copying it."""
    place = cache_path.parent
    archive, zip_path, back = place / "archive", place / "archive.zip", place / "back.zarr"
    cores = os.cpu_count() or 1
    turns: dict[str, Callable[[], Conversion | None]] = {
        "copying": lambda: _copy(cache_path, back),
        "packing, one thread": lambda: pack(cache_path, archive, num_workers=1),
        "unpacking, one thread": lambda: unpack(archive, back, num_workers=1),
        "packing, all cores": lambda: pack(cache_path, archive, num_workers=cores),
        "unpacking, all cores": lambda: unpack(archive, back, num_workers=cores),
        "packing to a zip file, all cores": lambda: pack(cache_path, zip_path, num_workers=cores),
        "unpacking a zip file, all cores": lambda: unpack(zip_path, back, num_workers=cores),
    }
    seconds: dict[str, list[float]] = {turn: [] for turn in turns}
    done: Conversion | None = None
    for _ in range(num_rounds):
        for turn, work in turns.items():
            _remove(*((archive, zip_path) if turn.startswith("packing") else (back,)))
            os.sync()
            start = time.perf_counter()
            done = work() or done
            seconds[turn].append(time.perf_counter() - start)
            if turn.startswith("unpacking"):
                _expect_equal(cache_path, back)
    assert done is not None
    print(
        f"{name}: {done.num_cases} cases, {done.cache_bytes / 1e6:.1f} MB, archive "
        f"{done.archive_bytes / 1e6:.1f} MB ({done.archive_bytes / done.cache_bytes:.1%})"
    )
    speeds = {turn: done.cache_bytes / 1e6 / statistics.median(values) for turn, values in seconds.items()}
    for turn, speed in speeds.items():
        print(f"  {turn:34} {speed:8.1f} MB/s   (median of {num_rounds})")
    return {
        "num_cases": done.num_cases,
        "cache_bytes": done.cache_bytes,
        "archive_bytes": done.archive_bytes,
        "mb_per_s": speeds,
    }


def _cache(data: Path, path: Path) -> Path:
    from preprocess.pipeline import PreprocessConfig
    from preprocess.runner import run

    # Whatever the spacing: data sets whose files state it wrongly are as good for this as others.
    return run(data, path, config=PreprocessConfig(spacing="unknown")).cache_path


def _copy(cache_path: Path, back: Path) -> None:
    shutil.copytree(cache_path, back)
    os.sync()


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _expect_equal(one: Path, other: Path) -> None:
    files = [[file for file in sorted(path.rglob("*")) if file.is_file()] for path in (one, other)]
    names = [
        [file.relative_to(path) for file in found] for path, found in zip((one, other), files, strict=True)
    ]
    if names[0] != names[1] or any(a.read_bytes() != b.read_bytes() for a, b in zip(*files, strict=True)):
        raise AssertionError("what comes back differs from the cache")


if __name__ == "__main__":
    main()
