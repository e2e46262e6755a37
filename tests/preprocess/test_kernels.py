"""Kernels against their plain twins and SciPy, on generated inputs and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components as scipy_components

from preprocess.kernels.asp import superpixel_means
from preprocess.kernels.connectivity import connected_superpixels
from preprocess.kernels.union_find import connected_components

few_examples = settings(max_examples=40, deadline=None)
label_maps = arrays.arrays(
    np.int64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(-2, 3)
)


@given(label_maps)
@few_examples
def test_connected_superpixels_equal_the_plain_twin(labels: np.ndarray) -> None:
    np.testing.assert_array_equal(connected_superpixels(labels), references.connected_superpixels(labels))


@given(label_maps)
@few_examples
def test_connected_superpixels_are_scipys_components_of_every_label(labels: np.ndarray) -> None:
    superpixels = connected_superpixels(labels)
    count = 0
    for label in np.unique(labels):
        pieces, num_pieces = ndimage.label(labels == label)
        count += num_pieces
        for piece in range(1, num_pieces + 1):
            ids = np.unique(superpixels[pieces == piece])
            assert len(ids) == 1
            assert (superpixels == ids[0]).sum() == (pieces == piece).sum()
    assert superpixels.dtype == np.int32
    np.testing.assert_array_equal(np.unique(superpixels), np.arange(count))


@given(label_maps)
@few_examples
def test_relabelling_changes_nothing(labels: np.ndarray) -> None:
    renamed = np.array([40, 7, -3, 0, 11, 5])[labels + 2]
    np.testing.assert_array_equal(connected_superpixels(renamed), connected_superpixels(labels))
    np.testing.assert_array_equal(
        connected_superpixels(connected_superpixels(labels)), connected_superpixels(labels)
    )


def test_corners_do_not_connect() -> None:
    labels = np.array([[1, 0], [0, 1]])
    np.testing.assert_array_equal(connected_superpixels(labels), [[0, 1], [2, 3]])


def test_a_spiral_as_long_as_the_map_stays_whole() -> None:
    labels = np.zeros((101, 101), np.int32)
    for ring in range(0, 50, 2):
        labels[ring : 101 - ring, ring : 101 - ring] = 1
        labels[ring + 1 : 100 - ring, ring + 1 : 100 - ring] = 0
        labels[ring + 1, ring : ring + 1] = 0
        labels[ring + 2, ring + 1] = 1
    pieces = sum(ndimage.label(labels == value)[1] for value in (0, 1))
    assert connected_superpixels(labels).max() + 1 == pieces


@given(label_maps, st.integers(0, 2**31))
@few_examples
def test_means_equal_the_plain_twin_and_keep_the_total(labels: np.ndarray, seed: int) -> None:
    superpixels = connected_superpixels(labels)
    values = np.random.default_rng(seed).normal(size=labels.shape).astype(np.float32)
    count = int(superpixels.max()) + 1
    means = superpixel_means(values, superpixels, count)
    assert means.dtype == np.float32
    np.testing.assert_allclose(
        means, references.superpixel_means(values, superpixels, count), rtol=1e-6, atol=1e-7
    )
    total = values.sum(dtype=np.float64)
    assert means[superpixels].sum(dtype=np.float64) == pytest.approx(total, abs=1e-5)


def test_a_superpixel_without_a_pixel_has_mean_0() -> None:
    means = superpixel_means(np.float32([[2, 4]]), np.array([[0, 2]]), 4)
    np.testing.assert_array_equal(means, [2, 0, 4, 0])


def test_sums_are_exact_beyond_float32() -> None:
    values = np.full((1, 3), 16_777_217.0, np.float64).astype(np.float32)
    values[0, 0] = 1.0
    expected = np.float32((1.0 + 2 * float(values[0, 1])) / 3)
    assert superpixel_means(values, np.zeros((1, 3), np.uint8), 1)[0] == expected


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
