"""The published way of pre-training, restated: what our loader and our step are compared with.

Restated from METHOD ("Views", "Losses", "Where we differ") in the plainest NumPy, scikit-image, SciPy and eager
PyTorch. Where METHOD leaves a choice, the faster one is taken. `PublishedDataset` is what worker processes load;
`published_losses` is the step, and computes what our preset `published` computes (tested). Called by
`benchmarks.input` and `benchmarks.step`.

Axes: B slice, C channel, Y row, X column; h and w are rows and columns of the deepest feature map; M embeddings.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.segmentation import slic
from torch import Tensor
from torch.nn.functional import normalize

from train.models.unet import PretrainNet

TEMPERATURE: Final = 0.1
BASE_TEMPERATURE: Final = 0.07
POSITION_THRESHOLD: Final = 0.1 - 1e-5  # so that rounding does not decide on slices 0.1 apart
WEIGHTS: Final = (1.0, 1.0, 0.5)
"""Of L_ins, L_intra and L_inter."""


class PublishedDataset(torch.utils.data.Dataset[dict[str, np.ndarray]]):
    """Two intensity views of each slice, padded or cropped at random, each with superpixels of its own.

    `slices`: float32 (y, x) each, held in memory and normalised, so that neither files nor normalising count. Items
    hold `views` (2, 1, side, side) and `superpixels` (2, side, side). The two geometric views are left out, because
    our loader does not make views either.
    """

    def __init__(self, slices: list[np.ndarray], *, side: int, seed: int = 0) -> None:
        self.slices, self.side, self.seed = slices, side, seed

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng([self.seed, index])
        image_YX = _pad_or_crop(self.slices[index], self.side, random)
        views = [_intensity_view(image_YX, random) for _ in range(2)]
        superpixels = [
            slic(np.stack([view_YX] * 3, axis=-1), n_segments=100, compactness=10) for view_YX in views
        ]
        return {"views": np.stack(views)[:, None], "superpixels": np.stack(superpixels)}


def _pad_or_crop(image_YX: np.ndarray, side: int, random: np.random.Generator) -> np.ndarray:
    """A random (side, side) part of the image, which is padded with zeros where it is smaller."""
    missing = [max(side - size, 0) for size in image_YX.shape]
    before = [int(random.integers(count, endpoint=True)) for count in missing]
    widths = [(first, count - first) for first, count in zip(before, missing, strict=True)]
    padded_YX = np.pad(image_YX, widths)
    y, x = (int(random.integers(size - side, endpoint=True)) for size in padded_YX.shape)
    return padded_YX[y : y + side, x : x + side]


def _intensity_view(image_YX: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The image with other brightness, contrast and sharpness, each with a chance of one half: float32."""
    if random.random() < 0.5:
        image_YX = image_YX + np.float32(random.uniform(-0.3, 0.3))
    if random.random() < 0.5:
        image_YX = image_YX * np.float32(random.uniform(0.7, 1.3))
    if random.random() < 0.5:
        image_YX = gaussian_filter(image_YX, random.uniform(0.5, 1.5))
    return image_YX


def published_losses(
    network: PretrainNet,
    views: tuple[Tensor, Tensor, Tensor, Tensor],
    superpixels_Bhw: Tensor,
    positions_B: Tensor,
) -> dict[str, Tensor]:
    """The losses `loss_ins`, `loss_intra` and `loss_inter` and their weighted sum `loss`, all scalars.

    `network` is one without a pixel head, and called once for each view. `views`: x1 to x4, float32 (B, C, Y, X).
    `superpixels_Bhw`: integers from 0 on, at the size of the deepest feature map; padding is a superpixel like others,
    since SLIC ran on padded images. `positions_B`: float32 in (0, 1]. Source: SuperCL (IEEE TIP 2026), as released.
    """
    x1, x2, x3, x4 = views
    features_x1, features_x2 = (network(x, None).features for x in (x1, x2))
    instances = torch.cat([network(None, x).instance for x in (x3, x4)])
    positions = positions_B.repeat(2)
    near = (positions[:, None] - positions).abs() < POSITION_THRESHOLD
    losses = {
        "loss_ins": _contrastive_loss(instances, near),
        "loss_intra": _ilcp_loss(features_x1, features_x2, superpixels_Bhw),
        "loss_inter": _contrastive_loss(instances, _igcp_pairs(features_x1, features_x2, superpixels_Bhw)),
    }
    total = sum(weight * loss for weight, loss in zip(WEIGHTS, losses.values(), strict=True))
    return {"loss": total, **losses}


