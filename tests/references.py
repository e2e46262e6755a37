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


def statistics(volume: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Per channel of (c, z, y, x): minimum, 0.5 and 99.5 percentile, maximum; mean and deviation between these."""
    rows = []
    for channel in volume:
        ordered = sorted(float(value) for value in channel.flat)
        low, high = percentile(ordered, 0.5), percentile(ordered, 99.5)
        clipped = [min(max(value, low), high) for value in ordered]
        mean = math.fsum(clipped) / len(clipped)
        variance = math.fsum((value - mean) ** 2 for value in clipped) / len(clipped)
        rows.append((ordered[0], low, high, ordered[-1], mean, math.sqrt(variance)))
    return tuple(rows)


def percentile(ordered: list[float], percent: float) -> float:
    """Of an ascending list, linear between neighbours."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def asp_on_grid(image: np.ndarray, superpixels: np.ndarray, *, grid: int = 32) -> np.ndarray:
    """(grid, grid) from (c, y, x) and (y, x): channels rescaled to 0..1, averaged over superpixels and channels."""
    num_superpixels = int(superpixels.max()) + 1
    height, width = superpixels.shape
    total = np.zeros((grid, grid))
    for channel in image.astype(float):
        low, high = min(channel.flat), max(channel.flat)
        scaled = (channel - low) / (high - low) if high > low else channel * 0
        means = superpixel_means(scaled, superpixels, num_superpixels)
        for row in range(grid):
            for column in range(grid):
                y, x = int((row + 0.5) * height / grid), int((column + 0.5) * width / grid)
                total[row, column] += means[superpixels[y, x]] / len(image)
    return total


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
        if length <= 1e-6 * math.sqrt(len(row)) * max(abs(value) for value in row):
            out[i, -1] = 1.0
        else:
            out[i, :-1] = centred / length
    return out


def nearest_neighbours(units: np.ndarray, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Index and cosine of the most similar row (of another group) of every row of (n, d); ties to the lower index."""
    if len(units) == 1:
        return np.zeros(1, int), np.ones(1)
    nearest, similarity = [], []
    for i, unit in enumerate(units):
        others = [j for j in range(len(units)) if j != i and (groups is None or groups[j] != groups[i])]
        best = max(others, key=lambda j: (float(unit @ units[j]), -j))
        nearest.append(best)
        similarity.append(float(unit @ units[best]))
    return np.array(nearest), np.array(similarity)


def component_means(units: np.ndarray, component_of_row: np.ndarray, num_components: int) -> np.ndarray:
    """The mean of the rows (n, d) of each component, scaled to length 1."""
    means = np.zeros((num_components, units.shape[1]))
    for unit, component in zip(units.astype(float), component_of_row, strict=True):
        means[component] += unit
    return _directions(means)[0]


def first_neighbour_hierarchy(
    rows: np.ndarray, *, cases: np.ndarray | None = None, min_components: int = 5
) -> list[np.ndarray]:
    """The partitions of (n, d), finest first: link nearest neighbours, average the members' directions, again."""
    units = centred_directions(rows)
    members = [[i] for i in range(len(rows))]
    partitions: list[np.ndarray] = []
    while True:
        means = np.stack([units[group].sum(axis=0) for group in members])
        nodes, _ = _directions(means)
        nearest, _ = nearest_neighbours(nodes, None if partitions else cases)
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


# ---------------------------------------------------------------- preprocessing: how good superpixels are


def superpixel_scores(
    superpixels: np.ndarray, image: np.ndarray, truth: np.ndarray, *, tolerance: int = 2
) -> dict[str, float]:
    """Scores of a map (y, x) against an image (c, y, x) and classes (y, x) that are not all one class."""
    height, width = superpixels.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    members: dict[int, list[tuple[int, int]]] = {}
    for place in places:
        members.setdefault(int(superpixels[place]), []).append(place)
    num_right = leak = 0
    for pixels in members.values():
        classes = [int(truth[place]) for place in pixels]
        num_right += max(classes.count(c) for c in classes)
        leak += sum(min(classes.count(c), len(classes) - classes.count(c)) for c in set(classes))

    def borders(regions: np.ndarray) -> list[tuple[int, int]]:
        return [
            (y, x)
            for y, x in places
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
            if near in places and regions[near] != regions[y, x]
        ]

    found, wanted = borders(superpixels), set(borders(truth))
    recalled = [
        any(abs(y - near_y) <= tolerance and abs(x - near_x) <= tolerance for near_y, near_x in found)
        for y, x in wanted
    ]
    total = explained = 0.0
    for channel in image.astype(float):
        values = (channel - channel.min()) / ((channel.max() - channel.min()) or 1)
        mean = values.sum() / len(places)
        total += sum((values[place] - mean) ** 2 for place in places)
        for pixels in members.values():
            explained += len(pixels) * (sum(values[place] for place in pixels) / len(pixels) - mean) ** 2
    return {
        "asa": num_right / len(places),
        "undersegmentation": leak / len(places),
        "boundary_recall": sum(recalled) / len(recalled),
        "explained_variance": explained / total,
    }


def slic(features: np.ndarray, *, n_segments: int, compactness: float) -> np.ndarray:
    """(y, x) from (c, y, x): SLIC by scikit-image's rules, pixel by pixel."""
    channels, height, width = features.shape
    span = features.max() - features.min()
    scaled = (features - features.min()) / (span if span else 1.0) * (1.0 / compactness)

    def steps(num_points: int) -> list[float]:
        if height * width <= num_points:
            return [1.0, 1.0]
        steps = [math.sqrt(height * width / num_points)] * 2
        short, long = sorted((0, 1), key=lambda axis: (height, width)[axis])
        if (height, width)[short] < steps[short]:
            steps[short], steps[long] = (height, width)[short], (height, width)[long] / num_points
        return steps

    step_y, step_x = steps(n_segments)
    seeds = [
        [float(y), float(x)] + [0.0] * channels
        for y in range(int(step_y // 2), height, round(step_y))
        for x in range(int(step_x // 2), width, round(step_x))
    ]
    reach_y, reach_x = (2 * round(step) for step in steps(len(seeds)))
    weight = 1 / max(round(step_y), round(step_x)) ** 2

    def inside(place: int, centre: float, reach: int, size: int) -> bool:
        return int(max(centre - reach, 0)) <= place < int(min(centre + reach + 1, size))

    clusters: dict[int, list[float]] = dict(enumerate(seeds))
    labels = np.zeros((height, width), int)
    for _ in range(10):
        for y in range(height):
            for x in range(width):
                offers = []
                for k, (centre_y, centre_x, *colour) in clusters.items():
                    if inside(y, centre_y, reach_y, height) and inside(x, centre_x, reach_x, width):
                        near = ((centre_y - y) ** 2 + (centre_x - x) ** 2) * weight
                        offers.append((near + sum((scaled[:, y, x] - colour) ** 2), k))
                if offers:
                    labels[y, x] = min(offers)[1]
        clusters = {}
        for k in range(len(seeds)):
            ys, xs = np.nonzero(labels == k)
            if len(ys):
                clusters[k] = [ys.mean(), xs.mean(), *scaled[:, ys, xs].mean(axis=1)]
    return _slic_connectivity(labels, len(seeds))


def _slic_connectivity(labels: np.ndarray, num_seeds: int) -> np.ndarray:
    """Pieces of at most 3 mean areas; one under half a mean area joins the piece that its search met last."""
    height, width = labels.shape
    min_size, max_size = (int(factor * labels.size / num_seeds) for factor in (0.5, 3))
    pieces = np.full(labels.shape, -1)
    count = 0
    for seed in np.ndindex(labels.shape):
        if pieces[seed] >= 0:
            continue
        pieces[seed] = touched = count
        found = [seed]
        for y, x in found:
            for near in ((y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x)):
                if len(found) >= max_size or not (0 <= near[0] < height and 0 <= near[1] < width):
                    continue
                if pieces[near] < 0 and labels[near] == labels[seed]:
                    pieces[near] = count
                    found.append(near)
                elif pieces[near] not in (-1, count):
                    touched = pieces[near]
        if len(found) < min_size:
            for place in found:
                pieces[place] = touched
        else:
            count += 1
    return pieces


def connect_regions(
    labels: np.ndarray, features: np.ndarray, means: np.ndarray, smallest_pixels: int
) -> tuple[np.ndarray, int]:
    """(y, x) and the number of regions, from labels (y, x) with 65,535 for the background, (c, y, x) and (c, k)."""
    pieces = connected_superpixels(labels).astype(int)  # numbered as a reader meets them
    label_of = [int(labels[tuple(np.argwhere(pieces == piece)[0])]) for piece in range(pieces.max() + 1)]
    sizes = np.bincount(pieces.ravel()).tolist()
    touching: list[list[int]] = [[] for _ in sizes]  # in the order in which the kernel meets them
    height, width = labels.shape
    for y in range(height):
        ends = [x for x in range(1, width) if pieces[y, x] != pieces[y, x - 1]] + [width]
        for start, end in zip([0, *ends], ends, strict=False):
            across = [(near, x) for near in (y - 1, y + 1) for x in reversed(range(start, end))]
            for near_y, near_x in [(y, start - 1), (y, end), *across]:
                if 0 <= near_y < height and 0 <= near_x < width:
                    near = int(pieces[near_y, near_x])
                    if near != pieces[y, start] and 65_535 not in (
                        label_of[near],
                        label_of[pieces[y, start]],
                    ):
                        touching[pieces[y, start]].append(near)

    foreground = [piece for piece, label in enumerate(label_of) if label != 65_535]
    waiting = [piece for piece in foreground if sizes[piece] < smallest_pixels]
    mean = {piece: means[:, label_of[piece]] for piece in foreground}
    mean |= {piece: features[:, pieces == piece].mean(axis=1) for piece in waiting}
    joined = {piece: piece for piece in range(len(sizes))}
    while waiting:
        nearest = {}
        for piece in waiting:
            whole = [joined[near] for near in touching[piece] if near not in waiting]
            if whole:
                nearest[piece] = min(whole, key=lambda near: sum((mean[near] - mean[piece]) ** 2))
        if nearest:
            joined |= nearest
            waiting = [piece for piece in waiting if piece not in nearest]
        else:  # islands of fragments: the largest around themselves become whole
            rank = {piece: (sizes[piece], -piece) for piece in waiting}
            waiting = [p for p in waiting if any(rank[near] > rank[p] for near in touching[p])]

    ids: dict[int, int] = {}
    further = []
    for piece in sorted(set(joined.values())):
        if label_of[piece] == 65_535 or label_of[piece] in ids.values():
            further.append(piece)
        else:
            ids[piece] = label_of[piece]
    for piece in further:
        ids[piece] = next(number for number in range(len(sizes)) if number not in ids.values())
    while max(ids.values()) >= len(ids):
        last = max(ids, key=lambda piece: ids[piece])
        ids[last] = next(number for number in range(len(ids)) if number not in ids.values())
    return np.array([[ids[joined[int(piece)]] for piece in row] for row in pieces]), len(ids)


def fast_slic(
    image: np.ndarray,
    mask: np.ndarray | None,
    *,
    n_segments: int,
    compactness: float,
) -> np.ndarray:
    """(y, x) from (c, y, x) and bool (y, x): coarse-to-fine SLIC, its numbers in float64."""
    channels, height, width = image.shape
    inside = np.ones((height, width), bool) if mask is None else mask
    side = max(math.sqrt(inside.sum() / n_segments), math.sqrt(height * width / 29_000))
    features = np.zeros(image.shape)
    for c, channel in enumerate(image.astype(float)):
        grey = (channel - channel.min()) / ((channel.max() - channel.min()) or 1)
        features[c] = _lightness(grey) if channels == 1 else 100 * grey
    features *= side / compactness * inside

    # Blocks: their number of pixels, and the means of y, x and features over these.
    factor = 1 if side < 12 else 4 if side < 24 else 8
    rows, columns = -(-height // factor), -(-width // factor)
    sizes = np.zeros((rows, columns))
    blocks = np.zeros((2 + channels, rows, columns))
    for i, j in np.ndindex(rows, columns):
        window = np.s_[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
        sizes[i, j] = inside[window].sum()
        blocks[:2, i, j] = (np.array([i, j]) + 0.5) * factor - 0.5
        blocks[2:, i, j] = features[(slice(None), *window)].sum(axis=(1, 2)) / max(sizes[i, j], 1)

    def cells(length: int, other_length: int, num_blocks: int) -> list[int]:
        """The cell of every block along one axis."""
        step = side * max(1, side / other_length)
        count = max(1, math.ceil((length - step // 2) / max(1, round(step))))
        edges = [k * num_blocks // count for k in range(count + 1)]
        return np.repeat(np.arange(count), np.diff(edges)).tolist()

    cell_y, cell_x = cells(height, width, rows), cells(width, height, columns)
    num_y, num_x = cell_y[-1] + 1, cell_x[-1] + 1
    labels = np.add.outer(np.array(cell_y) * num_x, cell_x)
    centres = np.full((2 + channels, num_y * num_x), 1e7)

    def move(labels: np.ndarray) -> None:
        for k in range(centres.shape[1]):
            weights = sizes * (labels == k)
            if weights.any():
                centres[:, k] = (blocks * weights).sum(axis=(1, 2)) / weights.sum()

    def assign() -> np.ndarray:
        labels = np.empty((rows, columns), int)
        for i, j in np.ndindex(rows, columns):
            near = [
                y * num_x + x
                for y in range(max(cell_y[i] - 1, 0), min(cell_y[i] + 2, num_y))
                for x in range(max(cell_x[j] - 1, 0), min(cell_x[j] + 2, num_x))
            ]
            labels[i, j] = min(near, key=lambda k: ((centres[:, k] - blocks[:, i, j]) ** 2).sum())
        return labels

    move(labels)
    for _ in range(9):
        labels = assign()
        move(labels)
    if factor == 1:
        labels = assign()
    labels[sizes == 0] = 65_535
    smallest = int(0.5 * inside.sum() / n_segments)
    labels, count = connect_regions(labels, blocks[2:], centres[2:], smallest // factor**2)
    if factor == 1:
        return labels

    centres = np.full((2 + channels, count), 1e7)
    labels[sizes == 0] = 65_535
    move(labels)
    for _ in range(int(math.log2(factor)) - 1 if mask is None else 0):
        padded = np.pad(features, ((0, 0), (1, 1), (1, 1)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        features = windows.mean(axis=(3, 4))
    pixels = np.full((height, width), 65_535)
    for y, x in np.argwhere(inside).tolist():
        top, left = (max(0, 2 * (place // (2 * factor)) - 1) for place in (y, x))
        bottom, right = (2 * (place // (2 * factor)) + 3 for place in (y, x))
        around = [k for k in labels[top:bottom, left:right].flat if k != 65_535]
        frequent = sorted(dict.fromkeys(around), key=lambda k: -around.count(k))[:4]
        point = np.array([y, x, *features[:, y, x]])
        pixels[y, x] = min(frequent, key=lambda k: ((centres[:, k] - point) ** 2).sum())
    return connect_regions(pixels, features, centres[2:], smallest)[0]


def _lightness(grey: np.ndarray) -> np.ndarray:
    """CIE L* of grey 0..1 in sRGB."""
    linear = np.where(grey > 0.04045, ((grey + 0.055) / 1.055) ** 2.4, grey / 12.92)
    return np.where(linear > 0.008856, 116 * np.cbrt(linear) - 16, 116 * 7.787 * linear)
