"""The nearest neighbour of nearly every row by an index of faiss, for more rows than an exact search has time for.

Called by `preprocess.ccl` for more than EXACT_LIMIT rows. faiss comes with the optional extra `index`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from preprocess.neighbours import Neighbours, group_numbers, nearest_neighbours
from supercl_core.errors import SuperCLError

EXACT_LIMIT: Final = 250_000
"""Rows up to which the exact search is the default (our choice). There it takes ten minutes of one core with d = 1025,
of which the index would save three quarters. Its time grows with n ** 2: for 1,000,000 rows with d = 256 it takes 40
minutes of one core, the index 5. (CPU times of an EPYC with AVX-512, projected from 40,000 and 100,000 rows for the
exact search and from 250,000 for the index.)"""

CHUNK_ROWS: Final = 4096
"""Rows that are searched for at a time."""

MOST_CANDIDATES: Final = 1024
"""Rows of the lists that are looked at for one of another group; a case of volumes has seldom more slices."""

SAME_SIMILARITY: Final = 1e-6
"""Neighbours whose similarities differ by no more are equally near: float32 products are off by a few 1e-7."""


def approximate_neighbours(
    unit_rows: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    seed: int = 0,
    on_rows: Callable[[int], object] = lambda count: None,
) -> Neighbours:
    """The most similar other row of nearly every row.

    `unit_rows`: float32 (n, d) of length 1, n at least 1. `groups`: integers (n,); rows of one group are never
    neighbours. `seed`: of the sample of rows that the index learns from. `on_rows` is called with the number of rows
    after each part that was searched for. A single row is its own neighbour.

    k-means divides the rows into 4 sqrt(n) lists, and a row is compared with those in the lists nearest to it: time
    grows with n ** 1.5. The few rows that meet no candidate there are compared with all. The result is the same on
    one machine with one number of threads (OMP_NUM_THREADS; a graph index such as HNSW, which is as fast, would
    depend on which thread comes first).
    Raises SuperCLError where faiss is missing, UsageError where all rows are of one group.
    """
    if len(unit_rows) == 1 and groups is None:
        return nearest_neighbours(unit_rows)
    group_of_row = _groups(groups, len(unit_rows))
    index = _index(unit_rows, seed)
    # The nearest row of another group lies behind those of the row's own, in lists farther away: for the made-up
    # million of benchmarks/weak_labels.py recall is 1.000 with 32 lists; in other groups 0.984, and 0.998 with 64.
    index.nprobe = 32 if groups is None else 64
    num_candidates = min(int(np.bincount(group_of_row).max()) + 1, MOST_CANDIDATES)
    nearest = Neighbours(np.empty(len(unit_rows), np.int32), np.empty(len(unit_rows), np.float32))
    for rows in _chunks(np.arange(len(unit_rows))):
        similarity, found = index.search(unit_rows[rows], num_candidates)
        allowed = (found >= 0) & (group_of_row[found] != group_of_row[rows, None])
        best = np.arange(len(rows)), allowed.argmax(axis=1)
        nearest.index[rows] = np.where(allowed[best], found[best], -1)
        nearest.similarity[rows] = similarity[best]
        on_rows(len(rows))
    left = np.flatnonzero(nearest.index < 0)
    found_exactly = _exact_neighbours(unit_rows, left, group_of_row)
    nearest.index[left], nearest.similarity[left] = found_exactly.index, found_exactly.similarity
    return nearest


def measured_recall(
    unit_rows: np.ndarray, found: Neighbours, groups: np.ndarray | None = None, *, sample: int, seed: int = 0
) -> float:
    """Share of a random sample of rows whose neighbour in `found` is the nearest one (recall@1).

    Arrays as for `approximate_neighbours`. `sample`: rows to search for exactly among all. A neighbour that is less
    similar than the nearest by at most SAME_SIMILARITY counts as nearest.
    """
    group_of_row = _groups(groups, len(unit_rows))
    rows = np.random.default_rng(seed).permutation(len(unit_rows))[:sample]
    neighbours = found.index[rows]
    nearest = _exact_neighbours(unit_rows, rows, group_of_row).index
    similarity, best = (
        np.einsum("nd,nd->n", unit_rows[rows], unit_rows[others], dtype=np.float64)
        for others in (neighbours, nearest)
    )
    right = (similarity >= best - SAME_SIMILARITY) & (group_of_row[neighbours] != group_of_row[rows])
    return float(right.mean())


def _groups(groups: np.ndarray | None, num_rows: int) -> np.ndarray:
    """The group of every row; by itself without `groups`, as no row is its own neighbour."""
    return np.arange(num_rows, dtype=np.int32) if groups is None else group_numbers(groups)


def _index(unit_rows: np.ndarray, seed: int) -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise SuperCLError(
            "An approximate search for neighbours needs the extra 'index'.",
            found=f"no module {error.name!r}",
            next_step="pip install 'supercl[index]', or search exactly.",
        ) from error

    num_rows, num_columns = unit_rows.shape
    num_lists = min(num_rows, round(4 * num_rows**0.5))
    index = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(num_columns), num_columns, num_lists, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.niter, index.cp.seed, index.cp.min_points_per_centroid = 5, seed, 1
    sample = np.random.default_rng(seed).permutation(num_rows)[: 32 * num_lists]
    index.train(unit_rows[np.sort(sample)])
    for rows in _chunks(np.arange(num_rows)):
        index.add(unit_rows[rows])
    return index


def _exact_neighbours(unit_rows: np.ndarray, chosen: np.ndarray, group_of_row: np.ndarray) -> Neighbours:
    """The nearest neighbours of the rows with the numbers `chosen` (m,), among all rows."""
    nearest = Neighbours(np.zeros(len(chosen), np.int32), np.full(len(chosen), -np.inf, np.float32))
    for part in _chunks(np.arange(len(chosen))):
        rows = chosen[part]
        wanted = unit_rows[rows]
        for others in _chunks(np.arange(len(unit_rows))):
            products = wanted @ unit_rows[others].T
            products[group_of_row[rows, None] == group_of_row[others]] = -np.inf
            best = products.argmax(axis=1)
            similarity = products[np.arange(len(rows)), best]
            better = similarity > nearest.similarity[part]
            nearest.index[part[better]] = others[best[better]]
            nearest.similarity[part[better]] = similarity[better]
    return nearest


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), CHUNK_ROWS):
        yield rows[start : start + CHUNK_ROWS]
