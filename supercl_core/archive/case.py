"""One case of a cache in its other form.

In an archive every slice is zstd of what the cache has, values and checksum, with a checksum behind. So each direction
checks what it reads, and gives back every byte. No metadata gets through that its seal and `schema` do not bear out.
Called by `forms`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from numcodecs import zstd  # type: ignore[import-untyped]

from supercl_core.archive.files import (
    Files,
    Part,
    read_chunks,
    write_node,
    write_shard,
)
from supercl_core.cache.cases import CaseRow, content_digest, shards_digest
from supercl_core.cache.schema import CHECKSUM_BYTES
from supercl_core.cache.writer import committed_case
from supercl_core.cache.zarr_files import (
    attributes_of,
    checksum,
    damaged,
    fits_checksum,
    layout_of,
    metadata_digest,
    shard_path,
)
from supercl_core.errors import CacheError

LEVEL: Final = 3
"""Of zstd: beyond it, time grows much faster than what it saves. Part of the archive form, whose bytes depend on it."""

CODECS: Final = [{"name": "zstd", "configuration": {"level": LEVEL, "checksum": False}}, {"name": "crc32c"}]
"""What follows, in an archive, the codecs that the inner chunks of a cache have."""

LARGEST_SLICE_BYTES: Final = (1 << 31) - (1 << 24)
"""Somewhat less than what zstd is given, and Linux reads, at once."""


def convert_case(files: Files, row: CaseRow, folder: Path, *, packing: bool) -> None:
    """Write one case of `files` in the other form to `folder`. Raises CacheError for anything wrong with it."""
    case = f"cases/{row.id}"
    arrays = {spec.case_path: spec for spec in row.arrays()}
    mapped = {name: files.node(f"{case}/{name}".rstrip("/")) for name in _nodes(row)}
    if not packing:
        mapped |= {name: _unpacked(mapped[name], files.path / case / name) for name in arrays}
    attributes = _check_case(mapped, row, files.path / case)
    checksums = {}
    for spec in arrays.values():
        shape, dtype = row.slice_layout(spec.name)
        size = math.prod(shape) * dtype.itemsize + CHECKSUM_BYTES
        file = shard_path(spec)
        values = np.zeros(row.shape[1], np.uint32)
        with files.open(f"{case}/{file}") as part:
            if size > LARGEST_SLICE_BYTES:
                raise damaged(part.where, f"slices of at most {LARGEST_SLICE_BYTES:,} bytes", f"{size:,}")
            chunks = _compressed(part, size, values) if packing else _restored(part, size, values)
            write_shard(folder / file, chunks)
        checksums[spec.name] = values
    if (
        content_digest(row, checksums) != row.content_digest
        or shards_digest(checksums) != attributes["shards_digest"]
    ):
        raise damaged(files.path / case, "slices that fit the digests of the case", "others")
    for name, node in mapped.items():
        write_node(folder / name, _packed(node) if packing and name in arrays else node)


def is_packed(archive_path: Path, files: Files, row: CaseRow) -> bool:
    """Whether an unfinished archive has the case, whole: a machine that went down may have lost what was written."""
    case = f"cases/{row.id}"
    packed = Files(archive_path)
    try:
        if packed.node(case) != files.node(case):
            return False
        for spec in row.arrays():
            with packed.open(f"{case}/{shard_path(spec)}") as part:
                for _ in read_chunks(part, row.shape[1], longest=part.size):
                    pass
    except CacheError:
        return False
    return True


def is_unpacked(cache_path: Path, files: Files, row: CaseRow) -> bool:
    """Whether the cache has the case as the archive has it."""
    case = f"cases/{row.id}"
    if committed_case(cache_path, row.id) is None:
        return False
    with suppress(CacheError):
        return Files(cache_path).node(case) == files.node(case)
    return False


def check_seal(folder: Path, nodes: Mapping[str, Any]) -> None:
    """Raise CacheError unless the metadata of a group is what its digest was made of; `nodes` as there."""
    if metadata_digest(nodes) != nodes[""]["attributes"]["supercl"]["metadata_digest"]:
        raise damaged(folder / "zarr.json", "metadata that fits `metadata_digest`", "other metadata")


def _compressed(part: Part, size: int, checksums: np.ndarray) -> Iterator[bytes]:
    """The slices of a cache's shard as an archive stores them.

    `size`: of a slice with its checksum, in bytes. `checksums`: uint32 (z,), is given those of the slices.
    """
    for z, chunk in enumerate(read_chunks(part, len(checksums), longest=size)):
        if len(chunk) != size:
            raise damaged(part.where, f"slices of {size:,} bytes", f"{len(chunk):,} bytes")
        checksums[z] = _stored_checksum(chunk)
        frame = zstd.compress(chunk, LEVEL, False)
        yield frame + checksum(frame)


def _restored(part: Part, size: int, checksums: np.ndarray) -> Iterator[bytes]:
    """The slices of an archive's shard as the cache stores them; arguments as of `_compressed`."""
    longest = (
        size + (size >> 8) + 64 + CHECKSUM_BYTES
    )  # the bound that zstd gives for what cannot be compressed
    for z, chunk in enumerate(read_chunks(part, len(checksums), longest=longest)):
        slice_ = np.zeros(size, np.uint8)  # given this, zstd asks for no memory, whatever the frame declares
        try:
            zstd.decompress(chunk[:-CHECKSUM_BYTES], slice_)
        except (RuntimeError, ValueError) as error:
            raise damaged(part.where, f"slice {z}: {size:,} bytes in zstd", error) from None
        if not fits_checksum(slice_):
            raise damaged(part.where, f"slice {z} that fits its checksum", "another content")
        checksums[z] = _stored_checksum(slice_)
        yield slice_.tobytes()


