"""Folders and zip files that may come from anywhere: what is read lies in them, and all else is refused."""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supercl_core.archive import files as archive_files
from supercl_core.archive.files import (
    checksum,
    fits_checksum,
    open_files,
    read_chunks,
    write_shard,
    write_zip,
)
from supercl_core.errors import CacheError

MEMBERS = {"zarr.json": b'{"zarr_format": 3}', "a/b": b"abc" * 100, "a/c/zarr.json": b"{}", "ü": b"x"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in MEMBERS.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    return tmp_path / "folder"


@pytest.fixture
def zip_path(folder: Path, tmp_path: Path) -> Path:
    write_zip(tmp_path / "a.zip", folder)
    return tmp_path / "a.zip"


def read_all(path: Path) -> dict[str, bytes]:
    with open_files(path) as files:
        return {name: files.read(name, limit_bytes=1000) for name in MEMBERS}


# ---------------------------------------------------------------- folders and zip files


def test_a_folder_and_its_zip_file_read_the_same(folder: Path, zip_path: Path) -> None:
    for path in (folder, zip_path):
        assert read_all(path) == MEMBERS
        with open_files(path) as files:
            assert files.groups("a") == ["c"]
            assert files.node("") == {"zarr_format": 3}
            with pytest.raises(CacheError, match="another JSON value"):
                files.node("a/c")
            with pytest.raises(CacheError, match="a file"):
                files.read("a/none", limit_bytes=10)
            with pytest.raises(CacheError, match="at most 10 bytes"):
                files.read("a/b", limit_bytes=10)


def test_equal_folders_give_equal_zip_files(folder: Path, zip_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name in reversed(MEMBERS):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes(MEMBERS[name])
        os.utime(other / name, (0, 2e9))
        (other / name).chmod(0o600)
    write_zip(tmp_path / "other.zip", other)
    assert (tmp_path / "other.zip").read_bytes() == zip_path.read_bytes()
    with zipfile.ZipFile(zip_path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == sorted(MEMBERS)
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_zip_files_of_other_programs_are_read(folder: Path, tmp_path: Path) -> None:
    """With entries for folders, a comment, and something in front."""
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as archive:
        archive.comment = b"a comment"
        archive.mkdir("a")
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
    (tmp_path / "b.zip").write_bytes(b"#!/bin/sh\n" + (tmp_path / "plain.zip").read_bytes())
    assert read_all(tmp_path / "plain.zip") == read_all(tmp_path / "b.zip") == MEMBERS


def test_large_members_need_zip64(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    write_zip(tmp_path / "large.zip", folder)
    monkeypatch.undo()
    assert b"PK\x06\x06" in (tmp_path / "large.zip").read_bytes()
    assert read_all(tmp_path / "large.zip") == MEMBERS


@pytest.mark.parametrize("kind", ["pipe", "folder", "link in a loop", "dangling link", "folder in between"])
def test_what_is_no_file_is_refused_at_once(folder: Path, kind: str) -> None:
    (folder / "a" / "b").unlink()
    match kind:
        case "pipe":
            os.mkfifo(folder / "a" / "b")
        case "folder":
            (folder / "a" / "b").mkdir()
        case "link in a loop":
            (folder / "a" / "b").symlink_to("b")
        case "dangling link":
            (folder / "a" / "b").symlink_to("nowhere")
        case _:
            shutil.rmtree(folder / "a")
            (folder / "a").write_text("x")
    with open_files(folder) as files, pytest.raises(CacheError, match="expected: a file"):
        files.read("a/b", limit_bytes=10)


def directory_at(content: bytes) -> int:
    return content.index(b"PK\1\2")


def entry_of(content: bytes, name: bytes) -> int:
    """Where the directory's entry for a member begins."""
    return content.rindex(name) - 46


def patched(content: bytes, at: int, layout: str, *values: int) -> bytes:
    new = struct.pack(layout, *values)
    return content[:at] + new + content[at + len(new) :]


ZIPS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda zip_: b"",
    "a text": lambda zip_: b"This is no zip file." * 50,
    "truncated": lambda zip_: zip_[:-40],
    "without its beginning": lambda zip_: zip_[200:],
    "a directory of terabytes": lambda zip_: patched(zip_, len(zip_) - 10, "<II", 0xFFFFFFF0, 0),
    "a directory beyond the file": lambda zip_: patched(zip_, len(zip_) - 6, "<I", 0xFFFFFF0),
    "a member encrypted": lambda zip_: patched(zip_, entry_of(zip_, b"a/b") + 8, "<H", 1),
    "a member deflated": lambda zip_: patched(zip_, entry_of(zip_, b"a/b") + 10, "<H", 8),
    "a member of four gigabytes": lambda zip_: patched(zip_, entry_of(zip_, b"a/b") + 20, "<II", 2**32 - 2, 2**32 - 2),
    "sizes that differ": lambda zip_: patched(zip_, entry_of(zip_, b"a/b") + 24, "<I", 299),
    "a member elsewhere": lambda zip_: patched(zip_, entry_of(zip_, b"a/c/zarr.json") + 42, "<I", 0),
    "a member beyond the file": lambda zip_: patched(zip_, entry_of(zip_, b"a/b") + 42, "<I", 2**31),
    "a member in the directory": lambda zip_: patched(zip_, entry_of(zip_, b"a/b") + 42, "<I", directory_at(zip_)),
    "no text for a name": lambda zip_: zip_.replace(b"\xc3\xbc", b"\xff\xff"),
    "zip64 fields that are none": lambda zip_: patched(zip_, entry_of(zip_, b"a/b") + 24, "<I", 2**32 - 1),
}  # fmt: skip


@pytest.mark.parametrize("what", ZIPS)
def test_crafted_zip_files_are_refused(zip_path: Path, what: str) -> None:
    zip_path.write_bytes(ZIPS[what](zip_path.read_bytes()))
    with pytest.raises(CacheError):
        read_all(zip_path)


def test_names_that_appear_twice_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("zarr.json", "{}")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("zarr.json", "[]")
    with pytest.raises(CacheError, match="names that appear twice"), open_files(tmp_path / "a.zip"):
        pass


def test_a_large_directory_is_not_read(zip_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_files, "DIRECTORY_LIMIT_BYTES", 100)
    with pytest.raises(CacheError, match="a directory of more than 100 bytes"), open_files(zip_path):
        pass


def test_neither_a_folder_nor_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, found in (("pipe", "neither a folder nor a file"), ("none", "nothing")):
        with pytest.raises(CacheError, match=found), open_files(tmp_path / name):
            pass


# ---------------------------------------------------------------- shards


def chunks_of(file: Path, num_chunks: int, longest: int = 1000) -> list[bytes]:
    with open_files(file.parent) as files, files.open(file.name) as part:
        return list(read_chunks(part, num_chunks, longest=longest))


@given(contents=st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=5), place=st.randoms())
@settings(max_examples=40, deadline=None)
def test_shards_come_back_and_every_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], place: object
) -> None:
    file = tmp_path_factory.mktemp("shard") / "x" / "shard"
    chunks = [content + checksum(content) for content in contents]
    write_shard(file, chunks)
    assert chunks_of(file, len(chunks)) == chunks
    whole = file.read_bytes()
    at = place.randrange(len(whole) * 8)  # type: ignore[attr-defined]
    file.write_bytes(whole[: at // 8] + bytes([whole[at // 8] ^ 1 << at % 8]) + whole[at // 8 + 1 :])
    with pytest.raises(CacheError):
        chunks_of(file, len(chunks))


def test_checksums_are_those_of_the_codec() -> None:
    assert checksum(b"123456789") == (0xE3069283).to_bytes(4, "little")
    assert fits_checksum(b"123456789" + checksum(b"123456789"))
    assert not fits_checksum(b"123456780" + checksum(b"123456789"))


def with_index(chunks: bytes, *entries: int) -> bytes:
    index = struct.pack(f"<{len(entries)}Q", *entries)
    return chunks + index + google_crc32c.value(index).to_bytes(4, "little")


CHUNK = b"abcdef" + checksum(b"abcdef")

SHARDS: dict[str, bytes] = {
    "nothing": b"",
    "no chunk": with_index(b"", 0, 10, 10, 10),
    "an overlap": with_index(CHUNK, 0, 10, 0, 10),
    "another order": with_index(CHUNK * 2, 10, 10, 0, 10),
    "a gap": with_index(CHUNK + b"x" + CHUNK, 0, 10, 11, 10),
    "a beginning that no chunk has": with_index(b"x" + CHUNK * 2, 1, 10, 11, 10),
    "an end that no chunk has": with_index(CHUNK * 2 + b"x", 0, 10, 10, 10),
    "an empty chunk": with_index(CHUNK, 0, 10, 10, 0),
    "a checksum alone": with_index(CHUNK + checksum(b""), 0, 10, 10, 4),
    "a chunk that is left out": with_index(CHUNK, 0, 10, 2**64 - 1, 2**64 - 1),
    "terabytes": with_index(CHUNK * 2, 0, 10, 10, 1 << 45),
    "numbers that overflow": with_index(CHUNK * 2, 0, 2**64 - 1, 2**64 - 1, 21),
    "more chunks": with_index(CHUNK * 3, 0, 10, 10, 10, 20, 10),
    "a long chunk": with_index(bytes(2000) + checksum(bytes(2000)) + CHUNK, 0, 2004, 2004, 10),
}


@pytest.mark.parametrize("what", SHARDS)
def test_crafted_indexes_are_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "shard").write_bytes(SHARDS[what])
    with pytest.raises(CacheError):
        chunks_of(tmp_path / "shard", 2)


def test_an_index_that_the_file_has_no_room_for_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(with_index(CHUNK, 0, 10))
    with pytest.raises(CacheError, match="found: +0 bytes"):
        chunks_of(tmp_path / "shard", 2**31)


def test_a_file_that_shrinks_while_it_is_read_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(with_index(CHUNK * 2, 0, 10, 10, 10))
    with open_files(tmp_path) as files, files.open("shard") as part:
        chunks = read_chunks(part, 2, longest=10)
        assert next(chunks) == CHUNK
        os.truncate(file, 15)
        with pytest.raises(CacheError, match="found: +5 bytes"):
            next(chunks)


def test_entries_of_an_index_are_offset_and_length(tmp_path: Path) -> None:
    write_shard(tmp_path / "x" / "shard", [CHUNK, CHUNK[:5] + checksum(CHUNK[:5])])
    index = np.frombuffer((tmp_path / "x" / "shard").read_bytes()[-36:-4], "<u8")
    assert index.tolist() == [0, 10, 10, 9]


def test_a_system_without_reading_at_a_place(
    folder: Path, zip_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pread")
    monkeypatch.delattr(os, "O_NONBLOCK")
    for path in (folder, zip_path):
        assert read_all(path) == MEMBERS
    with open_files(zip_path) as files, files.open("a/b") as part, ThreadPoolExecutor(8) as pool:
        places = list(range(0, 300, 3)) * 20
        assert set(pool.map(lambda place: part.read(place, 3), places)) == {b"abc"}
