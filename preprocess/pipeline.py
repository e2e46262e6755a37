"""From a volume in memory to the arrays of its case: pure functions, no files, no processes.

Called by `preprocess.runner` inside a worker. Axes: C channel, Z slice, Y row, X column, G cell of the ASP grid.

Memory. A volume of a type that the cache stores (int16, float32; labels of uint8) is unpacked once, to where it
stays, and written from there, so that a case takes the bytes of its arrays as stored and, beside them, a few
slices. A worker with two cases in flight therefore stays below 3 x the largest case + 500 MB, where the size of a
case is that of its arrays as stored. A volume of another type takes its own size in addition until it is converted.
"""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from preprocess.kernels.asp import superpixel_means
from preprocess.kernels.statistics import channel_statistics, percentiles
from preprocess.superpixels import MAX_SUPERPIXELS, Method, slic_superpixels
from supercl_core import intensity
from supercl_core.cache.schema import ASP_GRID, STATISTICS
from supercl_core.cache.weak_labels import grid_positions
from supercl_core.errors import SuperCLError, UsageError
from supercl_core.formats.geometry import check_place
from supercl_core.formats.volumes import Volume, orientation

QUANTISED_PERCENTILES: Final = (0.01, 99.99)
"""Window that `image_dtype = int16` spreads over 16 bits, in percent of all voxels."""

LARGEST_SPREAD: Final = 1e6
"""Range of a channel in units of that of its middle 99 %; beyond it, that is one grey in the window of its slices."""


COMPUTATION: Final = "1"
"""Raised whenever equal files and settings would give other bytes in a case: part of what identifies a case."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Settings that decide what is in a cache."""

    slic: Method = "fast"
    """`exact` gives the labels of the published call, `skimage` makes that call, `fast` are others as good."""
    n_segments: int = 100
    """Superpixels that SLIC aims at in a slice (published: 100)."""
    compactness: float = 10.0
    """SLIC's weight of distance against lightness (0..100); published: 10."""
    foreground_above: float | None = None
    """Pixels of at most this value in every channel are background, whose pieces are one superpixel each."""
    image_dtype: Literal["source", "int16"] = "source"
    """`int16` quantises volumes that are not integers; halves their size, loses precision."""
    spacing: Literal["file", "unknown"] = "file"
    """`unknown` for data sets whose files carry a meaningless spacing; distances are then in voxels."""

    def __post_init__(self) -> None:
        if not 1 <= self.n_segments <= MAX_SUPERPIXELS // 2:
            raise UsageError(
                "n_segments is out of range.",
                expected=f"1 to {MAX_SUPERPIXELS // 2}",
                found=self.n_segments,
                next_step="The published setting is 100.",
            )
        if not 0 < self.compactness < math.inf:
            raise UsageError(
                "compactness is out of range.",
                expected="a finite number above 0",
                found=self.compactness,
                next_step="The published setting is 10.",
            )
        if self.foreground_above is not None and not math.isfinite(self.foreground_above):
            raise UsageError(
                "foreground_above is out of range.",
                expected="a finite intensity",
                found=self.foreground_above,
                next_step="Leave it out to segment whole slices.",
            )
        if self.foreground_above is not None and self.slic == "exact":
            raise UsageError(
                "slic = exact takes no foreground.",
                expected="foreground_above together with slic = fast or skimage",
                found=f"foreground_above = {self.foreground_above}",
                next_step="Leave foreground_above out, or choose another slic.",
            )


def kernels_version(config: PreprocessConfig) -> str:
    """Version of what computes a case with these settings."""
    if config.slic == "skimage":
        return f"{COMPUTATION}, scikit-image {importlib.metadata.version('scikit-image')}"
    return COMPUTATION


@dataclass(frozen=True, kw_only=True)
class CaseArrays:
    """What is computed of one case: the arrays of the schema, and what its row and attributes say of them."""

    arrays: dict[str, np.ndarray]
    row: dict[str, Any]
    attributes: dict[str, Any]


