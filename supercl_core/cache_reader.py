"""Reading a cache: the tables at once, the arrays of a case through a memory map.

A mapped array is one file (see `schema`): slice z starts at z * (slice bytes + 4). The whole array is therefore
one strided NumPy view of the map, and taking a slice copies nothing. Checksums are the writer's and Zarr's
business; the reader checks the file's size, and the offsets were checked when the case was committed.
Called by training and inspection.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr

from supercl_core.cases import CaseRow, rows_from_group
from supercl_core.errors import CacheError
from supercl_core.schema import ASP_GRID, CHECKSUM_BYTES, SCHEMA_VERSION, array_spec
from supercl_core.volumes import Geometry

MAX_OPEN_MAPS: Final = 30_000
"""Files mapped at a time: Linux allows a process 65,530 maps in all."""

_INDEX_ENTRY_BYTES: Final = 16


@dataclass(frozen=True, kw_only=True)
class WeakLabels:
    """One set of weak labels over all slices of a cache."""

    name: str
    ccl: np.ndarray
    """int32 (levels, n), finest level first."""
    nearest: np.ndarray
    """int32 (levels, n); level 0: the nearest slice of each slice."""
    similarity: np.ndarray
    """float32 (levels, n)."""
    num_components: tuple[int, ...]
    """Of each level."""


@dataclass(frozen=True)
class CachedCase:
    """One case of a cache; every array is a read-only view of the mapped file."""

    cache: Cache
    row: CaseRow

    @property
    def image_ZCYX(self) -> np.ndarray:
        """Stored intensities (z, c, y, x); value = stored * row.image_scale + row.image_offset."""
        return self.cache.mapped(self.row, "image")

    @property
    def superpixels_ZYX(self) -> np.ndarray:
        """Superpixel ids, uint8 or uint16 (z, y, x)."""
        return self.cache.mapped(self.row, "superpixels")

    @property
    def ground_truth_ZYX(self) -> np.ndarray | None:
        """Classes, uint8 (z, y, x); None for a case without ground truth."""
        return self.cache.mapped(self.row, "ground_truth") if self.row.has_ground_truth else None

    @property
    def asp_ZGG(self) -> np.ndarray:
        """ASP maps, float16 (z, g, g), 0..1."""
        return self.cache.mapped(self.row, "asp")

    def geometry(self) -> Geometry:
        """The geometry of the source volume, for writing segmentations that lie over it."""
        group = zarr.open_group(self.cache.path / "cases" / self.row.id, mode="r", zarr_format=3)
        stored: Any = group.attrs["supercl"]
        geometry = stored["geometry"]
        return Geometry(
            spacing_mm=tuple(geometry["spacing_mm"]),
            origin_mm=tuple(geometry["origin_mm"]),
            direction=tuple(geometry["direction"]),
        )


class Cache:
    """An open cache. Threads may read from it at the same time."""

    def __init__(self, path: Path, attributes: dict[str, Any], root: zarr.Group) -> None:
        self.path = path
        self.attributes = attributes
        """The root's attributes, as `schema.ATTRIBUTES` declares them."""
        self.rows = rows_from_group(root["table"])  # type: ignore[arg-type]
        """Every case in order of its id, failed ones too."""
        self.slice_case = _read(root, "slices/case")
        """int32 (n,): index into `rows` of each slice's case."""
        self.slice_z = _read(root, "slices/z")
        """int32 (n,): index of each slice within its case."""
        self.slice_position = _read(root, "slices/position")
        """float32 (n,), in (0, 1]."""
        self._row_index = {row.id: index for index, row in enumerate(self.rows)}
        self._root = root
        self._map = functools.lru_cache(maxsize=MAX_OPEN_MAPS)(self._open_map)

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.attributes["name"]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Classes of the ground truth, background first; empty where there is none."""
        return tuple(self.attributes["class_names"])

    @property
    def num_channels(self) -> int:
        """Channels of every image of the cache."""
        return len(self.attributes["channel_names"])

    @property
    def num_slices(self) -> int:
        """Slices of all cases together (n)."""
        return len(self.slice_case)

    @property
    def done(self) -> list[CaseRow]:
        """The rows of the cases that are done."""
        return [row for row in self.rows if row.state == "done"]

    @property
    def failed(self) -> list[CaseRow]:
        """The rows of the cases that failed, each with its reason."""
        return [row for row in self.rows if row.state == "failed"]

    def case(self, case_id: str) -> CachedCase:
        """The case `case_id`. Raises CacheError for an unknown or failed case."""
        index = self._row_index.get(case_id)
        if index is None or self.rows[index].state == "failed":
            raise CacheError(
                f"The cache has no case {case_id!r}.",
                where=self.path,
                expected=f"one of its {len(self.done)} cases, such as {', '.join(r.id for r in self.done[:3])}",
                found=case_id if index is None else f"a failed case: {self.rows[index].reason}",
                next_step="Check the spelling: a case is named like its file, without the ending.",
            )
        return CachedCase(self, self.rows[index])

    def case_slices(self, case_ids: list[str]) -> np.ndarray:
        """Indices (int64, ascending) of all slices of the named cases."""
        wanted = [self._row_index[self.case(case_id).row.id] for case_id in case_ids]
        return np.flatnonzero(np.isin(self.slice_case, wanted))

    def weak_labels(self, name: str | None = None) -> WeakLabels:
        """The weak labels `name`, or the cache's default ones. Raises CacheError for an unknown name."""
        name = name or self.attributes["default_weak_labels"]
        groups = self._root["weak_labels"]
        if name not in groups:  # type: ignore[operator]
            raise CacheError(
                f"The cache has no weak labels {name!r}.",
                where=self.path,
                expected=", ".join(sorted(groups.group_keys())),  # type: ignore[union-attr]
                found=name,
                next_step="Name one of these, or compute them with `supercl weak-labels`.",
            )
        path = f"weak_labels/{name}"
        attributes: Any = self._root[path].attrs["supercl"]
        return WeakLabels(
            name=name,
            ccl=_read(self._root, f"{path}/ccl"),
            nearest=_read(self._root, f"{path}/nearest"),
            similarity=_read(self._root, f"{path}/similarity"),
            num_components=tuple(attributes["num_components"]),
        )

    def mapped(self, row: CaseRow, name: str) -> np.ndarray:
        """The mapped case array `name` with the slice axis first, read-only."""
        return self._map(row.id, name)

    def _open_map(self, case_id: str, name: str) -> np.ndarray:
        row = self.rows[self._row_index[case_id]]
        file = self.path / array_spec(name).path.format(case=case_id) / "c"
        channels, num_slices, height, width = row.shape
        shape: tuple[int, ...]
        match name:
            case "image":
                shape, dtype, file = (channels, height, width), np.dtype(row.image_dtype), file / "0"
            case "superpixels":
                shape, dtype = (height, width), np.dtype(row.superpixels_dtype)
            case "ground_truth":
                shape, dtype = (height, width), np.dtype(np.uint8)
            case _:
                shape, dtype = (ASP_GRID, ASP_GRID), np.dtype(np.float16)
        return map_shard(file / "0" / "0" / "0", num_slices, shape, dtype.newbyteorder("<"))


