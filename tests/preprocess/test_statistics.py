"""Statistics against their plain twin and NumPy's percentiles, for every type that the cache stores."""

from __future__ import annotations

import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from preprocess.kernels.statistics import channel_statistics, percentiles
from supercl_core.cache.schema import STATISTICS

LARGEST = float(np.finfo(np.float32).max)

few_examples = settings(max_examples=60, deadline=None)
volumes = st.sampled_from([np.int16, np.uint16, np.float32]).flatmap(
    lambda dtype: arrays.arrays(
        dtype,
        st.integers(1, 600),
        elements=st.one_of(
            st.sampled_from([0, 1, 40, 3000]),  # ties, as a background has them
            st.floats(-1e6, 1e6, width=32) if dtype is np.float32 else arrays.from_dtype(np.dtype(dtype)),
        ),
    )
)


def assert_statistics(values: np.ndarray) -> None:
    found = channel_statistics(values)
    (expected,) = references.statistics(values[None])
    low, high = np.percentile(values.astype(np.float64), (0.5, 99.5))
    assert found[:4] == (values.min(), low, high, values.max())
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9 * float(np.abs(values).max()))


@given(volumes)
@few_examples
def test_statistics_are_those_of_the_plain_twin_and_percentiles_are_numpys(values: np.ndarray) -> None:
    assert_statistics(values)


@given(volumes, st.lists(st.floats(0, 100), min_size=1, max_size=5))
@few_examples
def test_percentiles_are_numpys_bit_by_bit(values: np.ndarray, percents: list[float]) -> None:
    assert percentiles(values, percents) == np.percentile(values.astype(np.float64), percents).tolist()


@pytest.mark.parametrize(
    "values",
    [
        np.array([7], np.int16),
        np.array([-32768, 32767], np.int16),
        np.array([0, 65535, 65535], np.uint16),
        np.array([-3.5], np.float32),
        np.array([-LARGEST, LARGEST], np.float32),
        np.array([-1e-45, 0, 1e-45, -1, 1], np.float32),  # the smallest numbers there are
        np.array([-2.5, -2.5, -2.25, -1e30, -7], np.float32),
        np.full(1000, -12.75, np.float32),
    ],
)
def test_statistics_at_the_edges(values: np.ndarray) -> None:
    assert_statistics(values)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32])
def test_statistics_of_a_volume_longer_than_one_round_of_sums(dtype: type) -> None:
    values = np.random.default_rng(1).gamma(2, 500, size=(9, 41, 37)).astype(dtype)
    assert_statistics(values)
    named = dict(zip(STATISTICS, channel_statistics(values), strict=True))
    clipped = np.clip(values.astype(np.float64), *np.percentile(values.astype(np.float64), (0.5, 99.5)))
    assert named["mean"] == pytest.approx(clipped.mean(), rel=1e-12)
    assert named["std"] == pytest.approx(clipped.std(), rel=1e-12)


def test_a_constant_channel_has_no_deviation() -> None:
    for value, dtype in ((7, np.int16), (0.1, np.float32)):
        constant = float(dtype(value))
        assert channel_statistics(np.full((3, 5, 7), value, dtype)) == (*[constant] * 5, 0.0)


def test_zero_has_no_sign() -> None:
    values = np.array([-0.0, -0.0, 0.0], np.float32)
    assert not np.signbit(channel_statistics(values)).any()


def test_an_axis_that_is_not_contiguous_counts_the_same() -> None:
    values = np.random.default_rng(2).normal(size=(6, 7, 8)).astype(np.float32)
    assert channel_statistics(values.T) == pytest.approx(channel_statistics(values), rel=1e-12)
    assert channel_statistics(values[:, ::2, 1:]) == channel_statistics(values[:, ::2, 1:].copy())
