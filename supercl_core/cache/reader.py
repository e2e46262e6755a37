"""Reading a cache: the tables at once, the arrays of a case through a memory map.

A mapped array is one file (see `schema`): slice z starts at z * (slice bytes + 4). The whole array is therefore
one strided NumPy view of the map, and taking a slice copies nothing (`mapped_shard`). The reader checks tables
altogether and files by their size, so that no crafted cache makes it read elsewhere; checksums of slices are the
business of `verification` and of Zarr. Called by training and inspection.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from supercl_core.cache.cases import (
    CaseRow,
    case_id_problem,
    patients,
    rows_from_arrays,
    slice_columns,
    slices_digest,
)
from supercl_core.cache.mapped_shard import MappedShard
from supercl_core.cache.schema import (
    ARCHIVE_FORM,
    DESCRIPTOR_ARRAYS,
    LABEL_ARRAYS,
    SCHEMA_VERSION,
    SLICE_ARRAYS,
    TABLE_ARRAYS,
    array_spec,
)
from supercl_core.cache.zarr_files import (
    array_metadata,
    damaged,
    read_array,
    read_attributes,
    read_node,
    shard_path,
)
from supercl_core.errors import CacheError
from supercl_core.formats.geometry import Geometry

MAX_OPEN_MAPS: Final = 30_000
"""Files mapped at a time: Linux allows a process 65,530 maps in all."""


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
    descriptors: str
    """What they were computed from."""
    neighbours: str
    """Which slices may be linked: `any`, or those of `other-cases`."""


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

    def read(self, name: str, slices: slice) -> np.ndarray:
        """A copy of some slices of the array `name`, (z, ...).

        Raises StorageError where its file cannot be read any more, such as on a mount that is gone: to look at the
        views above kills the process then.
        """
        shard = self.cache.shard(self.row, name)
        rows = slice(0, shard.array.shape[-2])
        for z in range(*slices.indices(len(shard.array))):
            shard.load(z, rows)
        return shard.array[slices].copy()

    @functools.cached_property
    def attributes(self) -> dict[str, Any]:
        """What `schema.ATTRIBUTES` declares for a case: its key, geometry, orientation, precision."""
        return read_attributes(self.cache.path / "cases" / self.row.id, "cases/{case}")

    def geometry(self) -> Geometry:
        """The geometry of the source volume, for writing segmentations that lie over it."""
        stored = self.attributes["geometry"]
        values: dict[str, Any] = {}
        for name, size in (("spacing_mm", 3), ("origin_mm", 3), ("direction", 9)):
            value = stored.get(name)
            if not isinstance(value, list) or [type(part) is float for part in value] != [True] * size:
                where = self.cache.path / "cases" / self.row.id / "zarr.json"
                raise damaged(where, f"{name}: {size} numbers", f"{value!r:.80}")
            values[name] = tuple(value)
        return Geometry(**values)


class Cache:
    """An open cache. Threads may read from it at the same time."""

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        self.path = path
        self.attributes = attributes
        """The root's attributes, as `schema.ATTRIBUTES` declares them."""
        self.rows = self._checked_rows()
        """Every case in order of its id, failed ones too."""
        slices = self._checked_slices()
        self.slice_case = slices["case"]
        """int32 (n,): index into `rows` of each slice's case."""
        self.slice_z = slices["z"]
        """int32 (n,): index of each slice within its case."""
        self.slice_position = slices["position"]
        """float32 (n,), in (0, 1]."""
        self._row_index = {row.id: index for index, row in enumerate(self.rows)}
        self._map = functools.lru_cache(maxsize=MAX_OPEN_MAPS)(self._open_map)

    def __reduce__(self) -> tuple[object, ...]:
        # A copy in another process, such as a worker of a DataLoader, opens its own maps.
        return type(self), (self.path, self.attributes)

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

    @functools.cached_property
    def slice_patient(self) -> np.ndarray:
        """Integers (n,): the patient of each slice (`cases.patients`)."""
        return patients(self.rows)[self.slice_case]

    @functools.cached_property
    def slices_digest(self) -> str:
        """What descriptors and weak labels of just these slices carry (`cases.slices_digest`)."""
        return slices_digest(self.rows)

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
        """The weak labels `name`, or the cache's default ones.

        Raises CacheError for an unknown name, and for labels that are stale: made of other slices or descriptors.
        """
        name = name or self.attributes["default_weak_labels"]
        folder, attributes = self._set("weak_labels", name)
        arrays = {spec.name: read_array(folder / spec.name, spec) for spec in LABEL_ARRAYS}
        num_components = attributes["num_components"]
        for spec in LABEL_ARRAYS:
            expected, found = (len(num_components), self.num_slices), arrays[spec.name].shape
            if found != expected:
                raise damaged(folder / spec.name, f"shape {expected}", f"shape {found}")
        for level, (labels, count) in enumerate(zip(arrays["ccl"], num_components, strict=True)):
            if labels.min() < 0 or labels.max() >= count:
                raise damaged(folder / "ccl", f"labels 0 to {count - 1}", f"others in level {level}")
        return WeakLabels(
            name=name,
            num_components=tuple(num_components),
            descriptors=attributes["descriptors"],
            neighbours=attributes["neighbours"],
            **arrays,
        )

    def descriptors(self, name: str) -> np.ndarray:
        """The descriptors `name` of every slice from an encoder, float32 (n, d). Raises CacheError as `weak_labels`."""
        folder, attributes = self._set("descriptors", name)
        [spec] = DESCRIPTOR_ARRAYS
        values = read_array(folder / spec.name, spec)
        if len(values) != self.num_slices:
            raise damaged(folder / spec.name, f"{self.num_slices} rows", f"{len(values)}")
        if hashlib.sha256(values.data).hexdigest() != attributes["digest"]:
            raise damaged(folder / spec.name, "values that `digest` was made of", "others")
        return values

    def descriptors_digest(self, name: str) -> str:
        """What labels made of the descriptors `name` carry. Raises CacheError as `weak_labels`."""
        return str(self._set("descriptors", name)[1]["digest"])

    def set_names(self, group: str) -> list[str]:
        """Names of the sets that the cache has in a group of `schema.SETS`, stale ones too, in order."""
        folder = self.path / group
        names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
        return sorted(name for name in names if case_id_problem(name) is None)

    def is_stale(self, group: str, name: str) -> bool:
        """Whether a set was made of other slices or descriptors than those that are in the cache now."""
        attributes = read_attributes(self.path / group / name, f"{group}/{{name}}")
        if attributes["slices_digest"] != self.slices_digest:
            return True
        used = (
            attributes["descriptors"] if group == "weak_labels" and attributes["descriptors_digest"] else ""
        )
        if used not in self.set_names("descriptors"):
            return False
        current = read_attributes(self.path / "descriptors" / used, "descriptors/{name}")
        return bool(attributes["descriptors_digest"] != current["digest"])

    def _set(self, group: str, name: str) -> tuple[Path, dict[str, Any]]:
        """Folder and attributes of a set that is there and not stale."""
        words = group.replace("_", " ")
        makers = {
            "weak_labels": "supercl weak-labels CACHE --descriptors NAME",
            "descriptors": "supercl describe CACHE --encoder RUN",
        }
        if name not in self.set_names(group):
            raise CacheError(
                f"The cache has no {words} {name!r}.",
                where=self.path,
                expected=", ".join(self.set_names(group)) or f"none: there are no {words} at all",
                found=name,
                next_step=f"Name one that there is, or compute them with `{makers[group]}`.",
            )
        if self.is_stale(group, name):
            raise CacheError(
                f"The {words} {name!r} are stale.",
                where=self.path / group / name,
                expected=f"{words} of the slices that the cache holds now",
                found="others: the cases, or the descriptors, have changed since",
                next_step=f"Compute them again with `{makers[group]}`.",
            )
        folder = self.path / group / name
        return folder, read_attributes(folder, f"{group}/{{name}}")

    def mapped(self, row: CaseRow, name: str) -> np.ndarray:
        """The mapped case array `name` with the slice axis first, read-only."""
        return self.shard(row, name).array

    def shard(self, row: CaseRow, name: str) -> MappedShard:
        """The mapped file of the case array `name`."""
        return self._map(row.id, name)

    def _open_map(self, case_id: str, name: str) -> MappedShard:
        row = self.rows[self._row_index[case_id]]
        file = self.path / "cases" / case_id / shard_path(array_spec(name))
        return MappedShard(file, row.shape[1], *row.slice_layout(name))

    def _checked_rows(self) -> list[CaseRow]:
        folder = self.path / "table"
        shapes = {spec.name: array_metadata(folder / spec.name, spec)[0] for spec in TABLE_ARRAYS}
        if len({shape[0] for shape in shapes.values()}) != 1 or shapes["statistics"][1] != self.num_channels:
            raise damaged(folder, "one row a case", f"shapes {shapes}")
        try:
            rows = rows_from_arrays(
                {spec.name: read_array(folder / spec.name, spec) for spec in TABLE_ARRAYS}
            )
        except ValueError as error:
            raise damaged(folder, "rows of cases", error) from error
        ids = [row.id for row in rows]
        if ids != sorted(set(ids)):
            raise damaged(folder, "every case once, in order", "another order")
        if any(row.shape[0] != self.num_channels for row in rows if row.state == "done"):
            raise damaged(folder, f"{self.num_channels} channels in every case", "another number")
        return rows

    def _checked_slices(self) -> dict[str, np.ndarray]:
        folder = self.path / "slices"
        found = {spec.name: read_array(folder / spec.name, spec) for spec in SLICE_ARRAYS}
        if len(found["case"]) == sum(row.shape[1] for row in self.rows):
            expected = slice_columns(self.rows)
            if all(np.array_equal(found[name], expected[name]) for name in expected):
                return expected
        raise damaged(folder, "the slices of the cases in `table`", "others")


