"""The contrastive loss: how far it is from an independent plain reference, and ILCP's share of a training step.

    python -m benchmarks.losses [--side N] [--batch-size N] [--rounds N] [--device NAME] [--quick]

The reference is a loop in NumPy with a gradient derived by hand (tests/references.py), in float64.

ILCP is what pre-training does with the pixel embeddings: labels of the pixels, the loss, and its gradient. It takes
turns with whole steps, as configured by default, in the best precision of the device; medians. At 512 x 512 all 1,024
pixels of the stride-16 map are contrasted. The share hardly depends on the batch size. The last line of the output is
one JSON object.

"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch

from benchmarks.machine import as_text, machine
from benchmarks.timing import device_name, median_ms
from train.data import Batch
from train.device import prepare, resolve_precision, select_device
from train.losses.contrastive import supervised_contrastive
from train.methods import PretrainConfig
from train.models.backbones import build_encoder
from train.models.unet import PretrainNet, PretrainOutput
from train.pretraining import PretrainLosses

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import references

GROUPS, ITEMS, WIDTH = 2, 24, 8
FILTERS: Final = 32
STRIDE: Final = 16
NUM_SUPERPIXELS: Final = 100
WARM_UP: Final = 2
"""Rounds before the clock is read."""


@click.command(help=__doc__)
@click.option("--side", default=512, show_default=True, help="Rows and columns of a crop.")
@click.option("--batch-size", type=int, help="Slices a step; by default 2, on a GPU 16.")
@click.option("--rounds", default=7, show_default=True, help="Steps that are timed.")
@click.option("--device", "device_wanted", default="auto", show_default=True)
@click.option("--quick", is_flag=True, help="128 x 128, batches of 2, two rounds.")
def main(side: int, batch_size: int | None, rounds: int, device_wanted: str, quick: bool) -> None:
    """Print tables for people, then the figures as JSON."""
    device = select_device(device_wanted)
    batch_size = batch_size or (16 if device.type == "cuda" else 2)
    if quick:
        side, batch_size, rounds = 128, 2, 2
    run_with = {
        **machine("torch", "numpy"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **{"side": side, "filters": FILTERS, "batch_size": batch_size, "rounds": rounds},
        **{"precision": resolve_precision("auto", device), "quick": quick},
    }
    print(as_text(run_with))
    differences = reference_differences()
    print(f"{'loss against plain reference, float64':40} {'value':>9} {'gradient':>9}")
    for name, (value, gradient) in differences.items():
        print(f"{name:40} {value:9.1e} {gradient:9.1e}")
    cost = ilcp_cost(side=side, batch_size=batch_size, num_rounds=rounds, device=device)
    print(
        f"ILCP of {cost['ilcp_pixels']:,} pixels: {cost['ilcp_ms']:.1f} ms of a step of {cost['step_ms']:.1f} ms, "
        f"{cost['ilcp_share_of_step']:.1%}"
    )
    largest = max(max(pair) for pair in differences.values())
    print(json.dumps({**run_with, "largest_difference": largest, **cost}))


def reference_differences() -> dict[str, tuple[float, float]]:
    """The largest differences from the reference in value and gradient, for random and for degenerate pairs."""
    generator = np.random.default_rng(0)
    ids = {
        "random superpixels": generator.integers(0, 5, (GROUPS, ITEMS)),
        "random superpixels and padding": generator.integers(-1, 5, (GROUPS, ITEMS)),
        "one superpixel": np.zeros((GROUPS, ITEMS), int),
        "every pixel its own superpixel": np.tile(np.arange(ITEMS // 2), (GROUPS, 2)),
        "anchors without a positive": np.tile(np.maximum(np.arange(ITEMS), 3), (GROUPS, 1)),
        "no positive at all": np.tile(np.arange(ITEMS), (GROUPS, 1)),
    }
    differences = {}
    for name, labels in ids.items():
        embeddings = generator.normal(size=(GROUPS, ITEMS, WIDTH))
        tensor = torch.from_numpy(embeddings).requires_grad_()
        value = supervised_contrastive(tensor, torch.from_numpy(labels))
        value.backward()
        assert tensor.grad is not None
        positives = labels[:, :, None] == labels[:, None, :]
        expected, gradient = references.supervised_contrastive(embeddings, positives, valid=labels >= 0)
        difference = float(np.abs(tensor.grad.numpy() - gradient).max())
        differences[name] = (abs(value.item() - expected), difference)
    return differences


def ilcp_cost(*, side: int, batch_size: int, num_rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of ILCP and of a whole step, and the one as a share of the other."""
    torch.manual_seed(0)
    config = PretrainConfig(
        filters=FILTERS, batch_size=batch_size, precision=resolve_precision("auto", device)
    )
    encoder = build_encoder("unet", in_channels=1, filters=FILTERS)
    network = PretrainNet(encoder, projection=config.projection, pixel_stride=STRIDE)
    losses = PretrainLosses(
        prepare(network, config=config, device=device),
        config=config,
        in_channels=1,
        ccl=torch.arange(batch_size, device=device) // 2,
        num_superpixels=NUM_SUPERPIXELS,
    )
    optimiser = config.make_optimiser(network)
    generator = torch.Generator(device).manual_seed(0)
    batch = _batch(side, batch_size, device)
    cells = side // STRIDE
    pixels = torch.randn(
        2 * batch_size,
        config.projection,
        cells,
        cells,
        device=device,
        dtype=getattr(torch, config.precision),
        requires_grad=True,
    )

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        losses(batch, generator)["loss"].backward()
        optimiser.step()

    def ilcp() -> None:
        pixels.grad = None
        losses.loss_intra(PretrainOutput(None, pixels, None), batch).backward()

    turns = {"step": step, "ilcp": ilcp}
    ms = median_ms(turns, num_rounds=num_rounds, warm_up=WARM_UP, device=device)
    return {
        "ilcp_pixels": cells * cells,
        "ilcp_ms": ms["ilcp"],
        "step_ms": ms["step"],
        "ilcp_share_of_step": ms["ilcp"] / ms["step"],
    }


def _batch(side: int, batch_size: int, device: torch.device) -> Batch:
    """Noise with a grid of superpixels, as the loader would give such slices."""
    cells = side // STRIDE
    rows = torch.arange(cells) * 10 // cells
    superpixels = (10 * rows[:, None] + rows).to(torch.int16).expand(batch_size, -1, -1)
    return Batch(
        image_BCYX=torch.randn(batch_size, 1, side, side).to(device),
        superpixels_Bhw=superpixels.contiguous().to(device),
        ground_truth_BYX=None,
        positions_B=((torch.arange(batch_size) + 1) / batch_size).to(device),
        slices_B=torch.arange(batch_size, device=device),
    )


if __name__ == "__main__":
    main()
