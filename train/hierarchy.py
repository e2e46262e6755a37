"""The CCL hierarchy in torch: first-neighbour clustering on the device of the descriptors.

The same computation as the offline stage makes of the same descriptors: equal labels, except where two neighbours of a
node are equally near within rounding (1e-6 in cosine). Matrices of products are made block by block and never whole.
Called where training renews its weak labels from its own encoder; descriptors come from `train.descriptors`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from supercl_core.cache.weak_labels import MIN_COMPONENTS
from supercl_core.errors import SuperCLError, UsageError

BLOCK_ROWS: Final = 2048
"""Rows of one block of the similarity matrix: 16 MiB of float32."""

BLOCK_COLUMNS: Final = 64
"""Columns of the descriptors that are averaged together, in float64."""

LARGEST_COSINE: Final = 1 - 1e-6
"""Rows more alike than this are equally near: what is left between them is rounding, other in every block."""


@torch.no_grad()
def first_neighbour_hierarchy(
    descriptors: Tensor, groups: Tensor | None = None, *, block_rows: int = BLOCK_ROWS
) -> list[Tensor]:
    """Link every row to its nearest neighbour, take connected components, average them, and again.

    `descriptors`: floating point (n, d), compared by the cosine after `normalise`. `groups`: integer (n,), such as
    the case of each slice; a row is never linked to one of its own group, but components may be, whatever is in them.
    `block_rows` bounds the memory and, but for rounding, not the result.

    Returns the component of every row, int32 (n,), for each level, finest first. Components are numbered in the
    order of their first rows. Every level but the finest has at least five of them.

    Raises SuperCLError for NaN and infinities, and UsageError where all rows are of one group.

    Source: Sarfraz et al., "Efficient Parameter-free Clustering Using First Neighbor Relations", CVPR 2019; METHOD,
    cached IGCP.
    """
    num_bad = int((~torch.isfinite(descriptors)).any(dim=1).sum())
    if num_bad:
        raise SuperCLError(
            "Descriptors are not finite.",
            expected="finite numbers",
            found=f"NaN or infinities in {num_bad:,} of {len(descriptors):,} rows",
            next_step="Check what computed them: an encoder may have diverged.",
        )
    if groups is not None and bool((groups == groups[0]).all()):
        raise UsageError(
            "There is no other group to link to.",
            expected="rows of at least two groups, such as slices of two cases",
            found=f"{len(groups):,} rows of one group",
            next_step="Let rows of one group be linked, or use more cases.",
        )
    unit_rows = torch.cat([normalise(part) for part in descriptors.split(block_rows)])
    nodes = unit_rows
    levels: list[Tensor] = []
    labels = torch.arange(len(unit_rows), device=unit_rows.device)
    while True:
        nearest = nearest_neighbours(nodes, None if levels else groups, block_rows=block_rows)
        merged = connected_components(nearest)
        num_components = int(merged.max()) + 1
        if levels and num_components < MIN_COMPONENTS:
            return levels
        labels = merged[labels]
        levels.append(labels.int())
        nodes = component_means(unit_rows, labels, num_components)


def normalise(descriptors: Tensor) -> Tensor:
    """Rows with their mean subtracted and scaled to length 1: float32 (n, d + 1).

    The last column is 1 for rows without any contrast and 0 for all others: constant slices are alike among
    themselves and like nothing else.
    """
    centred = descriptors.double()
    centred = centred - centred.mean(dim=1, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    # Relative, since features of an encoder may be of any size.
    largest = descriptors.abs().amax(dim=1, keepdim=True).double()
    flat = length <= 1e-6 * math.sqrt(descriptors.shape[1]) * largest
    return torch.cat([(centred / length).masked_fill(flat, 0), flat], dim=1).float()


def nearest_neighbours(
    unit_rows: Tensor, groups: Tensor | None = None, *, block_rows: int = BLOCK_ROWS
) -> Tensor:
    """The most similar other row of every row, of another group where there are `groups`; ties to the lower index.

    `unit_rows`: float32 (n, d) of length 1; `groups`: integer (n,), at least two. Returns int64 (n,). A single row is
    its own neighbour.
    """
    num_rows = len(unit_rows)
    best = unit_rows.new_full((num_rows,), -math.inf)
    nearest = torch.zeros(num_rows, dtype=torch.long, device=unit_rows.device)
    blocks = [slice(start, start + block_rows) for start in range(0, num_rows, block_rows)]

    def improve(rows: slice, others: slice, similarities: Tensor) -> None:
        similarity, index = similarities.max(dim=1)  # of equals the first
        better = similarity > best[rows]  # of equals the one found before, whose index is lower
        best[rows] = similarity.where(better, best[rows])
        nearest[rows] = (index + others.start).where(better, nearest[rows])

    with _full_precision():
        for number, rows in enumerate(blocks):
            for others in blocks[number:]:
                similarities = (unit_rows[rows] @ unit_rows[others].T).clamp_(max=LARGEST_COSINE)
                if groups is not None:
                    similarities.masked_fill_(groups[rows, None] == groups[others], -math.inf)
                elif others is rows:
                    similarities.fill_diagonal_(-math.inf)
                improve(rows, others, similarities)
                if others is not rows:
                    improve(others, rows, similarities.T.contiguous())
    return nearest


def connected_components(nearest: Tensor) -> Tensor:
    """The components of the graph in which node i is linked to node `nearest[i]` alone: int64 (n,).

    `nearest`: int64 (n,). Components are numbered in the order of their smallest nodes. A walk along the links ends
    in the one cycle of its component. Doubling its length log2(n) times finds the smallest node of that cycle, on the
    device and with a few numbers a node.
    """
    nodes = torch.arange(len(nearest), device=nearest.device)
    # Of the first 2^k nodes of the walk from each node the smallest, and the node after them.
    smallest, reached = nodes, nearest
    for _ in range((len(nearest) - 1).bit_length()):
        smallest = torch.minimum(smallest, smallest[reached])
        reached = reached[reached]
    cycle = smallest[reached]
    first = nodes.scatter_reduce(0, cycle, nodes, "amin")[cycle]
    return ((first == nodes).cumsum(0) - 1)[first]


def component_means(unit_rows: Tensor, components: Tensor, num_components: int) -> Tensor:
    """The mean row of each component, scaled to length 1: float32 (num_components, d).

    Sums are float64 and taken in the order of the rows, on a GPU too.
    """
    members = components.argsort(stable=True)
    starts = torch.searchsorted(components[members], torch.arange(num_components, device=components.device))
    sums = torch.cat(
        [
            F.embedding_bag(members, columns.double(), starts, mode="sum")
            for columns in unit_rows.split(BLOCK_COLUMNS, dim=1)
        ],
        dim=1,
    )
    length = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
    return (sums / length.where(length > 0, 1)).float()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 without TF32 or bfloat16, which a process may allow itself to be faster elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