def process_case(
    image: Volume, label: Volume | None, *, config: PreprocessConfig, num_channels: int, num_classes: int
) -> CaseArrays:
    """Superpixels, ASP maps, statistics and storage form of one case.

    The arrays returned share memory with the volumes where they are the same. Raises SuperCLError when image and
    label differ in shape or place, when a label is no declared class, when the number of channels is not the data
    set's, when outliers leave nothing to be seen of the other values, when no voxel is foreground, or when a slice
    falls into more superpixels than there are ids. Spacing and place do not count with `spacing = unknown`.
    """
    shape = image.array_CZYX.shape
    if shape[0] != num_channels:
        raise SuperCLError(
            "The volume has another number of channels than the data set.",
            expected=num_channels,
            found=f"{shape[0]} in shape (c, z, y, x) = {shape}",
            next_step="Preprocess volumes of different kinds into caches of their own.",
        )
    has_spacing = config.spacing == "file" and image.geometry.has_spacing
    if has_spacing and image.geometry.spacing_problem:
        raise SuperCLError(
            "The volume's spacing cannot be right.",
            expected="numbers above 0",
            found=image.geometry.spacing_problem,
            next_step="Mend the header, or preprocess the data set with --set spacing=unknown.",
        )
    arrays = {}
    if label is not None:
        arrays["ground_truth"] = _checked_ground_truth(label, shape[1:], num_classes)
        if has_spacing:
            check_place(
                label.geometry,
                image.geometry,
                shape[1:],
                what="The label map lies elsewhere than its image.",
                next_step="Resample the label map to the image, or preprocess the data set with --set spacing=unknown.",
            )
    geometry, stored = image.geometry, intensity.to_stored(image.array_CZYX)
    del image, label  # a volume that was converted is not needed any more
    statistics = _statistics(stored)
    _check_outliers(statistics)
    superpixels_ZYX, asp_ZGG = _superpixels_and_asp(stored, config)
    if config.image_dtype == "int16" and stored.array_CZYX.dtype.kind == "f":
        low, high = percentiles(stored.array_CZYX, QUANTISED_PERCENTILES)
        if low == high:
            low, high = float(stored.array_CZYX.min()), float(stored.array_CZYX.max())
        stored = intensity.quantised(stored, (low, high))
    return CaseArrays(
        arrays={"image": stored.array_CZYX, "superpixels": superpixels_ZYX, "asp": asp_ZGG, **arrays},
        row={
            "shape": shape,
            "image_dtype": stored.array_CZYX.dtype.name,
            "superpixels_dtype": superpixels_ZYX.dtype.name,
            "num_superpixels": int(superpixels_ZYX.max()) + 1,
            "has_ground_truth": "ground_truth" in arrays,
            "spacing_mm": geometry.spacing_mm[::-1] if has_spacing else None,
            "image_scale": stored.scale,
            "image_offset": stored.offset,
            "statistics": statistics,
        },
        attributes={
            "geometry": {
                "spacing_mm": geometry.spacing_mm,
                "origin_mm": geometry.origin_mm,
                "direction": geometry.direction,
            },
            "orientation": orientation(geometry),
            "largest_error": stored.largest_error,
            "num_clipped": stored.num_clipped,
        },
    )


def asp_on_grid(slice_CYX: np.ndarray, superpixels_YX: np.ndarray) -> np.ndarray:
    """The ASP map of a slice, read at the centres of a g x g grid: float64 (g, g), 0..1.

    Each channel of `slice_CYX` (integers or floats) counts rescaled from its own minimum and maximum, and the map
    is the mean over channels; a constant channel counts as 0. `superpixels_YX`: uint8 or uint16 (y, x).
    """
    num_superpixels = int(superpixels_YX.max()) + 1
    means = np.zeros(num_superpixels)
    for channel_YX in slice_CYX:
        low, high = float(channel_YX.min()), float(channel_YX.max())
        if high > low:  # rescaling the means is rescaling the pixels, on a thousandth of the numbers
            means += (superpixel_means(channel_YX, superpixels_YX, num_superpixels) - low) / (high - low)
    height, width = superpixels_YX.shape
    grid = np.ix_(grid_positions(height), grid_positions(width))
    return (means / len(slice_CYX))[superpixels_YX[grid]]


