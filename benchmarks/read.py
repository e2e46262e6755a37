"""Batches of whole slices from a cache: the memory map beside memcpy, zarr-python, tensorstore and `.npy` files.

    python -m benchmarks.read [--cache CACHE] [--quick]        (part of make bench)

A batch is 16 random slices, image and superpixels at full resolution, and ends in the memory that training reuses, all
on one core. The map is read as training does, by `SliceDataset.gather`; memcpy takes the same bytes from arrays in
memory, one a slice; zarr-python reads one slice at a time, tensorstore all of a batch at once, `np.load` two files a
slice. The map takes turns of four batches with each of them in one process, and medians are compared. Warm means that
all lies in memory; cold, that the system was told to forget the files before each batch (what lies below it, such as a
host of virtual machines, may not).

Without CACHE, one of 1,200 slices of 512 x 512 (int16, uint8) is written into a temporary folder; of a cache, the cases
of the commonest slice size and dtypes are read. It must fit into memory three times. Printed as well: whether the map
gives the bytes that Zarr gives, the time to open a cache of 10,000 cases for training, and that of `supercl --help`.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, cast

import click
import numpy as np
import tensorstore
import zarr

if not __package__:  # run by its path: beside it lies a script that has the name of a package
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.machine import as_text, conditions
from benchmarks.verify import forget
from supercl_core.cache.cases import CaseRow
from supercl_core.cache.reader import open_cache
from supercl_core.cache.schema import ASP_GRID
from supercl_core.cache.writer import create_cache, set_root_attributes, write_case, write_tables
from supercl_core.errors import SuperCLError
from train.data import SliceDataset, StoredBatch
from train.loading import NUM_THREADS

BATCH: Final = 16
MANY_CASES: Final = 10_000
SIDE: Final = 512
READ: Final = {"image": "image", "superpixels": "labels/superpixels/0"}
"""The arrays of a batch, and their paths below a case."""

Figures = dict[str, Any]
Read = Callable[[np.ndarray, StoredBatch], None]
"""Fills a buffer with the slices at some places in a data set."""
Slice = tuple[np.ndarray, np.ndarray]
"""An image and its superpixels."""


@click.command(help=__doc__)
@click.option("--cache", "path", type=click.Path(path_type=Path), help="A cache instead of a made one.")
@click.option("--quick", is_flag=True, help="Fewer slices and rounds.")
def main(path: Path | None, quick: bool) -> None:
    """Print all figures."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    run_with = conditions(path or Path("made"), "numpy", "zarr", "tensorstore", quick=quick)
    print(as_text(run_with))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            path = path or made_cache(folder / "made.zarr", *((4, 16) if quick else (20, 60)))
            figures = {
                **compare_bytes(path),
                **compare_reading(path, folder, quick=quick),
                "open_10000_cases_s": seconds_to_open(many_cases(folder / "many.zarr")),
                "help_s": seconds_to_help(),
            }
        except SuperCLError as error:
            sys.exit(f"error: {error.message()}")
    for key, value in figures.items():
        print(f"{key:28} {value:,.4g}")
    print(json.dumps({**run_with, **figures}))


def compare_bytes(path: Path) -> Figures:
    """How many of the mapped arrays of all cases equal what plain Zarr reads."""
    cache, root = open_cache(path), cast(Any, zarr.open_group(path, mode="r"))
    equal = []
    for row in cache.done:
        for spec in row.arrays():
            stored = root[spec.path.format(case=row.id)][...]
            stored = stored.swapaxes(0, 1) if spec.axes == "czyx" else stored
            mapped = cache.mapped(row, spec.name)
            equal.append(stored.dtype == mapped.dtype and stored.tobytes() == mapped.tobytes())
    return {"arrays": len(equal), "arrays_equal_zarr": sum(equal)}


# ---------------------------------------------------------------- batches


