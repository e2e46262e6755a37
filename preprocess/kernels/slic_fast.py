"""Fast SLIC: k-means on block means, one assignment at full resolution, then connected regions.

Source: Achanta et al., "SLIC Superpixels Compared to State-of-the-Art Superpixel Methods", IEEE TPAMI 34 (2012),
for the distance and the iteration; that k-means runs on block means is our choice. It gives other superpixels
than scikit-image, of at least the same quality (`supercl quality`, `benchmarks/slic.py`). Called by
`preprocess.superpixels`.

Everything is float32 per pixel and float64 per cluster, summed in one fixed order: the same slice gives the same
superpixels on every machine. Loops over pixels are written so that LLVM vectorises them: rows are sliced before
they are indexed, candidates lie at constant distances in one array, and nothing is loaded under a condition.

C channel, Y row, X column, K cluster. A *block* is f x f pixels; a *cell* is what a cluster's seed owns on the grid
of seeds; a *tile* is 2 x 2 blocks.
"""

from __future__ import annotations

import math

import numpy as np

from preprocess.kernels import kernel
from preprocess.kernels.regions import BACKGROUND, connect_regions

NUM_ITERATIONS = 10
"""Of k-means, as published. With 3, a prototype lost 1.3 to 2.9 points of explained variance on brain slices."""

MAX_SEEDS = 29_000
"""Seeds at most, however small the foreground."""

CELLS = 9
"""Clusters that compete for a block: those of its own cell and of the cells around it."""

SLOTS = 4
"""Clusters that compete for a pixel: the most frequent ones of its tile's blocks and the blocks around these."""

CHUNK = 512
"""Columns that are assigned in one go; their coefficients fit the first-level cache."""

LANES = 16
"""Columns that are filled in one go: a vector of float32 on the widest machines."""

STRIDE = CHUNK + LANES
PLANE = SLOTS * STRIDE
"""Places of one kind of coefficient in the table of `_assign_pixels`."""

FAR = np.float32(3e38)

# L* (0..100) of a grey value 0..1 as two polynomials, lowest power first, each the best in the largest error, which
# is 0.02. They meet where L* turns from linear in the light to a cube root.
TURN = np.float32(0.092209147)
D0, D1, D2, D3 = (np.float32(v) for v in (0.0172176956, 71.0553990, -198.181825, 3997.89908))
B0, B1, B2, B3, B4, B5 = (
    np.float32(v) for v in (-4.59427061, 144.7614836, -97.52861294, 113.85484958, -79.71128968, 23.22676445)
)


def fast_slic(
    slice_CYX: np.ndarray, mask_YX: np.ndarray, n_segments: int, compactness: float
) -> tuple[np.ndarray, int]:
    """Superpixels of one slice.

    `slice_CYX`: int16, uint16 or float32 (c, y, x), in any unit; each channel is rescaled from its own minimum and
    maximum. One channel is compared by lightness L* (0..100), several by their values at the same scale.
    `mask_YX`: bool (y, x), the foreground, of which there is some; or of shape (0, 0) for the whole slice.
    `n_segments`: superpixels aimed at in the foreground. `compactness`: the difference in lightness that weighs as
    much as the side of a superpixel.

    Returns the map, uint16 (y, x), of ids 0..count-1, each one 4-connected region, and the count. Every region of
    the background is a superpixel too. A count above 65,535 means that the ids did not fit.
    """
    num_channels, height, width = slice_CYX.shape
    area = int(mask_YX.sum()) if mask_YX.size > 0 else height * width
    side = max(math.sqrt(area / n_segments), math.sqrt(height * width / MAX_SEEDS))
    features_CYX = np.empty((num_channels, height, width), np.float32)
    _features(slice_CYX, side / compactness, features_CYX)
    superpixels_YX, count = _segment(features_CYX, mask_YX, side, int(0.5 * area / n_segments))
    return superpixels_YX, count


