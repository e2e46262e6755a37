"""Metrics of superpixels: worked by hand, against the plain twin, at their edges; comparison over cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from preprocess.quality import (
    METRICS,
    achievable_accuracy,
    boundary_recall,
    compare,
    explained_variance,
    measure_slice,
    undersegmentation_error,
)

SHAPES = st.tuples(st.integers(1, 7), st.integers(2, 9))


@st.composite
def slices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Superpixels, an image that is not constant, and classes that are not all one class."""
    shape = draw(SHAPES)
    superpixels = draw(arrays(np.uint16, shape, elements=st.integers(0, 5)))
    truth = draw(arrays(np.uint8, shape, elements=st.integers(0, 2)))
    image = draw(arrays(np.int16, (draw(st.integers(1, 3)), *shape), elements=st.integers(-99, 99)))
    truth[0, 0], truth[-1, -1] = 0, 1
    image[0, 0, 0], image[0, -1, -1] = -100, 100
    return superpixels, image, truth


@given(slices())
@settings(deadline=None, max_examples=60)
def test_metrics_equal_their_plain_twin(drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    superpixels, image, truth = drawn
    assert measure_slice(superpixels, image, truth) == pytest.approx(
        references.superpixel_scores(superpixels, image, truth), abs=1e-12
    )


def test_accuracy_and_undersegmentation_of_a_map_worked_by_hand() -> None:
    superpixels = np.array([[0, 0, 1, 1], [0, 0, 1, 2]])
    truth = np.array([[0, 0, 1, 1], [0, 2, 0, 1]])
    # Superpixel 0 holds three pixels of class 0 and one of 2, superpixel 1 two of class 1 and one of 0.
    assert achievable_accuracy(superpixels, truth) == (3 + 2 + 1) / 8
    assert undersegmentation_error(superpixels, truth) == ((1 + 1) + (1 + 1) + 0) / 8


@pytest.mark.parametrize(("border", "recall"), [(5, 1.0), (6, 1.0), (7, 0.5), (8, 0.0)])
def test_a_border_is_recalled_from_two_pixels_away(border: int, recall: float) -> None:
    """The ground truth changes between columns 3 and 4, so columns 3 and 4 are its boundary."""
    columns = np.broadcast_to(np.arange(12), (5, 12))
    assert boundary_recall((columns >= border).astype(np.uint8), (columns > 3).astype(np.uint8)) == recall


def test_two_pixels_away_along_both_axes_is_near_enough() -> None:
    truth, superpixels = np.zeros((9, 9), int), np.zeros((9, 9), int)
    truth[0, 0] = superpixels[3, 3] = 1
    # (0, 1) has (2, 3) and (1, 0) has (3, 2) at two rows and two columns; (0, 0) is three from either.
    assert boundary_recall(superpixels, truth) == 2 / 3


def test_explained_variance_of_a_row_worked_by_hand() -> None:
    superpixels = np.array([[0, 0, 1, 1]])
    row = np.array([[[0, 1, 2, 3]]])
    assert explained_variance(superpixels, row) == pytest.approx(4 / 5)
    assert explained_variance(superpixels, (1000 - 7 * row).astype(np.int16)) == pytest.approx(4 / 5)
    flat_and_row = np.concatenate([np.full_like(row, 9), row])
    assert explained_variance(superpixels, flat_and_row) == pytest.approx(4 / 5)


def test_a_perfect_segmentation_has_perfect_scores_and_one_superpixel_none() -> None:
    truth = np.zeros((20, 24), np.uint8)
    truth[4:12, 5:15], truth[8:10, 7:9] = 1, 2
    found = measure_slice(references.connected_superpixels(truth), truth[None], truth)
    assert found == {
        "asa": 1,
        "boundary_recall": 1,
        "undersegmentation": 0,
        "explained_variance": pytest.approx(1),
    }
    found = measure_slice(np.zeros_like(truth), truth[None], truth)
    assert found == {
        "asa": (truth == 0).mean(),
        "boundary_recall": 0,
        "undersegmentation": pytest.approx(2 * (truth > 0).mean()),
        "explained_variance": pytest.approx(0),
    }


def test_a_slice_that_says_nothing_gives_nan() -> None:
    superpixels = np.arange(16).reshape(4, 4)
    constant, values = np.full((2, 4, 4), 7), np.arange(32).reshape(2, 4, 4)
    assert all(math.isnan(value) for value in measure_slice(superpixels, constant).values())
    found = measure_slice(superpixels, values, np.full((4, 4), 2))
    assert [name for name in METRICS if math.isnan(found[name])] == [
        "asa",
        "boundary_recall",
        "undersegmentation",
    ]
    assert found["explained_variance"] == pytest.approx(1)


def test_a_comparison_weighs_cases_alike_and_leaves_out_what_is_undefined() -> None:
    ours = np.array([1.0, 3.0, 10.0, np.nan, 5.0])
    reference = np.array([0.0, 1.0, 4.0, 1.0, np.nan])
    found = compare(ours, reference, np.array(["a", "a", "b", "b", "c"]))
    assert found is not None
    assert (found.ours, found.reference, found.difference) == (6.0, 2.25, 3.75)
    assert (found.num_cases, found.num_slices) == (2, 3)


def test_the_interval_resamples_cases_not_slices() -> None:
    """Two cases that differ by 0 and by 1: a resample holds either or both, however many slices they have."""
    cases = np.repeat([0, 1], 500)
    found = compare(cases.astype(float), np.zeros(1000), cases)
    assert found is not None
    assert found.interval == (0.0, 1.0)


def test_the_interval_of_many_cases_is_that_of_the_normal_law() -> None:
    differences = np.random.default_rng(1).normal(2.0, 1.0, 400)
    found = compare(differences, np.zeros(400), np.arange(400))
    assert found is not None
    assert found.interval is not None
    half = 1.96 * differences.std() / 20
    assert found.interval == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.01)
    assert compare(differences, np.zeros(400), np.arange(400)) == found


def test_one_case_has_no_interval_and_no_case_no_comparison() -> None:
    one = compare(np.array([1.0, 2.0]), np.array([0.0, 0.0]), np.array([0, 0]))
    assert one is not None
    assert one.interval is None
    assert compare(np.array([np.nan]), np.array([1.0]), np.array([0])) is None
