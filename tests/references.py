"""Plain, slow twins of the project's numerical code, for tests to compare with.

Loops over NumPy arrays in float64, written from the definitions: none shares code with what it is compared
to, none is vectorised, and gradients are derived by hand.
"""

from __future__ import annotations

import math

import numpy as np

# ---------------------------------------------------------------- training: the contrastive loss and its pairs


def supervised_contrastive(
    embeddings: np.ndarray,
    positives: np.ndarray,
    *,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    valid: np.ndarray | None = None,
) -> tuple[float, np.ndarray]:
    """Value and gradient of the loss for float64 (groups, M, D), bool (groups, M, M) and (groups, M)."""
    num_groups, num_items, _ = embeddings.shape
    if valid is None:
        valid = np.ones((num_groups, num_items), bool)
    group_losses = []
    group_gradients = []
    for group in range(num_groups):
        units, lengths = _directions(embeddings[group])
        items = [i for i in range(num_items) if valid[group, i]]
        losses = []
        gradient = np.zeros_like(embeddings[group])
        for i in items:
            others = [a for a in items if a != i]
            partners = [p for p in others if positives[group, i, p]]
            if not partners:
                continue
            cosines = {a: float(units[i] @ units[a]) for a in others}
            total = sum(math.exp(cosines[a] / temperature) for a in others)
            log_shares = [math.log(math.exp(cosines[p] / temperature) / total) for p in partners]
            losses.append(-(temperature / base_temperature) * sum(log_shares) / len(partners))
            for a in others:
                share = math.exp(cosines[a] / temperature) / total
                slope = (share - (a in partners) / len(partners)) / base_temperature
                # d cos(x, y) / dx = (y/|y| - cos x/|x|) / |x|; a vector of length 0 stays put.
                for x, y in ((i, a), (a, i)):
                    if lengths[x] > 0:
                        gradient[x] += slope * (units[y] - cosines[a] * units[x]) / lengths[x]
        if losses:
            group_losses.append(sum(losses) / len(losses))
            group_gradients.append((group, gradient / len(losses)))
    gradients = np.zeros_like(embeddings)
    for group, gradient in group_gradients:
        gradients[group] = gradient / len(group_losses)
    return (sum(group_losses) / len(group_losses) if group_losses else 0.0), gradients


def _directions(vectors: np.ndarray) -> tuple[np.ndarray, list[float]]:
    lengths = [math.sqrt(float(vector @ vector)) for vector in vectors]
    units = np.stack(
        [v / length if length > 0 else 0 * v for v, length in zip(vectors, lengths, strict=True)]
    )
    return units, lengths


def ilcp_pairs(superpixels: np.ndarray) -> np.ndarray:
    """(B, 2hw, 2hw) from (B, h, w): same superpixel of the same slice, in either view."""
    batch, height, width = superpixels.shape
    items = [(view, y, x) for view in range(2) for y in range(height) for x in range(width)]
    pairs = np.zeros((batch, len(items), len(items)), bool)
    for b in range(batch):
        for i, (view_i, y_i, x_i) in enumerate(items):
            for j, (view_j, y_j, x_j) in enumerate(items):
                if (view_i, y_i, x_i) != (view_j, y_j, x_j) and superpixels[b, y_i, x_i] >= 0:
                    pairs[b, i, j] = superpixels[b, y_i, x_i] == superpixels[b, y_j, x_j]
    return pairs


def slice_pairs(num_slices: int, alike: np.ndarray) -> np.ndarray:
    """(2B, 2B) from (B, B): the two views of a slice, and any views of two slices that are alike."""
    items = [(view, index) for view in range(2) for index in range(num_slices)]
    pairs = np.zeros((len(items), len(items)), bool)
    for i, (view_i, slice_i) in enumerate(items):
        for j, (view_j, slice_j) in enumerate(items):
            if slice_i == slice_j:
                pairs[i, j] = view_i != view_j
            else:
                pairs[i, j] = alike[slice_i, slice_j]
    return pairs


def asp(features: np.ndarray, superpixels: np.ndarray, *, divide_by: str = "superpixel") -> np.ndarray:
    """(B, C, h, w) with every pixel replaced by the mean over its superpixel; padding (-1) is 0."""
    batch, channels, height, width = features.shape
    out = np.zeros((batch, channels, height, width))
    for b in range(batch):
        for label in set(superpixels[b].flatten().tolist()) - {-1}:
            places = [(y, x) for y in range(height) for x in range(width) if superpixels[b, y, x] == label]
            for c in range(channels):
                total = sum(float(features[b, c, y, x]) for y, x in places)
                for y, x in places:
                    out[b, c, y, x] = total / (len(places) if divide_by == "superpixel" else height * width)
    return out


def components(adjacency: np.ndarray) -> np.ndarray:
    """(M,) from (M, M): the smallest node that can be reached, by a walk from every node."""
    num_nodes = len(adjacency)
    labels = np.full(num_nodes, -1)
    for start in range(num_nodes):
        waiting = [start]
        while waiting:
            node = waiting.pop()
            if labels[node] >= 0:
                continue
            labels[node] = start
            waiting += [n for n in range(num_nodes) if adjacency[node, n] or adjacency[n, node]]
    return labels


def online_igcp_pairs(
    features_x1: np.ndarray,
    features_x2: np.ndarray,
    superpixels: np.ndarray,
    *,
    divide_by: str = "superpixel",
    view_pairs: str = "edge",
) -> np.ndarray:
    """(2B, 2B): same component of the graph that links each ASP map to its nearest neighbour."""
    num_slices = len(superpixels)
    maps = []
    for features in (features_x1, features_x2):
        mean = features.mean(axis=1, keepdims=True)
        maps += [row.flatten() for row in asp(mean, superpixels, divide_by=divide_by)]
    units, _ = _directions(np.stack(maps))
    num_maps = len(maps)
    edges = np.zeros((num_maps, num_maps), bool)
    for i in range(num_maps):
        others = [j for j in range(num_maps) if j != i]
        edges[i, max(others, key=lambda j: (float(units[i] @ units[j]), -j))] = True
    views = slice_pairs(num_slices, np.zeros((num_slices, num_slices), bool))
    labels = components(edges | views if view_pairs == "edge" else edges)
    pairs = np.zeros_like(edges)
    for i in range(num_maps):
        for j in range(num_maps):
            pairs[i, j] = i != j and (labels[i] == labels[j] or views[i, j])
    return pairs
