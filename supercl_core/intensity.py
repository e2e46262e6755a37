"""Intensities: how the cache stores them, and the window that superpixels look through. NumPy only.

Called by preprocessing (per volume and slice) and by prediction. Training normalises on its own device, from the
statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from supercl_core.errors import SuperCLError

_LARGEST_ERROR: Final = 1e-3
"""Of what is stored in single precision, as a part of the volume's range: a thousand greys at least are left."""

PERCENTILES: Final = (0.5, 99.5)
"""Window of the training's normalisation, in percent of the voxels of a channel."""


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """Intensities as the cache holds them: value = array * scale + offset."""

    array_CZYX: np.ndarray
    """int16, uint16 or float32 (c, z, y, x)."""
    scale: float = 1.0
    offset: float = 0.0
    largest_error: float = 0.0
    """Largest absolute difference to the source's value, in the source's unit."""
    num_clipped: int = 0
    """Voxels outside the window of a quantised image; 0 for every other."""


def to_stored(array_CZYX: np.ndarray) -> StoredImage:
    """Store a volume without loss where it can be: 16-bit integers where these are exact, else float32.

    `array_CZYX`: any real dtype, finite. int16 and float32 arrays that stay as they are share their memory with
    the result. Raises SuperCLError for values that float32 cannot hold, or cannot tell apart.
    """
    lowest, highest = array_CZYX.min().item(), array_CZYX.max().item()
    low, high = float(lowest), float(highest)
    whole = array_CZYX.dtype.kind in "iub" or all(
        np.array_equal(part, np.rint(part)) for part in _slices(array_CZYX)
    )
    if whole and low >= -32768 and high <= 32767:
        if array_CZYX.dtype == np.uint16:
            return StoredImage(array_CZYX=array_CZYX.view(np.int16))
        return StoredImage(array_CZYX=array_CZYX.astype(np.int16, copy=False))
    if whole and high - low <= 65535 and max(abs(low), abs(high)) < 2**52:
        stored = np.empty(array_CZYX.shape, np.uint16)
        for part, stored_part in zip(_slices(array_CZYX), _slices(stored), strict=True):
            stored_part[...] = part.astype(np.float64) - low
        return StoredImage(array_CZYX=stored, offset=low)
    largest = float(np.finfo(np.float32).max)
    if max(abs(low), abs(high)) > largest:
        raise SuperCLError(
            "The volume's values are beyond single precision.",
            expected=f"magnitudes up to {largest:.3g}",
            found=f"{low:.3g} to {high:.3g}",
            next_step="Rescale the volume, or check how it was exported.",
        )
    stored = array_CZYX.astype(np.float32, copy=False)
    error = 0.0
    if stored is not array_CZYX:
        pairs = zip(_slices(array_CZYX), _slices(stored), strict=True)
        error = max(float(np.abs(stored_part.astype(np.float64) - part).max()) for part, stored_part in pairs)
        # Of integers beyond 2**53, double precision does not see the error either; the range tells.
        lost = abs(float(stored.max()) - float(stored.min()) - (highest - lowest))
        if max(error, lost) > _LARGEST_ERROR * (highest - lowest):
            raise SuperCLError(
                "Single precision cannot tell the volume's values apart.",
                expected=f"errors of at most {_LARGEST_ERROR:g} of the range of values",
                found=f"{max(error, lost):.3g} in {lowest} to {highest}",
                next_step="Subtract an offset from the volume, or check how it was exported.",
            )
    return StoredImage(array_CZYX=stored, largest_error=error)


def quantised(image: StoredImage, window: tuple[float, float]) -> StoredImage:
    """A float32 image on the 65,536 steps of int16 between the two values of `window`; what lies outside is clipped.

    `window` is in the unit of the image, its second value not below the first.
    """
    low, high = window
    scale = (high - low) / 65535 or 1.0
    offset = low + 32768 * scale
    stored = np.empty(image.array_CZYX.shape, np.int16)
    error, num_clipped = 0.0, 0
    for part, stored_part in zip(_slices(image.array_CZYX), _slices(stored), strict=True):
        values = part.astype(np.float64)
        stored_part[...] = np.clip(np.rint((values - offset) / scale), -32768, 32767)
        num_clipped += int(((values < low) | (values > high)).sum())
        error = max(error, float(np.abs(stored_part * scale + offset - values).max()))
    return StoredImage(
        array_CZYX=stored,
        scale=scale,
        offset=offset,
        largest_error=image.largest_error + error,
        num_clipped=num_clipped,
    )


def volume_window(image: StoredImage) -> np.ndarray:
    """Low, high, mean and standard deviation of each channel, in stored units: float32 (c, 4).

    Low and high are the 0.5 and 99.5 percentiles (linear, in float64); mean and standard deviation are taken after
    clipping to these, and that of a constant channel is given as 1. The same as from the statistics of a cached case
    (`train.data.normalisation_windows`), for a volume that is in no cache.
    """
    return np.array([_window(channel_ZYX) for channel_ZYX in image.array_CZYX], np.float32)


def _window(channel_ZYX: np.ndarray) -> tuple[float, float, float, float]:
    places = [(channel_ZYX.size - 1) * (percent / 100) for percent in PERCENTILES]
    ranks = [rank for place in places for rank in (math.floor(place), math.ceil(place))]
    ordered = np.partition(channel_ZYX, ranks, axis=None)[ranks].astype(np.float64)
    low, high = (
        np.interp(place % 1, (0, 1), pair) for place, pair in zip(places, np.split(ordered, 2), strict=True)
    )
    middle = (low + high) / 2  # differences to it are small, so that their squares lose no digits
    total = squares = 0.0
    for part_YX in channel_ZYX:
        differences = np.clip(part_YX.astype(np.float64), low, high) - middle
        total += differences.sum()
        squares += np.square(differences).sum()
    mean = total / channel_ZYX.size
    variance = squares / channel_ZYX.size - mean**2
    return low, high, middle + mean, math.sqrt(variance) if variance > 0 else 1.0


def _slices(array_CZYX: np.ndarray) -> Iterator[np.ndarray]:
    """All slices of a volume: copies of one are small, and stay in the processor's cache."""
    return (slice_YX for volume_ZYX in array_CZYX for slice_YX in volume_ZYX)


def rescale_slice(slice_CYX: np.ndarray) -> np.ndarray:
    """A slice rescaled to 0..1, each channel from its own minimum and maximum: float64 (c, y, x).

    A constant channel becomes 0. This is the window that superpixels and ASP maps are computed in (METHOD: as
    the published call of SLIC rescales every slice).
    """
    # In float32, ties between clusters fall differently: 0.01 % of the pixels of ACDC got another superpixel than
    # from the published call, none in float64.
    values = slice_CYX.astype(np.float64)
    low = values.min(axis=(1, 2), keepdims=True)
    span = values.max(axis=(1, 2), keepdims=True) - low
    return (values - low) / np.where(span > 0, span, 1)


def lightness(grey: np.ndarray) -> np.ndarray:
    """CIE L* (0..100) of grey values in 0..1 read as sRGB with equal components (D65 white).

    Source: IEC 61966-2-1 for the transfer curve, CIE 15 for L*. Any shape; float64.
    """
    linear = np.where(grey > 0.04045, ((grey + 0.055) / 1.055) ** 2.4, grey / 12.92)
    curve = np.where(linear > 0.008856, np.cbrt(linear), 7.787 * linear + 16 / 116)
    return 116 * curve - 16
