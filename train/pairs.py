"""Which embeddings are positive pairs: ILCP, instance pairs, and IGCP online and from cached labels.

Pairs of slices are bool masks that never mark the diagonal; those of pixels, of which there are many more, are
labels. Both hold the first view of everything before the second. All of it is batched and stays on the device of its
arguments: no value is read back, and no shape depends on one. `train.pretraining` hands the pairs to
`train.losses.contrastive`.
"""

from __future__ import annotations

import math
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from train.losses.contrastive import cosine_similarities

PixelSampling = Literal["all", "published", "spread"]
InstanceRule = Literal["position", "partition", "view"]
AspDivisor = Literal["superpixel", "image"]
ViewPairs = Literal["edge", "afterwards"]

# A position times the number of partitions is an integer at the end of a partition, which rounding may exceed. Other
# slices exceed one by more than this in volumes of up to 10,000 slices.
PARTITION_TOLERANCE: Final = 1e-4

# In a volume of 10 slices neighbours are 0.1 apart, and rounding must not decide which of them are closer than 0.1.
POSITION_TOLERANCE: Final = 1e-5


def ilcp_labels(superpixels: Tensor) -> Tensor:
    """Intra-image local contrastive pairs: two pixels of one slice in the same superpixel.

    `superpixels` is integer (B, h, w), or (B, P) at P sampled pixels, with -1 in padding. Returns the superpixels of
    the N pixels of x1 and then of the same N pixels of x2, (B, 2N): equal labels are positive pairs. Source: SuperCL
    (IEEE TIP 2026), ILCP.
    """
    return superpixels.flatten(1).repeat(1, 2)


