"""Inner products of two sets of rows, the nearest of each found among them, and the mean rows of components.

Called by `preprocess.neighbours` and `preprocess.ccl`. Products are not left to BLAS: there the last bits of a
product depend on where its rows lie in the matrix and on the number of threads (measured with OpenBLAS), so that equal
rows would not tie and labels would change with the number of workers. Here a product depends on its two rows alone.
One core of an EPYC with AVX-512 makes 160 GFLOP/s this way, against 109 with OpenBLAS in the same run; with the
kernels compiled for AVX2 it makes 76.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba.extending import intrinsic

from preprocess.kernels import kernel

ROW_MULTIPLE: Final = 4
"""Rows that `add_products` takes at a time."""

COLUMN_MULTIPLE: Final = 8
"""Columns that `add_products` takes at a time."""

_DEPTH: Final = 16
"""Columns after which `add_products` goes to the next rows: 512 rows of them stay in the first-level cache."""


@intrinsic
def _fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once. Spelled out, as a compiler left to choose may round differently from loop to loop."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return c(a, b, c), generate


@kernel
def _eight(values: np.ndarray, start: int) -> tuple[float, ...]:
    return (
        values[start],
        values[start + 1],
        values[start + 2],
        values[start + 3],
        values[start + 4],
        values[start + 5],
        values[start + 6],
        values[start + 7],
    )


@kernel
def _product_of_eight(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    product = a[0] * b[0]
    product = _fma(a[1], b[1], product)
    product = _fma(a[2], b[2], product)
    product = _fma(a[3], b[3], product)
    product = _fma(a[4], b[4], product)
    product = _fma(a[5], b[5], product)
    product = _fma(a[6], b[6], product)
    return _fma(a[7], b[7], product)


@kernel
def add_products(rows: np.ndarray, columns: np.ndarray, products: np.ndarray) -> None:
    """Add the inner products of `rows`, float32 (m, d), and `columns`, float32 (d, n), to `products` (m, n).

    m is a multiple of ROW_MULTIPLE and d one of COLUMN_MULTIPLE: rows and columns of zeros change no bit. Eight
    terms are summed with one rounding each, then added to the sum of those before: no product depends on any other,
    and a . b equals b . a in every bit.
    """
    num_rows, num_columns = rows.shape
    for depth in range(0, num_columns, _DEPTH):
        for i in range(0, num_rows, ROW_MULTIPLE):
            sums_0, sums_1, sums_2, sums_3 = products[i], products[i + 1], products[i + 2], products[i + 3]
            for k in range(depth, min(depth + _DEPTH, num_columns), COLUMN_MULTIPLE):
                a_0, a_1, a_2, a_3 = (
                    _eight(rows[i], k),
                    _eight(rows[i + 1], k),
                    _eight(rows[i + 2], k),
                    _eight(rows[i + 3], k),
                )
                b_0, b_1, b_2, b_3 = columns[k], columns[k + 1], columns[k + 2], columns[k + 3]
                b_4, b_5, b_6, b_7 = columns[k + 4], columns[k + 5], columns[k + 6], columns[k + 7]
                for j in range(len(sums_0)):
                    b = (b_0[j], b_1[j], b_2[j], b_3[j], b_4[j], b_5[j], b_6[j], b_7[j])
                    sums_0[j] += _product_of_eight(a_0, b)
                    sums_1[j] += _product_of_eight(a_1, b)
                    sums_2[j] += _product_of_eight(a_2, b)
                    sums_3[j] += _product_of_eight(a_3, b)


@kernel
def keep_best(
    products: np.ndarray,
    first_row: int,
    first_column: int,
    row_groups: np.ndarray,
    column_groups: np.ndarray,
    row_index: np.ndarray,
    row_best: np.ndarray,
    column_index: np.ndarray,
    column_best: np.ndarray,
) -> None:
    """Take from `products`, float32 (at least m, n), what is larger than the best so far of its row or its column.

    `first_row`, `first_column`: numbers of the first row and column among all rows. A product counts where the
    groups of its row and its column, int32 (m,) and (n,), differ; others become -inf. For every row and column
    `..._best`, float32, holds the largest product and `..._index`, int32, the number of the other; both are changed
    in place. What is no larger than the best so far changes nothing.
    """
    for i in range(len(row_groups)):
        row, group, best = np.int32(first_row + i), row_groups[i], row_best[i]
        candidates = products[i]
        is_better = False
        for j in range(len(column_groups)):
            product = candidates[j] if column_groups[j] != group else np.float32(-np.inf)
            candidates[j] = product
            is_better |= product > best
            column_index[j] = row if product > column_best[j] else column_index[j]
            column_best[j] = product if product > column_best[j] else column_best[j]
        if is_better:  # rarely; a search in the loop above would keep it from being vectorised
            for j in range(len(column_groups)):
                if candidates[j] > best:
                    best = candidates[j]
                    row_index[i] = first_column + j
            row_best[i] = best


@kernel
def component_means(unit_rows: np.ndarray, component_of_row: np.ndarray, num_components: int) -> np.ndarray:
    """The mean row of every component, scaled to length 1.

    `unit_rows`: float32 (n, d); `component_of_row`: integers (n,) in 0..num_components-1. Returns float32
    (num_components, d), summed in float64 in the order of the rows. A mean of zeros stays so.
    """
    num_rows, num_columns = unit_rows.shape
    ends = np.zeros(num_components + 1, np.int64)
    for row in range(num_rows):
        ends[component_of_row[row] + 1] += 1
    ends = np.cumsum(ends)
    members = np.empty(num_rows, np.int32)
    for row in range(num_rows):
        component = component_of_row[row]
        members[ends[component]] = row
        ends[component] += 1
    means = np.empty((num_components, num_columns), np.float32)
    start = 0
    for component in range(num_components):
        total = np.zeros(num_columns, np.float64)
        for member in range(start, ends[component]):
            row = members[member]
            for column in range(num_columns):
                total[column] += unit_rows[row, column]
        start = ends[component]
        length = np.sqrt((total * total).sum())
        means[component] = total / length if length > 0 else total
    return means
