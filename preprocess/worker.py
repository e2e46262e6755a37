"""What runs in a worker process: one case from its files into the cache. Handed to Dask by `preprocess.runner`."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from preprocess.cluster import check_software
from preprocess.pipeline import CaseArrays, PreprocessConfig, process_case
from preprocess.plan import failed_row, source_digest, source_stamp
from supercl_core.cache.cases import CaseRow, case_key
from supercl_core.cache.writer import write_case
from supercl_core.errors import SuperCLError, storage_error
from supercl_core.formats.case_files import read_image, read_label_map
from supercl_core.formats.volumes import Volume
from supercl_core.locks import check_lock
from supercl_core.memory import keep_freed_memory
from supercl_core.sources import CaseSource

_NOT_THE_CASE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Refusals of the system that no file of a case is the reason of, as its files are only read."""
_compiled: Final[set[tuple[object, ...]]] = set()
"""What this process need not compile any more."""


def compute_case(
    case: CaseSource,
    cache_path: Path,
    *,
    config: PreprocessConfig,
    num_channels: int,
    num_classes: int,
    config_digest: str,
    token: str,
    versions: Mapping[str, str],
) -> CaseRow:
    """Compute one case and commit it; runs in a worker. A failure becomes the row's reason.

    `config_digest`: the root's. `token`: of the run's lock. `versions`: of the software that the case is to be computed
    with; raises SuperCLError where this worker has other ones (workers may join at any time). Raises StorageError where
    the system takes no more (a full disk, too many open files), and CacheError where the run has lost its lock.
    """
    check_software(versions, host=socket.gethostname())
    # Dask tells its worker processes to hand back everything beyond 64 KiB. The kernels' few megabytes a slice would
    # then be new to the process at every slice: two thirds of its system time.
    keep_freed_memory(256 << 20)
    try:
        stamp = source_stamp(case)
        computed = _computed(case, config, num_channels, num_classes)
        digest = source_digest(case)
        _check_unchanged(case, stamp)
    except Exception as error:  # one case, whatever is wrong with it, must not stop the others
        if isinstance(error, OSError) and error.errno in _NOT_THE_CASE:
            raise storage_error(error, where="files beside the cache, such as NUMBA_CACHE_DIR") from None
        return failed_row(case, error)
    row = CaseRow(id=case.id, digest=digest, source=case.name, **computed.row)
    attributes = {
        **computed.attributes,
        "key": case_key(config_digest, digest),
        "provenance": {"source_stamp": stamp},
    }
    try:
        return write_case(cache_path, row, computed.arrays, attributes=attributes, token=token)
    except OSError as error:
        check_lock(cache_path, token)  # the next holder removes what a lost run was writing
        raise storage_error(error, where=cache_path) from None


def compile_kernels(
    image: Volume, label: Volume | None, *, config: PreprocessConfig, num_channels: int, num_classes: int
) -> None:
    """Have the kernels compiled for cases like this one, while every other process of this machine waits.

    Numba keeps what it compiled on disk, and compiles for every combination of dtypes. So the first process to meet
    one computes a single slice, and the others load what it left; a later run loads it too.
    """
    arrays = [volume.array_CZYX for volume in (image, label) if volume is not None]
    kind = (config, num_channels, *(array.dtype for array in arrays))
    if kind in _compiled:
        return
    with _one_at_a_time(), suppress(SuperCLError):  # said when the whole case is computed
        process_case(
            middle_slices(image, 1),
            label and middle_slices(label, 1),
            config=config,
            num_channels=num_channels,
            num_classes=num_classes,
        )
    _compiled.add(kind)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Wait until no other process of this user on this machine is in here; on Windows all of them compile."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with open(
        Path(tempfile.gettempdir()) / f"supercl-kernels-{os.getuid()}.lock",
        "a",
        # Everybody may write there, so a link is not followed.
        opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o600),
    ) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, or by the death of the process
        yield


def middle_slices(volume: Volume, num_slices: int) -> Volume:
    """At most `num_slices` slices from the middle of a volume, sharing its memory."""
    first = max((volume.array_CZYX.shape[1] - num_slices) // 2, 0)
    return dataclasses.replace(volume, array_CZYX=volume.array_CZYX[:, first : first + num_slices])


def _computed(case: CaseSource, config: PreprocessConfig, num_channels: int, num_classes: int) -> CaseArrays:
    """The arrays of a case; its volumes, where these are others, are gone when it returns."""
    label = read_label_map(case)
    image = read_image(case)
    compile_kernels(image, label, config=config, num_channels=num_channels, num_classes=num_classes)
    return process_case(image, label, config=config, num_channels=num_channels, num_classes=num_classes)


def _check_unchanged(case: CaseSource, stamp: list[list[int]]) -> None:
    if source_stamp(case) != stamp:
        raise SuperCLError(
            "The case's files changed while they were read.",
            where=case.name,
            next_step="Run the same command again once nothing writes to them.",
        )