def compare_reading(path: Path, folder: Path, *, quick: bool) -> Figures:
    """Slices per second of the map, and its time beside those of the other ways."""
    dataset = whole_slices(path)
    buffers = [dataset.buffer(BATCH) for _ in range(NUM_THREADS)]
    figures: Figures = {"num_slices": len(dataset), "slice_bytes": _slice_bytes(buffers[0])}
    from_map, others = ways_to_read(dataset, folder)
    for name, other in others.items():
        mapped, others_s = take_turns([from_map, other], len(dataset), buffers, num_rounds=5 if quick else 40)
        if name == "memcpy":
            figures["mmap_slices_per_second"] = BATCH / mapped
            figures["mmap_vs_memcpy"] = mapped / others_s
        else:
            figures[f"mmap_vs_{name}"] = others_s / mapped
    del dataset, from_map, other, others
    mapped, others_s = read_cold(path, folder, buffers[0], num_rounds=5 if quick else 40)
    return {**figures, "mmap_cold_slices_per_second": BATCH / mapped, "mmap_cold_vs_npy": others_s / mapped}


def take_turns(
    ways: list[Read], num_slices: int, buffers: list[StoredBatch], *, num_rounds: int
) -> list[float]:
    """Median seconds for a batch by each way, when all lies in memory."""
    random = np.random.default_rng(0)
    for start in range(0, num_slices, BATCH):
        for read in ways:
            read(np.arange(start, start + BATCH) % num_slices, buffers[0])
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(num_rounds):
        for way in random.permutation(len(ways)):
            for buffer in buffers:
                places = random.integers(num_slices, size=BATCH)
                seconds[way].append(_seconds(functools.partial(ways[way], places, buffer)))
    return [statistics.median(found) for found in seconds]


def ways_to_read(dataset: SliceDataset, folder: Path) -> tuple[Read, dict[str, Read]]:
    """From the map, and all other ways; writes the `.npy` files into `folder`."""
    cache = dataset.cache
    cases = [cache.rows[index].id for index in cache.slice_case[dataset.slices]]
    slices_z = cache.slice_z[dataset.slices].tolist()
    copies = {
        name: [
            stored.copy() for case in dataset.case_ids for stored in cache.mapped(cache.case(case).row, name)
        ]
        for name in READ
    }
    root = cast(Any, zarr.open_group(cache.path, mode="r"))
    arrays = {case: [root[f"cases/{case}/{below}"] for below in READ.values()] for case in dataset.case_ids}
    stores = {case: [_tensorstore(array) for array in arrays[case]] for case in dataset.case_ids}
    for name, values in copies.items():
        for place, stored in enumerate(values):
            np.save(folder / f"{place}_{name}.npy", stored)

    def from_map(places: np.ndarray, buffer: StoredBatch) -> None:
        dataset.gather(dataset.slices[places], out=buffer)

    def from_memory(place: int) -> Slice:
        return copies["image"][place], copies["superpixels"][place]

    def from_zarr(place: int) -> Slice:
        (image, superpixels), z = arrays[cases[place]], slices_z[place]
        return image[:, z], superpixels[z]

    def from_tensorstore(places: np.ndarray, buffer: StoredBatch) -> None:
        reads = []
        for place in places:
            (image, superpixels), z = stores[cases[place]], slices_z[place]
            reads.append((image[:, z].read(), superpixels[z].read()))
        copy_slices(((image.result(), superpixels.result()) for image, superpixels in reads), buffer)

    return from_map, {
        "memcpy": lambda places, buffer: copy_slices(map(from_memory, places), buffer),
        "zarr": lambda places, buffer: copy_slices(map(from_zarr, places), buffer),
        "tensorstore": from_tensorstore,
        "npy": functools.partial(from_npy, folder),
    }


def from_npy(folder: Path, places: np.ndarray, buffer: StoredBatch) -> None:
    """Two files a slice."""
    copy_slices(((np.load(folder / f"{place}_{name}.npy") for name in READ) for place in places), buffer)


def copy_slices(slices: Iterable[Iterable[np.ndarray]], buffer: StoredBatch) -> None:
    """Copy images and superpixels into a batch."""
    images, superpixels = buffer.image_BCYX.numpy(), buffer.superpixels_Bhw.numpy()
    for item, (image, map_YX) in enumerate(slices):
        images[item] = image
        superpixels[item] = map_YX