@kernel
def _segment(
    features_CYX: np.ndarray, mask_YX: np.ndarray, side: float, smallest_pixels: int
) -> tuple[np.ndarray, int]:
    """Superpixels with sides of about `side` pixels; features count like distances in pixels, and may be changed.

    Apart from `_features`, so that only that is compiled for every dtype.
    """
    num_channels, height, width = features_CYX.shape
    masked = mask_YX.size > 0
    factor = block_side(side)
    if masked:
        _clear_background(features_CYX, mask_YX)

    # k-means on blocks, which lie cell by cell in these arrays (N), so that a cell's blocks are neighbours.
    means_CYX, weights_YX = _block_means(features_CYX, mask_YX, factor)
    rows = _cells(height, factor, side * max(1.0, side / width))
    columns = _cells(width, factor, side * max(1.0, side / height))
    order, owners_N, blocks_VN, sums_NV = _blocks_by_cell(means_CYX, weights_YX, rows, columns, factor)
    centres_VK = np.full((2 + num_channels, (len(rows) - 1) * (len(columns) - 1)), 1e7)
    _update(owners_N, sums_NV, centres_VK)
    for _ in range(NUM_ITERATIONS - 1):
        _assign_blocks(blocks_VN, rows, columns, factor, centres_VK, owners_N)
        _update(owners_N, sums_NV, centres_VK)
    if factor == 1:
        _assign_blocks(blocks_VN, rows, columns, factor, centres_VK, owners_N)
    blocks_YX = np.empty(weights_YX.shape, np.uint16)
    flat = blocks_YX.ravel()
    for place in range(len(order)):
        flat[order[place]] = owners_N[place] if sums_NV[place, 0] > 0 else BACKGROUND
    count = connect_regions(blocks_YX, means_CYX, centres_VK[2:], smallest_pixels // factor**2)
    if factor == 1:
        return blocks_YX, count

    # Every region of blocks becomes a cluster, and every pixel goes to one of those around it.
    for place in range(len(order)):
        if sums_NV[place, 0] > 0:
            owners_N[place] = flat[order[place]]
        else:
            owners_N[place], flat[order[place]] = 0, BACKGROUND
    centres_VK = np.full((2 + num_channels, count), 1e7)
    _update(owners_N, sums_NV, centres_VK)
    if not masked:  # the foreground's rim would take from the background
        spare_CYX = np.empty_like(features_CYX)
        for _ in range(int(math.log2(factor)) - 1):
            _smooth(features_CYX, spare_CYX)
            features_CYX, spare_CYX = spare_CYX, features_CYX
    superpixels_YX = np.empty((height, width), np.uint16)
    _assign_pixels(features_CYX, factor, blocks_YX, centres_VK, superpixels_YX)
    if masked:
        for y in range(height):
            for x in range(width):
                if not mask_YX[y, x]:
                    superpixels_YX[y, x] = BACKGROUND
    count = connect_regions(superpixels_YX, features_CYX, centres_VK[2:], smallest_pixels)
    return superpixels_YX, count


@kernel
def block_side(side: float) -> int:
    """Pixels along a block for superpixels of `side` pixels: at least three blocks, and none where these are small.

    With more blocks, quality on synthetic anatomy is a little better and on real slices is not; with blocks of 16
    pixels, joining the fragments at their rims costs more than fewer blocks save.
    """
    if side < 12:
        return 1
    return 4 if side < 24 else 8


@kernel
def _features(slice_CYX: np.ndarray, scale: float, out_CYX: np.ndarray) -> None:
    """Lightness of one channel, or several rescaled to 0..100, times `scale`."""
    num_channels, height, width = slice_CYX.shape
    for c in range(num_channels):
        lowest, highest = slice_CYX[c, 0].copy(), slice_CYX[c, 0].copy()
        for y in range(1, height):
            row = slice_CYX[c, y]
            for x in range(width):
                value = row[x]
                lowest[x] = value if value < lowest[x] else lowest[x]
                highest[x] = value if value > highest[x] else highest[x]
        low, span = np.float32(lowest.min()), np.float64(highest.max()) - np.float64(lowest.min())
        per_unit = np.float32(2 / span if span > 0 else 0)
        half = np.float32(0.5)  # the difference of two large values may be beyond single precision
        factor = np.float32(scale)
        for y in range(height):
            row, out = slice_CYX[c, y], out_CYX[c, y]
            if num_channels == 1:
                for x in range(width):
                    grey = (np.float32(row[x]) * half - low * half) * per_unit
                    dark = D0 + grey * (D1 + grey * (D2 + grey * D3))
                    bright = B0 + grey * (B1 + grey * (B2 + grey * (B3 + grey * (B4 + grey * B5))))
                    out[x] = (dark if grey < TURN else bright) * factor
            else:
                for x in range(width):
                    out[x] = (np.float32(row[x]) * half - low * half) * per_unit * (np.float32(100) * factor)


@kernel
def _clear_background(features_CYX: np.ndarray, mask_YX: np.ndarray) -> None:
    for c in range(len(features_CYX)):
        for y in range(features_CYX.shape[1]):
            for x in range(features_CYX.shape[2]):
                if not mask_YX[y, x]:
                    features_CYX[c, y, x] = 0


@kernel
def _block_means(features_CYX: np.ndarray, mask_YX: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over the foreground of each block, float32 (c, rows, columns), and its pixels there (rows, columns)."""
    num_channels, height, width = features_CYX.shape
    num_rows, num_columns = -(-height // factor), -(-width // factor)
    means_CYX = np.empty((num_channels, num_rows, num_columns), np.float32)
    weights_YX = np.empty((num_rows, num_columns), np.float32)
    if mask_YX.size > 0:
        _sum_blocks(mask_YX.astype(np.float32), factor, weights_YX)
    else:
        for row in range(num_rows):
            for column in range(num_columns):
                weights_YX[row, column] = min(factor, height - row * factor) * min(
                    factor, width - column * factor
                )
    for c in range(num_channels):
        _sum_blocks(features_CYX[c], factor, means_CYX[c])
        for row in range(num_rows):
            for column in range(num_columns):
                means_CYX[c, row, column] /= max(weights_YX[row, column], np.float32(1))
    return means_CYX, weights_YX


@kernel
def _sum_blocks(image_YX: np.ndarray, factor: int, out_YX: np.ndarray) -> None:
    height, width = image_YX.shape
    num_rows, num_columns = out_YX.shape
    sums = np.empty(num_columns * factor, np.float32)
    for row in range(num_rows):
        sums[:] = 0
        columns = sums[:width]
        for y in range(row * factor, min(height, row * factor + factor)):
            line = image_YX[y]
            for x in range(width):
                columns[x] += line[x]
        size = num_columns * factor
        while size > num_columns:  # factor is a power of two
            size //= 2
            for x in range(size):
                sums[x] = sums[2 * x] + sums[2 * x + 1]
        out_YX[row] = sums[:num_columns]


@kernel
def _cells(length: int, factor: int, side: float) -> np.ndarray:
    """First blocks of the cells along one axis, and the number of blocks; as many cells as scikit-image has seeds."""
    pixels = max(1.0, np.rint(side))
    num_cells = max(1, math.ceil((length - side // 2) / pixels))
    num_blocks = -(-length // factor)
    return np.arange(num_cells + 1) * num_blocks // num_cells


@kernel
def _blocks_by_cell(
    means_CYX: np.ndarray, weights_YX: np.ndarray, rows: np.ndarray, columns: np.ndarray, factor: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The blocks, cell by cell, as k-means reads them.

    Returns, for every block: its number in raster order, its cell, uint16; y and x from the cell's first pixel and
    its features, float32 (2 + c, n); its pixels and the sums of y, x and features over them, float64 (n, 3 + c).
    """
    num_channels, num_rows, num_columns = means_CYX.shape
    num_blocks = num_rows * num_columns
    order = np.empty(num_blocks, np.int32)
    cells_N = np.empty(num_blocks, np.uint16)
    blocks_VN = np.empty((2 + num_channels, num_blocks), np.float32)
    sums_NV = np.empty((num_blocks, 3 + num_channels))
    middle = (factor - 1) / 2
    place = 0
    for i in range(len(rows) - 1):
        for j in range(len(columns) - 1):
            for row in range(rows[i], rows[i + 1]):
                for column in range(columns[j], columns[j + 1]):
                    weight = weights_YX[row, column]
                    order[place] = row * num_columns + column
                    cells_N[place] = i * (len(columns) - 1) + j
                    blocks_VN[0, place] = (row - rows[i]) * factor
                    blocks_VN[1, place] = (column - columns[j]) * factor
                    sums_NV[place, 0] = weight
                    sums_NV[place, 1] = weight * (row * factor + middle)
                    sums_NV[place, 2] = weight * (column * factor + middle)
                    for c in range(num_channels):
                        blocks_VN[2 + c, place] = means_CYX[c, row, column]
                        sums_NV[place, 3 + c] = weight * means_CYX[c, row, column]
                    place += 1
    return order, cells_N, blocks_VN, sums_NV


@kernel
def _update(owners_N: np.ndarray, sums_NV: np.ndarray, centres_VK: np.ndarray) -> None:
    """Move every cluster, y, x and features, to the mean of its blocks; one without any stays where it is."""
    num_values, num_clusters = centres_VK.shape
    totals_KV = np.zeros((num_clusters, 1 + num_values))
    for block in range(len(owners_N)):
        totals, sums = totals_KV[owners_N[block]], sums_NV[block]
        for v in range(1 + num_values):
            totals[v] += sums[v]
    for cluster in range(num_clusters):
        weight = totals_KV[cluster, 0]
        if weight > 0:
            for v in range(num_values):
                centres_VK[v, cluster] = totals_KV[cluster, 1 + v] / weight


@kernel
def _assign_blocks(
    blocks_VN: np.ndarray, rows: np.ndarray, columns: np.ndarray, factor: int, centres_VK: np.ndarray,
    owners_N: np.ndarray,
) -> None:  # fmt: skip
    """Give every block to the nearest of the clusters of its cell and of the cells around.

    By squared distance without the block's own squares, which do not matter: |centre|^2 - 2 centre . block.
    """
    num_values = len(centres_VK)
    num_rows, num_columns = len(rows) - 1, len(columns) - 1
    weights = np.empty((1 + num_values) * CELLS, np.float32)
    clusters = np.empty(CELLS, np.uint16)
    further = np.zeros(CELLS * CHUNK, np.float32)
    middle = (factor - 1) / 2
    end = 0
    for i in range(num_rows):
        for j in range(num_columns):
            start, end = end, end + (rows[i + 1] - rows[i]) * (columns[j + 1] - columns[j])
            for n in range(CELLS):
                near_i = min(max(i + n // 3 - 1, 0), num_rows - 1)
                near_j = min(max(j + n % 3 - 1, 0), num_columns - 1)
                cluster = near_i * num_columns + near_j
                clusters[n] = cluster
                y = centres_VK[0, cluster] - (rows[i] * factor + middle)
                x = centres_VK[1, cluster] - (columns[j] * factor + middle)
                square = y * y + x * x
                weights[CELLS + n], weights[2 * CELLS + n] = -2 * y, -2 * x
                for v in range(2, num_values):
                    square += centres_VK[v, cluster] ** 2
                    weights[(1 + v) * CELLS + n] = -2 * centres_VK[v, cluster]
                weights[n] = square
            for first in range(start, end, CHUNK):
                last = min(first + CHUNK, end)
                for v in range(3, num_values):
                    values = blocks_VN[v, first:last]
                    for n in range(CELLS):
                        ahead, weight = (
                            further[n * CHUNK : n * CHUNK + last - first],
                            weights[(1 + v) * CELLS + n],
                        )
                        for block in range(last - first):
                            ahead[block] = (ahead[block] if v > 3 else np.float32(0)) + weight * values[block]
                _nearest_cell(
                    blocks_VN[0, first:last], blocks_VN[1, first:last], blocks_VN[2, first:last],
                    further, weights, clusters, owners_N[first:last],
                )  # fmt: skip


@kernel
def _nearest_cell(
    y_N: np.ndarray, x_N: np.ndarray, feature_N: np.ndarray, further: np.ndarray, weights: np.ndarray,
    clusters: np.ndarray, owners_N: np.ndarray,
) -> None:  # fmt: skip
    for block in range(len(owners_N)):
        y, x, feature = y_N[block], x_N[block], feature_N[block]
        nearest, owner = FAR, clusters[0]
        for n in range(CELLS):
            distance = (
                (weights[n] + further[n * CHUNK + block])
                + weights[CELLS + n] * y
                + weights[2 * CELLS + n] * x
                + weights[3 * CELLS + n] * feature
            )
            cluster = clusters[n]
            owner = cluster if distance < nearest else owner
            nearest = distance if distance < nearest else nearest
        owners_N[block] = owner


@kernel
def _smooth(features_CYX: np.ndarray, out_CYX: np.ndarray) -> None:
    """Means over 3 x 3 pixels, edges repeated: without them, noise breaks the rim of superpixels into fragments."""
    num_channels, height, width = features_CYX.shape
    padded = np.empty(width + 2, np.float32)
    left, middle, right = padded[:width], padded[1 : width + 1], padded[2:]
    ninth = np.float32(1 / 9)
    for c in range(num_channels):
        for y in range(height):
            above, row = features_CYX[c, max(y - 1, 0)], features_CYX[c, y]
            below = features_CYX[c, min(y + 1, height - 1)]
            for x in range(width):
                middle[x] = above[x] + row[x] + below[x]
            padded[0], padded[width + 1] = padded[1], padded[width]
            out = out_CYX[c, y]
            for x in range(width):
                out[x] = (left[x] + middle[x] + right[x]) * ninth


@kernel
def _assign_pixels(
    features_CYX: np.ndarray, factor: int, blocks_YX: np.ndarray, centres_VK: np.ndarray, out_YX: np.ndarray
) -> None:
    """Give every pixel to the nearest of the SLOTS clusters that are most frequent around its tile.

    `blocks_YX`: the cluster of every block, uint16, or BACKGROUND. A tile without any cluster gets BACKGROUND.
    """
    num_channels, height, width = features_CYX.shape
    tile = 2 * factor
    filled = max(tile, LANES)  # whole vectors; what is too much, the next tile overwrites
    # For every slot and column: |centre|^2 and the part of x; the weight of y; that of the feature; the cluster.
    table = np.zeros(4 * PLANE, np.float32)
    further_C = np.zeros((num_channels - 1, PLANE), np.float32)
    row_table = table if num_channels == 1 else np.empty(4 * PLANE, np.float32)
    found, counts = np.empty(16, np.int64), np.empty(16, np.int64)
    for y0 in range(0, height, tile):
        for start in range(0, width, CHUNK):
            stop = min(width, start + CHUNK)
            for x0 in range(start, stop, tile):
                num_found = _clusters_around(blocks_YX, y0 // factor, x0 // factor, found, counts)
                for slot in range(SLOTS):
                    first = slot * STRIDE + x0 - start
                    if slot >= num_found:
                        for column in range(filled):
                            table[first + column] = FAR
                        continue
                    cluster = found[slot]
                    owner, constant, slope, weight_y, weight = (
                        np.float32(cluster),
                        np.float32(0),
                        np.float32(0),
                        np.float32(0),
                        np.float32(0),
                    )
                    if cluster != BACKGROUND:
                        y, x = centres_VK[0, cluster] - y0, centres_VK[1, cluster] - x0
                        square = y * y + x * x
                        for v in range(2, 2 + num_channels):
                            square += centres_VK[v, cluster] ** 2
                        constant, slope, weight_y = np.float32(square), np.float32(-2 * x), np.float32(-2 * y)
                        weight = np.float32(-2 * centres_VK[2, cluster])
                        for c in range(1, num_channels):
                            further_C[c - 1, first : first + filled] = -2 * centres_VK[2 + c, cluster]
                    for column in range(filled):
                        table[first + column] = constant + slope * np.float32(column)
                        table[PLANE + first + column] = weight_y
                        table[2 * PLANE + first + column] = weight
                        table[3 * PLANE + first + column] = owner
            for y in range(y0, min(y0 + tile, height)):
                if num_channels > 1:
                    row_table[:] = table
                    for c in range(1, num_channels):
                        values = features_CYX[c, y, start:stop]
                        for slot in range(SLOTS):
                            constants = row_table[slot * STRIDE : slot * STRIDE + stop - start]
                            weights = further_C[c - 1, slot * STRIDE : slot * STRIDE + stop - start]
                            for column in range(stop - start):
                                constants[column] += weights[column] * values[column]
                _nearest_slot(
                    features_CYX[0, y, start:stop], np.float32(y - y0), row_table, out_YX[y, start:stop]
                )


@kernel
def _nearest_slot(feature_X: np.ndarray, y: np.float32, table: np.ndarray, out_X: np.ndarray) -> None:
    for x in range(len(out_X)):
        feature = feature_X[x]
        nearest, owner = FAR, table[3 * PLANE + x]
        for slot in range(SLOTS):
            place = slot * STRIDE + x
            distance = table[place] + y * table[PLANE + place] + feature * table[2 * PLANE + place]
            candidate = table[3 * PLANE + place]
            owner = candidate if distance < nearest else owner
            nearest = distance if distance < nearest else nearest
        out_X[x] = np.uint16(owner)


@kernel
def _clusters_around(
    blocks_YX: np.ndarray, row: int, column: int, found: np.ndarray, counts: np.ndarray
) -> int:
    """The clusters of the 4 x 4 blocks around the tile at (row, column), the SLOTS most frequent ones; how many."""
    num_found, last = 0, -1
    for i in range(max(row - 1, 0), min(row + 3, blocks_YX.shape[0])):
        for j in range(max(column - 1, 0), min(column + 3, blocks_YX.shape[1])):
            cluster = np.int64(blocks_YX[i, j])
            if cluster == BACKGROUND:
                continue
            if last < 0 or found[last] != cluster:
                last = 0
                while last < num_found and found[last] != cluster:
                    last += 1
                if last == num_found:
                    found[last], counts[last] = cluster, 0
                    num_found += 1
            counts[last] += 1
    if num_found == 0:
        found[0] = BACKGROUND
        return 1
    for slot in range(min(SLOTS, num_found)):
        best = slot
        for other in range(slot + 1, num_found):
            if counts[other] > counts[best]:
                best = other
        cluster, count = found[best], counts[best]
        for other in range(best, slot, -1):
            found[other], counts[other] = found[other - 1], counts[other - 1]
        found[slot], counts[slot] = cluster, count
    return min(num_found, SLOTS)
