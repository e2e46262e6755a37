"""The hierarchy in torch against the offline stage's, SciPy and plain loops; ties, groups and degenerate rows."""

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array, csgraph
from torch.overrides import TorchFunctionMode

from preprocess.ccl import first_neighbour_hierarchy as offline_hierarchy
from preprocess.ccl import normalise as offline_normalise
from preprocess.kernels.neighbours import component_means as offline_means
from preprocess.phantom import phantom_case
from preprocess.pipeline import asp_on_grid
from preprocess.superpixels import slic_superpixels
from supercl_core.errors import SuperCLError, UsageError
from train.hierarchy import (
    component_means,
    connected_components,
    first_neighbour_hierarchy,
    nearest_neighbours,
    normalise,
)

TIE = 1e-6
"""Difference of two cosines that rounding may turn round."""


def random_rows(num_rows, num_columns=6, seed=0):
    return np.random.default_rng(seed).random((num_rows, num_columns)).astype(np.float32)


def like_slices(num_cases=12, num_slices=20, num_columns=64, seed=0):
    """Rows that change slowly along each case, around a course that all cases share."""
    random = np.random.default_rng(seed)
    course = random.normal(size=(num_slices, num_columns)).cumsum(axis=0)
    own = 0.3 * random.normal(size=(num_cases, num_slices, num_columns)).cumsum(axis=1)
    return (course + own).reshape(-1, num_columns).astype(np.float32)


def compare_with_offline(rows, cases=None):
    """Assert that the nearest neighbours of each level equal the offline ones but for ties, up to a level with ties.

    Returns the number of neighbours in which they differ; without any, all labels of all levels are equal.
    """
    groups = None if cases is None else torch.from_numpy(cases)
    levels = first_neighbour_hierarchy(torch.from_numpy(rows), groups)
    offline = offline_hierarchy(rows, cases)
    unit_rows = nodes = normalise(torch.from_numpy(rows))
    for level, labels in enumerate(offline.ccl):
        nearest = nearest_neighbours(nodes, None if level else groups).numpy()
        expected = offline.nearest[level, : len(nodes)]
        differing = np.flatnonzero(nearest != expected)
        exact = nodes.double().numpy()
        ours, theirs = (
            (exact[differing] * exact[found[differing]]).sum(axis=1) for found in (nearest, expected)
        )
        assert (np.abs(ours - theirs) <= TIE).all()
        if len(differing):
            return len(differing)
        assert levels[level].dtype == torch.int32
        np.testing.assert_array_equal(levels[level].numpy(), labels)
        nodes = component_means(unit_rows, levels[level].long(), int(labels.max()) + 1)
    assert len(levels) == len(offline.ccl)
    return 0


# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize(
    ("num_rows", "num_columns"), [(1, 4), (2, 4), (3, 1), (6, 4), (40, 6), (333, 20), (2500, 8)]
)
def test_random_rows_give_the_labels_of_the_offline_stage(num_rows, num_columns):
    for seed in range(3):
        assert compare_with_offline(random_rows(num_rows, num_columns, seed)) == 0


@pytest.mark.parametrize("seed", range(4))
def test_rows_like_slices_give_the_labels_of_the_offline_stage(seed):
    rows = like_slices(seed=seed)
    cases = np.arange(len(rows)) // 20
    assert compare_with_offline(rows) == 0
    assert compare_with_offline(rows, cases) == 0
    apart = first_neighbour_hierarchy(torch.from_numpy(rows), torch.from_numpy(cases))[0]
    assert not torch.equal(apart, first_neighbour_hierarchy(torch.from_numpy(rows))[0])


def test_intensities_of_phantoms_give_the_labels_of_the_offline_stage():
    rows, cases = [], []
    for case in range(5):
        for slice_YX in phantom_case(case, seed=1).image:
            slice_CYX = slice_YX[None]
            superpixels_YX = slic_superpixels(slice_CYX, method="fast", n_segments=100, compactness=10.0)
            rows.append(asp_on_grid(slice_CYX, superpixels_YX).astype(np.float16).astype(np.float32).ravel())
            cases.append(case)
    rows = np.stack(rows)
    assert compare_with_offline(rows) == 0
    assert compare_with_offline(rows, np.array(cases)) == 0


def test_where_neighbours_tie_the_chosen_one_is_as_near():
    rows = np.repeat(like_slices(num_cases=3), 4, axis=0)
    rows += np.random.default_rng(0).normal(scale=1e-6, size=rows.shape).astype(np.float32)
    assert compare_with_offline(rows) > 0  # so the ties are there


@given(st.integers(1, 40), st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_hierarchy_equals_the_plain_twin(num_rows, seed):
    rows = random_rows(num_rows, 4, seed)
    levels = first_neighbour_hierarchy(torch.from_numpy(rows))
    expected = references.first_neighbour_hierarchy(rows)
    assert [level.tolist() for level in levels] == [level.tolist() for level in expected]


@pytest.mark.parametrize("block_rows", [7, 64, 239, 240])
def test_blocks_do_not_change_labels(block_rows):
    rows = torch.from_numpy(like_slices())
    cases = torch.arange(len(rows)) // 20
    for groups in (None, cases):
        levels = first_neighbour_hierarchy(rows, groups)
        again = first_neighbour_hierarchy(rows, groups, block_rows=block_rows)
        assert all(torch.equal(a, b) for a, b in zip(levels, again, strict=True))


def test_groups_count_at_the_finest_level_only():
    rows = torch.from_numpy(like_slices())
    cases = torch.arange(len(rows)) // 20
    nearest = nearest_neighbours(normalise(rows), cases)
    assert (cases[nearest] != cases).all()
    levels = first_neighbour_hierarchy(rows, cases)
    assert len(levels) > 1
    labels = levels[0].long()
    means = component_means(normalise(rows), labels, int(labels.max()) + 1)
    expected = connected_components(nearest_neighbours(means))[labels]
    assert torch.equal(levels[1].long(), expected)


# ---------------------------------------------------------------- degenerate rows


def test_a_single_row_is_one_component():
    [labels] = first_neighbour_hierarchy(torch.ones(1, 4))
    assert (labels.tolist(), labels.dtype) == ([0], torch.int32)


def test_two_rows_are_one_component_however_unlike():
    [labels] = first_neighbour_hierarchy(torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]))
    assert labels.tolist() == [0, 0]