def read_cold(path: Path, folder: Path, buffer: StoredBatch, *, num_rounds: int) -> list[float]:
    """Median seconds for a batch from the map and from `.npy` files that are not in memory."""
    random = np.random.default_rng(1)
    os.sync()  # what is not on the disk yet cannot be forgotten
    seconds: dict[str, list[float]] = {"mmap": [], "npy": []}
    for number in range(num_rounds):
        gc.collect()  # the maps of the last round: what is mapped is not forgotten
        dataset = whole_slices(path)
        places = random.integers(len(dataset), size=BATCH)
        shards = {
            dataset.cache.shard(dataset.cache.rows[index], name).file
            for index in dataset.cache.slice_case[dataset.slices[places]]
            for name in READ
        }
        forget([*shards, *(folder / f"{place}_{name}.npy" for place in places for name in READ)])
        turns: dict[str, Callable[[], object]] = {
            "mmap": functools.partial(dataset.gather, dataset.slices[places], out=buffer),
            "npy": functools.partial(from_npy, folder, places, buffer),
        }
        for name in sorted(turns, reverse=bool(number % 2)):
            seconds[name].append(_seconds(turns[name]))
    return [statistics.median(values) for values in seconds.values()]


def whole_slices(path: Path) -> SliceDataset:
    """The slices of the commonest size and dtypes of a cache, with superpixels at full resolution."""
    cache = open_cache(path)
    kinds = {row.id: (row.shape[2:], row.image_dtype, row.superpixels_dtype) for row in cache.done}
    [(commonest, _)] = Counter(kinds.values()).most_common(1)
    ids = [case for case, kind in kinds.items() if kind == commonest]
    return SliceDataset(cache, ids, patch_size=commonest[0], multiple_of=1, superpixel_stride=1)


def _tensorstore(array: Any) -> Any:
    path = str(array.store_path).removeprefix("file://")
    return tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result()


# ---------------------------------------------------------------- caches


def made_cache(path: Path, num_cases: int, num_slices: int) -> Path:
    """A cache of noise: the content does not matter to reading."""
    random = np.random.default_rng(0)
    _create(path)
    rows = []
    for number in range(num_cases):
        arrays = {
            "image": random.integers(-1000, 1000, (1, num_slices, SIDE, SIDE), np.int16),
            "superpixels": random.integers(0, 100, (num_slices, SIDE, SIDE), np.uint8),
            "asp": np.zeros((num_slices, ASP_GRID, ASP_GRID), np.float16),
        }
        attributes = {
            "key": "",
            "provenance": {},
            "geometry": {},
            "orientation": "unknown",
            "largest_error": 0.0,
            "num_clipped": 0,
        }
        rows.append(write_case(path, _row(number, num_slices), arrays, attributes=attributes))
    return _complete(path, rows)


def many_cases(path: Path) -> Path:
    """The tables of a cache of 10,000 cases of 20 to 200 slices: opening it looks at nothing else."""
    random = np.random.default_rng(0)
    _create(path)
    return _complete(path, [_row(number, int(random.integers(20, 201))) for number in range(MANY_CASES)])


def _create(path: Path) -> None:
    names = {"name": "made", "channel_names": ["CT"], "class_names": []}
    settings = {"config": {}, "kernels": "", "config_digest": "", "default_weak_labels": "", "provenance": {}}
    create_cache(path, {**names, **settings})


def _row(number: int, num_slices: int) -> CaseRow:
    return CaseRow(
        id=f"case_{number:05d}",
        digest=hashlib.sha256(b"%d" % number).hexdigest(),
        content_digest=hashlib.sha256(b"%d" % number).hexdigest(),
        source=f"imagesTr/case_{number:05d}.nii.gz",
        shape=(1, num_slices, SIDE, SIDE),
        image_dtype="int16",
        superpixels_dtype="uint8",
        num_superpixels=100,
        spacing_mm=(1.0, 1.0, 1.0),
        statistics=((-1000.0, -990.0, 989.0, 999.0, 0.0, 577.0),),
    )


def _complete(path: Path, rows: list[CaseRow]) -> Path:
    write_tables(path, rows, num_channels=1)
    set_root_attributes(path, {"complete": True})
    return path


# ---------------------------------------------------------------- beginnings


def seconds_to_open(path: Path) -> float:
    """Median time from a path to a data set for training."""
    return statistics.median(_seconds(lambda: SliceDataset(open_cache(path))) for _ in range(5))


def seconds_to_help() -> float:
    """Median time of `supercl --help` in a process of its own."""
    command = [str(Path(sys.executable).with_name("supercl")), "--help"]
    run = functools.partial(subprocess.run, command, check=True, capture_output=True)
    return statistics.median(_seconds(run) for _ in range(7))


def _slice_bytes(buffer: StoredBatch) -> int:
    return buffer.image_BCYX[0].nbytes + buffer.superpixels_Bhw[0].nbytes


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
