"""SLIC superpixels of one slice, by one of three ways that keep the same promises.

Called by `preprocess.pipeline` for every slice, and by `preprocess.quality`. C channel, Y row, X column.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np

from preprocess.kernels.regions import BACKGROUND, connect_regions
from preprocess.kernels.slic_exact import exact_slic, lightness_slice
from preprocess.kernels.slic_fast import fast_slic
from supercl_core.errors import SuperCLError
from supercl_core.intensity import rescale_slice

Method = Literal["fast", "exact", "skimage"]

MAX_SUPERPIXELS: Final = 32_767
"""Ids of a slice fit a signed 16-bit integer with -1 left for padding, which is what training gathers them as."""

WHOLE_SLICE: Final = np.zeros((0, 0), bool)


def slic_superpixels(
    slice_CYX: np.ndarray,
    *,
    method: Method = "fast",
    n_segments: int,
    compactness: float,
    mask_YX: np.ndarray | None = None,
) -> np.ndarray:
    """The superpixels of one slice.

    `slice_CYX`: any real dtype, finite (c, y, x); each channel is rescaled from its own minimum and maximum, one
    channel is compared by lightness L* (0..100), several by their values at the same scale. `n_segments`:
    superpixels aimed at; `compactness`: the difference in lightness that weighs as much as the side of one.
    `mask_YX`: bool (y, x), the foreground, which alone counts for `n_segments`; default the whole slice.

    `fast`: coarse to fine, our own. `exact`: scikit-image's superpixels of the published call, pixel for pixel;
    `skimage`: that call itself. Neither knows a mask in a way that repeats the published one, so `exact` takes none.

    Returns uint16 (y, x): ids contiguous from 0, each a 4-connected region, none across the border of the mask;
    every region of the background is a superpixel of its own.

    Raises SuperCLError when there are more superpixels than ids.
    """
    if mask_YX is not None and mask_YX.all():
        mask_YX = None
    if mask_YX is not None and not mask_YX.any():
        superpixels_YX = np.full(mask_YX.shape, BACKGROUND)
        count = _connect(superpixels_YX, num_labels=0)
    elif method == "fast":
        mask = WHOLE_SLICE if mask_YX is None else np.ascontiguousarray(mask_YX)
        superpixels_YX, count = fast_slic(_compilable(slice_CYX), mask, n_segments, float(compactness))
    else:
        features_CYX = (
            lightness_slice(slice_CYX[0])[None] / 100 if len(slice_CYX) == 1 else rescale_slice(slice_CYX)
        )
        if method == "exact":
            assert mask_YX is None, "the published call has no mask"
            superpixels_YX = exact_slic(features_CYX, n_segments=n_segments, compactness=compactness / 100)
            count = int(superpixels_YX.max()) + 1
        else:
            superpixels_YX, count = _skimage(features_CYX, n_segments, compactness / 100, mask_YX)
    if count > MAX_SUPERPIXELS:
        raise SuperCLError(
            "A slice fell into too many superpixels.",
            expected=f"at most {MAX_SUPERPIXELS}",
            found=count,
            next_step="Ask for fewer with --set n_segments=100.",
        )
    return superpixels_YX.astype(np.uint16, copy=False)


def _compilable(slice_CYX: np.ndarray) -> np.ndarray:
    """The slice in one of the three dtypes that the kernel is compiled for, C-contiguous."""
    if slice_CYX.dtype not in (np.int16, np.uint16, np.float32):
        # Differences count, not values: those of large integers survive single precision from their minimum on.
        slice_CYX = (slice_CYX - slice_CYX.min(axis=(1, 2), keepdims=True).astype(np.float64)).astype(
            np.float32
        )
    return np.ascontiguousarray(slice_CYX)


def _skimage(
    features_CYX: np.ndarray, n_segments: int, compactness: float, mask_YX: np.ndarray | None
) -> tuple[np.ndarray, int]:
    from skimage.segmentation import slic

    labels_YX = slic(
        features_CYX,
        n_segments=n_segments,
        compactness=compactness,
        channel_axis=0,
        convert2lab=False,
        start_label=1,  # scikit-image's masked SLIC takes no other
        mask=mask_YX,
    )
    superpixels_YX = labels_YX.astype(np.uint16)  # with a mask, 0 is also what no cluster reached
    if mask_YX is not None:
        superpixels_YX[~mask_YX] = BACKGROUND
    return superpixels_YX, _connect(superpixels_YX, num_labels=int(labels_YX.max()) + 1)


def _connect(superpixels_YX: np.ndarray, *, num_labels: int) -> int:
    """Make every label one region, in place (scikit-image's masked SLIC leaves some in pieces); how many there are."""
    no_features = np.zeros((1, 0, 0), np.float32)
    return connect_regions(superpixels_YX, no_features, np.zeros((1, num_labels)), 0)
