"""Compiled loops over pixels and nodes. Each has a plain, slow twin in `tests/references.py`.

Kernels are compiled once per machine and release the GIL; they never run in parallel themselves, since
parallelism belongs to Dask (and Numba's default threading layer aborts when two threads enter it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` with the one set of options that every kernel here uses."""
    return numba.njit(nogil=True, cache=True)(function)
