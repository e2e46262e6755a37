"""Storage types are exact where they can be, and L* is scikit-image's."""

from __future__ import annotations

import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from skimage.color import rgb2lab

from supercl_core.errors import SuperCLError
from supercl_core.intensity import (
    StoredImage,
    lightness,
    quantised,
    rescale_slice,
    to_stored,
    volume_window,
)


def restore(stored: StoredImage) -> np.ndarray:
    return stored.array_CZYX * stored.scale + stored.offset


@pytest.mark.parametrize(
    ("values", "dtype", "stored_dtype", "offset"),
    [
        ([0, 255], "uint8", "int16", 0),
        ([-32768, 32767], "int16", "int16", 0),
        ([-5.0, 7.0], "float32", "int16", 0),
        ([0, 32768], "int32", "uint16", 0),
        ([-100, 65435], "int32", "uint16", -100),
        ([1e6, 1e6 + 65535], "float64", "uint16", 1e6),
        ([2**40, 2**40 + 9], "int64", "uint16", 2**40),
        ([2**63, 2**63 + 2**41], "uint64", "float32", 0),
        ([0, 65536], "int32", "float32", 0),
        ([0.5, 1.25], "float32", "float32", 0),
        ([0.5, 1.25], "float64", "float32", 0),
        ([0, 2**24], "int32", "float32", 0),
    ],
)
def test_storage_type_is_the_smallest_that_is_exact(values, dtype, stored_dtype, offset) -> None:
    array = np.array(values, dtype).reshape(1, 1, 1, 2)
    stored = to_stored(array)
    assert stored.array_CZYX.dtype == stored_dtype
    assert (stored.offset, stored.scale, stored.num_clipped, stored.largest_error) == (offset, 1, 0, 0)
    np.testing.assert_array_equal(restore(stored).astype(np.float64), array.astype(np.float64))


def test_what_float32_cannot_hold_is_recorded_as_error() -> None:
    array = np.array([0.1, 16_777_217.0]).reshape(1, 1, 1, 2)
    stored = to_stored(array)
    assert stored.largest_error == 1.0


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([2**62, 2**62 + 15], "int64"),
        ([1e15, 1e15 + 0.5], "float64"),
        ([1e9, 1e9 + 0.25, 1e9 + 100], "float64"),
    ],
)
def test_values_that_float32_would_make_equal_are_refused(values: list, dtype: str) -> None:
    """Of integers as large as the first, double precision does not see the difference either."""
    array = np.array(values, dtype).reshape(1, 1, 1, -1)
    with pytest.raises(SuperCLError, match="cannot tell the volume's values apart"):
        to_stored(array)


@given(arrays.arrays(np.float32, (1, 2, 3, 4), elements=st.floats(-1e6, 1e6, width=32)))
@settings(max_examples=50, deadline=None)
def test_storage_without_quantising_is_lossless_for_float32(array: np.ndarray) -> None:
    np.testing.assert_array_equal(restore(to_stored(array)), array)


@pytest.mark.parametrize(
    "array",
    [
        np.array([[[[-5, 300]]]], np.int16),
        np.array([[[[5, 300]]]], np.uint16),
        np.array([[[[0.5, 300]]]], np.float32),
    ],
)
def test_what_stays_as_it_is_is_not_copied(array: np.ndarray) -> None:
    assert np.shares_memory(to_stored(array).array_CZYX, array)


def test_whole_slices_before_a_fraction_do_not_make_a_volume_whole() -> None:
    array = np.zeros((2, 3, 4, 5), np.float32)
    array[1, 2, 3, 4] = 0.25
    assert to_stored(array).array_CZYX is array


def test_quantising_spreads_the_window_and_counts_what_it_clips() -> None:
    values = np.random.default_rng(0).normal(size=(2, 10, 50, 50)).astype(np.float32)
    low, high = -2.5, 3.0
    stored = quantised(to_stored(values), (low, high))
    assert stored.array_CZYX.dtype == np.int16
    assert stored.scale == pytest.approx((high - low) / 65535)
    assert stored.num_clipped == ((values < low) | (values > high)).sum() > 100
    error = np.abs(restore(stored) - values)
    inside = (values >= low) & (values <= high)
    assert error[inside].max() <= stored.scale / 2 + 1e-9
    assert stored.largest_error == error.max()


def test_quantising_adds_to_the_error_of_single_precision() -> None:
    values = np.array([0.1, 16_777_217.0]).reshape(1, 1, 1, 2)
    stored = quantised(to_stored(values), (0.0, 2e7))
    assert np.abs(restore(stored) - values).max() <= stored.largest_error <= 1 + stored.scale / 2


def test_a_window_without_width_holds_its_value_exactly() -> None:
    stored = quantised(to_stored(np.full((1, 2, 3, 4), 0.5, np.float32)), (0.5, 0.5))
    np.testing.assert_array_equal(restore(stored), 0.5)
    assert (stored.largest_error, stored.num_clipped) == (0, 0)


def test_slices_are_rescaled_channel_by_channel() -> None:
    slice_CYX = np.array([[[-4, 0, 4]], [[7, 7, 7]], [[0, 1, 10]]], np.int16)
    np.testing.assert_allclose(rescale_slice(slice_CYX), [[[0, 0.5, 1]], [[0, 0, 0]], [[0, 0.1, 1]]])


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32])
def test_the_widest_slice_of_a_type_is_rescaled_without_overflow(dtype: type) -> None:
    limits = np.finfo(dtype) if dtype is np.float32 else np.iinfo(dtype)
    np.testing.assert_array_equal(rescale_slice(np.array([[[limits.min, limits.max]]], dtype)), [[[0, 1]]])


def test_lightness_is_scikit_images() -> None:
    grey = np.concatenate([np.linspace(0, 1, 1001), [0.04045, 0.0404499, 0.008856]])
    np.testing.assert_allclose(lightness(grey), rgb2lab(np.stack([grey] * 3, -1))[:, 0], atol=1e-4)


def test_values_beyond_float32_are_refused() -> None:
    with pytest.raises(SuperCLError, match="beyond single precision"):
        to_stored(np.array([0.5, 1e300]).reshape(1, 1, 1, 2))


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).integers(-300, 900, (2, 5, 7, 9)),
        np.random.default_rng(1).integers(0, 60_000, (1, 3, 31, 33)) + 40_000,  # stored with an offset
        np.random.default_rng(2).lognormal(3, 2, (1, 4, 6, 8)).astype(np.float32) + 1e4,
        np.arange(3).reshape(1, 1, 1, 3) - 0.5,
        np.array([[[[7]]]]),
        np.full((1, 2, 3, 4), 0.1, np.float32),
    ],
)
def test_the_window_of_a_volume_is_that_of_its_statistics(values: np.ndarray) -> None:
    stored = to_stored(values)
    found = volume_window(stored)
    assert (found.shape, found.dtype) == ((len(values), 4), np.float32)
    wanted = [
        [row[1], row[2], row[4], row[5] or 1]
        for row in references.statistics(stored.array_CZYX.astype(float))
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32])
def test_the_window_of_a_volume_is_what_the_cache_says_of_it_to_the_last_bit(dtype: type) -> None:
    from preprocess.kernels.statistics import channel_statistics

    for seed in range(20):
        values = np.random.default_rng(seed).normal(300, 90, (1, 5, 24, 20)).astype(dtype)
        _, low, high, _, mean, std = channel_statistics(values[0])
        np.testing.assert_array_equal(
            volume_window(StoredImage(array_CZYX=values)), np.float32([[low, high, mean, std]])
        )