def open_cache(path: Path | str, *, unfinished: bool = False) -> Cache:
    """Open a cache for reading; needs no write permission. Only its writer opens an `unfinished` one.

    Raises CacheError when there is none at `path`, when it is of another schema version, or not complete.

    Example:
        cache = open_cache("heart.zarr")
        case = cache.case(cache.rows[0].id)
        image_CYX = case.image_ZCYX[3]
    """
    path = Path(path)
    if not (path / "zarr.json").is_file():
        raise CacheError(
            "There is no cache here.",
            where=path,
            expected="a folder written by `supercl preprocess`",
            found="another folder" if path.is_dir() else "a file" if path.exists() else "nothing",
            next_step="Check the path, or write one with `supercl preprocess INPUT CACHE`.",
        )
    root = zarr.open_group(path, mode="r", zarr_format=3)
    attributes: Any = root.attrs.get("supercl", {})
    check_version(path, attributes)
    if not (attributes["complete"] or unfinished):
        raise CacheError(
            "The cache is not complete.",
            where=path,
            expected="every case done or listed as failed, and weak labels",
            found="preprocessing still running, or stopped before its end",
            next_step="Run the same `supercl preprocess INPUT CACHE` again; it goes on where it stopped.",
        )
    return Cache(path, attributes, root)


def check_version(path: Path, attributes: dict[str, Any]) -> None:
    """Raise CacheError unless the root attributes are those of a cache of this schema version."""
    if attributes.get("schema_version") != SCHEMA_VERSION:
        raise CacheError(
            "The cache has another schema version.",
            where=path,
            expected=f"version {SCHEMA_VERSION}",
            found=f"version {attributes['schema_version']}"
            if "schema_version" in attributes
            else "no cache of ours",
            next_step="Preprocess the data set again into a new cache, or use the version of supercl that wrote it.",
        )


def map_shard(file: Path, num_slices: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Map one shard file as a read-only array (num_slices, *shape).

    Raises CacheError when the file is missing or not of the size that the shape asks for.
    """
    slice_bytes = math.prod(shape) * dtype.itemsize
    step = slice_bytes + CHECKSUM_BYTES
    expected = num_slices * (step + _INDEX_ENTRY_BYTES) + CHECKSUM_BYTES
    found = file.stat().st_size if file.is_file() else 0
    if found != expected:
        raise CacheError(
            "An array of the cache is damaged.",
            where=file,
            expected=f"{expected:,} bytes",
            found=f"{found:,} bytes" if found else "no file",
            next_step="Delete the folder of this case below cases/ and run `supercl preprocess` again.",
        )
    buffer = np.memmap(file, dtype=np.uint8, mode="r")
    inner = [dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return np.ndarray((num_slices, *shape), dtype, buffer=buffer, strides=(step, *inner))


def _read(root: zarr.Group, path: str) -> np.ndarray:
    array: Any = root[path]
    return np.asarray(array[:])
