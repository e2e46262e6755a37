"""What the pairs of IGCP cost in a step of pre-training: cached weak labels against online ones and against none.

    python -m benchmarks.igcp_cost [--batch-size N] [--side N] [--filters N] [--rounds N] [--device NAME]

Steps of the three kinds take turns in one process, with random slices; medians. The pairs alone are, for cached IGCP,
the look-up of labels, the mask of positives and a step's share of ordering 40,000 slices in groups, on the thread
that trains; for online IGCP all that makes the mask from features. `benchmarks.weak_labels` calls
`cached_pairs_share`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import click
import numpy as np
import torch

from benchmarks.machine import as_text, machine
from benchmarks.timing import device_name, median_ms
from train.data import Batch
from train.device import select_device
from train.methods import PretrainConfig
from train.models.unet import Encoder, PretrainNet
from train.pretraining import PretrainLosses
from train.sampling import SliceOrder

NUM_SLICES: Final = 40_000
NUM_COMPONENTS: Final = 16_000
"""As the finest level of that many real slices has (MEASUREMENTS)."""
NUM_SUPERPIXELS: Final = 100
PAIRS_A_ROUND: Final = 50
"""Pairs are made this often between two readings of the clock."""


@click.command(help=__doc__)
@click.option("--batch-size", default=16, show_default=True, help="Slices a step.")
@click.option("--side", default=96, show_default=True, help="Rows and columns of a crop.")
@click.option("--filters", default=32, show_default=True, help="Width of the network (f0).")
@click.option("--rounds", default=7, show_default=True, help="Steps of each kind that are timed.")
@click.option("--device", default="auto", show_default=True)
def main(batch_size: int, side: int, filters: int, rounds: int, device: str) -> None:
    """Print the figures as JSON."""
    conditions = machine("torch", "numpy")
    print(as_text(conditions))
    figures = cached_pairs_share(
        batch_size=batch_size, side=side, filters=filters, num_rounds=rounds, device_wanted=device
    )
    print(json.dumps({**conditions, **figures}))


def cached_pairs_share(
    *,
    batch_size: int = 16,
    side: int = 96,
    filters: int = 32,
    num_rounds: int = 7,
    device_wanted: str = "auto",
) -> dict[str, Any]:
    """Times in ms of a step with each kind of IGCP, of the pairs alone, and these as shares of a step without IGCP.

    The keys that matter: `cached_pairs_share_of_step`, `online_pairs_share_of_step` and `step_ms` (by kind).
    """
    device = select_device(device_wanted)
    random = np.random.default_rng(0)
    labels = random.integers(0, NUM_COMPONENTS, NUM_SLICES).astype(np.int32)
    order = SliceOrder(slices=np.arange(NUM_SLICES), batch_size=batch_size, seed=0, labels=labels)
    torch.manual_seed(0)
    encoder = Encoder(1, filters)
    network = PretrainNet(encoder).to(device)
    cells = side // encoder.strides[-1]
    batch = _batch(next(order.batches(0)), side, cells, random, device)
    ccl = torch.from_numpy(labels).to(device)
    losses = {
        kind: PretrainLosses(
            network,
            config=PretrainConfig(igcp=kind),
            in_channels=1,
            ccl=ccl if kind == "cached" else None,
            num_superpixels=NUM_SUPERPIXELS,
        )
        for kind in ("none", "cached", "online")
    }
    optimiser = PretrainConfig().make_optimiser(network)
    generator = torch.Generator(device)
    features = torch.randn(2 * batch_size, encoder.channels[-1], cells, cells, device=device)

    def step(kind: str) -> None:
        optimiser.zero_grad(set_to_none=True)
        losses[kind](batch, generator)["loss"].backward()
        optimiser.step()

    def pairs(kind: str) -> None:
        for _ in range(PAIRS_A_ROUND):
            losses[kind].inter_positives(batch, features)

    turns: dict[str, Callable[[], object]] = {
        **{f"step {kind}": lambda kind=kind: step(kind) for kind in losses},
        **{f"pairs {kind}": lambda kind=kind: pairs(kind) for kind in ("cached", "online")},
        "epoch": lambda: next(order.batches(0)),
    }
    ms = median_ms(turns, num_rounds=num_rounds, warm_up=1, device=device)
    pairs_ms = {kind: ms[f"pairs {kind}"] / PAIRS_A_ROUND for kind in ("cached", "online")}
    order_ms = ms["epoch"] / order.steps_per_epoch
    return {
        "device": device_name(device),
        "batch_size": batch_size,
        "side": side,
        "filters": filters,
        "step_ms": {kind: ms[f"step {kind}"] for kind in losses},
        "pairs_ms": pairs_ms,
        "order_ms_per_step": order_ms,
        "cached_pairs_share_of_step": (pairs_ms["cached"] + order_ms) / ms["step none"],
        "online_pairs_share_of_step": pairs_ms["online"] / ms["step none"],
    }


def _batch(
    slices: np.ndarray, side: int, cells: int, random: np.random.Generator, device: torch.device
) -> Batch:
    """Noise with a grid of superpixels, as the loader would give such slices."""
    size = len(slices)
    ids = np.arange(cells * cells).reshape(cells, cells) % NUM_SUPERPIXELS
    return Batch(
        image_BCYX=torch.from_numpy(random.normal(size=(size, 1, side, side)).astype(np.float32)).to(device),
        superpixels_Bhw=torch.from_numpy(np.broadcast_to(ids, (size, cells, cells)).astype(np.int16)).to(
            device
        ),
        ground_truth_BYX=None,
        positions_B=torch.from_numpy(random.uniform(0.01, 1, size).astype(np.float32)).to(device),
        slices_B=torch.from_numpy(slices).to(device),
    )


if __name__ == "__main__":
    main()
