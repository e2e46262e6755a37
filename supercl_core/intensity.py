"""Intensities: storage type, statistics, and the windows that other parts look through. NumPy only.

Called by preprocessing (per volume and slice). Training normalises on its own device, from the statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from supercl_core.errors import SuperCLError

PERCENTILES: Final = (0.5, 99.5)
"""Window of the training's normalisation, in percent of the voxels of a channel."""

QUANTISED_PERCENTILES: Final = (0.01, 99.99)
"""Window that `--image-dtype int16` spreads over 16 bits, in percent of all voxels."""


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """Intensities as the cache holds them: value = array * scale + offset."""

    array_CZYX: np.ndarray
    """int16, uint16 or float32 (c, z, y, x)."""
    scale: float
    offset: float
    largest_error: float
    """Largest absolute difference to the source's value, in the source's unit."""
    num_clipped: int
    """Voxels outside the window of a quantised image; 0 for every other."""


def to_stored(array_CZYX: np.ndarray, *, quantise: bool) -> StoredImage:
    """Choose how to store a volume: 16-bit integers where these are exact, else float32.

    `array_CZYX`: any real dtype, finite. With `quantise`, non-integers go to int16 between the 0.01 and 99.99
    percentiles instead, which is lossy; the error and the number of clipped voxels are returned.

    Raises SuperCLError for values that float32 cannot hold.
    """
    low, high = float(array_CZYX.min()), float(array_CZYX.max())
    whole = array_CZYX.dtype.kind in "iub" or bool((array_CZYX == np.rint(array_CZYX)).all())
    if whole and low >= -32768 and high <= 32767:
        return StoredImage(
            array_CZYX=array_CZYX.astype(np.int16), scale=1.0, offset=0.0, largest_error=0.0, num_clipped=0
        )
    if whole and high - low <= 65535 and max(abs(low), abs(high)) < 2**52:
        stored = (array_CZYX.astype(np.float64) - low).astype(np.uint16)
        return StoredImage(array_CZYX=stored, scale=1.0, offset=low, largest_error=0.0, num_clipped=0)
    if quantise:
        return _quantised(array_CZYX)
    largest = float(np.finfo(np.float32).max)
    if max(abs(low), abs(high)) > largest:
        raise SuperCLError(
            "The volume's values are beyond single precision.",
            expected=f"magnitudes up to {largest:.3g}",
            found=f"{low:.3g} to {high:.3g}",
            next_step="Rescale the volume, or check how it was exported.",
        )
    stored = array_CZYX.astype(np.float32)
    error = 0.0
    if array_CZYX.dtype != np.float32:
        error = float(np.abs(stored.astype(np.float64) - array_CZYX).max())
    return StoredImage(array_CZYX=stored, scale=1.0, offset=0.0, largest_error=error, num_clipped=0)


def _quantised(array_CZYX: np.ndarray) -> StoredImage:
    values = array_CZYX.astype(np.float64)
    low, high = np.percentile(values, QUANTISED_PERCENTILES)
    if high <= low:
        low, high = float(values.min()), float(values.max())
    scale = (high - low) / 65535
    offset = low + 32768 * scale
    stored = np.clip(np.rint((values - offset) / scale), -32768, 32767).astype(np.int16)
    clipped = int(((values < low) | (values > high)).sum())
    error = float(np.abs(stored * scale + offset - values).max())
    return StoredImage(
        array_CZYX=stored, scale=scale, offset=offset, largest_error=error, num_clipped=clipped
    )


def statistics(array_CZYX: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Statistics of every channel of a volume, in the order of `schema.STATISTICS`.

    Mean and standard deviation are taken after clipping to the 0.5 and 99.5 percentiles; a constant channel has
    a standard deviation of 0.
    """
    rows = []
    for channel in array_CZYX:
        values = channel.astype(np.float32).ravel()
        low, high = np.percentile(values, PERCENTILES)
        clipped = np.clip(values, low, high)
        mean, std = clipped.mean(dtype=np.float64), clipped.std(dtype=np.float64)
        rows.append(tuple(float(v) for v in (values.min(), low, high, values.max(), mean, std)))
    return tuple(rows)


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
