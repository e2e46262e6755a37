"""One shard file mapped into memory, and how to touch it so that a file that cannot be read is an error.

To touch a page that the system cannot read (of a file cut short, or on a mount that is gone) kills the process with
SIGBUS. Before rows of a slice are copied, `prefetch` asks whether they are in memory, and where they are not, `load`
has the system read them, which says where it could not. Where Linux is too old (before 5.14), or the system another
one, pages are touched as they are. Called by `supercl_core.cache.reader` and `train.data`.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import sys
import weakref
from pathlib import Path
from typing import Final

import numpy as np

from supercl_core.cache.schema import CHECKSUM_BYTES
from supercl_core.cache.zarr_files import damaged, shard_bytes
from supercl_core.errors import StorageError, storage_error

_MADV_WILLNEED: Final = 3
_MADV_POPULATE_READ: Final = 22


class MappedShard:
    """A mapped array of a case. Threads may read from it at the same time.

    Raises CacheError when the file is missing or not of the size that the shape asks for, StorageError when the system
    cannot open it.
    """

    def __init__(self, file: Path, num_slices: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.file = file
        slice_bytes = math.prod(shape) * dtype.itemsize
        self._size = shard_bytes(num_slices, slice_bytes)
        try:
            found = file.stat().st_size if file.is_file() else 0
            if found != self._size:
                raise damaged(file, f"{self._size:,} bytes", f"{found:,} bytes" if found else "no file")
            content = _map(file, self._size)
            # Of files of others Linux says that all is in memory.
            self._residence_is_told = hasattr(os, "geteuid") and (
                file.stat().st_uid == os.geteuid() or os.access(file, os.W_OK)
            )
        except OSError as error:
            raise storage_error(error, where=file) from error
        strides = [dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        self._slice_step, self._row_step = slice_bytes + CHECKSUM_BYTES, strides[-2]
        self._last_plane = slice_bytes - shape[-2] * self._row_step
        self.array = np.ndarray(
            (num_slices, *shape), dtype, buffer=content, strides=(self._slice_step, *strides)
        )
        """The whole array (num_slices, *shape), read-only; a view of the map."""
        self._address = self.array.ctypes.data
        self._page_flags = ctypes.c_char * (slice_bytes // mmap.PAGESIZE + 2)

    def prefetch(self, z: int, rows: slice) -> bool:
        """Whether some rows of a slice, with start and stop, are in memory; else the system begins to read them.

        Rows that are there can be copied; others have to be loaded first. Threads may ask at the same time.
        """
        if _libc is None or rows.start >= rows.stop:
            return True
        start, size = self._pages(z, rows)
        if self._residence_is_told:
            # 2 us for 512 KiB that are in memory, where to populate them takes as long as to copy them.
            resident = self._page_flags()
            is_told = _libc.mincore(start, size, resident) == 0
            if is_told and resident.raw.find(b"\0", 0, -(-size // mmap.PAGESIZE)) < 0:
                return True
        _libc.madvise(start, size, _MADV_WILLNEED)  # to populate alone reads bit by bit, ten times slower
        return False

    def load(self, z: int, rows: slice) -> None:
        """Have some rows of a slice in memory. Raises StorageError, which names file and slice, where it cannot be."""
        if _libc is None or rows.start >= rows.stop:
            return
        if _libc.madvise(*self._pages(z, rows), _MADV_POPULATE_READ) and ctypes.get_errno() != errno.EINVAL:
            raise self._unreadable(z)

    def _pages(self, z: int, rows: slice) -> tuple[int, int]:
        """Address of the first page of some rows of a slice, and bytes from there to the last row of all channels."""
        slice_start = self._address + z * self._slice_step
        start = slice_start + rows.start * self._row_step & -mmap.PAGESIZE
        return start, slice_start + self._last_plane + rows.stop * self._row_step - start

    def _unreadable(self, z: int) -> StorageError:
        """The error for a slice that the system could not read."""
        try:
            size = self.file.stat().st_size
            found = "an error of the disk or of the mount" if size == self._size else f"{size:,} bytes"
        except OSError as error:
            found = error.strerror or str(error)
        return StorageError(
            "A file of the cache cannot be read any more.",
            where=f"{self.file}, slice {z}",
            expected=f"{self._size:,} bytes, as when it was opened",
            found=found,
            next_step="Check the mount and the disk (`supercl verify CACHE`), then run the same command again.",
        )


def _c_library() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mmap.argtypes = (address, size, number, number, number, ctypes.c_long)
    library.mmap.restype = address
    library.munmap.argtypes = (address, size)
    library.madvise.argtypes = (address, size, number)
    library.mincore.argtypes = (address, size, ctypes.c_char_p)
    return library


_libc: Final = _c_library()


def _map(file: Path, size: int) -> memoryview | mmap.mmap:
    """The bytes of a file, mapped; unmapped when nobody uses them any more."""
    with file.open("rb") as opened:
        if _libc is None or sys.platform == "win32":
            return mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ)
        # Python's own map keeps the file open, and processes may have as few as 1,024 files open.
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, opened.fileno(), 0)
        if address == ctypes.c_void_p(-1).value:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(file))
    content = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(content, _libc.munmap, address, size).atexit = False
    return memoryview(content).toreadonly()