def _superpixels_and_asp(
    image: intensity.StoredImage, config: PreprocessConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Superpixels, uint8 or uint16 (z, y, x), and ASP maps, float16 (z, g, g), of every slice."""
    above = None if config.foreground_above is None else config.foreground_above - image.offset
    if above is not None and image.array_CZYX.max() <= above:
        raise SuperCLError(
            "The volume has no foreground.",
            expected=f"a voxel above foreground_above = {config.foreground_above:g}",
            found=f"{float(image.array_CZYX.max()) + image.offset:g} at most",
            next_step="Lower foreground_above, or leave the volume out.",
        )
    superpixels_ZYX = np.empty(image.array_CZYX.shape[1:], np.uint8)
    asp_ZGG = np.empty((len(superpixels_ZYX), ASP_GRID, ASP_GRID), np.float16)
    for z in range(len(superpixels_ZYX)):
        slice_CYX = image.array_CZYX[:, z]
        superpixels_YX = slic_superpixels(
            slice_CYX,
            method=config.slic,
            n_segments=config.n_segments,
            compactness=config.compactness,
            mask_YX=None if above is None else np.any(slice_CYX > above, axis=0),
        )
        if superpixels_YX.max() > np.iinfo(superpixels_ZYX.dtype).max:
            superpixels_ZYX = superpixels_ZYX.astype(np.uint16)
        superpixels_ZYX[z] = superpixels_YX
        asp_ZGG[z] = asp_on_grid(slice_CYX, superpixels_ZYX[z])
    return superpixels_ZYX, asp_ZGG


def _statistics(image: intensity.StoredImage) -> tuple[tuple[float, ...], ...]:
    """Statistics of every channel, in the source's unit and in the order of `schema.STATISTICS`."""
    offsets = [0.0 if name == "std" else image.offset for name in STATISTICS]
    return tuple(
        tuple(value + offset for value, offset in zip(channel_statistics(channel), offsets, strict=True))
        for channel in image.array_CZYX
    )


def _check_outliers(statistics: tuple[tuple[float, ...], ...]) -> None:
    for minimum, low, high, maximum, *_ in statistics:
        if high > low and maximum - minimum > LARGEST_SPREAD * (high - low):
            raise SuperCLError(
                "A few values are so large that nothing is left to be seen of the others.",
                expected=f"a range of at most {LARGEST_SPREAD:,.0f} times that of 99 % of the voxels",
                found=f"{minimum:g} to {maximum:g}, and 99 % of the voxels in {low:g} to {high:g}",
                next_step="Clip the volume, or check how it was exported.",
            )


def _checked_ground_truth(label: Volume, shape_ZYX: tuple[int, ...], num_classes: int) -> np.ndarray:
    label_ZYX = label.array_CZYX[0]
    if label.array_CZYX.shape != (1, *shape_ZYX):
        raise SuperCLError(
            "The label map has another shape than its image.",
            expected=f"(z, y, x) = {shape_ZYX}",
            found=label.array_CZYX.shape[1:] if len(label.array_CZYX) == 1 else label.array_CZYX.shape,
            next_step="Resample the label map to the grid of the image.",
        )
    if label_ZYX.min() >= 0 and label_ZYX.max() < num_classes:
        classes_ZYX = label_ZYX.astype(np.uint8, copy=False)
        if classes_ZYX.dtype == label_ZYX.dtype or np.array_equal(classes_ZYX, label_ZYX):
            return classes_ZYX
    unknown = [value.item() for value in np.unique(label_ZYX) if value not in range(num_classes)]
    raise SuperCLError(
        "The label map has values that are no declared class.",
        expected=f"integers from 0 to {num_classes - 1}",
        found=unknown[:5],
        next_step="Declare the classes in dataset.json, or mend the label map.",
    )