@pytest.mark.parametrize(("num_rows", "block_rows"), [(3, 2), (300, 7), (1000, 999), (5000, 2048)])
def test_equal_rows_are_one_component(num_rows, block_rows):
    rows = torch.from_numpy(random_rows(1, 100)).repeat(num_rows, 1)
    [labels] = first_neighbour_hierarchy(rows, block_rows=block_rows)
    assert labels.eq(0).all()


def test_products_that_rounding_parts_still_tie():
    unit_rows = torch.zeros(4, 3)
    unit_rows[:, 0] = torch.tensor([1, 1 - 2e-7, 1 + 2e-7, 1])
    assert nearest_neighbours(unit_rows).tolist() == [1, 0, 0, 0]


def test_constant_rows_are_alike_and_like_nothing_else():
    rows = torch.from_numpy(np.concatenate([random_rows(8), np.full((3, 6), 0.7), np.zeros((2, 6))]))
    nearest = nearest_neighbours(normalise(rows))
    assert nearest[8:].tolist() == [9, 8, 8, 8, 8]
    assert (nearest[:8] < 8).all()
    assert first_neighbour_hierarchy(rows)[0][8:].unique().numel() == 1


def test_ties_go_to_the_lower_index():
    unit_rows = torch.eye(2)[[0, 1, 0, 0, 1, 1]]
    for block_rows in (1, 2, 4, 6):
        assert nearest_neighbours(unit_rows, block_rows=block_rows).tolist() == [2, 4, 0, 0, 1, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    rows = torch.from_numpy(random_rows(5))
    rows[[1, 3], 2] = value
    with pytest.raises(SuperCLError, match="2 of 5 rows"):
        first_neighbour_hierarchy(rows)


@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_single_group_is_refused(num_rows):
    with pytest.raises(UsageError, match=f"{num_rows} rows of one group"):
        first_neighbour_hierarchy(torch.rand(num_rows, 3), torch.full((num_rows,), 7))


# ---------------------------------------------------------------- its parts


def test_rows_are_normalised_as_offline():
    rows = np.concatenate([random_rows(5), np.full((1, 6), 3e-9), 1e-12 * random_rows(2, seed=1)])
    np.testing.assert_allclose(normalise(torch.from_numpy(rows)), offline_normalise(rows), rtol=0, atol=1e-7)


@given(st.integers(1, 30), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_nearest_neighbours_equal_the_plain_twin(num_rows, seed):
    unit_rows = normalise(torch.from_numpy(random_rows(num_rows, 6, seed)))
    expected, _ = references.nearest_neighbours(unit_rows.double().numpy())
    assert nearest_neighbours(unit_rows, block_rows=8).tolist() == expected.tolist()


@given(st.integers(1, 60).flatmap(lambda n: st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
@settings(max_examples=100, deadline=None)
def test_components_equal_those_of_scipy(nearest):
    assert_same_components(np.array(nearest))


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 16, 17, 1000])
def test_components_of_long_walks_equal_those_of_scipy(num_nodes):
    nodes = np.arange(num_nodes)
    order = np.random.default_rng(0).permutation(num_nodes)
    for nearest in (np.minimum(nodes + 1, num_nodes - 1), np.maximum(nodes - 1, 0), (nodes + 1) % num_nodes):
        assert_same_components(nearest)
        assert_same_components(order[nearest[np.argsort(order)]])


def assert_same_components(nearest):
    graph = coo_array((np.ones(len(nearest)), (np.arange(len(nearest)), nearest)))
    graph.resize(len(nearest), len(nearest))
    _, expected = csgraph.connected_components(graph, directed=False)
    _, first, inverse = np.unique(expected, return_index=True, return_inverse=True)
    in_order_of_first = np.argsort(np.argsort(first))[inverse]
    labels = connected_components(torch.from_numpy(nearest))
    np.testing.assert_array_equal(labels, in_order_of_first)


def test_means_equal_the_offline_ones():
    unit_rows = normalise(torch.from_numpy(random_rows(200, 150)))
    components = torch.from_numpy(np.random.default_rng(1).permutation(np.arange(200) % 9))
    means = component_means(unit_rows, components, 9)
    expected = offline_means(unit_rows.numpy(), components.numpy(), 9)
    np.testing.assert_allclose(means, expected, rtol=0, atol=1e-7)


def test_means_that_cancel_stay_zero():
    unit_rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    means = component_means(unit_rows, torch.tensor([0, 0, 1]), 2)
    assert means.tolist() == [[0, 0], [0, 1]]


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_products_are_float32_whatever_the_process_allows(allowed):
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), settings=None):
            if "matmul" in getattr(function, "__name__", ""):
                seen.append(torch.get_float32_matmul_precision())
            return function(*arguments, **(settings or {}))

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        with Watch():
            first_neighbour_hierarchy(torch.from_numpy(random_rows(30)))
        assert set(seen) == {"highest"}
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)