def _contrastive_loss(embeddings_MD: Tensor, pairs_MM: Tensor) -> Tensor:
    """METHOD's formula, term by term. Every anchor has a positive here: its other view."""
    unit_MD = normalize(embeddings_MD)
    scores_MM = unit_MD @ unit_MD.T / TEMPERATURE
    others_MM = 1 - torch.eye(len(scores_MM), device=scores_MM.device)
    positives_MM = pairs_MM * others_MM
    log_shares_MM = scores_MM - torch.log((torch.exp(scores_MM) * others_MM).sum(dim=1, keepdim=True))
    mean_M = (positives_MM * log_shares_MM).sum(dim=1) / positives_MM.sum(dim=1)
    return -TEMPERATURE / BASE_TEMPERATURE * mean_M.mean()


def _ilcp_loss(features_x1: Tensor, features_x2: Tensor, superpixels_Bhw: Tensor) -> Tensor:
    """L_intra, slice by slice, over every 16th position of maps of 32 x 32 and above."""
    every = 16 if superpixels_Bhw[0].numel() >= 32 * 32 else 1
    losses = []
    for map_x1, map_x2, superpixels_hw in zip(features_x1, features_x2, superpixels_Bhw, strict=True):
        pixels_MD = torch.cat([map_Chw.flatten(1).T[::every] for map_Chw in (map_x1, map_x2)])
        ids_M = superpixels_hw.flatten()[::every].repeat(2)
        losses.append(_contrastive_loss(pixels_MD, ids_M[:, None] == ids_M))
    return torch.stack(losses).mean()


@torch.no_grad()
def _igcp_pairs(features_x1: Tensor, features_x2: Tensor, superpixels_Bhw: Tensor) -> Tensor:
    """The positives of L_inter, bool (2B, 2B): components of the 1-nearest-neighbour graph, then the view pairs."""
    means_Mhw = torch.cat([features_x1, features_x2]).mean(dim=1)
    maps = [
        _asp(mean_hw, ids_hw)
        for mean_hw, ids_hw in zip(means_Mhw, superpixels_Bhw.repeat(2, 1, 1), strict=True)
    ]
    unit_MD = normalize(torch.stack(maps).flatten(1))
    similarities_MM = (unit_MD @ unit_MD.T).fill_diagonal_(-torch.inf)
    nearest = similarities_MM.argmax(dim=1).cpu().numpy()
    nodes = np.arange(len(nearest))
    graph = coo_array((np.ones(len(nearest)), (nodes, nearest)), shape=(len(nearest), len(nearest)))
    _, components = connected_components(graph, directed=False)
    labels = torch.from_numpy(components).to(similarities_MM.device)
    slices = torch.arange(len(superpixels_Bhw), device=labels.device).repeat(2)
    return (labels[:, None] == labels) | (slices[:, None] == slices)


def _asp(values_hw: Tensor, superpixels_hw: Tensor) -> Tensor:
    """Each position's superpixel summed up, over the number of all positions."""
    ids = superpixels_hw.flatten().long()
    sums = values_hw.new_zeros(int(ids.max()) + 1).index_add(0, ids, values_hw.flatten())
    return (sums / ids.numel())[ids].view_as(values_hw)