def _stored_checksum(chunk: bytes | np.ndarray) -> int:
    return int.from_bytes(bytes(chunk[-CHECKSUM_BYTES:]), "little")


def _check_case(nodes: Mapping[str, Any], row: CaseRow, folder: Path) -> dict[str, Any]:
    """The attributes of a case. Raises CacheError unless its nodes, as in a cache, are sealed and those of `row`."""
    attributes = attributes_of(nodes[""], folder, "cases/{case}")
    if attributes["row"] != json.loads(json.dumps(row.as_dict())):
        raise damaged(folder / "zarr.json", "the row that `table` has", "another row")
    check_seal(folder, nodes)
    for spec in row.arrays():
        path = spec.case_path
        expected = row.layout(spec.name)
        if (found := layout_of(nodes[path], folder / path, spec)) != expected:
            raise damaged(folder / path / "zarr.json", expected, found)
    return attributes


def _packed(node: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a mapped array as an archive has it."""
    return _with_codecs(node, [*node["codecs"][0]["configuration"]["codecs"], *CODECS])


def _unpacked(node: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What `_packed` was given. Raises CacheError for any other array."""
    with suppress(KeyError, TypeError, IndexError):
        codecs = node["codecs"][0]["configuration"]["codecs"]
        if codecs[-len(CODECS) :] == CODECS:
            return _with_codecs(node, codecs[: -len(CODECS)])
    raise damaged(folder / "zarr.json", f"inner codecs that end in {CODECS}", "others")


def _with_codecs(node: Mapping[str, Any], codecs: Sequence[Any]) -> dict[str, Any]:
    sharding = node["codecs"][0]
    configuration = {**sharding["configuration"], "codecs": codecs}
    return {**node, "codecs": [{**sharding, "configuration": configuration}, *node["codecs"][1:]]}


def _nodes(row: CaseRow) -> list[str]:
    """Paths of the nodes of a case, below its folder: groups before what they hold."""
    paths = [Path(spec.case_path) for spec in row.arrays()]
    return sorted(
        {"" if part == Path() else part.as_posix() for path in paths for part in (path, *path.parents)}
    )
