"""SLIC with scikit-image's superpixels, pixel for pixel, several times faster. Called by `preprocess.superpixels`.

Same seeds, windows, rule for ties, order of additions and connectivity as `skimage.segmentation.slic` (0.26) in
float64. What makes it fast: the loop over the pixels of a row is vectorised, and works on a band of rows that stays in
the processor's cache. Suffixes of array names: C channel, Y row, X column, K cluster.

Sources: Achanta et al., IEEE TPAMI 34, 2012; the behaviour of scikit-image.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from preprocess.kernels import kernel

NUM_ITERATIONS: Final = 10
BAND: Final = 32
"""Rows that are assigned together. Our choice: the whole slice at once takes a tenth longer at 512 x 512."""


def exact_slic(features_CYX: np.ndarray, *, n_segments: int, compactness: float) -> np.ndarray:
    """The superpixels that scikit-image finds in a slice.

    `features_CYX`: real numbers (c, y, x), finite, in any unit; they are rescaled to 0..1, all channels together.
    `n_segments`, at least 1, is the number of superpixels aimed at; `compactness`, above 0, weighs distance against
    features.

    Returns int32 (y, x), equal to `skimage.segmentation.slic(features_CYX, n_segments, compactness, channel_axis=0,
    convert2lab=False, start_label=0)` of float64: every superpixel is one 4-connected component, and ids are
    contiguous from 0 in raster order. The published call (compactness 10 on L* of a grey slice) is L* / 100 with 0.1.
    """
    num_channels, height, width = features_CYX.shape
    step_y, step_x = _grid_steps(height, width, n_segments)
    stride_y, stride_x = round(step_y), round(step_x)
    seeds_Y = np.arange(int(step_y // 2), height, stride_y)
    seeds_X = np.arange(int(step_x // 2), width, stride_x)
    num_clusters = len(seeds_Y) * len(seeds_X)
    # Features of seeds start at 0, so that the first assignment is by distance alone.
    centres_K = np.zeros((num_clusters, 2 + num_channels))
    centres_K[:, 0] = np.repeat(seeds_Y, len(seeds_X))
    centres_K[:, 1] = np.tile(seeds_X, len(seeds_Y))
    # Windows follow from the number of seeds, not from the number asked for.
    reach_y, reach_x = (2 * round(step) for step in _grid_steps(height, width, num_clusters))

    scaled_CYX = features_CYX.astype(np.float64, order="C")
    scaled_CYX -= scaled_CYX.min()
    scaled_CYX /= scaled_CYX.max() or 1.0
    scaled_CYX *= 1.0 / compactness
    weight = 1.0 / max(stride_y, stride_x) ** 2
    labels_YX = _cluster(scaled_CYX, centres_K, reach_y, reach_x, weight)
    mean_size = height * width / num_clusters
    return _connect(labels_YX, int(0.5 * mean_size), int(3 * mean_size))


def lightness_slice(slice_YX: np.ndarray) -> np.ndarray:
    """CIE L* of a slice rescaled to 0..1 from its own minimum and maximum and read as sRGB grey.

    `slice_YX`: real numbers (y, x), finite. Returns float64 (y, x) in 0..100; a constant slice gives 0. The formula
    of `supercl_core.intensity.lightness` to 1e-12, with operations that round alike on every machine.
    """
    values_YX = slice_YX.astype(np.float64, order="C")
    values_YX -= values_YX.min()
    _to_lightness(values_YX.reshape(-1), values_YX.max() or 1.0)
    return values_YX


def _grid_steps(height: int, width: int, num_points: int) -> tuple[float, float]:
    """Spacing along y and x of about `num_points` points on a grid, as `skimage.util.regular_grid` chooses it."""
    if height * width <= num_points:
        return 1.0, 1.0
    step = math.sqrt(height * width / num_points)
    if step <= min(height, width):
        return step, step
    if height <= width:
        return float(height), width / num_points
    return height / num_points, float(width)


@kernel
def _to_lightness(values: np.ndarray, span: float) -> None:
    """Replace values in 0..span by L*, in place."""
    for i in range(values.size):
        grey = values[i] / span
        # sRGB's curve is u ** 2.4 and the cube root of that u ** 0.8; both follow from u ** -0.2. Four steps of
        # Newton's method from a parabola give it to the last bits for u in 0.09..1, where the powers are used.
        u = (grey + 0.055) / 1.055
        root = 1.7 + u * (-1.59 + u * 0.92)
        for _ in range(4):
            square = root * root
            root *= 1.2 - 0.2 * u * (square * square * root)
        power = u * root
        linear = power * power * power if grey > 0.04045 else grey / 12.92
        values[i] = 116 * (power if linear > 0.008856 else 7.787 * linear + 16 / 116) - 16


@kernel
def _cluster(
    features_CYX: np.ndarray, centres_K: np.ndarray, reach_y: int, reach_x: int, weight: float
) -> np.ndarray:
    """The cluster of every pixel after all iterations: int32 (y, x).

    `centres_K`: float64 (k, 2 + c) of y, x and features; seeds before, overwritten. Clusters win pixels up to
    `reach_y` and `reach_x` from their centre; `weight` is that of squared distance against squared features.
    """
    _, height, width = features_CYX.shape
    # The windows of the seeds cover the slice together; later, a pixel outside every window keeps its cluster.
    labels_YX = np.zeros((height, width), np.int32)
    best_YX = np.empty((BAND, width))
    scratch_X = np.zeros((2, width))
    for _ in range(NUM_ITERATIONS):
        for top in range(0, height, BAND):
            best_YX[:] = np.inf
            for k in range(len(centres_K)):
                y, x = centres_K[k, 0], centres_K[k, 1]
                if math.isnan(y):
                    continue  # a cluster that has lost its last pixel never wins another
                first_row, end_row = int(max(y - reach_y, 0)), int(min(y + reach_y + 1, height))
                rows = max(first_row, top), min(end_row, top + BAND)
                columns = int(max(x - reach_x, 0)), int(min(x + reach_x + 1, width))
                if rows[0] < rows[1]:
                    _claim(k, rows, columns, features_CYX, centres_K, weight, best_YX, labels_YX, scratch_X)
        _recentre(features_CYX, labels_YX, centres_K)
    return labels_YX


@kernel
def _claim(
    k: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    features_CYX: np.ndarray,
    centres_K: np.ndarray,
    weight: float,
    best_YX: np.ndarray,
    labels_YX: np.ndarray,
    scratch_X: np.ndarray,
) -> None:
    """Give cluster `k` the pixels of its window (first and end of rows and columns) to which it is nearest so far.

    `best_YX`: distances so far, of a band of rows. `scratch_X`: two rows; the second is 0 where there is one channel.
    Rows are sliced before the inner loops so that LLVM vectorises these; indices with an offset become gathers.
    """
    left, right = columns
    width = right - left
    last = len(features_CYX) - 1
    squares, others = scratch_X[0, :width], scratch_X[1, :width]
    centre_y, centre_x, centre_last = centres_K[k, 0], centres_K[k, 1], centres_K[k, 2 + last]
    for x in range(width):
        squares[x] = (centre_x - (left + x)) ** 2
    for y in range(rows[0], rows[1]):
        if last > 0:
            others[:] = 0
            for c in range(last):
                values = features_CYX[c, y, left:right]
                centre = centres_K[k, 2 + c]
                for x in range(width):
                    others[x] += (values[x] - centre) ** 2
        square_y = (centre_y - y) ** 2
        values = features_CYX[last, y, left:right]
        best, labels = best_YX[y % BAND, left:right], labels_YX[y, left:right]
        for x in range(width):
            distance = (square_y + squares[x]) * weight + (others[x] + (values[x] - centre_last) ** 2)
            # Ties go to the lower cluster. Both stores are unconditional, so that the loop has no branch.
            closer = distance < best[x]
            best[x] = distance if closer else best[x]
            labels[x] = k if closer else labels[x]


@kernel
def _recentre(features_CYX: np.ndarray, labels_YX: np.ndarray, centres_K: np.ndarray) -> None:
    """Put every centre at the mean over the cluster's pixels, added up in raster order; NaN without a pixel."""
    num_channels, height, width = features_CYX.shape
    sizes_K = np.zeros(len(centres_K))
    centres_K[:] = 0
    for y in range(height):
        labels = labels_YX[y]
        stop = 0
        while stop < width:
            start, k = stop, labels[stop]
            while stop < width and labels[stop] == k:
                stop += 1
            size = stop - start
            sizes_K[k] += size
            centres_K[k, 0] += size * y
            centres_K[k, 1] += size * (start + stop - 1) // 2
            for c in range(num_channels):
                total = centres_K[k, 2 + c]
                for x in range(start, stop):
                    total += features_CYX[c, y, x]
                centres_K[k, 2 + c] = total
    centres_K /= sizes_K.reshape(-1, 1)


