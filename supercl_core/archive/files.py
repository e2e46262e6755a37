"""Files of a cache or of an archive, by name, in a folder or in one zip file, and the shards among them.

Nothing that a file says of itself is believed: names are only looked up, never made from what is found; sizes are held
against the file before memory is asked for. Zip files of ours hold their members as they are; any other kind of member
is refused, so that none is ever inflated. Called by `forms` and the modules of archives.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from supercl_core.cache.schema import CHECKSUM_BYTES
from supercl_core.cache.zarr_files import (
    INDEX_ENTRY_BYTES,
    METADATA_LIMIT_BYTES,
    checked_node,
    checksum,
    damaged,
    fits_checksum,
    node_text,
)
from supercl_core.errors import CacheError
from supercl_core.files import parse_json, without_waiting

DIRECTORY_LIMIT_BYTES: Final = 512 << 20
"""Largest directory of a zip file that is read: that of 180,000 cases."""

_seeking: Final = threading.Lock()
_LOCAL_HEADER_BYTES: Final = 30
_ENCRYPTED: Final = 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """The bytes of one file, alone or inside of a zip file. Threads may read at the same time."""

    where: Path
    """Its name for a user."""
    descriptor: int
    start: int
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on. Raises CacheError where the file does not have them."""
        content = b""
        if 0 <= offset <= offset + length <= self.size:
            try:
                content = _read_at(self.descriptor, length, self.start + offset)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
        if len(content) != length:
            raise damaged(self.where, f"{length:,} bytes from byte {offset:,} on", f"{len(content):,} bytes")
        return content


