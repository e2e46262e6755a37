"""From a volume in memory to the arrays of its case: pure functions, no files, no processes.

Called by `preprocess.runner` inside a worker. Axes: C channel, Z slice, Y row, X column, G cell of the ASP grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from skimage.segmentation import slic

from preprocess.kernels.asp import superpixel_means
from preprocess.kernels.connectivity import connected_superpixels
from supercl_core import intensity
from supercl_core.errors import SuperCLError, UsageError
from supercl_core.schema import ASP_GRID
from supercl_core.volumes import Volume, orientation

MAX_SUPERPIXELS: Final = 32_767
"""Ids of a slice fit a signed 16-bit integer with -1 left for padding, which is what training gathers them as."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Settings that decide what is in a cache."""

    n_segments: int = 100
    """Superpixels that SLIC aims at in a slice (published: 100)."""
    compactness: float = 10.0
    """SLIC's weight of distance against lightness (0..100); published: 10."""
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

    Raises SuperCLError when image and label differ in shape, when a label is no declared class, or when the
    number of channels is not the data set's.
    """
    volume_CZYX = image.array_CZYX
    if volume_CZYX.shape[0] != num_channels:
        raise SuperCLError(
            "The volume has another number of channels than the data set.",
            expected=num_channels,
            found=f"{volume_CZYX.shape[0]} in shape (c, z, y, x) = {volume_CZYX.shape}",
            next_step="Preprocess volumes of different kinds into caches of their own.",
        )
    stored = intensity.to_stored(volume_CZYX, quantise=config.image_dtype == "int16")
    superpixels, asp_maps = [], []
    for slice_CYX in volume_CZYX.swapaxes(0, 1):
        scaled_CYX = intensity.rescale_slice(slice_CYX)
        superpixels_YX = slic_superpixels(scaled_CYX, config)
        superpixels.append(superpixels_YX)
        asp_maps.append(asp_on_grid(scaled_CYX.mean(axis=0), superpixels_YX))
    superpixels_ZYX = np.stack(superpixels)
    num_superpixels = int(superpixels_ZYX.max()) + 1
    superpixels_dtype = np.uint8 if num_superpixels <= 256 else np.uint16
    arrays = {
        "image": stored.array_CZYX,
        "superpixels": superpixels_ZYX.astype(superpixels_dtype),
        "asp": np.stack(asp_maps).astype(np.float16),
    }
    if label is not None:
        arrays["ground_truth"] = _checked_ground_truth(label, volume_CZYX.shape[1:], num_classes)
    geometry = image.geometry
    spacing_mm = geometry.spacing_mm[::-1] if config.spacing == "file" else None
    return CaseArrays(
        arrays=arrays,
        row={
            "shape": volume_CZYX.shape,
            "image_dtype": stored.array_CZYX.dtype.name,
            "superpixels_dtype": np.dtype(superpixels_dtype).name,
            "num_superpixels": num_superpixels,
            "has_ground_truth": label is not None,
            "spacing_mm": spacing_mm,
            "image_scale": stored.scale,
            "image_offset": stored.offset,
            "statistics": intensity.statistics(volume_CZYX),
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


def slic_superpixels(scaled_CYX: np.ndarray, config: PreprocessConfig) -> np.ndarray:
    """SLIC superpixels of one slice rescaled to 0..1, float64 (c, y, x).

    Returns int32 (y, x): ids contiguous from 0, each a 4-connected component. One channel is segmented by its
    lightness L*, which gives the labels of the published call (scikit-image on the slice stacked to RGB, L* in
    0..100); several channels by their rescaled values, at the same scale of compactness (METHOD; DESIGN).

    Raises SuperCLError when there are more superpixels than ids.
    """
    compactness = config.compactness / 100
    features_CYX = intensity.lightness(scaled_CYX) / 100 if len(scaled_CYX) == 1 else scaled_CYX
    labels_YX = slic(
        features_CYX,
        n_segments=config.n_segments,
        compactness=compactness,
        channel_axis=0,
        start_label=0,
    )
    superpixels_YX = connected_superpixels(labels_YX)
    if superpixels_YX.max() >= MAX_SUPERPIXELS:
        raise SuperCLError(
            "A slice fell into too many superpixels.",
            expected=f"at most {MAX_SUPERPIXELS}",
            found=int(superpixels_YX.max()) + 1,
            next_step="Ask for fewer with --set n_segments=100.",
        )
    return superpixels_YX


def asp_on_grid(values_YX: np.ndarray, superpixels_YX: np.ndarray) -> np.ndarray:
    """The ASP map of `values_YX`, float64 (y, x), read at the centres of a g x g grid: float32 (g, g)."""
    means = superpixel_means(values_YX, superpixels_YX, int(superpixels_YX.max()) + 1)
    height, width = values_YX.shape
    centres = (np.arange(ASP_GRID) + 0.5) / ASP_GRID
    rows, columns = (centres * height).astype(int), (centres * width).astype(int)
    return means[superpixels_YX[np.ix_(rows, columns)]]


def _checked_ground_truth(label: Volume, shape_ZYX: tuple[int, ...], num_classes: int) -> np.ndarray:
    label_ZYX = label.array_CZYX[0]
    if label.array_CZYX.shape != (1, *shape_ZYX):
        raise SuperCLError(
            "The label map has another shape than its image.",
            expected=f"(z, y, x) = {shape_ZYX}",
            found=label.array_CZYX.shape[1:] if len(label.array_CZYX) == 1 else label.array_CZYX.shape,
            next_step="Resample the label map to the grid of the image.",
        )
    classes = np.unique(label_ZYX)
    unknown = [value.item() for value in classes if value not in range(num_classes)]
    if unknown:
        raise SuperCLError(
            "The label map has values that are no declared class.",
            expected=f"integers from 0 to {num_classes - 1}",
            found=unknown[:5],
            next_step="Declare the classes in dataset.json, or mend the label map.",
        )
    return label_ZYX.astype(np.uint8)
