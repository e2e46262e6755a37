"""The one supervised contrastive loss that L_ins, L_intra and L_inter share.

Which pairs are positive is decided in `train.pairs`; `train.pretraining` weighs and adds the three losses.
Nothing here waits for the device: no value is read back, and no shape depends on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# An embedding shorter than this has no direction: its cosine with everything is 0, and so is its gradient.
SHORTEST_EMBEDDING: Final = 1e-12

# Of one matrix over pairs, of which a few live at a time. On a processor they stay in its last cache: with 2,048 items
# of width 128 on one core a group takes 40 ms, as with smaller chunks, which are more calls; 16 MiB take 44 ms. A GPU
# needs more work in each call.
CPU_CHUNK_BYTES: Final = 8 * 2**20
GPU_CHUNK_BYTES: Final = 32 * 2**20


def supervised_contrastive(
    embeddings: Tensor, pairs: Tensor, *, temperature: float = 0.1, base_temperature: float = 0.07
) -> Tensor:
    """Pull the positives of each embedding towards it, against all others of its group.

    `embeddings` is floating point (..., M, D), of any length: cosines are compared. `pairs` says which are positives
    of each other. Labels, integer (..., M): those of equal label; an item with a negative one is padding, which is no
    anchor, no positive and no negative. Or a mask, bool (..., M, M): row i marks the positives of anchor i, and the
    diagonal is ignored. Leading dimensions are independent groups.

    Returns a scalar: the mean over the anchors of a group that have a positive, then the mean over the groups that
    have an anchor; 0, with zero gradient, where there is none. Computed in float32, also under autocast; float64 stays
    float64. The matrices over pairs are made in chunks and none is kept for the backward pass.

    Source: supervised contrastive learning (Khosla et al., NeurIPS 2020, equation 2), with the factor
    temperature / base_temperature of SuperCL (IEEE TIP 2026).
    """
    num_items, width = embeddings.shape[-2:]
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = _directions(embeddings).reshape(-1, num_items, width)
        shape = (num_items, num_items) if pairs.dtype == torch.bool else (num_items,)
        loss = _Contrast.apply(unit, pairs.reshape(-1, *shape), temperature)
        return temperature / base_temperature * loss


def cosine_similarities(embeddings: Tensor) -> Tensor:
    """Cosine similarity of every two embeddings of a group.

    `embeddings` is floating point (..., M, D). Returns (..., M, M) in [-1, 1], up to rounding, float32 also
    under autocast; float64 stays float64. An embedding of length 0 has similarity 0 with everything, itself
    included, and zero gradient.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = _directions(embeddings)
        return unit @ unit.mT


class _Contrast(torch.autograd.Function):
    """The loss of unit vectors. Its gradient is made beside its value, while a chunk is at hand, and scaled later."""

    @staticmethod
    def forward(ctx: Any, unit_GMD: Tensor, pairs: Tensor, temperature: float) -> Tensor:
        num_groups, num_items, _ = unit_GMD.shape
        is_mask = pairs.dtype == torch.bool
        loss_GM = unit_GMD.new_zeros(num_groups, num_items)
        is_padding_GM = torch.zeros_like(loss_GM, dtype=torch.bool) if is_mask else pairs < 0
        is_anchor_GM = torch.zeros_like(is_padding_GM)
        # Added to logits. Finite: a row of nothing but -inf would have the softmax NaN.
        lowest = torch.finfo(unit_GMD.dtype).min
        excluded_GM = torch.zeros_like(loss_GM).masked_fill_(is_padding_GM, lowest)
        gradient_GMD = torch.zeros_like(unit_GMD)
        for groups, rows in _chunks(unit_GMD):
            unit = unit_GMD[groups]
            logits = torch.baddbmm(excluded_GM[groups, None], unit[:, rows] / temperature, unit.mT)
            is_positive = pairs[groups, rows] if is_mask else pairs[groups, rows, None] == pairs[groups, None]
            target = is_positive.to(unit.dtype)
            # Nothing is contrasted with itself.
            logits.diagonal(rows.start, 1, 2).fill_(lowest)
            target.diagonal(rows.start, 1, 2).fill_(0)

            num_positives = target.sum(dim=-1).masked_fill_(is_padding_GM[groups, rows], 0)
            is_anchor = num_positives > 0
            target.mul_(num_positives.reciprocal().masked_fill_(~is_anchor, 0)[..., None])
            log_share = logits.log_softmax(dim=-1)
            loss_GM[groups, rows] = -(target * log_share).sum(dim=-1)
            is_anchor_GM[groups, rows] = is_anchor
            # By the logits of the anchors; each cosine has a unit vector on either side.
            slope = log_share.exp_().mul_(is_anchor[..., None]).sub_(target)
            gradient_GMD[groups].baddbmm_(slope.mT, unit[:, rows])
            gradient_GMD[groups, rows].baddbmm_(slope, unit)

        num_anchors = is_anchor_GM.sum(dim=1)
        weight_G = 1 / (num_anchors.clamp_min(1) * (num_anchors > 0).sum().clamp_min(1)).to(loss_GM.dtype)
        ctx.save_for_backward(gradient_GMD.mul_(weight_G[:, None, None] / temperature))
        return (loss_GM.sum(dim=1) * weight_G).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient_GMD,) = ctx.saved_tensors
        return grad * gradient_GMD, None, None


def _chunks(unit_GMD: Tensor) -> Iterator[tuple[slice, slice]]:
    """Groups and rows whose part of the (G, M, M) matrix is as large as a chunk may be, and at least one row."""
    num_groups, num_items, _ = unit_GMD.shape
    rows_in_chunk = (CPU_CHUNK_BYTES if unit_GMD.device.type == "cpu" else GPU_CHUNK_BYTES) // (
        num_items * unit_GMD.element_size()
    )
    num_rows = max(1, min(num_items, rows_in_chunk))
    num_together = max(1, rows_in_chunk // num_rows)
    for group in range(0, num_groups, num_together):
        for row in range(0, num_items, num_rows):
            yield slice(group, group + num_together), slice(row, row + num_rows)


def _directions(embeddings: Tensor) -> Tensor:
    """Embeddings (..., D) at length 1, or 0 where they have no direction, in at least float32."""
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    length = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
    inverse = (1 / length.clamp_min(SHORTEST_EMBEDDING)).masked_fill(length < SHORTEST_EMBEDDING, 0)
    return embeddings * inverse