def sample_pixels(
    height: int,
    width: int,
    *,
    mode: PixelSampling = "all",
    count: int = 1024,
    device: torch.device | None = None,
) -> Tensor:
    """The flat positions, row by row, of the pixels of a feature map that ILCP contrasts.

    "all" takes every pixel. "published" takes every 16th position of maps of 32 x 32 and above, which on a
    map 32 wide is two columns, and all of a smaller one. "spread" (our choice) takes all of a map of at most
    `count` pixels, and of a larger one an even grid of at most `count`. Returns int64 (P,), ascending, made on
    `device`.
    """
    assert mode in get_args(PixelSampling), mode
    num_pixels = height * width
    if mode == "published" and num_pixels >= 32 * 32:
        return torch.arange(0, num_pixels, 16, device=device)
    if mode == "spread" and num_pixels > count:
        num_rows = min(height, count, max(1, math.isqrt(count * height // width)))
        rows = _even_positions(height, num_rows, device)
        columns = _even_positions(width, min(width, count // num_rows), device)
        return (rows[:, None] * width + columns).flatten()
    return torch.arange(num_pixels, device=device)


def instance_positives(
    positions: Tensor,
    *,
    threshold: float = 0.1,
    num_partitions: int = 4,
    rule: InstanceRule = "position",
) -> Tensor:
    """Pairs of slices for L_ins.

    `positions` is floating point (B,), the position (z + 1) / Z of each slice in its volume. "position" pairs slices
    closer than `threshold` (PCL; Zeng et al., MICCAI 2021). "partition" cuts volumes into `num_partitions` equal parts
    along z and pairs slices of the same part, of whatever volume (GCL; Chaitanya et al., NeurIPS 2020). "view" pairs
    only the two views of a slice. Returns (2B, 2B): all slices of x3, then all of x4.
    """
    assert rule in get_args(InstanceRule), rule
    if rule == "view":
        return _view_pairs(positions)
    both = positions.repeat(2)
    if rule == "partition":
        return _same_label((both * num_partitions - PARTITION_TOLERANCE).ceil())
    near = (both[:, None] - both[None, :]).abs() < threshold - POSITION_TOLERANCE
    return near.fill_diagonal_(False)


def cached_igcp_positives(ccl: Tensor) -> Tensor:
    """Inter-image pairs from labels of the offline stage: same CCL label, or two views of one slice.

    `ccl` is integer (B,); -1 is a slice without a label, which is paired with its other view only. Returns
    (2B, 2B): all slices of x3, then all of x4.
    """
    return _same_label(ccl.repeat(2)) | _view_pairs(ccl)


@torch.no_grad()
def online_igcp_positives(
    features_x1: Tensor,
    features_x2: Tensor,
    superpixels: Tensor,
    *,
    num_superpixels: int,
    divide_by: AspDivisor = "superpixel",
    view_pairs: ViewPairs = "edge",
) -> Tensor:
    """Inter-image pairs from the features of this batch: slices linked by nearest neighbours in ASP space.

    `features_x1` and `features_x2` are floating point (B, C, h, w); only their mean over the channels is
    used, so it may be taken before slices are gathered from several processes (then C is 1). `superpixels`
    and `divide_by` are those of `asp`. Each of the 2B maps is linked to its most similar other one (cosine;
    of equals the first), and the connected components of these links are the weak labels.

    With `view_pairs="edge"` the two views of a slice are linked before components are taken, so that the
    pairs are transitive (our choice); with "afterwards" they are added to the finished pairs, as published.
    Returns (2B, 2B): all slices of the first view, then all of the second. No gradient flows.

    Source: SuperCL (IEEE TIP 2026), IGCP.
    """
    assert view_pairs in get_args(ViewPairs), view_pairs
    dtype = torch.promote_types(features_x1.dtype, torch.float32)
    channel_mean = torch.cat([features_x1, features_x2]).mean(dim=1, keepdim=True, dtype=dtype)
    maps = asp(
        channel_mean, superpixels.repeat(2, 1, 1), num_superpixels=num_superpixels, divide_by=divide_by
    )
    similarities = cosine_similarities(maps.flatten(1)).fill_diagonal_(-math.inf)
    links = torch.zeros_like(similarities, dtype=torch.bool)
    links.scatter_(1, similarities.argmax(dim=1, keepdim=True), True)

    views = _view_pairs(superpixels)
    if view_pairs == "edge":
        return _same_label(connected_components(links | views))
    return _same_label(connected_components(links)) | views


def asp(
    features: Tensor, superpixels: Tensor, *, num_superpixels: int, divide_by: AspDivisor = "superpixel"
) -> Tensor:
    """Average superpixel map: every pixel replaced by the mean over its superpixel.

    `features` is floating point (B, C, h, w). `superpixels` is integer (B, h, w) with ids from 0 to
    `num_superpixels` - 1, and -1 in padding, which becomes 0. `divide_by="image"` divides the sum over a
    superpixel by h * w, as the published code does. Returns (B, C, h, w), float32 (float64 stays float64).
    Source: SuperCL (IEEE TIP 2026), ASP.
    """
    assert divide_by in get_args(AspDivisor), divide_by
    values = features.to(torch.promote_types(features.dtype, torch.float32)).flatten(2)
    # Padding gets a bin of its own, the last.
    ids = superpixels.flatten(1).long()[:, None, :]
    ids = ids.where(ids >= 0, num_superpixels)
    batch, channels, num_pixels = values.shape
    bins = values.new_zeros(batch, channels, num_superpixels + 1)
    means = bins.scatter_add(2, ids.expand_as(values), values)
    if divide_by == "superpixel":
        sizes = bins[:, :1].scatter_add(2, ids, torch.ones_like(values[:, :1]))
        means = means / sizes.clamp_min(1)
    else:
        means = means / num_pixels
    spread = means.gather(2, ids.expand_as(values)).view_as(features)
    return spread.masked_fill((superpixels < 0)[:, None], 0)


def connected_components(adjacency: Tensor) -> Tensor:
    """Label the nodes of an undirected graph by component.

    `adjacency` is bool (M, M); an edge counts in whichever direction it is marked. Returns int64 (M,): the
    smallest node of each node's component. The relation "within n steps" is squared log2(M) times, which
    suits a batch and needs no loop that waits for the device.
    """
    num_nodes = len(adjacency)
    nodes = torch.arange(num_nodes, device=adjacency.device)
    reached = adjacency | adjacency.T | (nodes[:, None] == nodes[None, :])
    for _ in range(max(num_nodes - 1, 0).bit_length()):
        # Counts of paths are sums of ones: never below 1 where there is a path, at whatever precision.
        paths = reached.float()
        reached = (paths @ paths) > 0
    return nodes.where(reached, num_nodes).amin(dim=1)


def _view_pairs(slices: Tensor) -> Tensor:
    """(2B, 2B): each slice of the first view with itself in the second; B is the length of `slices`."""
    return _same_label(torch.arange(len(slices), device=slices.device).repeat(2))


def _same_label(labels: Tensor) -> Tensor:
    """(..., M, M) from labels (..., M): equal and not negative, without the diagonal."""
    same = (labels[..., :, None] == labels[..., None, :]) & (labels >= 0)[..., None]
    return same & ~torch.eye(labels.shape[-1], dtype=torch.bool, device=labels.device)


def _even_positions(length: int, count: int, device: torch.device | None) -> Tensor:
    """`count` <= `length` different positions, each in the middle of an equal share of 0 .. `length` - 1."""
    return (2 * torch.arange(count, device=device) + 1) * length // (2 * count)
