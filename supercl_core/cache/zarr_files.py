"""The files of a cache's Zarr nodes, read without Zarr and believed in nothing.

A cache may be damaged or come from anywhere. So what a node says of itself is compared with `schema`, sizes with those
of files, content with its checksum; whatever differs raises CacheError before memory of a declared size is asked for.
A chain of codecs is never built from what a file says. Called by the cache's reader and writer and by `verification`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np

from supercl_core.cache.cases import CaseRow
from supercl_core.cache.schema import ATTRIBUTES, CHECKSUM_BYTES, ArraySpec
from supercl_core.errors import CacheError
from supercl_core.files import parse_json, read_text

METADATA_LIMIT_BYTES: Final = 16 << 20
"""Largest zarr.json that is read."""

INDEX_ENTRY_BYTES: Final = 16
"""Of a shard's index, for every inner chunk: offset and length."""

_LARGEST: Final = 2**31
"""Of any axis."""


def read_node(folder: Path, *, parse: Callable[[str], Any] = parse_json) -> dict[str, Any]:
    """The content of a node's zarr.json. Raises CacheError where it is missing or no metadata of Zarr v3.

    `parse`: `files.parse_json`, or a function that remembers what it gave.
    """
    file = folder / "zarr.json"
    try:
        node = parse(read_text(file, limit_bytes=METADATA_LIMIT_BYTES))
    except (OSError, ValueError) as error:
        raise damaged(file, "metadata of Zarr v3", getattr(error, "strerror", None) or error) from error
    return checked_node(node, file)


def read_nodes(folder: Path) -> dict[str, Any]:
    """What `read_node` gives for a group and every node below it, by the node's path below the group."""
    paths = sorted(file.parent.relative_to(folder) for file in folder.rglob("zarr.json"))
    return {"" if path == Path() else path.as_posix(): read_node(folder / path) for path in paths}


def checked_node(node: Any, file: Path) -> dict[str, Any]:
    """The JSON value of the zarr.json `file`. Raises CacheError where it is no metadata of Zarr v3."""
    if not isinstance(node, dict) or node.get("zarr_format") != 3:
        raise damaged(file, "metadata of Zarr v3", "another JSON value")
    return node


def node_text(node: Mapping[str, Any]) -> bytes:
    """The metadata of a node as Zarr writes it."""
    return json.dumps(node, indent=2).encode()


def read_attributes(folder: Path, group: str) -> dict[str, Any]:
    """Our attributes of a group, checked against the declaration of `group` in `schema.ATTRIBUTES`."""
    return attributes_of(read_node(folder), folder, group)


def attributes_of(node: Mapping[str, Any], folder: Path, group: str) -> dict[str, Any]:
    """What `read_attributes` gives for a node that was read from `folder`."""
    attributes = node.get("attributes")
    ours = attributes.get("supercl") if isinstance(attributes, dict) else None
    if not isinstance(ours, dict):
        raise damaged(folder / "zarr.json", "the attribute `supercl`", "none")
    for spec in ATTRIBUTES:
        if spec.group == group and not (spec.key in ours and _is(spec.type, ours[spec.key])):
            found = f"{ours[spec.key]!r:.60}" if spec.key in ours else "nothing"
            raise damaged(folder / "zarr.json", f"the attribute {spec.key}: {spec.type}", found)
    return ours


