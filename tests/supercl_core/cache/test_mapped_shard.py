"""A mapped shard against a file worked by hand, and files that cannot be read any more."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from supercl_core.cache import mapped_shard
from supercl_core.cache.mapped_shard import MappedShard
from supercl_core.errors import CacheError, StorageError

SHAPE = (2, 300, 70)
"""Of a slice: several pages, none of which begins with one."""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about pages")


def write_shard(file: Path, num_slices: int = 3) -> np.ndarray:
    slices = np.random.default_rng(0).integers(0, 1000, (num_slices, *SHAPE)).astype("<u2")
    content = b"".join(values.tobytes() + b"CRC%d" % (z % 10) for z, values in enumerate(slices))
    file.write_bytes(content + bytes(num_slices * 16 + 4))
    return slices


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "shard"


def opened(file: Path, num_slices: int = 3) -> MappedShard:
    return MappedShard(file, num_slices, SHAPE, np.dtype("<u2"))


def test_a_file_worked_by_hand(file: Path) -> None:
    content = b"\1\0\2\0\3\0CRC1\4\0\5\0\6\0CRC2"
    file.write_bytes(content + bytes(2 * 16 + 4))
    shard = MappedShard(file, 2, (1, 3), np.dtype("<u2"))
    np.testing.assert_array_equal(shard.array, [[[1, 2, 3]], [[4, 5, 6]]])
    assert not shard.array.flags.writeable


def load(parts: Iterable[tuple[MappedShard, int, slice]]) -> None:
    """What is done before rows are copied."""
    for shard, z, rows in parts:
        if not shard.prefetch(z, rows):
            shard.load(z, rows)


@pytest.mark.parametrize("is_told", [True, False])
def test_loading_changes_nothing_for_any_rows(
    file: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    slices = write_shard(file)
    shard = opened(file)
    monkeypatch.setattr(shard, "_residence_is_told", is_told)
    load(
        (shard, z, slice(*rows))
        for z in range(3)
        for rows in ((0, 300), (299, 300), (17, 140), (5, 5), (8, 3))
    )
    np.testing.assert_array_equal(shard.array, slices)


@on_linux
def test_loading_brings_the_rows_of_every_channel_into_memory(file: Path) -> None:
    write_shard(file, num_slices=40)
    os.sync()
    with file.open("rb") as descriptor:
        os.posix_fadvise(descriptor.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    shard = opened(file, num_slices=40)
    parts = [shard.array[z, channel, rows] for z, rows in WANTED for channel in range(2)]
    if any(is_resident(part) for part in parts):
        pytest.skip("this file system forgets nothing")
    assert not any(shard.prefetch(z, rows) for z, rows in WANTED)
    for z, rows in WANTED:
        shard.load(z, rows)
    assert all(is_resident(part) for part in parts)
    assert all(shard.prefetch(z, rows) for z, rows in WANTED)


WANTED = ((20, slice(0, 300)), (3, slice(100, 200)))


def is_resident(rows: np.ndarray) -> bool:
    start = rows.ctypes.data & -mmap.PAGESIZE
    size = rows.ctypes.data + rows.nbytes - start
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages) == 0
    return b"\0" not in pages.raw


@on_linux
@pytest.mark.parametrize("is_told", [True, False])
def test_a_file_cut_short_is_an_error_that_names_file_and_slice(
    file: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    write_shard(file)
    shard = opened(file)
    monkeypatch.setattr(shard, "_residence_is_told", is_told)
    os.truncate(file, 2 * 84_004)
    load([(shard, 0, slice(0, 300)), (shard, 1, slice(299, 300))])  # what is still there
    with pytest.raises(StorageError, match="cannot be read any more") as caught:
        load([(shard, 0, slice(0, 300)), (shard, 2, slice(299, 300))])
    assert caught.value.where == f"{file}, slice 2"
    assert (caught.value.expected, caught.value.found) == (
        "252,064 bytes, as when it was opened",
        "168,008 bytes",
    )


@on_linux
def test_the_error_says_when_the_file_is_gone_too(file: Path) -> None:
    write_shard(file)
    shard = opened(file)
    os.truncate(file, 0)
    file.unlink()
    with pytest.raises(StorageError) as caught:
        load([(shard, 1, slice(0, 300))])
    assert caught.value.found == "No such file or directory"


@on_linux
def test_a_linux_without_the_call_reads_all_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slices = write_shard(file)
    shard = opened(file)
    monkeypatch.setattr(mapped_shard, "_MADV_POPULATE_READ", 9999)  # what it does not know gives EINVAL
    monkeypatch.setattr(shard, "_residence_is_told", False)
    load([(shard, 1, slice(0, 300))])
    np.testing.assert_array_equal(shard.array, slices)


def test_another_system_maps_and_reads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slices = write_shard(file)
    monkeypatch.setattr(mapped_shard, "_libc", None)
    shard = opened(file)
    load([(shard, 1, slice(0, 300))])
    np.testing.assert_array_equal(shard.array, slices)
    assert not shard.array.flags.writeable


@on_linux
def test_maps_keep_no_file_open_and_end_with_their_last_view(file: Path) -> None:
    write_shard(file)
    files_before = num_files_open()
    shards = [opened(file) for _ in range(50)]
    assert num_files_open() == files_before
    view = shards[0].array[2, 0]
    expected = view.copy()
    del shards
    assert num_maps(file) == 1
    np.testing.assert_array_equal(view, expected)
    del view
    assert num_maps(file) == 0


def num_files_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def num_maps(file: Path) -> int:
    return sum(line.endswith(str(file)) for line in Path("/proc/self/maps").read_text().splitlines())


@on_linux
def test_more_cases_than_a_process_may_have_files_open(cache_path: Path) -> None:
    program = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
from supercl_core.cache.reader import open_cache
caches = [open_cache(sys.argv[1]) for _ in range(20)]
views = [cache.case(row.id).image_ZCYX for cache in caches for row in cache.done]
print(len(views))
"""
    command = [sys.executable, "-c", program, str(cache_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "80\n"


def test_a_file_that_must_not_be_opened_is_an_error_with_its_name(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(file)

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(mapped_shard, "_map", refuse)
    with pytest.raises(StorageError, match="The disk reports an error") as caught:
        opened(file)
    assert caught.value.where == file


def test_a_missing_file_is_damage(file: Path) -> None:
    with pytest.raises(CacheError, match="no file"):
        opened(file)
