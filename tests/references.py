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


# ---------------------------------------------------------------- preprocessing: superpixels and weak labels


def connected_superpixels(labels: np.ndarray) -> np.ndarray:
    """(y, x) from (y, x): pieces of equal labels that hang together by edges, numbered as a reader meets them."""
    height, width = labels.shape
    pieces = np.arange(height * width).reshape(height, width)
    changed = True
    while changed:  # every pixel takes the smallest piece of its like neighbours until none is smaller
        changed = False
        for y in range(height):
            for x in range(width):
                for near_y, near_x in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    inside = 0 <= near_y < height and 0 <= near_x < width
                    if (
                        inside
                        and labels[near_y, near_x] == labels[y, x]
                        and pieces[near_y, near_x] < pieces[y, x]
                    ):
                        pieces[y, x] = pieces[near_y, near_x]
                        changed = True
    numbers: dict[int, int] = {}
    return np.array([[numbers.setdefault(int(piece), len(numbers)) for piece in row] for row in pieces])


def superpixel_means(values: np.ndarray, superpixels: np.ndarray, num_superpixels: int) -> np.ndarray:
    """(num_superpixels,) from two maps (y, x); 0 for a superpixel without a pixel."""
    means = []
    for superpixel in range(num_superpixels):
        inside = [float(v) for v, s in zip(values.flat, superpixels.flat, strict=True) if s == superpixel]
        means.append(math.fsum(inside) / len(inside) if inside else 0.0)
    return np.array(means)


def graph_components(num_nodes: int, edges: list[tuple[int, int]]) -> np.ndarray:
    """(num_nodes,): components of an undirected graph, numbered in the order of their smallest node."""
    adjacency = np.zeros((num_nodes, num_nodes), bool)
    for start, end in edges:
        adjacency[start, end] = True
    smallest = components(adjacency).tolist()
    order = sorted(set(smallest))
    return np.array([order.index(node) for node in smallest], dtype=int)


def centred_directions(rows: np.ndarray) -> np.ndarray:
    """(n, d + 1) from (n, d): each row less its mean, of length 1; a constant row points along the last axis."""
    out = np.zeros((len(rows), rows.shape[1] + 1))
    for i, row in enumerate(rows.astype(float)):
        centred = row - sum(row) / len(row)
        length = math.sqrt(float(centred @ centred))
        if length < 1e-6 * math.sqrt(len(row)):
            out[i, -1] = 1.0
        else:
            out[i, :-1] = centred / length
    return out


def nearest_neighbours(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and cosine of the most similar other row of every row of (n, d); ties to the lower index."""
    if len(units) == 1:
        return np.zeros(1, int), np.ones(1)
    nearest, similarity = [], []
    for i, unit in enumerate(units):
        others = [j for j in range(len(units)) if j != i]
        best = max(others, key=lambda j: (float(unit @ units[j]), -j))
        nearest.append(best)
        similarity.append(float(unit @ units[best]))
    return np.array(nearest), np.array(similarity)


def first_neighbour_hierarchy(rows: np.ndarray, *, min_components: int = 5) -> list[np.ndarray]:
    """The partitions of (n, d), finest first: link nearest neighbours, average the members' directions, again."""
    units = centred_directions(rows)
    members = [[i] for i in range(len(rows))]
    partitions: list[np.ndarray] = []
    while True:
        means = np.stack([units[group].sum(axis=0) for group in members])
        nodes, _ = _directions(means)
        nearest, _ = nearest_neighbours(nodes)
        joined = graph_components(len(nodes), list(enumerate(nearest.tolist())))
        num_components = len(set(joined.tolist()))
        if partitions and (num_components < min_components or num_components == len(members)):
            return partitions
        members = [
            sorted(
                i for group, label in zip(members, joined, strict=True) if label == component for i in group
            )
            for component in range(num_components)
        ]
        labels = np.zeros(len(rows), int)
        for component, group in enumerate(members):
            labels[group] = component
        partitions.append(labels)
