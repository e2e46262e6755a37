"""Nearest neighbours against plain loops, with ties and groups, and equal in every bit however they are computed."""

from __future__ import annotations

import pickle
import sys
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import approximate, neighbours
from preprocess.approximate import approximate_neighbours, measured_recall
from preprocess.kernels.neighbours import COLUMN_MULTIPLE, ROW_MULTIPLE, add_products, component_means
from preprocess.neighbours import Neighbours, nearest_neighbours, num_block_pairs
from supercl_core.errors import SuperCLError, UsageError

few_examples = settings(max_examples=30, deadline=None)


def unit_rows(num_rows: int, seed: int, num_columns: int = 6) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(num_rows, num_columns))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def tied_rows(num_rows: int, seed: int, num_columns: int) -> np.ndarray:
    """Rows with four values of a half, either sign: all products are multiples of a quarter, and many are equal."""
    generator = np.random.default_rng(seed)
    rows = np.zeros((num_rows, num_columns), np.float32)
    for row in rows:
        row[generator.permutation(num_columns)[:4]] = generator.choice([-0.5, 0.5], 4)
    return rows


def walks(num_cases: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of cases of 20 slices, each near the one before it and near the same slice of all cases; and their cases."""
    generator = np.random.default_rng(seed)
    curve = generator.normal(size=(20, 24)).cumsum(axis=0)
    rows = curve + generator.normal(size=(num_cases, 20, 24)).cumsum(axis=1) / 3
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    return rows.reshape(-1, 24).astype(np.float32), np.repeat(np.arange(num_cases), 20)


def assert_same(found: Neighbours, expected: Neighbours) -> None:
    assert (found.index.dtype, found.similarity.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(found.index, expected.index)
    np.testing.assert_array_equal(found.similarity, expected.similarity)


@given(st.integers(2, 40), st.integers(4, 19), st.integers(0, 9999), st.integers(1, 50), st.booleans())
@few_examples
def test_neighbours_and_ties_equal_the_plain_twin(
    num_rows: int, num_columns: int, seed: int, block_rows: int, is_grouped: bool
) -> None:
    rows = tied_rows(num_rows, seed, num_columns)
    groups = np.random.default_rng(seed).permutation(num_rows) % 3 if is_grouped else None
    index, similarity = references.nearest_neighbours(rows.astype(float), groups)
    expected = Neighbours(index.astype(np.int32), similarity.astype(np.float32))
    assert_same(nearest_neighbours(rows, groups, block_rows=block_rows), expected)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 9999))
@few_examples
def test_similarities_equal_the_plain_twin(num_rows: int, num_columns: int, seed: int) -> None:
    rows = unit_rows(num_rows, seed, num_columns)
    found = nearest_neighbours(rows)
    index, similarity = references.nearest_neighbours(rows.astype(float))
    np.testing.assert_allclose(found.similarity, similarity, atol=1e-6)
    if num_columns > 2:  # in a line or a plane many neighbours are equally near
        np.testing.assert_array_equal(found.index, index)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """More rows than two tiles hold, some of them equal."""
    rows = unit_rows(1100, 0, num_columns=65)
    rows[[300, 513, 1099]] = rows[17]
    return rows


@pytest.fixture(scope="module")
def groups(rows: np.ndarray) -> np.ndarray:
    return np.arange(len(rows)) // 20


@pytest.fixture(scope="module")
def expected(rows: np.ndarray, groups: np.ndarray) -> tuple[Neighbours, Neighbours]:
    """Without and with groups."""
    return nearest_neighbours(rows), nearest_neighbours(rows, groups)


def test_many_rows_equal_matrix_products_in_float64(
    rows: np.ndarray, groups: np.ndarray, expected: tuple[Neighbours, Neighbours]
) -> None:
    products = rows.astype(float) @ rows.T.astype(float)
    np.fill_diagonal(products, -2)
    for found in expected:
        unlike = np.setdiff1d(
            np.arange(len(rows)), [17, 300, 513, 1099]
        )  # the others have several neighbours
        np.testing.assert_array_equal(found.index[unlike], products[unlike].argmax(axis=1))
        np.testing.assert_allclose(found.similarity, products.max(axis=1), atol=1e-6)
        products[groups[:, None] == groups] = -2


def test_equal_rows_tie_wherever_they_lie(expected: tuple[Neighbours, Neighbours]) -> None:
    for found in expected:
        assert found.index[[17, 300, 513, 1099]].tolist() == [300, 17, 17, 17]


def test_a_similarity_depends_on_its_two_rows_only(
    rows: np.ndarray, expected: tuple[Neighbours, Neighbours]
) -> None:
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = nearest_neighbours(rows[order])
    np.testing.assert_array_equal(shuffled.similarity, expected[0].similarity[order])


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("block_rows", [150, 513, 2000])
def test_block_size_and_threads_change_no_bit(
    rows: np.ndarray,
    groups: np.ndarray,
    expected: tuple[Neighbours, Neighbours],
    block_rows: int,
    num_threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(neighbours, "TASKS_IN_HAND", 5)
    with ThreadPoolExecutor(num_threads) as executor:
        found = nearest_neighbours(rows, executor=executor, block_rows=block_rows)
        of_others = nearest_neighbours(rows, groups, executor=executor, block_rows=block_rows)
    assert_same(found, expected[0])
    assert_same(of_others, expected[1])


def test_worker_processes_change_no_bit(
    rows: np.ndarray, groups: np.ndarray, expected: tuple[Neighbours, Neighbours], tmp_path: Path
) -> None:
    from distributed import Client, LocalCluster

    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    with (
        LocalCluster(
            n_workers=4, threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
        for num_workers, block_rows in ((1, 700), (2, 300), (4, 200)):
            executor = client.get_executor(pure=False, workers=workers[:num_workers])
            found = nearest_neighbours(mapped, executor=executor, block_rows=block_rows)
            assert_same(found, expected[0])
        assert_same(nearest_neighbours(mapped, groups, executor=executor, block_rows=200), expected[1])


class Watched(ThreadPoolExecutor):
    """Remembers its tasks, how many were unfinished at most, and how large they would be to send."""

    def __init__(self) -> None:
        super().__init__(1)
        self.tasks: list[Future] = []
        self.most, self.largest_bytes = 0, 0

    def submit(self, function, /, *arguments):
        task = super().submit(function, *arguments)
        self.tasks.append(task)
        self.most = max(self.most, sum(not task.done() for task in self.tasks))
        self.largest_bytes = max(self.largest_bytes, len(pickle.dumps((function, arguments))))
        return task


def test_tasks_are_few_at_a_time_and_light_where_rows_lie_in_a_file(
    rows: np.ndarray,
    expected: tuple[Neighbours, Neighbours],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(neighbours, "TASKS_IN_HAND", 3)
    np.save(tmp_path / "rows.npy", np.concatenate([np.zeros((7, 65), np.float32), rows]))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    with Watched() as executor:
        nearest_neighbours(mapped, executor=executor, block_rows=100)
        assert executor.most <= 3
        assert executor.largest_bytes < 3000
        # A part of a map does not tell where in the file it begins.
        assert_same(nearest_neighbours(mapped[7:], executor=executor, block_rows=100), expected[0])
    np.save(tmp_path / "columns.npy", np.asfortranarray(rows))
    assert_same(nearest_neighbours(np.load(tmp_path / "columns.npy", mmap_mode="r")), expected[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 99])
def test_a_value_that_is_not_finite_is_refused(value: float, row: int) -> None:
    rows = unit_rows(100, 0)
    rows[row, 3] = value
    first = row // 5 * 5
    with pytest.raises(ValueError, match=f"rows {first} to {first + 4} is not finite"):
        nearest_neighbours(rows, block_rows=5)


class Stalled(Executor):
    """Runs its first task and leaves all others waiting."""

    def __init__(self) -> None:
        self.tasks: list[Future] = []

    def submit(self, function, /, *arguments):
        task: Future = Future()
        if not self.tasks:
            try:
                task.set_result(function(*arguments))
            except ValueError as error:
                task.set_exception(error)
        self.tasks.append(task)
        return task


def test_a_task_that_fails_ends_the_others() -> None:
    rows = unit_rows(20, 0)
    rows[1] = np.nan
    executor = Stalled()
    with pytest.raises(ValueError, match="not finite"):
        nearest_neighbours(rows, executor=executor, block_rows=5)
    assert [task.cancelled() for task in executor.tasks] == [False] + [True] * 9


def test_a_single_row_is_its_own_neighbour() -> None:
    for search in (nearest_neighbours, approximate_neighbours):
        assert_same(search(unit_rows(1, 0)), Neighbours(np.zeros(1, np.int32), np.ones(1, np.float32)))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_rows_of_one_group_have_no_neighbours(num_rows: int) -> None:
    for search in (nearest_neighbours, approximate_neighbours):
        with pytest.raises(UsageError, match="at least two cases"):
            search(unit_rows(num_rows, 0), np.full(num_rows, 7))


@pytest.mark.parametrize("block_rows", [1, 2, 100])
def test_rows_that_are_all_equal_are_linked_to_the_first(block_rows: int) -> None:
    rows = np.tile(unit_rows(1, 3), (5, 1))
    assert nearest_neighbours(rows, block_rows=block_rows).index.tolist() == [1, 0, 0, 0, 0]
    groups = np.array([4, 4, 4, 9, 9])
    assert nearest_neighbours(rows, groups, block_rows=block_rows).index.tolist() == [3, 3, 3, 0, 0]


@pytest.mark.parametrize(("num_rows", "block_rows"), [(2, 1), (10, 10), (11, 5), (30, 4)])
def test_progress_is_told_for_each_pair_of_blocks(num_rows: int, block_rows: int) -> None:
    calls: list[None] = []
    nearest_neighbours(unit_rows(num_rows, 0), block_rows=block_rows, on_block=lambda: calls.append(None))
    assert len(calls) == num_block_pairs(num_rows, block_rows)


# ---------------------------------------------------------------- kernels


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 40), st.integers(0, 9999))
@few_examples
def test_products_are_those_of_matrices_and_commute(height: int, depth: int, width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    a = generator.normal(size=(height * ROW_MULTIPLE, depth * COLUMN_MULTIPLE)).astype(np.float32)
    b = generator.normal(size=(width * ROW_MULTIPLE, depth * COLUMN_MULTIPLE)).astype(np.float32)
    products, swapped = np.ones((len(a), len(b)), np.float32), np.ones((len(b), len(a)), np.float32)
    add_products(a, np.ascontiguousarray(b.T), products)
    add_products(b, np.ascontiguousarray(a.T), swapped)
    np.testing.assert_allclose(products, 1 + a.astype(float) @ b.T.astype(float), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(products, swapped.T)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 6), st.integers(0, 9999))
@few_examples
def test_means_of_components_equal_the_plain_twin(
    num_rows: int, num_columns: int, num_components: int, seed: int
) -> None:
    rows = unit_rows(num_rows, seed, num_columns)
    components = np.random.default_rng(seed).integers(0, num_components, num_rows)
    means = component_means(rows, components, num_components)
    assert means.dtype == np.float32
    expected = references.component_means(rows, components, num_components)
    np.testing.assert_allclose(means, expected, atol=2e-7)


def test_opposite_rows_have_a_mean_of_zeros() -> None:
    rows = np.float32([[1, 0], [0, 1], [-1, 0], [0, 1]])
    means = component_means(rows, np.array([0, 1, 0, 1], np.int32), 2)
    np.testing.assert_array_equal(means, [[0, 0], [0, 1]])


def test_rows_in_a_file_are_summed_in_float64(tmp_path: Path) -> None:
    rows = np.float32([[1, 1], *[[2**-25, 0]] * 64])  # each changes no float32 sum of 1
    np.save(tmp_path / "rows.npy", rows)
    means = component_means(np.load(tmp_path / "rows.npy", mmap_mode="r"), np.zeros(65, np.int32), 1)
    assert means[0, 0] / means[0, 1] == pytest.approx(1 + 2**-19, abs=1e-7)


# ---------------------------------------------------------------- the approximate index


def test_the_approximate_index_finds_nearly_all_neighbours() -> None:
    pytest.importorskip("faiss")
    rows, cases = walks(200, seed=0)
    for groups in (None, cases):
        found = approximate_neighbours(rows, groups)
        exact = nearest_neighbours(rows, groups)
        assert (found.index.dtype, found.similarity.dtype) == (np.int32, np.float32)
        assert (found.index == exact.index).mean() >= 0.99
        assert measured_recall(rows, found, groups, sample=1000, seed=0) >= 0.99
        np.testing.assert_allclose(
            found.similarity, np.einsum("nd,nd->n", rows, rows[found.index]), atol=1e-6
        )
        assert_same(approximate_neighbours(rows, groups), found)
    assert (cases[found.index] != cases).all()


def test_rows_without_a_candidate_are_compared_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(approximate, "MOST_CANDIDATES", 1)
    monkeypatch.setattr(approximate, "CHUNK_ROWS", 7)
    rows, cases = walks(6, seed=1)
    for groups in (None, cases):
        found, exact = approximate_neighbours(rows, groups), nearest_neighbours(rows, groups)
        np.testing.assert_array_equal(found.index, exact.index)
        np.testing.assert_allclose(found.similarity, exact.similarity, atol=1e-6)


def test_recall_is_the_share_of_rows_with_their_nearest_neighbour() -> None:
    rows, cases = walks(10, seed=2)
    exact = nearest_neighbours(rows, cases)
    assert measured_recall(rows, exact, cases, sample=10**9) == 1
    damaged = exact.index.copy()
    damaged[::4] = (damaged[::4] + 20) % len(rows)  # another case, and in places the row's own
    damaged[1::4] = nearest_neighbours(rows).index[1::4]
    right = (damaged == exact.index).mean()
    assert 0.5 <= right < 0.9
    found = Neighbours(damaged, exact.similarity)
    assert measured_recall(rows, found, cases, sample=10**9) == right
    assert measured_recall(rows, found, cases, sample=50, seed=1) == pytest.approx(right, abs=0.2)


def test_an_equally_near_neighbour_counts_as_right() -> None:
    rows = np.tile(unit_rows(1, 3), (5, 1))
    found = Neighbours(np.int32([4, 4, 4, 4, 3]), np.ones(5, np.float32))
    assert measured_recall(rows, found, sample=5) == 1


def test_without_faiss_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(SuperCLError, match=r"pip install 'supercl\[index\]'"):
        approximate_neighbours(unit_rows(3, 0))
