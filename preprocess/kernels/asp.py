"""The mean over every superpixel (ASP). Called by `preprocess.pipeline`."""

from __future__ import annotations

import numpy as np

from preprocess.kernels import kernel


@kernel
def superpixel_means(values_YX: np.ndarray, superpixels_YX: np.ndarray, num_superpixels: int) -> np.ndarray:
    """The mean of `values_YX`, float32 or float64 (y, x), over each superpixel.

    `superpixels_YX`: integers (y, x) in 0..num_superpixels-1. Returns float32 (num_superpixels,); a superpixel
    without a pixel gets 0. Sums are float64.
    """
    sums = np.zeros(num_superpixels, np.float64)
    counts = np.zeros(num_superpixels, np.int64)
    height, width = values_YX.shape
    for y in range(height):
        for x in range(width):
            superpixel = superpixels_YX[y, x]
            sums[superpixel] += values_YX[y, x]
            counts[superpixel] += 1
    means = np.zeros(num_superpixels, np.float32)
    for superpixel in range(num_superpixels):
        if counts[superpixel] > 0:
            means[superpixel] = sums[superpixel] / counts[superpixel]
    return means
