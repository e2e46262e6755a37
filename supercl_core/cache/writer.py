"""Writing a cache: the root once, each case by one writer, the tables and weak labels at the end.

Everything is written into the sibling folder `CACHE.wip` and renamed into the cache when it is whole, so that a
reader of the cache never sees half a case and nothing foreign lies inside the Zarr hierarchy. Whoever holds the
cache's lock writes below a name of his own there: a process of a run that has lost the lock stays harmless.
Called by preprocessing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from supercl_core.cache import ome
from supercl_core.cache.cases import CaseRow, content_digest, rows_to_arrays, shards_digest, slice_columns
from supercl_core.cache.schema import CHECKSUM_BYTES, SCHEMA_VERSION, SETS, array_spec
from supercl_core.cache.zarr_files import (
    attributes_of,
    checksum,
    chunk_path,
    metadata_digest,
    node_text,
    read_node,
    read_nodes,
    shard_sizes,
)
from supercl_core.errors import CacheError
from supercl_core.files import replace_folder, wip_path
from supercl_core.locks import check_lock

WRITE_THROUGH_BYTES: Final = 1 << 20
"""Shards of this size and above are on the disk, and out of memory, before their case is committed."""

_EMPTY_GROUP: Final[dict[str, Any]] = {"attributes": {}, "zarr_format": 3, "node_type": "group"}


def create_cache(path: Path, attributes: dict[str, Any]) -> None:
    """Write the root of a new cache, not complete yet. `attributes` as in `schema.ATTRIBUTES` for `/`.

    Cases that are there already, below a root that got lost, stay.
    """
    _write_empty_group(path, "cases")
    stored = {**attributes, "schema_version": SCHEMA_VERSION, "complete": False}
    _write_node(path, path, {**_EMPTY_GROUP, "attributes": {"supercl": stored}})


def set_root_attributes(path: Path, changes: dict[str, Any]) -> None:
    """Change some of the root's attributes, all at once."""
    node = read_node(path)
    node["attributes"]["supercl"].update(changes)
    _write_node(path, path, node)


def write_case(
    path: Path, row: CaseRow, arrays: dict[str, np.ndarray], *, attributes: dict[str, Any], token: str = ""
) -> CaseRow:
    """Write one case and commit it with a rename, replacing an older one of that id; returns its row as stored.

    `arrays`: `image` (c, z, y, x), `superpixels` (z, y, x), `asp` (z, g, g) and, optionally, `ground_truth`
    (z, y, x), in the dtypes of the schema. `attributes`: what the schema declares for a case beside `row` and
    the digests of metadata and shards. `token`: of the lock under which the case is written, empty where there is no
    other writer.

    Raises CacheError, and commits nothing, where the lock is another's by now.
    """
    wip = wip_path(path) / token / row.id
    shutil.rmtree(wip, ignore_errors=True)
    names: Any = read_node(path)["attributes"]["supercl"]
    # Zarr makes the metadata in memory: on disk each of its files costs it a millisecond.
    metadata: dict[str, Buffer] = {}
    group = zarr.create_group(
        MemoryStore(metadata),
        attributes={"ome": ome.case_attributes(row, names["channel_names"])},
    )
    layers = [name for name in ("superpixels", "ground_truth") if name in arrays]
    group.create_group("labels", attributes={"ome": ome.labels_attributes(layers)})
    group.create_group("labels/superpixels", attributes={"ome": ome.superpixels_attributes(row)})
    if "ground_truth" in arrays:
        classes = ome.ground_truth_attributes(row, names["class_names"])
        group.create_group("labels/ground_truth", attributes={"ome": classes})
    checksums = {
        name: _write_shard(_declare_mapped(group, name, array), array, wip) for name, array in arrays.items()
    }
    row = dataclasses.replace(row, content_digest=content_digest(row, checksums))
    nodes = {
        key.removesuffix("zarr.json").rstrip("/"): json.loads(content.to_bytes())
        for key, content in metadata.items()
    }
    ours = {**attributes, "row": row.as_dict(), "shards_digest": shards_digest(checksums)}
    nodes[""]["attributes"]["supercl"] = ours
    ours["metadata_digest"] = metadata_digest(json.loads(json.dumps(nodes)))
    for name, node in nodes.items():
        (wip / name / "zarr.json").write_bytes(node_text(node))
    if token:
        check_lock(path, token)
    replace_folder(wip, path / "cases" / row.id)
    return row


def committed_case(path: Path, case_id: str) -> dict[str, Any] | None:
    """The attributes of a case that is in the cache; None where there is none, or one that is visibly damaged.

    Looks at metadata and at the sizes of files, not at their content.
    """
    folder = path / "cases" / case_id
    try:
        nodes = read_nodes(folder)
        attributes = attributes_of(nodes.get("", {}), folder, "cases/{case}")
        row = CaseRow.from_dict(attributes["row"])
        if row.id != case_id or metadata_digest(nodes) != attributes["metadata_digest"]:
            return None
        for file, size in shard_sizes(row).items():
            if (folder / file).stat().st_size != size:
                return None
    except (CacheError, ValueError, OSError):
        return None
    return attributes


def restamp_case(path: Path, case_id: str, provenance: dict[str, Any]) -> None:
    """Replace the attribute `provenance` of a committed case."""
    folder = path / "cases" / case_id
    node = read_node(folder)
    node["attributes"]["supercl"]["provenance"] = provenance
    _replace_file(path, folder / "zarr.json", node_text(node))


def remove_cases(path: Path, *, keep: Collection[str]) -> None:
    """Remove every case, or remains of one, that is not in `keep`."""
    for folder in list((path / "cases").iterdir()):
        if folder.is_dir() and folder.name not in keep:
            away = wip_path(path) / ".removed"
            shutil.rmtree(away, ignore_errors=True)
            away.parent.mkdir(exist_ok=True)
            folder.rename(away)
            shutil.rmtree(away)


