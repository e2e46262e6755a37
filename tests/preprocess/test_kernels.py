"""Kernels against their plain twins and SciPy, on generated inputs and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components as scipy_components

from preprocess.kernels.asp import superpixel_means
from preprocess.kernels.union_find import connected_components

few_examples = settings(max_examples=40, deadline=None)


@given(
    st.sampled_from([np.uint8, np.uint16]),
    st.sampled_from([np.int16, np.uint16, np.float32, np.float64, np.int32]),
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), min_size=1, max_size=12),
    st.integers(0, 9),
    st.integers(0, 2**31),
)
@few_examples
def test_means_equal_the_plain_twin_wherever_runs_and_memory_begin(
    ids: type, dtype: type, runs: list[tuple[int, int]], start: int, seed: int
) -> None:
    superpixels = np.concatenate([np.full(length, superpixel, ids) for superpixel, length in runs])
    start = min(start, len(superpixels) - 1)
    values = (np.random.default_rng(seed).normal(size=len(superpixels)) * 1000).clip(0).astype(dtype)
    arguments = values[None, start:], superpixels[None, start:], 10
    means = superpixel_means(*arguments)
    assert means.dtype == np.float64
    np.testing.assert_allclose(means, references.superpixel_means(*arguments), rtol=1e-13)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
@few_examples
def test_means_keep_the_total(height: int, width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    superpixels = generator.integers(0, 6, (height, width), dtype=np.uint8)
    values = generator.normal(size=superpixels.shape)
    means = superpixel_means(values, superpixels, int(superpixels.max()) + 1)
    assert means[superpixels].sum() == pytest.approx(values.sum(), abs=1e-12)


def test_a_superpixel_without_a_pixel_has_mean_0() -> None:
    means = superpixel_means(np.float32([[2, 4]]), np.array([[0, 2]], np.uint8), 4)
    np.testing.assert_array_equal(means, [2, 0, 4, 0])


@pytest.mark.parametrize("length", [3, 1000])
def test_sums_are_exact_beyond_float32(length: int) -> None:
    superpixels = np.zeros((1, length), np.uint8)
    values = np.full((1, length), 16_777_216, np.int32)
    values[0, 0] = 16_777_219
    assert superpixel_means(values, superpixels, 1)[0] == 16_777_216 + 3 / length
    floats = np.full((1, length), 2.0**24, np.float32)
    floats[0, 0] = 0.5
    assert superpixel_means(floats, superpixels, 1)[0] == (2.0**24 * (length - 1) + 0.5) / length


@pytest.mark.parametrize("value", [-32768, 32767])
def test_a_slice_at_the_end_of_the_range_does_not_overflow(value: int) -> None:
    values = np.full((512, 512), value, np.int16)
    assert superpixel_means(values, np.zeros((512, 512), np.uint8), 1)[0] == value


graphs = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=15)
    )
)


@given(graphs, st.randoms(use_true_random=False))
@few_examples
def test_components_equal_the_plain_twin_and_scipy_in_any_order_of_edges(graph, random) -> None:
    num_nodes, edges = graph
    ends = np.array(edges, dtype=np.int64).reshape(-1, 2)
    labels = connected_components(num_nodes, ends[:, 0], ends[:, 1])
    np.testing.assert_array_equal(labels, references.graph_components(num_nodes, edges))
    matrix = coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(num_nodes, num_nodes))
    count, expected = scipy_components(matrix, directed=False)
    assert labels.max() + 1 == count
    assert len(set(zip(labels.tolist(), expected.tolist(), strict=True))) == count
    random.shuffle(edges)
    shuffled = np.array([edge[::-1] for edge in edges], dtype=np.int64).reshape(-1, 2)
    np.testing.assert_array_equal(connected_components(num_nodes, shuffled[:, 0], shuffled[:, 1]), labels)


def test_a_chain_of_many_nodes_is_one_component() -> None:
    nodes = np.arange(50_000)
    assert connected_components(50_000, nodes[::-1][:-1].copy(), nodes[::-1][1:].copy()).max() == 0
