"""Freed memory kept for the next computation instead of handed back to the system.

Handed back and asked for again, the same pages are new to the process every time: the system clears each of them, in
the middle of the computation. Called by the workers of preprocessing and by training on a CPU.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_MMAP_MAX: Final = -4
"""Options of mallopt, from malloc.h."""


@cache
def keep_freed_memory(limit_bytes: int | None = None) -> None:
    """Let glibc's malloc keep up to `limit_bytes` that were freed, or all; once for this process.

    With a limit, blocks above 32 MiB are still handed back. Elsewhere than on glibc nothing happens.
    """
    # On Windows there is no library without a name.
    set_option = None if sys.platform == "win32" else getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    if limit_bytes is None:
        set_option(_M_TRIM_THRESHOLD, -1)
        set_option(_M_MMAP_MAX, 0)  # a block with a mapping of its own is always handed back
    else:
        set_option(_M_TRIM_THRESHOLD, limit_bytes)
        set_option(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
