"""Exact intensity statistics of whole volumes, without sorting or copying them. Called by `preprocess.pipeline`.

Values are counted by the upper 16 bits of their representation, which is the whole value of a 16-bit integer. Of
float32 a second pass counts the lower 16 bits in the few bins that hold the order statistics asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import numpy as np

from preprocess.kernels import kernel

PERCENTILES: Final = (0.5, 99.5)
"""Window of the training's normalisation, in percent of the voxels of a channel."""

_NUM_BINS: Final = 65536
_NUM_SUMS: Final = 256


def channel_statistics(values: np.ndarray) -> tuple[float, ...]:
    """Statistics of one channel, in the order of `schema.STATISTICS`.

    `values`: int16, uint16 or finite float32, contiguous, any shape, not empty. Percentiles are NumPy's (linear
    interpolation, in float64). Mean and standard deviation are taken after clipping to the 0.5 and 99.5
    percentiles, summed in float64 in a fixed order; a constant channel has a standard deviation of 0.
    """
    flat = values.reshape(-1)
    counts = _counts_in_order(flat)
    positions = [_position(percent, flat.size) for percent in PERCENTILES]
    order_statistics = _order_statistics(flat, counts, {0, flat.size - 1, *_ranks(positions)})
    low, high = (_interpolated(order_statistics, position) for position in positions)
    middle = (low + high) / 2
    if flat.dtype.kind == "f":
        total, squares = _clipped_sums(flat, low, high, middle)
    else:
        differences = np.clip(_bin_values(flat.dtype), low, high) - middle
        total, squares = (counts * differences).sum(), (counts * differences**2).sum()
    # Half a percent of the voxels lies at either end of the window, so the variance is no small difference.
    mean = total / flat.size
    std = math.sqrt(squares / flat.size - mean**2)
    return (order_statistics[0], low, high, order_statistics[flat.size - 1], middle + float(mean), std)


def percentiles(values: np.ndarray, percents: Iterable[float]) -> list[float]:
    """The percentiles of `values`, as `channel_statistics` takes and defines them; `percents` are in 0..100."""
    flat = values.reshape(-1)
    positions = [_position(percent, flat.size) for percent in percents]
    order_statistics = _order_statistics(flat, _counts_in_order(flat), _ranks(positions))
    return [_interpolated(order_statistics, position) for position in positions]


def _position(percent: float, size: int) -> float:
    return (size - 1) * (percent / 100)


def _ranks(positions: Iterable[float]) -> set[int]:
    return {rank for position in positions for rank in (math.floor(position), math.ceil(position))}


def _interpolated(order_statistics: dict[int, float], position: float) -> float:
    """The value at a fractional rank; from the nearer end, as NumPy does, so that both ends are met exactly."""
    below, above = order_statistics[math.floor(position)], order_statistics[math.ceil(position)]
    weight = position - math.floor(position)
    difference = above - below
    return below + difference * weight if weight < 0.5 else above - difference * (1 - weight)


def _order_statistics(flat: np.ndarray, counts: np.ndarray, ranks: set[int]) -> dict[int, float]:
    """The values at the given ranks (from 0) of the sorted `flat`; `counts` are its `_counts_in_order`."""
    ordered = sorted(ranks)
    cumulative = np.cumsum(counts)
    bins = np.searchsorted(cumulative, ordered, side="right")
    if flat.dtype.kind != "f":
        return dict(zip(ordered, _bin_values(flat.dtype)[bins].tolist(), strict=True))
    halves = flat.view(np.uint16).reshape(-1, 2)
    upper = _bins_in_order(flat.dtype)[bins]
    rows = np.full(_NUM_BINS, -1, np.int8)
    distinct = np.unique(upper)
    rows[distinct] = np.arange(len(distinct))
    lower_counts = np.zeros((len(distinct), _NUM_BINS), np.int64)
    _count_lower_halves(halves, rows, lower_counts)
    found = {}
    for rank, bin_, bits in zip(ordered, bins, upper, strict=True):
        step = -1 if bits >= _NUM_BINS // 2 else 1  # of negative floats the larger bits are the smaller value
        within = np.cumsum(lower_counts[rows[bits]][::step])
        place = np.searchsorted(within, rank - (cumulative[bin_] - counts[bin_]), side="right")
        lower = np.arange(_NUM_BINS)[::step][place]
        value = np.array([lower, bits], np.uint16).view(np.float32)[0]
        found[rank] = float(value) + 0.0  # -0.0 becomes 0.0
    return found


def _counts_in_order(flat: np.ndarray) -> np.ndarray:
    """int64 (65536,): how often each upper half occurs, ascending by the value that it stands for."""
    halves = flat.view(np.uint16)
    counts = np.zeros((4, _NUM_BINS), np.int64)
    _count(halves[1::2] if flat.dtype.kind == "f" else halves, counts)
    return counts.sum(axis=0)[_bins_in_order(flat.dtype)]


def _bins_in_order(dtype: np.dtype) -> np.ndarray:
    """The upper halves of all values of `dtype`, ascending by value."""
    positive, negative = np.split(np.arange(_NUM_BINS), 2)
    match dtype.kind:
        case "u":
            return np.arange(_NUM_BINS)
        case "i":
            return np.concatenate([negative, positive])
        case _:
            return np.concatenate([negative[::-1], positive])


def _bin_values(dtype: np.dtype) -> np.ndarray:
    """float64 (65536,): the values of a 16-bit integer type, ascending."""
    return np.arange(_NUM_BINS, dtype=np.float64) + np.iinfo(dtype).min


@kernel
def _count(halves: np.ndarray, counts: np.ndarray) -> None:
    """Count uint16 (n,) into the four rows of int64 (4, 65536); equal neighbours then wait for no other's sum."""
    counts_0, counts_1, counts_2, counts_3 = counts
    whole = len(halves) // 4 * 4
    for i in range(0, whole, 4):
        counts_0[halves[i]] += 1
        counts_1[halves[i + 1]] += 1
        counts_2[halves[i + 2]] += 1
        counts_3[halves[i + 3]] += 1
    for i in range(whole, len(halves)):
        counts_0[halves[i]] += 1


@kernel
def _count_lower_halves(halves: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> None:
    """Count the first column of uint16 (n, 2) into the row of `counts` that `rows` names for the second (or -1)."""
    for i in range(len(halves)):
        row = rows[halves[i, 1]]
        if row >= 0:
            counts[row, halves[i, 0]] += 1


@kernel
def _clipped_sums(values: np.ndarray, low: float, high: float, middle: float) -> tuple[float, float]:
    """Sum and sum of squares of the differences to `middle` of the values (n,), clipped to low..high."""
    # A compiler keeps the order of a float sum; many sums side by side are what it can vectorise (5 x).
    totals, squares = np.zeros(_NUM_SUMS), np.zeros(_NUM_SUMS)
    for start in range(0, len(values), _NUM_SUMS):
        part = values[start : start + _NUM_SUMS]
        for i in range(len(part)):
            difference = min(max(np.float64(part[i]), low), high) - middle
            totals[i] += difference
            squares[i] += difference * difference
    return totals.sum(), squares.sum()
