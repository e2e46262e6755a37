"""Components of superpixels against SciPy's labelling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import label

from supercl_core.checks.superpixel_check import component_roots, count_components


def labelled(superpixels_ZYX: np.ndarray) -> np.ndarray:
    num_ids = int(superpixels_ZYX.max()) + 1
    return np.array(
        [[label(slice_YX == number)[1] for number in range(num_ids)] for slice_YX in superpixels_ZYX]
    )


@given(
    st.tuples(*[st.integers(1, size) for size in (3, 9, 9)]).flatmap(
        lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 3))
    )
)
@settings(max_examples=300, deadline=None)
def test_random_maps(superpixels_ZYX: np.ndarray) -> None:
    np.testing.assert_array_equal(count_components(superpixels_ZYX), labelled(superpixels_ZYX))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("num_ids", [2, 3, 7, 200])
def test_noise_of_a_whole_slice(num_ids: int, dtype: type) -> None:
    noise = np.random.default_rng(num_ids).integers(0, num_ids, (2, 61, 67)).astype(dtype)
    np.testing.assert_array_equal(count_components(noise), labelled(noise))


@pytest.mark.parametrize("turned", [False, True])
def test_a_snake_is_one_component(turned: bool) -> None:
    """One region that goes to and fro over the whole slice, each of the gaps between its bends a region of its own."""
    snake = np.ones((1, 41, 41), np.uint8)
    snake[0, ::2] = 0
    snake[0, 1::4, -1] = snake[0, 3::4, 0] = 0
    if turned:
        snake = np.ascontiguousarray(snake.swapaxes(1, 2))
    assert count_components(snake).tolist() == [[1, 20]]


def test_slices_are_kept_apart() -> None:
    """The last row of one slice is no neighbour of the first row of the next."""
    superpixels_ZYX = np.zeros((3, 2, 4), np.uint8)
    superpixels_ZYX[:, 1, 2:] = 1
    assert count_components(superpixels_ZYX).tolist() == [[1, 1]] * 3


@given(
    st.integers(1, 30).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))
    )
)
@settings(max_examples=200, deadline=None)
def test_roots_of_any_graph(graph: tuple[int, list[tuple[int, int]]]) -> None:
    num_nodes, edges = graph
    smallest = list(range(num_nodes))
    for _ in range(num_nodes):
        for node, other in edges:
            smallest[node] = smallest[other] = min(smallest[node], smallest[other])
    ends = np.array(edges, np.int64).reshape(-1, 2)
    assert component_roots(num_nodes, ends[:, 0], ends[:, 1]).tolist() == sorted(set(smallest))
