"""What a training step costs, ours beside the published one: time, memory, and the wait for data.

    python -m benchmarks.step [--side N] [--filters N] [--batch-size N] [--rounds N] [--device NAME] [--compile]
                              [--quick]

Published, restated (`benchmarks.published`): four forward passes in plain eager PyTorch, loops over the batch,
components through SciPy. Ours: pre-training as configured by default, cached IGCP included, in float32 and in the best
precision of the device. All have the same encoder and instance head (ours its pixel head as well), the same batch and
AdamW, and make the four views in the same way, on the device and inside the time. What the loop adds on both
sides, such as reading losses back and logging, is left out.

Each way has a process of its own, because what ours sets for its process (how the C library keeps memory, see
`train.device`) must not help the published one, and because peak memory belongs to a process. The processes take turns
step by step; medians. On a GPU each turn begins with a step that is not timed, and leaves its memory to the others.
Two more ways show what parts of ours would do for the published step: `published_memory_kept` has our setting of the C
library, `published_mixed` runs under autocast in our best precision.

Peak memory: on a CPU what the process grew by since before its first step, on a GPU all tensors. The share of time
spent waiting for data is of our loader on a made cache, in our best precision. The last line of the output is one JSON
object.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import numpy as np
import psutil
import torch
from torch import Tensor

if not __package__:  # run by its path: beside it lies a script that has the name of a package
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.input import write_slices
from benchmarks.machine import as_text, machine, peak_bytes
from benchmarks.published import published_losses
from benchmarks.timing import device_name
from supercl_core.cache.reader import open_cache
from supercl_core.memory import keep_freed_memory
from train.augment import AugmentConfig, pretrain_views
from train.data import Batch, SliceDataset
from train.device import prepare, resolve_precision, select_device
from train.loading import BatchLoader
from train.methods import PretrainConfig
from train.models.backbones import build_encoder
from train.models.unet import PretrainNet
from train.pretraining import PretrainLosses
from train.sampling import SliceOrder

NUM_SUPERPIXELS: Final = 100
WARM_UP: Final = 2
"""Steps of every way before the clock is read."""
LOADED_STEPS: Final = 30
"""Steps over which the wait for data is taken."""

ComputeLosses = Callable[[Batch, torch.Generator], dict[str, Tensor]]


class Way(NamedTuple):
    """How a step is taken."""

    ours: bool
    precision: str
    keep_memory: bool = False
    """For the published step; ours always does."""
    compile: bool = False


class Stepper:
    """A network, a batch and an optimiser, in a process that knows one way only."""

    def __init__(
        self, way: Way, cache_path: Path, *, filters: int, batch_size: int, device: torch.device
    ) -> None:
        self.device = device
        dataset = SliceDataset(open_cache(cache_path))
        labels = np.arange(len(dataset), dtype=np.int32) // 2
        order = SliceOrder(slices=dataset.slices, batch_size=batch_size, seed=0, labels=labels)
        self.loader = BatchLoader(dataset, order, device=device)
        with closing(iter(self.loader)) as batches:
            self.batch = next(batches)
        torch.manual_seed(0)
        self.generator = torch.Generator(device).manual_seed(0)
        config = PretrainConfig(
            filters=filters, batch_size=batch_size, precision=way.precision, compile=way.compile
        )
        encoder = build_encoder("unet", in_channels=1, filters=filters)
        network = PretrainNet(encoder, projection=config.projection if way.ours else 0)
        if way.ours:
            self.losses: ComputeLosses = PretrainLosses(
                prepare(network, config=config, device=device),
                config=config,
                in_channels=1,
                ccl=torch.from_numpy(labels).to(device),
                num_superpixels=NUM_SUPERPIXELS,
            )
        else:
            self.losses = published_step(network.to(device), precision=way.precision)
            if way.keep_memory:
                keep_freed_memory()
        self.optimiser = config.make_optimiser(network)
        self.memory_before = psutil.Process().memory_info().rss

    def step_ms(self) -> float:
        """Take a step; the milliseconds that it took."""
        if self.device.type == "cuda":
            self._step(self.batch)  # asks the device for the memory that the last turn gave back
        start = time.perf_counter()
        self._step(self.batch)
        seconds = time.perf_counter() - start
        torch.cuda.empty_cache()  # nothing on a CPU; a GPU is too small for what all processes would keep
        return 1000 * seconds

    def peak_memory_bytes(self) -> int:
        """Of the steps so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_bytes() - self.memory_before

    def data_wait_share(self) -> float:
        """The share of time for which steps with batches from the loader wait for them, once they are under way."""
        with closing(iter(self.loader)) as batches:
            self._step(next(batches))
            start, waited_s = time.perf_counter(), self.loader.wait_s
            for _ in range(LOADED_STEPS):
                self._step(next(batches))
            return (self.loader.wait_s - waited_s) / (time.perf_counter() - start)

    def _step(self, batch: Batch) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        self.losses(batch, self.generator)["loss"].backward()
        self.optimiser.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def published_step(network: PretrainNet, *, precision: str) -> ComputeLosses:
    """The published losses of a batch, with the views made as ours are."""

    def losses(batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        views = pretrain_views(batch.image_BCYX, generator, config=AugmentConfig())
        dtype = getattr(torch, precision)
        with torch.autocast(views.x1.device.type, dtype, enabled=precision != "float32"):
            return published_losses(network, views, batch.superpixels_Bhw, batch.positions_B)

    return losses


class Remote:
    """A Stepper in a process of its own, which ends with this one."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, arguments, settings), daemon=True).start()
        theirs.close()

    def ask(self, method: str) -> Any:
        """What the method of the Stepper returns. EOFError or OSError: its process has died, and said why."""
        self._pipe.send(method)
        return self._pipe.recv()


def _serve(pipe: Connection, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
    stepper = Stepper(*arguments, **settings)
    with suppress(EOFError):  # the other process has ended
        while True:
            pipe.send(getattr(stepper, pipe.recv())())


@click.command(help=__doc__)
@click.option("--side", type=int, help="Rows and columns of a crop; by default 128, on a GPU 512.")
@click.option("--filters", default=32, show_default=True, help="Width of the network (f0).")
@click.option("--batch-size", type=int, help="Slices a step; by default 8, on a GPU 16.")
@click.option("--rounds", default=9, show_default=True, help="Steps of each way that are timed.")
@click.option("--device", "device_wanted", default="auto", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Compile our network.")
@click.option("--quick", is_flag=True, help="64 x 64, 8 filters, batches of 4, two rounds.")
def main(
    side: int | None,
    filters: int,
    batch_size: int | None,
    rounds: int,
    device_wanted: str,
    compiled: bool,
    quick: bool,
) -> None:
    """Print a table for people, then the figures as JSON."""
    device = select_device(device_wanted)
    side = side or (512 if device.type == "cuda" else 128)
    batch_size = batch_size or (16 if device.type == "cuda" else 8)
    if quick:
        side, filters, batch_size, rounds = 64, 8, 4, 2
    precision = resolve_precision("auto", device)
    run_with = {
        **machine("torch", "numpy", "scipy"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **{"side": side, "filters": filters, "batch_size": batch_size, "rounds": rounds},
        **{"precision": precision, "compile": compiled, "quick": quick},
    }
    print(as_text(run_with))
    ways = {
        "published": Way(ours=False, precision="float32"),
        "published_memory_kept": Way(ours=False, precision="float32", keep_memory=True),
        "published_mixed": Way(ours=False, precision=precision),
        "ours_float32": Way(ours=True, precision="float32", compile=compiled),
        "ours": Way(ours=True, precision=precision, compile=compiled),
    }
    with tempfile.TemporaryDirectory() as folder:
        cache_path = write_slices(Path(folder) / "made.zarr", side=side)
        remotes = {
            name: Remote(way, cache_path, filters=filters, batch_size=batch_size, device=device)
            for name, way in ways.items()
        }
        steps: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(WARM_UP + rounds):
            for name, remote in remotes.items():
                steps[name].append(remote.ask("step_ms"))
        memory = {name: remote.ask("peak_memory_bytes") for name, remote in remotes.items()}
        data_wait_share = remotes["ours"].ask("data_wait_share")
    ms = {name: statistics.median(values[WARM_UP:]) for name, values in steps.items()}
    for name in ways:
        print(f"{name:24} {ms[name]:9.1f} ms {memory[name] / 1e6:9.0f} MB")
    figures = {
        "vs_published": ms["published"] / ms["ours_float32"],
        "vs_published_best": ms["published"] / ms["ours"],
        "vs_published_memory_kept": ms["published_memory_kept"] / ms["ours_float32"],
        "vs_published_mixed": ms["published_mixed"] / ms["ours"],
        "slices_per_second": 1000 * batch_size / ms["ours"],
        "peak_memory_vs_published": memory["ours"] / memory["published"],
        "data_wait_share": data_wait_share,
        "step_ms": ms,
        "peak_memory_bytes": memory,
    }
    print(json.dumps({**run_with, **figures}))


if __name__ == "__main__":
    main()