def write_tables(path: Path, rows: list[CaseRow], *, num_channels: int) -> None:
    """Write `table/` and `slices/` for all cases, in the order given, and the groups of sets over slices."""
    _write_group(path, "table", rows_to_arrays(rows, num_channels=num_channels), {})
    _write_group(path, "slices", slice_columns(rows), {})
    for name in SETS:
        _write_empty_group(path, name)


def write_weak_labels(
    path: Path, name: str, arrays: dict[str, np.ndarray], attributes: dict[str, Any]
) -> None:
    """Write one set of weak labels: `ccl`, `nearest` and `similarity`, each (levels, n).

    `attributes`: what the schema declares for such a group, but for the digest of its metadata.
    """
    _write_group(path, f"weak_labels/{name}", arrays, attributes)


def write_descriptors(path: Path, name: str, values: np.ndarray, attributes: dict[str, Any]) -> None:
    """Write descriptors of every slice, float32 (n, d).

    `attributes`: what the schema declares for such a group, but for the digests of values and metadata.
    """
    digest = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
    _write_group(path, f"descriptors/{name}", {"values": values}, {**attributes, "digest": digest})


def _write_group(path: Path, name: str, arrays: dict[str, np.ndarray], attributes: dict[str, Any]) -> None:
    wip = wip_path(path) / name
    shutil.rmtree(wip, ignore_errors=True)
    # Zarr writes into memory: where the disk is full, its tasks would end in tracebacks beside our message.
    content: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(content))
    for key, array in arrays.items():
        group.create_array(
            key,
            data=array,
            chunks=array.shape,
            compressors=[Crc32cCodec()],
            fill_value=0,
            config={"write_empty_chunks": True},
        )
    for key, value in content.items():
        file = wip / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(value.as_numpy_array().data)
    if attributes:
        _write_node(path, wip, {**_EMPTY_GROUP, "attributes": {"supercl": attributes}})
    replace_folder(wip, path / name)


def _write_empty_group(path: Path, name: str) -> None:
    """Write the metadata of a group without attributes; what is below it stays."""
    (path / name).mkdir(parents=True, exist_ok=True)
    _write_node(path, path / name, _EMPTY_GROUP)


def _write_node(path: Path, folder: Path, node: dict[str, Any]) -> None:
    """Write the metadata of a group of the cache at `path`, its attributes sealed."""
    if ours := node["attributes"].get("supercl"):
        ours["metadata_digest"] = metadata_digest({"": json.loads(json.dumps(node))})
    _replace_file(path, folder / "zarr.json", node_text(node))


def _replace_file(path: Path, file: Path, content: bytes) -> None:
    """Replace a file of the cache at `path`; what is not whole yet lies beside the cache."""
    wip = wip_path(path) / ".file"
    wip.parent.mkdir(parents=True, exist_ok=True)
    with wip.open("wb") as written:
        written.write(content)
        written.flush()
        os.fsync(written.fileno())  # a rename may reach the disk before the content it names
    wip.replace(file)


def _declare_mapped(group: zarr.Group, name: str, array: np.ndarray) -> zarr.Array:
    """The Zarr array for one mapped array of a case, without content."""
    spec = array_spec(name)
    if array.dtype.name not in spec.dtypes or array.ndim != len(spec.axes):
        raise AssertionError(f"{name}: {array.dtype} {array.shape} is not what the schema declares")
    chunk = tuple(1 if axis == "z" else size for axis, size in zip(spec.axes, array.shape, strict=True))
    plane = ["grid_y", "grid_x"] if name == "asp" else ["y", "x"]
    return group.create_array(
        spec.case_path,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunk,
        shards=array.shape,
        serializer=BytesCodec(endian="little") if array.dtype.itemsize > 1 else BytesCodec(endian=None),
        compressors=[Crc32cCodec()],
        fill_value=0,
        dimension_names=[*spec.axes[:-2], *plane],
        config={"write_empty_chunks": True},
    )


def _write_shard(declared: zarr.Array, array: np.ndarray, folder: Path) -> np.ndarray:
    """Write the only shard of a mapped array, as Zarr writes it but without a copy, and with slices in order.

    Returns the checksums of the slices, uint32 (z,). Source: the Zarr v3 specification (sharding codec, index at the
    end; crc32c codec).
    """
    file = chunk_path(folder / declared.path, array.ndim)
    file.parent.mkdir(parents=True)
    z_axis = array.ndim - 3
    step = array.nbytes // array.shape[z_axis] + CHECKSUM_BYTES
    offsets = np.arange(array.shape[z_axis]) * step
    with file.open("wb") as shard:
        checksums = [
            _write_checked(
                shard, np.ascontiguousarray(slice_.astype(array.dtype.newbyteorder("<"), copy=False))
            )
            for slice_ in np.moveaxis(array, z_axis, 0)
        ]
        _write_checked(shard, np.stack([offsets, np.full_like(offsets, step)], axis=1).astype("<u8"))
        if array.nbytes >= WRITE_THROUGH_BYTES and sys.platform == "linux":
            # Nobody reads a case soon. Left to the kernel, its pages push out the files that are still to be read,
            # and on virtual machines each fresh one is a fault of the host: 0.5 instead of 2.5 ms per MB there.
            shard.flush()
            os.fsync(shard.fileno())
            os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return np.array(checksums, np.uint32)


def _write_checked(file: BinaryIO, content: np.ndarray) -> int:
    """Write an array and its checksum, which is returned."""
    behind = checksum(content)
    file.write(content.data)
    file.write(behind)
    return int.from_bytes(behind, "little")
