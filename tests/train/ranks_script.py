"""Losses and gradients of one global batch of 4 slices, alone or as one of the ranks of torchrun.

    python ranks_script.py CACHE OUT IGCP         torchrun --nproc-per-node 2 ranks_script.py CACHE OUT IGCP

Slices, crops and views are those of training. The network has no batch statistics, so that nothing but the split over
ranks differs. Rank 0 writes {"loss": {...}, "gradients": {...}} to OUT.
"""

import sys
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor, nn

from supercl_core.cache.reader import open_cache
from train import distributed
from train.data import SliceDataset
from train.device import prepare
from train.loading import BatchLoader
from train.methods import PretrainConfig
from train.models.unet import PretrainOutput
from train.pretraining import PretrainLosses
from train.sampling import SliceOrder

CPU = torch.device("cpu")


class Plain(nn.Module):
    """A network without batch statistics: 16 x 16 blocks to 6 features."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Conv2d(1, 6, 16, stride=16)
        self.head = nn.Linear(6, 5)

    def forward(self, local: Tensor, whole: Tensor, *, passes: int) -> PretrainOutput:
        near, far = (torch.tanh(self.blocks(views)) for views in (local, whole))
        return PretrainOutput(self.head(far.mean(dim=(2, 3))), near, near)


def main(cache_path: str, out: str, igcp: str) -> None:
    cache = open_cache(cache_path)
    config = PretrainConfig(igcp=igcp, batch_size=4, precision="float32")
    with distributed.process_group():
        rank, world_size = distributed.rank(), distributed.world_size()
        # More rows and fewer columns than the slices have: padding and crops.
        dataset = SliceDataset(cache, patch_size=(32, 16))
        order = SliceOrder(slices=dataset.slices, batch_size=4, seed=1)
        loader = BatchLoader(dataset, order, device=CPU, rank=rank, world_size=world_size)
        with closing(iter(loader)) as batches:
            batch = next(batches)
        superpixels = batch.superpixels_Bhw.clone()
        superpixels[
            batch.slices_B == int(next(order.batches(0))[1])
        ] = -1  # ranks of different numbers of anchors
        batch = replace(batch, image_BCYX=batch.image_BCYX.double(), superpixels_Bhw=superpixels)
        torch.manual_seed(0)
        network = Plain().double()
        compute_losses = PretrainLosses(
            prepare(network, config=config, device=CPU),
            config=config,
            in_channels=1,
            ccl=torch.arange(cache.num_slices) // 6 if igcp == "cached" else None,
            num_superpixels=max(row.num_superpixels for row in cache.done),
        )
        losses = compute_losses(batch, torch.Generator().manual_seed(3))
        losses["loss"].backward()
        values = {name: distributed.mean(value).item() for name, value in losses.items()}
        if rank == 0:
            gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
            torch.save({"loss": values, "gradients": gradients}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
