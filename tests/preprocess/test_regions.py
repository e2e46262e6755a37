"""Regions of labels: against the plain twin and SciPy, and small maps worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from preprocess.kernels.regions import BACKGROUND, _find_runs, connect_regions

B = int(BACKGROUND)


@st.composite
def maps(draw: st.DrawFn) -> np.ndarray:
    """Specks or patches of four labels and the background; Hypothesis's own arrays are mostly of one value."""
    height, width = draw(
        st.tuples(st.integers(1, 11), st.integers(1, 19)) | st.tuples(st.just(1), st.just(40))
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    labels = rng.choice(np.array([0, 1, 2, 3, B], np.uint16), (height, width), p=[0.3, 0.3, 0.2, 0.1, 0.1])
    grain = draw(st.integers(1, 3))
    return np.kron(labels, np.ones((grain, grain), np.uint16))[:height, :width]


label_maps = maps()


def connected(labels: list[list[int]], means: list[float], smallest: int, values: object = None) -> list:
    """The regions of labels whose pixels have `values`, or else the mean of their label."""
    before = np.array(labels, np.uint16)
    if values is None:
        values = np.where(before == B, 0, np.array([*means, 0])[np.minimum(before, len(means))])
    regions, features = before.copy(), np.array(values, np.float32)[None]
    count = connect_regions(regions, features, np.array([means], float), smallest)
    np.testing.assert_array_equal(np.unique(regions), np.arange(count))
    return regions.tolist()


@given(label_maps, st.integers(0, 12), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_regions_are_the_plain_twins(labels: np.ndarray, smallest: int, channels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(channels, *labels.shape)).astype(np.float32)
    means = rng.normal(size=(channels, 4))
    expected, expected_count = references.connect_regions(labels, features, means, smallest)
    regions, features_before = labels.copy(), features.copy()
    count = connect_regions(regions, features, means, smallest)
    np.testing.assert_array_equal(regions, expected)
    assert count == expected_count
    np.testing.assert_array_equal(features, features_before)


@given(label_maps, st.integers(0, 12), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_regions_are_connected_numbered_without_gaps_and_keep_to_their_side_of_the_background(
    labels: np.ndarray, smallest: int, seed: int
) -> None:
    regions = labels.copy()
    features = np.random.default_rng(seed).normal(size=(1, *labels.shape)).astype(np.float32)
    count = connect_regions(regions, features, np.zeros((1, 4)), smallest)
    np.testing.assert_array_equal(np.unique(regions), np.arange(count))
    assert all(ndimage.label(regions == region)[1] == 1 for region in range(count))
    pieces, num_pieces = ndimage.label(labels == B)
    assert len(np.unique(regions[labels == B])) == num_pieces
    assert not set(regions[labels == B].tolist()) & set(regions[labels != B].tolist())
    # Nothing is cut: pixels of one label that touch stay together.
    for axis in (0, 1):
        same = np.diff(labels.astype(int), axis=axis) == 0
        assert (np.diff(regions.astype(int), axis=axis)[same] == 0).all()
    # A region too small has only such around it, none that was large enough before anything joined.
    for label in range(4):
        pieces, num_pieces = ndimage.label(labels == label)
        for piece in range(1, num_pieces + 1):
            if (pieces == piece).sum() >= smallest:
                assert (regions == regions[pieces == piece][0]).sum() >= smallest


@given(label_maps)
@settings(max_examples=60, deadline=None)
def test_without_a_smallest_size_regions_are_scipys_components(labels: np.ndarray) -> None:
    regions = labels.copy()
    count = connect_regions(regions, np.zeros((1, 0, 0), np.float32), np.zeros((1, 4)), 0)
    components = [ndimage.label(labels == label) for label in np.unique(labels)]
    assert count == sum(num_components for _, num_components in components)
    for pieces, num_pieces in components:
        for piece in range(1, num_pieces + 1):
            np.testing.assert_array_equal(regions == regions[pieces == piece][0], pieces == piece)


@given(label_maps)
@settings(max_examples=60, deadline=None)
def test_runs_are_those_of_a_plain_loop(labels: np.ndarray) -> None:
    starts, ends, first_of_row = _find_runs(labels)
    expected: list[tuple[int, int]] = []
    rows = [0]
    for row in labels:
        changes = [x for x in range(1, len(row)) if row[x] != row[x - 1]]
        expected += zip([0, *changes], [*changes, len(row)], strict=True)
        rows.append(len(expected))
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == expected
    assert first_of_row.tolist() == rows


def test_the_first_region_of_a_label_keeps_its_id_and_further_ones_fill_the_gaps() -> None:
    # Label 3 twice, label 1 not at all: its second region takes the free id 1.
    assert connected([[3, 0, 3], [2, 2, 2]], [0, 0, 0, 0], 0) == [[3, 0, 1], [2, 2, 2]]
    # Labels 0 and 2 are unused and nothing is new: the highest ids move down.
    assert connected([[1, 3, 4]], [0, 0, 0, 0, 0], 0) == [[1, 2, 0]]
    # More regions than labels.
    assert connected([[0, 1, 0, 1, 0]], [0, 0], 0) == [[0, 1, 2, 3, 4]]


def test_corners_do_not_connect() -> None:
    assert connected([[1, 0], [0, 1]], [0, 0], 0) == [[1, 0], [2, 3]]


def test_a_fragment_joins_the_nearest_mean_not_the_first_or_the_largest_neighbour() -> None:
    labels = [[0, 0, 0, 0], [0, 2, 1, 1], [0, 0, 1, 1]]
    assert connected(labels, [0, 10, 6], 2) == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert connected(labels, [0, 10, 4], 2) == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("nearest", [0, 1, 2])
def test_a_fragment_joins_the_nearest_of_several_regions_on_one_side(turns: int, nearest: int) -> None:
    labels = np.rot90([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [B, 3, 3, 3, 3, B]], turns)
    means = [0.0 if label == nearest else 10 + label for label in range(3)]
    regions = np.array(connected(labels.tolist(), [*means, 1.0], 5))
    assert (regions[labels == 3] == regions[labels == nearest][0]).all()


def test_a_fragment_has_the_mean_of_its_own_pixels_and_a_whole_region_that_of_its_label() -> None:
    labels = [[0, 0, 2, 1, 1]]
    # By its label, the fragment would join 0.
    assert connected(labels, [0, 10, 0], 2, values=[[0, 0, 9, 10, 10]]) == [[0, 0, 1, 1, 1]]
    # By their pixels, 0 would be the nearer one.
    assert connected(labels, [0, 10, 0], 2, values=[[9, 9, 9, 0, 0]]) == [[0, 0, 1, 1, 1]]


def test_a_fragment_of_several_runs_has_one_mean() -> None:
    labels = [[0, 0, 2, 1, 1], [0, 2, 2, 1, 1], [0, 0, 1, 1, 1]]
    values = [[0, 0, 4, 10, 10], [0, 4, 10, 10, 10], [0, 0, 10, 10, 10]]
    joined = [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert connected(labels, [0, 10, 0], 4, values=values) == joined


def test_a_region_of_just_the_smallest_size_stays() -> None:
    assert connected([[0, 0, 0, 1, 1, 0, 0, 0]], [0, 5], 2) == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert connected([[0, 0, 0, 1, 1, 0, 0, 0]], [0, 5], 3) == [[0, 0, 0, 0, 0, 1, 1, 1]]


def test_fragments_join_in_rounds() -> None:
    # 2 touches only the fragment 1 in the first round; in the second, that is part of 0, whose mean counts.
    labels = [[0, 0, 0, 1, 2, 3, 4, 4, 4]]
    assert connected(labels, [0, 2, 3, 4, 9], 2) == [[0, 0, 0, 0, 0, 1, 1, 1, 1]]
    # By the means of the fragments themselves, 2 would have gone to the right.
    assert connected(labels, [0, 2, 5.5, 6, 7], 2) == [[0, 0, 0, 0, 1, 1, 1, 1, 1]]
    # By the mean of what 1 had been, 2 would have gone to the left.
    assert connected(labels, [0, 5, 5, 7, 9], 2) == [[0, 0, 0, 0, 1, 1, 1, 1, 1]]


def test_among_fragments_alone_the_largest_becomes_whole_and_of_equals_the_first() -> None:
    assert connected([[0, 1, 1, 2]], [0, 5, 9], 100) == [[0, 0, 0, 0]]
    assert connected([[0, 0, 1, 2, 2]], [0, 5, 9], 100) == [[0, 0, 1, 1, 1]]
    assert connected([[0, 1], [2, 3]], [0, 1, 2, 3], 100) == [[0, 0], [0, 0]]


def test_the_background_is_never_joined_and_its_regions_stay_however_small() -> None:
    labels = [[0, 0, B, 1], [0, 0, B, B], [B, 0, 0, 0]]
    # The fragment 1 touches only background: it becomes a region of its own.
    assert connected(labels, [0, 0], 4) == [[0, 0, 2, 1], [0, 0, 2, 2], [3, 0, 0, 0]]
    assert connected([[B, B], [B, B]], [0], 4) == [[0, 0], [0, 0]]
    assert connected([[B, 0], [0, B]], [0], 4) == [[1, 0], [2, 3]]


def test_a_spiral_as_long_as_the_map_stays_whole() -> None:
    path = np.zeros((41, 41), np.uint16)
    y, x, (step_y, step_x) = 0, 0, (0, 1)
    path[0, 0] = 1
    for length in (40, *np.repeat(np.arange(40, 0, -2), 2)):
        for _ in range(length):
            y, x = y + step_y, x + step_x
            path[y, x] = 1
        step_y, step_x = step_x, -step_y
    labels = path.copy()
    assert connect_regions(labels, np.zeros((1, 41, 41), np.float32), np.zeros((1, 2)), 0) == 2
    np.testing.assert_array_equal(labels, path)


@pytest.mark.parametrize("smallest", [0, 2])
def test_the_count_is_right_beyond_the_ids(smallest: int) -> None:
    labels = np.where(np.indices((300, 300)).sum(axis=0) % 2, BACKGROUND, 0).astype(np.uint16)
    assert connect_regions(labels, np.zeros((1, 300, 300), np.float32), np.zeros((1, 1)), smallest) == 90_000
