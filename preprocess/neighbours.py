"""The nearest neighbour of every row by cosine similarity: exactly, in blocks that any executor may compute.

What rows are, and what becomes of the links, is left to `preprocess.ccl`, which calls this. For more rows than
EXACT_LIMIT there is `preprocess.approximate`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, as_completed, wait
from dataclasses import dataclass
from typing import Final

import numpy as np

from preprocess.kernels.neighbours import COLUMN_MULTIPLE, ROW_MULTIPLE, add_products, keep_best
from supercl_core.errors import UsageError

BLOCK_ROWS: Final = 4096
"""Rows of a block: two blocks and their products take 36 MB at d = 1024."""

TILE_ROWS: Final = 512
"""Rows and columns of the products made at a time: 1 MiB of float32, about a core's second-level cache."""

TASKS_IN_HAND: Final = 256
"""Tasks given to an executor at a time; results of so many take 16 MiB."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest neighbour of each of n rows."""

    index: np.ndarray
    """int32 (n,): its number."""
    similarity: np.ndarray
    """float32 (n,): the cosine to it, in -1..1 within rounding."""


def nearest_neighbours(
    unit_rows: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    executor: Executor | None = None,
    block_rows: int = BLOCK_ROWS,
    on_block: Callable[[], None] = lambda: None,
) -> Neighbours:
    """The most similar other row of every row, by exact search.

    `unit_rows`: float32 (n, d) of length 1, n at least 1. `groups`: integers (n,); rows of one group are never
    neighbours. Ties go to the lower index. A single row is its own neighbour, with similarity 1.

    Tasks run in this thread, or in `executor`: threads share `unit_rows`, and other processes map its file where it
    is a whole memory-mapped one (`np.lib.format.open_memmap(path, "r")`), else they are sent blocks of it. Dask may
    take two tasks with one file for the same: use `client.get_executor(pure=False)`. `on_block` is called after each
    of `num_block_pairs(n, block_rows)` tasks.

    The result depends on the rows only, in every bit: not on `block_rows`, the executor or the order of tasks.
    Raises UsageError where all rows are of one group, ValueError where a value is not finite.
    """
    num_rows = len(unit_rows)
    if groups is None:
        if num_rows == 1:
            return Neighbours(np.zeros(1, np.int32), np.ones(1, np.float32))
        group_of_row = np.arange(num_rows, dtype=np.int32)
    else:
        group_of_row = group_numbers(groups)
    blocks = [
        _Block.of(unit_rows, group_of_row, start, block_rows) for start in range(0, num_rows, block_rows)
    ]
    pairs = ((a, b) for number, a in enumerate(blocks) for b in blocks[number:])
    nearest = Neighbours(np.zeros(num_rows, np.int32), np.full(num_rows, -np.inf, np.float32))
    for parts in _results(pairs, executor):
        for start, part in parts:
            _merge(nearest, start, part)
        on_block()
    return nearest