def array_metadata(folder: Path, spec: ArraySpec) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype (little-endian) of the array in `folder`.

    Raises CacheError unless its metadata is what `spec` declares: dtype, axes, chunks and codecs, and no others.
    """
    return layout_of(read_node(folder), folder, spec)


def layout_of(node: Mapping[str, Any], folder: Path, spec: ArraySpec) -> tuple[tuple[int, ...], np.dtype]:
    """What `array_metadata` gives for a node that was read from `folder`."""
    shape, data_type = node.get("shape"), node.get("data_type")
    if not (
        isinstance(shape, list)
        and len(shape) == len(spec.axes)
        and all(type(size) is int and 0 < size < _LARGEST for size in shape)
        and data_type in spec.dtypes
    ):
        expected = f"an array ({', '.join(spec.axes)}) of {' or '.join(spec.dtypes)}"
        raise damaged(folder / "zarr.json", expected, f"shape {shape!r:.60}, dtype {data_type!r:.60}")
    for key, expected_part in _layout(spec, shape, data_type).items():
        if node.get(key) != expected_part:
            raise damaged(folder / "zarr.json", f"{key}: {expected_part}", f"{node.get(key)!r:.200}")
    return tuple(shape), np.dtype(data_type).newbyteorder("<")


def read_array(folder: Path, spec: ArraySpec) -> np.ndarray:
    """One of the arrays that are not mapped, whole and read-only. Raises CacheError where anything is wrong with it."""
    shape, dtype = array_metadata(folder, spec)
    file = chunk_path(folder, len(shape))
    expected = math.prod(shape) * dtype.itemsize + CHECKSUM_BYTES
    try:
        found = file.stat().st_size
        content = file.read_bytes() if file.is_file() and found == expected else None
    except OSError as error:
        raise damaged(file, f"{expected:,} bytes", error.strerror or error) from error
    if content is None:
        raise damaged(file, f"{expected:,} bytes", f"{found:,} bytes")
    if not fits_checksum(content):
        raise damaged(file, "content that fits its checksum", "another content")
    return np.frombuffer(content, np.uint8)[:-CHECKSUM_BYTES].view(dtype).reshape(shape)


def checksum(content: bytes | np.ndarray) -> bytes:
    """The crc32c of bytes, or of a contiguous array, as the codec writes it behind them."""
    return google_crc32c.value(content).to_bytes(CHECKSUM_BYTES, "little")


def fits_checksum(content: bytes | np.ndarray) -> bool:
    """Whether some bytes end with their checksum."""
    values = np.frombuffer(content, np.uint8)  # of views, the checksum's library takes those of NumPy only
    return values[-CHECKSUM_BYTES:].tobytes() == checksum(values[:-CHECKSUM_BYTES])


def chunk_path(folder: Path, num_axes: int) -> Path:
    """The only chunk, or shard, of an array of a cache."""
    return folder.joinpath("c", *["0"] * num_axes)


@functools.cache
def shard_path(spec: ArraySpec) -> str:
    """The only shard of a mapped array, below the folder of its case."""
    return chunk_path(Path(spec.case_path), len(spec.axes)).as_posix()


def shard_bytes(num_slices: int, slice_bytes: int) -> int:
    """Size of the shard of a mapped array: every slice with its checksum, then the index with its own."""
    return num_slices * (slice_bytes + CHECKSUM_BYTES + INDEX_ENTRY_BYTES) + CHECKSUM_BYTES


def shard_sizes(row: CaseRow) -> dict[str, int]:
    """Size in bytes of every shard of a case, by its path below the folder of the case."""
    sizes = {}
    for spec in row.arrays():
        shape, dtype = row.slice_layout(spec.name)
        sizes[shard_path(spec)] = shard_bytes(row.shape[1], math.prod(shape) * dtype.itemsize)
    return sizes


def metadata_digest(nodes: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over the metadata of a group and the nodes below it.

    `nodes`: content of zarr.json by the node's path below the group, that of the group itself under the empty path.
    What varies between equal runs (`provenance`) and the digest itself are left out.
    """
    own = nodes[""]
    ours = {
        key: value
        for key, value in own["attributes"]["supercl"].items()
        if key not in ("provenance", "metadata_digest")
    }
    sealed = {**nodes, "": {**own, "attributes": {**own["attributes"], "supercl": ours}}}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def damaged(where: Path, expected: object, found: object) -> CacheError:
    """The error for a part of a cache that is not what it should be."""
    return CacheError(
        "The cache is damaged.",
        where=where,
        expected=expected,
        found=found,
        next_step="`supercl verify CACHE` lists all damage, `supercl repair CACHE` mends it.",
    )


def _layout(spec: ArraySpec, shape: list[int], data_type: str) -> dict[str, Any]:
    """The parts of an array's metadata that say where and how its values are stored."""
    little_endian: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    codecs = [{"name": "bytes"} if np.dtype(data_type).itemsize == 1 else little_endian, {"name": "crc32c"}]
    if spec.mapped:
        chunk = [1 if axis == "z" else size for axis, size in zip(spec.axes, shape, strict=True)]
        sharding = {
            "chunk_shape": chunk,
            "codecs": codecs,
            "index_codecs": [little_endian, {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return {
        "node_type": "array",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": codecs,
    }


def _is(kind: str, value: Any) -> bool:
    """Whether a value is of a type as `schema.ATTRIBUTES` names it."""
    match kind:
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return type(value) is int
        case "number":
            return type(value) in (int, float)
        case "string":
            return isinstance(value, str)
        case "object":
            return isinstance(value, dict)
        case "list of strings":
            return isinstance(value, list) and all(isinstance(item, str) for item in value)
        case "list of integers":
            return isinstance(value, list) and all(type(item) is int for item in value)
    raise AssertionError(f"schema.ATTRIBUTES names the unknown type {kind!r}")
