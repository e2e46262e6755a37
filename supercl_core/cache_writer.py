"""Writing a cache: the root once, each case by one writer, the tables and weak labels at the end.

Everything is written into the sibling folder `CACHE.wip` and renamed into the cache when it is whole, so that a
reader of the cache never sees half a case and nothing foreign lies inside the Zarr hierarchy.
Called by preprocessing.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from supercl_core import ome
from supercl_core.cases import CaseRow, rows_to_arrays
from supercl_core.errors import SuperCLError
from supercl_core.files import replace_folder, wip_path
from supercl_core.schema import ASP_GRID, CHECKSUM_BYTES, SCHEMA_VERSION, array_spec


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
    group = zarr.open_group(wip, mode="w", zarr_format=3)
    group.attrs["ome"] = ome.image_attributes(row.id, "image", "czyx", row.spacing_mm)
    group.attrs["supercl"] = {**attributes, "row": row.as_dict()}
    layers = [name for name in ("superpixels", "ground_truth") if name in arrays]
    group.create_group("labels").attrs["ome"] = ome.labels_attributes(layers)
    for layer in layers:
        label_group = group.create_group(f"labels/{layer}")
        label_group.attrs["ome"] = ome.label_attributes(layer, row.spacing_mm)
    for name, array in arrays.items():
        _write_mapped(group, name, array)
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


def _write_mapped(group: zarr.Group, name: str, array: np.ndarray) -> None:
    """Write one mapped array and check that its slices lie where the reader will look for them."""
    spec = array_spec(name)
    if array.dtype.name not in spec.dtypes or array.ndim != len(spec.axes):
        raise AssertionError(f"{name}: {array.dtype} {array.shape} is not what the schema declares")
    chunk = tuple(1 if axis == "z" else size for axis, size in zip(spec.axes, array.shape, strict=True))
    relative = spec.path.removeprefix("cases/{case}/")
    names = ["y", "x"] if array.shape[1:] != (ASP_GRID, ASP_GRID) or name != "asp" else ["grid_y", "grid_x"]
    stored = group.create_array(
        relative,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunk,
        shards=array.shape,
        serializer=BytesCodec(endian="little") if array.dtype.itemsize > 1 else BytesCodec(endian=None),
        compressors=[Crc32cCodec()],
        fill_value=0,
        dimension_names=[*spec.axes[:-2], *names],
        config={"write_empty_chunks": True},
    )
    stored[...] = array
    folder = Path(str(group.store_path.store.root)) / group.path / relative  # type: ignore[attr-defined]
    _check_offsets(folder.joinpath("c", *"0" * array.ndim), array.nbytes // array.shape[spec.axes.index("z")])


def _check_offsets(file: Path, slice_bytes: int) -> None:
    """Raise unless the shard's index places slice z at z * (slice bytes + 4): the reader relies on it."""
    step = slice_bytes + CHECKSUM_BYTES
    size = file.stat().st_size
    num_slices = (size - CHECKSUM_BYTES) // (step + 16)
    with file.open("rb") as shard:
        shard.seek(num_slices * step)
        index = np.frombuffer(shard.read(num_slices * 16), dtype="<u8").reshape(num_slices, 2)
    wanted = np.stack([np.arange(num_slices) * step, np.full(num_slices, step)], axis=1)
    if not np.array_equal(index, wanted):
        raise SuperCLError(
            "The Zarr library wrote the slices of a shard in another order than the memory map needs.",
            where=file,
            expected=f"slice z at byte z * {step}",
            found=f"offsets {index[:3, 0].tolist()}",
            next_step="Install the version of zarr that the constraints file names.",
        )