def _read_at(descriptor: int, length: int, offset: int) -> bytes:
    """What `os.pread` gives; Windows does not have it, and threads there take turns."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, offset)
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)


class Files:
    """The files of a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def open(self, name: str) -> Iterator[Part]:
        """A file by its path below the folder. Raises CacheError where there is no regular file of that name."""
        where = self.path / name
        try:
            descriptor = without_waiting(where, os.O_RDONLY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                raise damaged(where, "a file", error.strerror) from None
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise damaged(where, "a file", "something else")
            yield Part(where=where, descriptor=descriptor, start=0, size=status.st_size)
        finally:
            os.close(descriptor)

    def groups(self, name: str) -> list[str]:
        """Names of the nodes directly below the group `name`, in order."""
        return sorted(file.parent.name for file in (self.path / name).glob("*/zarr.json"))

    def read(self, name: str, *, limit_bytes: int) -> bytes:
        """A whole file of at most `limit_bytes`."""
        with self.open(name) as part:
            if part.size > limit_bytes:
                raise damaged(part.where, f"at most {limit_bytes:,} bytes", f"{part.size:,} bytes")
            return part.read(0, part.size)

    def node(self, name: str) -> dict[str, Any]:
        """The metadata of the node `name`. Raises CacheError where it is none of Zarr v3."""
        file = f"{name}/zarr.json".lstrip("/")
        try:
            node = parse_json(self.read(file, limit_bytes=METADATA_LIMIT_BYTES).decode())
        except ValueError as error:
            raise damaged(self.path / file, "metadata of Zarr v3", error) from None
        return checked_node(node, self.path / file)


class _ZipFiles(Files):
    """The members of a zip file."""

    def __init__(self, path: Path, file: _BoundedFile) -> None:
        super().__init__(path)
        self._descriptor = file.fileno()
        try:
            directory = zipfile.ZipFile(file)
        except Exception as error:  # zipfile raises whatever it stumbles over
            raise no_archive(path, str(error) or type(error).__name__) from None
        self._end = directory.start_dir
        self._members = {info.orig_filename: info for info in directory.infolist()}
        if len(self._members) != len(directory.infolist()):
            raise no_archive(path, "a zip file with names that appear twice")

    @contextmanager
    def open(self, name: str) -> Iterator[Part]:
        where = self.path / name
        info = self._members.get(name)
        if info is None:
            raise damaged(where, "a file", "none")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
            raise damaged(where, "a member stored as it is", "a compressed or encrypted one")
        archive = Part(where=where, descriptor=self._descriptor, start=0, size=self._end)
        header = archive.read(info.header_offset, _LOCAL_HEADER_BYTES)
        name_bytes, extra_bytes = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        start = info.header_offset + _LOCAL_HEADER_BYTES
        if header[:4] != b"PK\3\4" or archive.read(start, name_bytes) != name.encode():
            raise damaged(where, "the member that the zip file's directory names", "another one")
        start += name_bytes + extra_bytes
        if info.file_size != info.compress_size or start + info.file_size > self._end:
            raise damaged(where, "a member that lies in the zip file", f"one of {info.file_size:,} bytes")
        yield Part(where=where, descriptor=self._descriptor, start=start, size=info.file_size)

    def groups(self, name: str) -> list[str]:
        parts = [member.split("/") for member in self._members if member.startswith(f"{name}/")]
        return sorted(part[1] for part in parts if part[2:] == ["zarr.json"])


class _BoundedFile(io.FileIO):
    """A file of which little is read at a time: its reader asks for as much as the file declares."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > DIRECTORY_LIMIT_BYTES:
            raise ValueError(f"a directory of more than {DIRECTORY_LIMIT_BYTES:,} bytes")
        return super().read(size)


@contextmanager
def open_files(path: Path) -> Iterator[Files]:
    """The files of the archive at `path`, a folder or a zip file. Raises CacheError where it is neither."""
    if path.is_dir():
        yield Files(path)
    elif path.is_file():
        with _BoundedFile(path) as file:
            yield _ZipFiles(path, file)
    else:
        raise no_archive(path, "neither a folder nor a file" if path.exists() else "nothing")


def write_zip(path: Path, folder: Path) -> None:
    """Write all files below `folder` to a new zip file, in the order of their names, which equal files make equal."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name in names:
                info = zipfile.ZipInfo(name)  # of 1980, whatever the file's time
                info.create_system = 3  # Unix, whatever system this is
                info.external_attr = (stat.S_IFREG | 0o644) << 16
                info.file_size = (folder / name).stat().st_size
                with (folder / name).open("rb") as source, archive.open(info, "w") as member:
                    while block := source.read(1 << 20):
                        member.write(block)
        file.flush()
        os.fsync(file.fileno())


def read_chunks(part: Part, num_chunks: int, *, longest: int) -> Iterator[bytes]:
    """Yield the inner chunks of a shard, in order, each with its checksum, which is checked, at its end.

    Raises CacheError unless the chunks, of at most `longest` bytes, lie one behind the other and fill the shard up to
    its index. Source: the Zarr v3 specification (sharding codec, index at the end; crc32c codec).
    """
    index_bytes = num_chunks * INDEX_ENTRY_BYTES + CHECKSUM_BYTES
    index = _checked(part, part.read(part.size - index_bytes, index_bytes), "the index")
    offsets, lengths = np.frombuffer(index, "<u8", count=num_chunks * 2).reshape(-1, 2).T
    ends = np.append(offsets[1:], np.uint64(part.size - index_bytes))
    fits = (lengths > CHECKSUM_BYTES) & (lengths <= longest) & (lengths <= ends) & (offsets == ends - lengths)
    if offsets[0] != 0 or not fits.all():
        raise damaged(part.where, f"an index of {num_chunks:,} chunks in order", "another one")
    for z, (offset, length) in enumerate(zip(offsets.tolist(), lengths.tolist(), strict=True)):
        yield _checked(part, part.read(offset, length), f"slice {z}")


def write_shard(file: Path, chunks: Iterable[bytes]) -> None:
    """Write a shard of inner chunks that carry their checksums already."""
    file.parent.mkdir(parents=True)
    lengths = []
    with file.open("wb") as shard:
        for chunk in chunks:
            lengths.append(shard.write(chunk))
        ends = np.cumsum(lengths)
        index = np.stack([ends - lengths, lengths], axis=1).astype("<u8").tobytes()
        shard.write(index + checksum(index))


def _checked(part: Part, content: bytes, what: str) -> bytes:
    if not fits_checksum(content):
        raise damaged(part.where, f"{what} that fits its checksum", "another content")
    return content


def write_node(folder: Path, node: Mapping[str, Any]) -> None:
    """Write the metadata of a node."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zarr.json").write_bytes(node_text(node))


def no_archive(path: Path, problem: object) -> CacheError:
    """The error for what is no archive, or one whose root or tables are damaged."""
    return CacheError(
        "This is no archive of a cache, or a damaged one.",
        where=path,
        found=problem,
        next_step="Name an archive that `supercl pack` wrote, or fetch a sound copy of it.",
    )
