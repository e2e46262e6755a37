"""The one supervised contrastive loss that L_ins, L_intra and L_inter share.

Which pairs are positive is decided in `train.pairs`; `train.pretraining` weighs and adds the three losses.
Nothing here waits for the device: no value is read back, and no shape depends on one.
"""

from __future__ import annotations

import torch
from torch import Tensor

# An embedding shorter than this has no direction: its cosine with everything is 0, and so is its gradient.
SHORTEST_EMBEDDING = 1e-12


def supervised_contrastive(
    embeddings: Tensor,
    positives: Tensor,
    *,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    valid: Tensor | None = None,
) -> Tensor:
    """Pull the positives of each embedding towards it, against all others of its group.

    `embeddings` is floating point (..., M, D), of any length: cosines are compared. `positives` is bool
    (..., M, M); row i marks the positives of anchor i, the diagonal is ignored. `valid` is bool (..., M); an
    item that is not valid (padding) is no anchor, no positive and no negative. Leading dimensions are
    independent groups, and broadcast.

    Returns a scalar: the mean over the anchors of a group that have a positive, then the mean over the
    groups that have an anchor; 0, with zero gradient, where there is none. Computed in float32, also under
    autocast; float64 stays float64.

    Source: supervised contrastive learning (Khosla et al., NeurIPS 2020, equation 2), with the factor
    temperature / base_temperature of SuperCL (IEEE TIP 2026).
    """
    num_items = embeddings.shape[-2]
    candidates = ~torch.eye(num_items, dtype=torch.bool, device=embeddings.device)
    if valid is not None:
        candidates = candidates & valid[..., None, :] & valid[..., :, None]
    positives = positives & candidates

    logits = cosine_similarities(embeddings) / temperature
    # Finite: over nothing but -inf the log-sum-exp has a NaN gradient, which anomaly detection would report.
    lowest = torch.finfo(logits.dtype).min
    log_normaliser = logits.masked_fill(~candidates, lowest).logsumexp(dim=-1)
    num_positives = positives.sum(dim=-1)
    mean_positive = logits.masked_fill(~positives, 0).sum(dim=-1) / num_positives.clamp_min(1)

    is_anchor = num_positives > 0
    anchor_loss = (log_normaliser - mean_positive).masked_fill(~is_anchor, 0)
    num_anchors = is_anchor.sum(dim=-1)
    group_loss = anchor_loss.sum(dim=-1) / num_anchors.clamp_min(1)
    num_groups = (num_anchors > 0).sum()
    return temperature / base_temperature * group_loss.sum() / num_groups.clamp_min(1)


def cosine_similarities(embeddings: Tensor) -> Tensor:
    """Cosine similarity of every two embeddings of a group.

    `embeddings` is floating point (..., M, D). Returns (..., M, M) in [-1, 1], up to rounding, float32 also
    under autocast; float64 stays float64. An embedding of length 0 has similarity 0 with everything, itself
    included, and zero gradient.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        length = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
        inverse = (1 / length.clamp_min(SHORTEST_EMBEDDING)).masked_fill(length < SHORTEST_EMBEDDING, 0)
        unit = embeddings * inverse
        return unit @ unit.mT