def open_cache(path: Path | str, *, unfinished: bool = False) -> Cache:
    """Open a cache for reading; needs no write permission. Only its writer opens an `unfinished` one.

    Raises CacheError when there is none at `path`, when it is of another schema version, or not complete.

    Example:
        cache = open_cache("heart.zarr")
        case = cache.case(cache.rows[0].id)
        image_CYX = case.image_ZCYX[3]
    """
    path = Path(path)
    attributes = read_root(path)
    if not (attributes["complete"] or unfinished):
        raise CacheError(
            "The cache is not complete.",
            where=path,
            expected="every case done or listed as failed, and weak labels",
            found="preprocessing still running, or stopped before its end",
            next_step="Run the same `supercl preprocess INPUT CACHE`, or `supercl unpack`, again; it goes on where it "
            "stopped.",
        )
    return Cache(path, attributes)


def read_root(path: Path) -> dict[str, Any]:
    """The attributes of the root of a cache. Raises CacheError where it is none, of another version, or damaged."""
    try:
        is_there = (path / "zarr.json").is_file()
        found = "another folder" if path.is_dir() else "a file" if path.exists() else "nothing"
    except OSError as error:  # a name that is too long, a folder that must not be entered
        is_there, found = False, str(error.strerror)
    if not is_there:
        raise CacheError(
            "There is no cache here.",
            where=path,
            expected="a folder written by `supercl preprocess`",
            found=found,
            next_step="Check the path, or write one with `supercl preprocess INPUT CACHE`.",
        )
    check_version(path)
    return read_attributes(path, "/")


def check_version(path: Path) -> None:
    """Raise CacheError where the root at `path` can be read, and is a packed cache or none of this schema version."""
    try:
        attributes: Any = read_node(path).get("attributes")
    except CacheError:
        return
    ours = attributes.get("supercl") if isinstance(attributes, dict) else None
    if isinstance(ours, dict) and ours.get("form") == ARCHIVE_FORM:
        raise CacheError(
            "The cache is packed.",
            where=path,
            expected="a cache that can be mapped into memory",
            found="an archive",
            next_step=f"Unpack it first: supercl unpack {path} CACHE",
        )
    version = ours.get("schema_version") if isinstance(ours, dict) else None
    if version != SCHEMA_VERSION:
        raise CacheError(
            "This is no cache of supercl." if version is None else "The cache has another schema version.",
            where=path,
            expected=f"version {SCHEMA_VERSION}",
            found="no attributes of supercl" if version is None else f"version {version!r:.20}",
            next_step="Preprocess the data set again into a new cache, or use the version of supercl that wrote it.",
        )
