"""What both halves of SuperCL share: the cache, its schema, volumes, cases, settings and the command line.

Imports neither half, nor torch, dask, numba or matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supercl_core.cache.reader import open_cache

__all__ = ["open_cache"]


def __getattr__(name: str) -> Any:
    if name == "open_cache":
        from supercl_core.cache.reader import open_cache

        return open_cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
