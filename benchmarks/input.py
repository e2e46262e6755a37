"""How fast our loader makes batches, beside the published way, on one core in one run.

    python -m benchmarks.input [--side N] [--batch-size N] [--rounds N] [--quick]

Published, restated (`benchmarks.published`): a DataLoader whose worker runs scikit-image's SLIC on both intensity views
of each sample; a second worker on the same core made it slower. Ours: `train.loading` on a made cache of the same
slices, warm, up to batches that are ready for augmentation on the CPU. Neither makes the geometric views, and the
published way gets its slices from memory, normalised: both spare it work. Everything shares one core, and nobody uses
the batches. The process keeps freed memory, as training on a CPU does (`train.device`). Both take turns; medians. The
last line of the output is one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Final

import click
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch.utils.data import DataLoader

if not __package__:  # run by its path: beside it lies a script that has the name of a package
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.machine import as_text, machine
from benchmarks.published import PublishedDataset
from supercl_core.cache.reader import open_cache
from supercl_core.memory import keep_freed_memory
from train.data import SliceDataset
from train.loading import BatchLoader
from train.sampling import SliceOrder

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import made_caches

NUM_CASES: Final = 4
SLICES_A_CASE: Final = 16
PUBLISHED_BATCHES: Final = 2
"""Of each of its turns."""
OUR_BATCHES: Final = 100
SKIPPED_BATCHES: Final = 20
"""Of each of our turns, for what was gathered ahead before the clock was read."""


@click.command(help=__doc__)
@click.option("--side", default=512, show_default=True, help="Rows and columns of the slices and crops.")
@click.option("--batch-size", default=16, show_default=True, help="Slices a batch.")
@click.option("--rounds", default=3, show_default=True, help="Turns of each.")
@click.option("--quick", is_flag=True, help="128 x 128, batches of 4, one round.")
def main(side: int, batch_size: int, rounds: int, quick: bool) -> None:
    """Print batches per second for people, then all figures as JSON."""
    if quick:
        side, batch_size, rounds = 128, 4, 1
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    keep_freed_memory()
    run_with = {
        **machine("torch", "numpy", "scikit-image"),
        **{"side": side, "batch_size": batch_size, "rounds": rounds, "quick": quick},
    }
    print(f"{as_text(run_with)}; one core used")
    with tempfile.TemporaryDirectory() as folder:
        dataset = SliceDataset(open_cache(write_slices(Path(folder) / "made.zarr", side=side)))
        rates = measure(dataset, batch_size=batch_size, num_rounds=rounds)
    print(", ".join(f"{name} {rate:.2f} batches/s" for name, rate in rates.items()))
    figures = {
        "vs_published": rates["ours"] / rates["published"],
        "batches_per_second": rates["ours"],
        "published_batches_per_second": rates["published"],
    }
    print(json.dumps({**run_with, **figures}))


def measure(dataset: SliceDataset, *, batch_size: int, num_rounds: int) -> dict[str, float]:
    """Batches per second, `published` and `ours`."""
    slices = [dataset[index]["image"][0].numpy() for index in range(PUBLISHED_BATCHES * batch_size)]
    published = PublishedDataset(slices, side=dataset.patch_size[0])
    seconds: dict[str, list[float]] = {"published": [], "ours": []}
    for _ in range(num_rounds):
        seconds["published"].append(published_seconds(published, batch_size=batch_size))
        seconds["ours"].append(our_seconds(dataset, batch_size=batch_size))
    return {name: 1 / statistics.median(values) for name, values in seconds.items()}


def published_seconds(dataset: PublishedDataset, *, batch_size: int) -> float:
    """Seconds a batch of an epoch of the published way."""
    start = time.perf_counter()
    num_batches = sum(1 for _ in DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=1))
    return (time.perf_counter() - start) / num_batches


def our_seconds(dataset: SliceDataset, *, batch_size: int) -> float:
    """Seconds a batch of our loader, once it is under way."""
    order = SliceOrder(slices=dataset.slices, batch_size=batch_size, seed=0)
    with closing(iter(BatchLoader(dataset, order, device=torch.device("cpu")))) as batches:
        for _ in range(SKIPPED_BATCHES):
            next(batches)
        start = time.perf_counter()
        for _ in range(OUR_BATCHES):
            next(batches)
        return (time.perf_counter() - start) / OUR_BATCHES


def write_slices(path: Path, *, side: int) -> Path:
    """A cache at `path`, which is returned: slices of smooth noise, with square superpixels, ten along each side."""
    random = np.random.default_rng(0)
    shape_ZYX = (SLICES_A_CASE, side, side)
    square = np.arange(side) * 10 // side
    superpixels_ZYX = np.broadcast_to(10 * square[:, None] + square, shape_ZYX).astype(np.uint8)
    cases = {}
    for case in range(NUM_CASES):
        noise_ZYX = gaussian_filter(random.normal(size=shape_ZYX), (0, side / 32, side / 32))
        grain_ZYX = random.normal(scale=0.1 * noise_ZYX.std(), size=shape_ZYX)
        image_ZYX = 500 + 200 * (noise_ZYX + grain_ZYX) / noise_ZYX.std()
        cases[f"case_{case}"] = {"image": image_ZYX.astype(np.int16)[None], "superpixels": superpixels_ZYX}
    return made_caches.write_cache(
        path, cases, name="made", channel_names=("CT",), class_names=("background",)
    )


if __name__ == "__main__":
    main()