@kernel
def _connect(labels_YX: np.ndarray, min_size: int, max_size: int) -> np.ndarray:
    """Connected superpixels from clusters, int32 (y, x): numbered in raster order of their first pixel.

    A search in breadth from each pixel without a superpixel follows its cluster up to `max_size` pixels; what is
    found becomes a superpixel, or with fewer than `min_size` pixels joins the superpixel touched last, if there is one.
    """
    height, width = labels_YX.shape
    stride = width + 2
    # A border of no cluster spares the search all checks for the edges of the slice.
    padded_YX = np.full((height + 2, stride), -1, np.int32)
    padded_YX[1:-1, 1:-1] = labels_YX
    labels = padded_YX.reshape(-1)
    superpixels = np.full(labels.size, -1, np.int32)
    queue = np.empty(max_size, np.int32)
    count = 0
    for row in range(stride, stride * (height + 1), stride):
        for seed in range(row + 1, row + 1 + width):
            if superpixels[seed] >= 0:
                continue
            superpixels[seed] = touched = count
            queue[0] = seed
            size, visited = 1, 0
            while visited < size < max_size:
                for step in (1, -1, stride, -stride):
                    near = queue[visited] + step
                    if labels[near] == labels[seed] and superpixels[near] < 0:
                        superpixels[near] = count
                        queue[size] = near
                        size += 1
                        if size == max_size:
                            break
                    elif superpixels[near] >= 0 and superpixels[near] != count:
                        touched = superpixels[near]
                visited += 1
            if size >= min_size:
                count += 1
            else:
                for i in range(size):
                    superpixels[queue[i]] = touched
    return superpixels.reshape(height + 2, stride)[1:-1, 1:-1].copy()