def num_block_pairs(num_rows: int, block_rows: int = BLOCK_ROWS) -> int:
    """How often `nearest_neighbours` calls `on_block`, for more than one row."""
    num_blocks = -(-num_rows // block_rows)
    return num_blocks * (num_blocks + 1) // 2


def group_numbers(groups: np.ndarray) -> np.ndarray:
    """The groups of rows, integers (n,), numbered from 0: int32 (n,). Raises UsageError where there is only one."""
    names, numbers = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise UsageError(
            "Neighbours in other cases need at least two cases.",
            expected="slices of two or more cases",
            found="slices of one case",
            next_step="Allow neighbours of the same case (--neighbours any), or preprocess more cases.",
        )
    return numbers.astype(np.int32)


@dataclass(frozen=True)
class _Block:
    """Some consecutive rows, light to send: the values themselves only where they are in no file."""

    start: int
    groups: np.ndarray
    values: np.ndarray | tuple[str, int, tuple[int, int]]
    """float32 (rows, d), or where they are: path, offset in bytes and shape."""

    @classmethod
    def of(cls, unit_rows: np.ndarray, group_of_row: np.ndarray, start: int, block_rows: int) -> _Block:
        assert unit_rows.dtype == np.float32
        rows = slice(start, start + block_rows)
        groups, values = group_of_row[rows], np.asarray(unit_rows[rows])
        # A view of a memory map keeps the offset of the whole, which alone tells where in the file its values are.
        if (
            isinstance(unit_rows, np.memmap)
            and isinstance(unit_rows.base, mmap.mmap)
            and unit_rows.flags.c_contiguous
        ):
            offset = unit_rows.offset + start * unit_rows.strides[0]
            return cls(start, groups, (str(unit_rows.filename), offset, values.shape))
        return cls(start, groups, values)

    def padded(self) -> np.ndarray:
        """The values, with rows and columns of zeros to the multiples that `add_products` asks for."""
        values = self.values
        if isinstance(values, tuple):
            path, offset, shape = values
            values = np.memmap(path, np.float32, "r", offset, shape)
        num_rows, num_columns = values.shape
        padded = np.zeros((_up(num_rows, ROW_MULTIPLE), _up(num_columns, COLUMN_MULTIPLE)), np.float32)
        padded[:num_rows, :num_columns] = values
        return padded


def _best_of_blocks(a: _Block, b: _Block) -> list[tuple[int, Neighbours]]:
    """The nearest neighbours of the rows of `a` in `b` and of those of `b` in `a`, each with its first row."""
    rows_a = a.padded()
    rows_b = rows_a if a.start == b.start else b.padded()
    if rows_a is rows_b and not np.isfinite(rows_a).all():
        raise ValueError(f"a value in rows {a.start} to {a.start + len(a.groups) - 1} is not finite")
    best_a, best_b = (
        Neighbours(np.zeros(size, np.int32), np.full(size, -np.inf, np.float32))
        for size in (len(a.groups), len(b.groups))
    )
    for first_b in range(0, len(b.groups), TILE_ROWS):
        tile_b = slice(first_b, first_b + TILE_ROWS)
        columns = np.ascontiguousarray(rows_b[tile_b].T)
        for first_a in range(0, len(a.groups), TILE_ROWS):
            if a.start + first_a > b.start + first_b:
                break
            tile_a = slice(first_a, first_a + TILE_ROWS)
            products = np.zeros((len(rows_a[tile_a]), columns.shape[1]), np.float32)
            add_products(rows_a[tile_a], columns, products)
            keep_best(
                products,
                a.start + first_a,
                b.start + first_b,
                a.groups[tile_a],
                b.groups[tile_b],
                best_a.index[tile_a],
                best_a.similarity[tile_a],
                best_b.index[tile_b],
                best_b.similarity[tile_b],
            )
    return [(a.start, best_a), (b.start, best_b)]


def _results(
    pairs: Iterable[tuple[_Block, _Block]], executor: Executor | None
) -> Iterator[list[tuple[int, Neighbours]]]:
    """What `_best_of_blocks` returns for all pairs, in the order of their completion."""
    if executor is None:
        for pair in pairs:
            yield _best_of_blocks(*pair)
        return
    pending: set[Future[list[tuple[int, Neighbours]]]] = set()
    try:
        for pair in pairs:
            pending.add(executor.submit(_best_of_blocks, *pair))
            if len(pending) == TASKS_IN_HAND:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (task.result() for task in done)
        yield from (task.result() for task in as_completed(pending))
    finally:
        for task in pending:
            task.cancel()


def _merge(nearest: Neighbours, start: int, part: Neighbours) -> None:
    """Take from `part`, of the rows from `start` on, what is nearer, or as near with a lower index."""
    rows = slice(start, start + len(part.index))
    index, similarity = nearest.index[rows], nearest.similarity[rows]
    better = (part.similarity > similarity) | ((part.similarity == similarity) & (part.index < index))
    index[better] = part.index[better]
    similarity[better] = part.similarity[better]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
