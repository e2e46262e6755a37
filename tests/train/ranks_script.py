"""Losses and gradients of one global batch of 4 slices, alone or as one of the ranks of torchrun.

    python ranks_script.py OUT IGCP         torchrun --nproc-per-node 2 ranks_script.py OUT IGCP

The network has no batch statistics, and the views are the slices themselves, so that nothing but the split over
ranks differs. Rank 0 writes {"loss": {...}, "gradients": {...}} to OUT.
"""

import sys

import torch
from torch import nn

from train import distributed
from train.augment import AugmentConfig
from train.data import Batch
from train.models.unet import PretrainOutput
from train.pretraining import PretrainConfig, PretrainLosses

SAME = AugmentConfig(p_brightness=0, p_contrast=0, p_blur=0, p_geometric=0, mirror_axes=(), crop=(1.0, 1.0))


class Plain(nn.Module):
    """A network without batch statistics: 16 x 16 blocks to 6 features."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Conv2d(1, 6, 16, stride=16)
        self.head = nn.Linear(6, 5)

    def forward(self, images: torch.Tensor) -> PretrainOutput:
        features = torch.tanh(self.blocks(images))
        return PretrainOutput(self.head(features.mean(dim=(2, 3))), features, features)


def main(out: str, igcp: str) -> None:
    generator = torch.Generator().manual_seed(3)
    superpixels = torch.randint(0, 3, (4, 3, 2), generator=generator).short()
    superpixels[1] = -1  # a slice that is all padding: the ranks have different numbers of anchors
    whole = {
        "image_BCYX": torch.randn(4, 1, 48, 32, generator=generator, dtype=torch.float64),
        "windows_BC4": torch.zeros(4, 1, 4),
        "superpixels_Bhw": superpixels,
        "positions_B": torch.tensor([0.1, 0.5, 0.15, 0.9]),
        "slices_B": torch.arange(4),
    }
    with distributed.process_group():
        compute(out, igcp, whole, generator)


def compute(out: str, igcp: str, whole: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    torch.manual_seed(0)
    network = Plain().double()
    rank, size = distributed.rank(), distributed.world_size()
    batch = Batch(ground_truth_BYX=None, **{name: value[rank::size] for name, value in whole.items()})
    compute_losses = PretrainLosses(
        distributed.parallel(network, torch.device("cpu")),
        config=PretrainConfig(igcp=igcp, augment=SAME),
        in_channels=1,
        ccl=torch.tensor([0, 0, 1, 1]) if igcp == "cached" else None,
        num_superpixels=3,
    )
    losses = compute_losses(batch, generator)
    losses["loss"].backward()
    values = {name: distributed.mean(value).item() for name, value in losses.items()}
    if rank == 0:
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        torch.save({"loss": values, "gradients": gradients}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
