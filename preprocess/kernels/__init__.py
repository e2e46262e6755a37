"""Compiled loops over pixels and nodes. Each has a plain, slow twin in `tests/references.py`.

Kernels are compiled once per machine and release the GIL; they never run in parallel themselves, since
parallelism belongs to Dask (and Numba's default threading layer aborts when two threads enter it).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` with the one set of options that every kernel here uses."""
    return numba.njit(nogil=True, cache=True)(function)


def _cache_path() -> Path:
    """Where compiled kernels are kept: one folder of the user for each state of the sources.

    Numba by itself looks only at the file of the function called. A change in a file that this one's kernels call
    would leave what was compiled before in use.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "supercl" / f"kernels-{digest.hexdigest()[:16]}"


if not numba.config.CACHE_DIR:  # the user's NUMBA_CACHE_DIR
    numba.config.CACHE_DIR = str(_cache_path())
