"""Nearest neighbours and the CCL hierarchy against plain loops, at block edges and for degenerate slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import ccl as module
from preprocess.ccl import (
    MIN_COMPONENTS,
    first_neighbour_hierarchy,
    intensity_descriptors,
    nearest_neighbours,
    normalise,
)
from supercl_core.cache_reader import open_cache


def random_rows(num_rows: int, seed: int, num_columns: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).random((num_rows, num_columns)).astype(np.float32)


def test_rows_are_centred_and_of_length_1() -> None:
    rows = np.concatenate([random_rows(5, 0), np.full((2, 6), 0.7, np.float32)])
    units = normalise(rows)
    assert units.dtype == np.float32
    np.testing.assert_allclose(units, references.centred_directions(rows), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, rtol=1e-6)


@given(st.integers(1, 30), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_nearest_neighbours_equal_the_plain_twin(num_rows: int, seed: int) -> None:
    units = normalise(random_rows(num_rows, seed))
    nearest, similarity = nearest_neighbours(units)
    expected, expected_similarity = references.nearest_neighbours(units.astype(np.float64))
    assert (nearest.dtype, similarity.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(nearest, expected)
    np.testing.assert_allclose(similarity, expected_similarity, atol=1e-6)


@pytest.mark.parametrize("block_rows", [1, 2, 7, 50, 51])
def test_nearest_neighbours_do_not_depend_on_the_size_of_blocks(
    block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = normalise(random_rows(50, 3))
    nearest, similarity = nearest_neighbours(units)
    monkeypatch.setattr(module, "BLOCK_ROWS", block_rows)
    again, similarity_again = nearest_neighbours(units)
    np.testing.assert_array_equal(again, nearest)
    np.testing.assert_allclose(similarity_again, similarity, atol=1e-6)


@pytest.mark.parametrize("block_rows", [1, 2, 3, 2048])
def test_ties_go_to_the_lower_index(block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", block_rows)
    units = np.eye(2, dtype=np.float32)[[0, 1, 0, 0, 1, 1]]
    np.testing.assert_array_equal(nearest_neighbours(units)[0], [2, 4, 0, 0, 1, 1])


def test_a_single_row_is_its_own_neighbour() -> None:
    nearest, similarity = nearest_neighbours(np.float32([[0, 1]]))
    assert (nearest.tolist(), similarity.tolist()) == ([0], [1.0])


@pytest.mark.parametrize(("num_rows", "seed"), [(1, 0), (2, 0), (6, 1), (40, 2), (120, 3), (120, 4)])
def test_hierarchy_equals_the_plain_twin(num_rows: int, seed: int) -> None:
    rows = random_rows(num_rows, seed, num_columns=4)
    hierarchy = first_neighbour_hierarchy(rows)
    expected = references.first_neighbour_hierarchy(rows)
    assert len(hierarchy.ccl) == len(expected)
    for level, labels in zip(hierarchy.ccl, expected, strict=True):
        np.testing.assert_array_equal(level, labels)


@pytest.fixture(scope="module")
def deep() -> module.Hierarchy:
    return first_neighbour_hierarchy(random_rows(400, 5, num_columns=4))


def test_each_level_is_coarser_and_nested(deep: module.Hierarchy) -> None:
    assert len(deep.num_components) >= 2
    assert list(deep.num_components) == sorted(deep.num_components, reverse=True)
    assert deep.num_components[-1] >= MIN_COMPONENTS
    assert deep.ccl.dtype == np.int32
    for level, count in zip(deep.ccl, deep.num_components, strict=True):
        np.testing.assert_array_equal(np.unique(level), np.arange(count))
    for fine, coarse in zip(deep.ccl, deep.ccl[1:], strict=False):
        assert len(set(zip(fine.tolist(), coarse.tolist(), strict=True))) == fine.max() + 1


def test_nearest_and_similarity_fill_the_nodes_of_a_level_and_nothing_more(deep: module.Hierarchy) -> None:
    for level, num_nodes in enumerate([400, *deep.num_components[:-1]]):
        assert (deep.nearest[level, :num_nodes] >= 0).all()
        assert (deep.nearest[level, :num_nodes] < num_nodes).all()
        assert (deep.nearest[level, num_nodes:] == -1).all()
        assert np.isfinite(deep.similarity[level, :num_nodes]).all()
        assert np.isnan(deep.similarity[level, num_nodes:]).all()


def test_two_slices_linked_at_a_level_share_its_label(deep: module.Hierarchy) -> None:
    np.testing.assert_array_equal(deep.ccl[0][deep.nearest[0]], deep.ccl[0])


def test_the_finest_level_is_kept_however_few_components_it_has() -> None:
    hierarchy = first_neighbour_hierarchy(random_rows(3, 0))
    assert hierarchy.ccl.shape == (1, 3)
    assert hierarchy.num_components == (1,)
    single = first_neighbour_hierarchy(random_rows(1, 0))
    assert (single.ccl.tolist(), single.num_components) == ([[0]], (1,))


def test_constant_slices_are_alike_among_themselves_only() -> None:
    rows = np.concatenate([np.zeros((2, 8)), random_rows(6, 1, num_columns=8), np.full((2, 8), 0.4)])
    finest = first_neighbour_hierarchy(rows).ccl[0]
    assert set(np.flatnonzero(finest == finest[0])) == {0, 1, 8, 9}


def test_brightness_and_contrast_do_not_change_the_labels() -> None:
    rows = random_rows(60, 7)
    changed = rows * np.linspace(0.5, 4, 60)[:, None] + np.linspace(-3, 3, 60)[:, None]
    np.testing.assert_array_equal(first_neighbour_hierarchy(changed).ccl, first_neighbour_hierarchy(rows).ccl)


def test_descriptors_are_the_asp_maps_in_the_order_of_the_slices(cache_path: Path) -> None:
    cache = open_cache(cache_path)
    descriptors = intensity_descriptors(cache)
    assert descriptors.shape == (cache.num_slices, 32 * 32)
    for index in (0, 6, 22):
        row = cache.rows[cache.slice_case[index]]
        asp = cache.case(row.id).asp_ZGG[cache.slice_z[index]]
        np.testing.assert_array_equal(descriptors[index], asp.ravel().astype(np.float32))


def test_labels_of_a_cache_are_those_of_its_descriptors(cache_copy: Path) -> None:
    cache = open_cache(cache_copy)
    stored = cache.weak_labels()
    expected = references.first_neighbour_hierarchy(intensity_descriptors(cache))
    np.testing.assert_array_equal(stored.ccl, np.stack(expected))
    computed = module.weak_labels(cache)
    np.testing.assert_array_equal(computed.ccl, stored.ccl)
    np.testing.assert_array_equal(open_cache(cache_copy).weak_labels().nearest, computed.nearest)
