"""Slices as pictures: the window to grey values, superpixels painted with their means, borders, class colours.

Pure functions on arrays, and on one slice of an open case. What is made of them is left to `supercl_core.showing.view`
(a contact sheet), `supercl_core.showing.view_page` (a page), `preprocess.quality_report` and `train.report.pictures`,
which call this module.

Axes: z slice, c channel, y row, x column.
"""

from __future__ import annotations

import colorsys
from typing import Final

import numpy as np

from supercl_core.cache.cases import CaseRow
from supercl_core.cache.reader import CachedCase

BORDER_RGB: Final = (240, 228, 66)
"""Of superpixel borders: the yellow of the palette below, which no class has."""

_CLASS_RGB: Final = (
    (213, 94, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (0, 114, 178),
)


def class_rgb(value: int) -> tuple[int, int, int]:
    """The colour of the ground truth class `value`, 1 or more: red, green, blue, 0..255.

    The first six are Okabe and Ito's, which most colour-blind readers can tell apart; further ones turn the hue by
    the golden angle (our choice).
    """
    if value <= len(_CLASS_RGB):
        return _CLASS_RGB[value - 1]
    red, green, blue = colorsys.hsv_to_rgb(value * 0.618034 % 1, 0.65, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def class_name(class_names: tuple[str, ...], value: int) -> str:
    """The name of the ground truth class `value`, also where the cache declares none for it."""
    return class_names[value] if value < len(class_names) else f"class {value}"


def pixel_aspect(row: CaseRow) -> float:
    """Height of a case's pixels over their width, at most 50 to 1; 1 where the spacing is unknown."""
    if row.spacing_mm is None:
        return 1.0
    _, height_mm, width_mm = row.spacing_mm
    return min(max(height_mm / width_mm, 1 / 50), 50.0)


def grey_slice(case: CachedCase, z: int, channel: int = 0) -> np.ndarray:
    """One channel of a slice in grey, uint8 (y, x): the case's percentiles 0.5 and 99.5 become black and white."""
    return np.rint(255 * _windowed(case, z)[channel]).astype(np.uint8)


def asp_slice(case: CachedCase, z: int) -> np.ndarray:
    """The average-superpixel map of a slice at full resolution, uint8 (y, x).

    Every superpixel has its mean intensity, in the grey values of `grey_slice` (mean over channels). The cache's
    `asp` is coarser and spans each slice from its own minimum to its maximum.
    """
    ids = case.superpixels_ZYX[z].ravel()
    means = np.bincount(ids, _windowed(case, z).mean(axis=0).ravel()) / np.maximum(np.bincount(ids), 1)
    return np.rint(255 * means).astype(np.uint8)[ids].reshape(case.row.shape[2:])


def boundaries(regions_YX: np.ndarray) -> np.ndarray:
    """Pixels with a 4-neighbour in another region: bool (y, x) from integers (y, x)."""
    found_YX = np.zeros(regions_YX.shape, bool)
    down = regions_YX[1:] != regions_YX[:-1]
    right = regions_YX[:, 1:] != regions_YX[:, :-1]
    found_YX[1:] |= down
    found_YX[:-1] |= down
    found_YX[:, 1:] |= right
    found_YX[:, :-1] |= right
    return found_YX


def _windowed(case: CachedCase, z: int) -> np.ndarray:
    """All channels of a slice, 0..1 between the case's percentiles 0.5 and 99.5: float64 (c, y, x)."""
    row = case.row
    low, high = (
        row.statistic(name)[:, None, None].astype(np.float64)
        for name in ("percentile_00_5", "percentile_99_5")
    )
    values_CYX = case.image_ZCYX[z] * np.float64(row.image_scale) + row.image_offset
    return np.clip((values_CYX - low) / np.where(high > low, high - low, 1), 0, 1)
