"""Superpixels as 4-connected components with contiguous ids. Called by `preprocess.pipeline`."""

from __future__ import annotations

import numpy as np

from preprocess.kernels import kernel


@kernel
def connected_superpixels(labels_YX: np.ndarray) -> np.ndarray:
    """Split every label into its 4-connected components and number these from 0 in raster order.

    `labels_YX`: any integers (y, x). Returns int32 (y, x). This makes the cache's promise true whatever algorithm
    gave the labels; labels that keep it already are only renumbered.
    """
    height, width = labels_YX.shape
    components = np.full((height, width), -1, np.int32)
    stack_y = np.empty(height * width, np.int32)
    stack_x = np.empty(height * width, np.int32)
    count = 0
    for seed_y in range(height):
        for seed_x in range(width):
            if components[seed_y, seed_x] >= 0:
                continue
            label = labels_YX[seed_y, seed_x]
            components[seed_y, seed_x] = count
            stack_y[0], stack_x[0] = seed_y, seed_x
            size = 1
            while size > 0:
                size -= 1
                y, x = stack_y[size], stack_x[size]
                for step_y, step_x in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                    near_y, near_x = y + step_y, x + step_x
                    if (
                        0 <= near_y < height
                        and 0 <= near_x < width
                        and components[near_y, near_x] < 0
                        and labels_YX[near_y, near_x] == label
                    ):
                        components[near_y, near_x] = count
                        stack_y[size], stack_x[size] = near_y, near_x
                        size += 1
            count += 1
    return components
