"""Writing a cache: the root once, each case by one writer, the tables and weak labels at the end.

Everything is written into the sibling folder `CACHE.wip` and renamed into the cache when it is whole, so that a
reader of the cache never sees half a case and nothing foreign lies inside the Zarr hierarchy.
Called by preprocessing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO, Final

import google_crc32c
import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from supercl_core import ome
from supercl_core.cases import CaseRow, rows_to_arrays
from supercl_core.files import replace_folder, wip_path
from supercl_core.schema import CHECKSUM_BYTES, SCHEMA_VERSION, array_spec

WRITE_THROUGH_BYTES: Final = 1 << 20
"""Shards of this size and above are on the disk, and out of memory, before their case is committed."""


def create_cache(path: Path, attributes: dict[str, Any]) -> None:
    """Write the root of a new cache, not complete yet. `attributes` as in `schema.ATTRIBUTES` for `/`."""
    wip = wip_path(path) / "root"
    shutil.rmtree(wip, ignore_errors=True)
    root = zarr.open_group(wip, mode="w", zarr_format=3)
    root.attrs["supercl"] = {**attributes, "schema_version": SCHEMA_VERSION, "complete": False}
    root.create_group("cases")
    replace_folder(wip, path)


def set_root_attributes(path: Path, changes: dict[str, Any]) -> None:
    """Change some of the root's attributes; Zarr replaces the file atomically."""
    root = zarr.open_group(path, mode="r+", zarr_format=3)
    stored: Any = root.attrs["supercl"]
    root.attrs["supercl"] = {**stored, **changes}


def write_case(
    path: Path, row: CaseRow, arrays: dict[str, np.ndarray], *, attributes: dict[str, Any]
) -> None:
    """Write one case and commit it with a rename, replacing an older one of that id.

    `arrays`: `image` (c, z, y, x), `superpixels` (z, y, x), `asp` (z, g, g) and, optionally, `ground_truth`
    (z, y, x), in the dtypes of the schema. `attributes`: what the schema declares for a case beside `row`.
    """
    wip = wip_path(path) / row.id
    shutil.rmtree(wip, ignore_errors=True)
    # Zarr makes the metadata in memory: on disk each of its files costs it a millisecond.
    metadata: dict[str, Buffer] = {}
    group = zarr.create_group(
        MemoryStore(metadata),
        attributes={
            "ome": ome.image_attributes(row.id, "image", "czyx", row.spacing_mm),
            "supercl": {**attributes, "row": row.as_dict()},
        },
    )
    layers = [name for name in ("superpixels", "ground_truth") if name in arrays]
    group.create_group("labels", attributes={"ome": ome.labels_attributes(layers)})
    for layer in layers:
        ome_attributes = ome.label_attributes(layer, row.spacing_mm)
        group.create_group(f"labels/{layer}", attributes={"ome": ome_attributes})
    for name, array in arrays.items():
        _write_shard(_declare_mapped(group, name, array), array, wip)
    for key, content in metadata.items():
        (wip / key).write_bytes(content.to_bytes())
    replace_folder(wip, path / "cases" / row.id)


def committed_case(path: Path, case_id: str) -> dict[str, Any] | None:
    """The attributes of a case that is in the cache already; None where it is not."""
    folder = path / "cases" / case_id
    if not (folder / "zarr.json").is_file():
        return None
    attributes: Any = zarr.open_group(folder, mode="r", zarr_format=3).attrs["supercl"]
    return attributes


def write_tables(path: Path, rows: list[CaseRow], *, num_channels: int) -> None:
    """Write `table/` and `slices/` for all cases, in the order given."""
    _write_group(path, "table", rows_to_arrays(rows, num_channels=num_channels), {})
    counts = [row.shape[1] for row in rows]
    z = np.concatenate([np.arange(count) for count in counts] + [np.zeros(0, int)])
    totals = np.repeat(counts, counts)
    slices = {
        "case": np.repeat(np.arange(len(rows)), counts).astype(np.int32),
        "z": z.astype(np.int32),
        "position": ((z + 1) / np.maximum(totals, 1)).astype(np.float32),
    }
    _write_group(path, "slices", slices, {})


def write_weak_labels(
    path: Path, name: str, arrays: dict[str, np.ndarray], attributes: dict[str, Any]
) -> None:
    """Write one set of weak labels: `ccl`, `nearest` and `similarity`, each (levels, n)."""
    if not (path / "weak_labels").is_dir():
        zarr.open_group(path, mode="r+", zarr_format=3).create_group("weak_labels")
    _write_group(path, f"weak_labels/{name}", arrays, attributes)


def _write_group(path: Path, name: str, arrays: dict[str, np.ndarray], attributes: dict[str, Any]) -> None:
    wip = wip_path(path) / name
    shutil.rmtree(wip, ignore_errors=True)
    group = zarr.open_group(wip, mode="w", zarr_format=3)
    if attributes:
        group.attrs["supercl"] = attributes
    for key, array in arrays.items():
        group.create_array(key, data=array, chunks=tuple(max(size, 1) for size in array.shape))
    replace_folder(wip, path / name)


def _declare_mapped(group: zarr.Group, name: str, array: np.ndarray) -> zarr.Array:
    """The Zarr array for one mapped array of a case, without content."""
    spec = array_spec(name)
    if array.dtype.name not in spec.dtypes or array.ndim != len(spec.axes):
        raise AssertionError(f"{name}: {array.dtype} {array.shape} is not what the schema declares")
    chunk = tuple(1 if axis == "z" else size for axis, size in zip(spec.axes, array.shape, strict=True))
    plane = ["grid_y", "grid_x"] if name == "asp" else ["y", "x"]
    return group.create_array(
        spec.path.removeprefix("cases/{case}/"),
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


def _write_shard(declared: zarr.Array, array: np.ndarray, folder: Path) -> None:
    """Write the only shard of a mapped array, as Zarr writes it but without a copy, and with slices in order.

    Source: the Zarr v3 specification (sharding codec, index at the end; crc32c codec).
    """
    file = folder / declared.path / declared.metadata.encode_chunk_key((0,) * array.ndim)
    file.parent.mkdir(parents=True)
    z_axis = array.ndim - 3
    step = array.nbytes // array.shape[z_axis] + CHECKSUM_BYTES
    offsets = np.arange(array.shape[z_axis]) * step
    with file.open("wb") as shard:
        for slice_ in np.moveaxis(array, z_axis, 0):
            _write_checked(
                shard, np.ascontiguousarray(slice_.astype(array.dtype.newbyteorder("<"), copy=False))
            )
        _write_checked(shard, np.stack([offsets, np.full_like(offsets, step)], axis=1).astype("<u8"))
        if array.nbytes >= WRITE_THROUGH_BYTES and hasattr(os, "posix_fadvise"):
            # Nobody reads a case soon. Left to the kernel, its pages push out the files that are still to be read,
            # and on virtual machines each fresh one is a fault of the host: 0.5 instead of 2.5 ms per MB there.
            shard.flush()
            os.fsync(shard.fileno())
            os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_checked(file: BinaryIO, content: np.ndarray) -> None:
    file.write(content.data)
    file.write(google_crc32c.value(content).to_bytes(CHECKSUM_BYTES, "little"))
