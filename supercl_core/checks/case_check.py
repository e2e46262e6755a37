"""All that can be checked of one committed case: its files, metadata, checksums, and the values of its arrays.

Shards are read from their files in pieces of a megabyte, so that a case of any size is checked within the caches of a
core, and a file that shrinks meanwhile is damage and no crash. Called by `verification`.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import stat
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np

from supercl_core.cache.cases import CaseRow, case_key, content_digest, shards_digest
from supercl_core.cache.schema import CHECKSUM_BYTES, OME_VERSION
from supercl_core.cache.zarr_files import (
    attributes_of,
    layout_of,
    metadata_digest,
    read_node,
    shard_path,
    shard_sizes,
)
from supercl_core.checks.superpixel_check import count_components
from supercl_core.errors import CacheError
from supercl_core.files import parse_json

PIECE_BYTES: Final = 1 << 20
"""Read at a time, or a single slice: about what lies in a core's cache together with what is made of it."""

LARGEST_REMEMBERED: Final = 1 << 16
"""Characters of metadata that are kept for the next case."""

MOST_PROBLEMS: Final = 10
"""Listed of one shard: a file that is damaged throughout would fill the screen, and one of them is enough."""

Problem = tuple[str, str]
"""A path below the folder that was checked, and what is wrong there."""

NOT_EXPECTED: Final = "not a part of a cache"
MISSING: Final = "missing"


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a case has to agree with: the root of its cache, and its row in the table."""

    config_digest: str
    num_channels: int
    num_classes: int
    row: CaseRow | None
    """None where there is no table to believe."""


@dataclass(frozen=True, kw_only=True)
class CaseReport:
    """What the check of one case gave."""

    problems: tuple[Problem, ...]
    num_slices: int
    num_bytes: int
    """Of all files of the case."""


def check_case(folder: Path, expected: Expected) -> CaseReport:
    """Check everything about the case in `folder`. Raises nothing for what is wrong with it."""
    problems: list[Problem] = []
    files: dict[str, int] = {}
    row = expected.row
    if not folder.is_dir():
        return CaseReport(problems=(("", MISSING),), num_slices=0, num_bytes=0)
    try:
        files = list_files(folder)
        nodes, found = _read_nodes(folder, files)
        problems += found
        own, row, found = _check_metadata(folder, nodes, expected)
        problems += found
        if row is not None:
            problems += compare_names(files, _names(row))
            problems += _check_arrays(folder, files, nodes, own, row, expected.num_classes)
    except OSError as error:
        problems.append((_below(folder, error.filename), f"cannot be read: {error.strerror or error}"))
    except MemoryError:
        problems.append(("", "needs more memory than there is"))
    return CaseReport(
        problems=tuple(problems),
        num_slices=row.shape[1] if row else 0,
        num_bytes=sum(max(size, 0) for size in files.values()),
    )


def list_files(folder: Path) -> dict[str, int]:
    """Size of every file below `folder` by its path there; -1 for what is neither a file nor a folder.

    Links to folders are not followed, and an empty folder counts as a file.
    """
    sizes: dict[str, int] = {}
    folders = [("", os.fspath(folder))]
    while folders:
        prefix, path = folders.pop()
        with os.scandir(path) as entries:
            found = list(entries)
        if not found:
            sizes[prefix.rstrip("/")] = -1
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                folders.append((f"{prefix}{entry.name}/", entry.path))
            else:
                sizes[prefix + entry.name] = _file_bytes(entry)
    return sizes


def compare_names(files: Mapping[str, int], names: Set[str]) -> list[Problem]:
    """Which of the files `names` are missing, and which files are there that should not be, or are no files."""
    missing = [(name, MISSING) for name in sorted(names - files.keys())]
    return missing + [(name, NOT_EXPECTED) for name in sorted(files.keys() - names)]


def located(error: CacheError, folder: Path) -> Problem:
    """Where below `folder` an error of reading a cache lies, and what it says."""
    return _below(folder, error.where), f"expected {error.expected}, found {error.found}"


def _below(folder: Path, where: object) -> str:
    path = Path(str(where))
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(where)


def _file_bytes(entry: os.DirEntry[str]) -> int:
    try:
        status = entry.stat()
    except OSError:  # a link to nowhere
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


# ---------------------------------------------------------------- metadata


_parse_again = functools.lru_cache(maxsize=256)(parse_json)
"""The metadata of arrays and layers repeats from case to case, and parsing it takes as long as checking slices."""


def _parse(text: str) -> Any:
    return _parse_again(text) if len(text) <= LARGEST_REMEMBERED else parse_json(text)


def _read_nodes(folder: Path, files: Mapping[str, int]) -> tuple[dict[str, Any], list[Problem]]:
    """The content of every zarr.json by the path of its node below the case, and what is wrong with the others."""
    nodes, problems = {}, []
    for file in files:
        name = "" if file == "zarr.json" else file.removesuffix("/zarr.json")
        if name != file:
            try:
                nodes[name] = read_node(folder / name, parse=_parse if name else parse_json)
            except CacheError as error:
                problems.append(located(error, folder))
    return nodes, problems


def _check_metadata(
    folder: Path, nodes: Mapping[str, Any], expected: Expected
) -> tuple[dict[str, Any] | None, CaseRow | None, list[Problem]]:
    """Attributes of the case where it has any, the row to check arrays by, and what is wrong with the groups."""
    if "" not in nodes:
        return None, expected.row, []
    try:
        attributes = attributes_of(nodes[""], folder, "cases/{case}")
        row = CaseRow.from_dict(attributes["row"])
    except CacheError as error:
        return None, expected.row, [located(error, folder)]
    except ValueError as error:
        return None, expected.row, [("zarr.json", str(error))]
    problems: list[Problem] = []
    if metadata_digest(nodes) != attributes["metadata_digest"]:
        problems.append(("zarr.json", "the metadata of the case is not what `metadata_digest` was made of"))
    if row.id != folder.name or row.state != "done":
        problems.append(("zarr.json", f"holds the row of another case: {row.id!r}, {row.state}"))
    if row.shape[0] != expected.num_channels:
        problems.append(("zarr.json", f"expected {expected.num_channels} channels, found {row.shape[0]}"))
    if attributes["key"] != case_key(expected.config_digest, row.digest):
        problems.append(("zarr.json", "`key` belongs to other settings or another source"))
    if expected.row is not None and row != expected.row:
        problems.append(("zarr.json", "`row` differs from the row in `table`"))
    for name in _groups(row):
        if name in nodes and _ome_version(nodes[name]) != OME_VERSION:
            problems.append(
                (f"{name}/zarr.json".lstrip("/"), f"expected metadata of OME-NGFF {OME_VERSION}, found none")
            )
    return attributes, row, problems


def _groups(row: CaseRow) -> list[str]:
    """Paths of the groups of a case, below its folder."""
    return ["", "labels", *(f"labels/{spec.name}" for spec in row.arrays() if "/labels/" in spec.path)]


def _ome_version(node: Mapping[str, Any]) -> object:
    attributes = node.get("attributes")
    ome = attributes.get("ome") if isinstance(attributes, dict) else None
    return ome.get("version") if isinstance(ome, dict) else None


def _names(row: CaseRow) -> set[str]:
    """Every file that the case has, and no other one."""
    names = {f"{group}/zarr.json".lstrip("/") for group in _groups(row)}
    for spec in row.arrays():
        names |= {f"{spec.case_path}/zarr.json", shard_path(spec)}
    return names


# ---------------------------------------------------------------- arrays


def _check_arrays(
    folder: Path,
    files: Mapping[str, int],
    nodes: Mapping[str, Any],
    own: Mapping[str, Any] | None,
    row: CaseRow,
    num_classes: int,
) -> Iterator[Problem]:
    """What is wrong with the arrays of a case whose row is `row`; `own` are its attributes where they can be read."""
    checksums: dict[str, np.ndarray] = {}
    sizes = shard_sizes(row)
    for spec in row.arrays():
        path = spec.case_path
        shape, dtype = row.layout(spec.name)
        if path in nodes:
            try:
                found_shape, found_dtype = layout_of(nodes[path], folder / path, spec)
            except CacheError as error:
                yield located(error, folder)
            else:
                if (found_shape, found_dtype) != (shape, dtype):
                    found = f"{found_dtype.name} {found_shape}"
                    yield f"{path}/zarr.json", f"expected {dtype.name} {shape}, found {found}"
        shard = shard_path(spec)
        if shard not in files:
            continue
        if files[shard] != sizes[shard]:
            found = f"{files[shard]:,}" if files[shard] >= 0 else "no file"
            yield shard, f"expected {sizes[shard]:,} bytes, found {found}"
            continue
        reader = _Shard(folder / shard, row, spec.name, num_classes)
        wrong = list(itertools.islice(reader.check(), MOST_PROBLEMS + 1))
        yield from ((shard, problem) for problem in wrong[:MOST_PROBLEMS])
        if len(wrong) > MOST_PROBLEMS:
            yield shard, "and more: the rest of the file was not looked at"
        if not wrong:
            checksums[spec.name] = reader.checksums
    if len(checksums) == len(row.arrays()):
        if own is not None and shards_digest(checksums) != own["shards_digest"]:
            yield "zarr.json", "`shards_digest` is not that of the arrays"
        elif content_digest(row, checksums) != row.content_digest:
            yield "zarr.json", "`content_digest` is not that of the arrays"


class _Shard:
    """One shard, read from its beginning to its end."""

    def __init__(self, file: Path, row: CaseRow, name: str, num_classes: int) -> None:
        self._file, self._row, self._name, self._num_classes = file, row, name, num_classes
        self._shape, self._dtype = row.slice_layout(name)
        self._most_ids = 0
        self.checksums = np.zeros(row.shape[1], "<u4")
        """As stored behind each slice."""

    def check(self) -> Iterator[str]:
        """Yield every problem."""
        num_slices, step = self._row.shape[1], math.prod(self._shape) * self._dtype.itemsize + CHECKSUM_BYTES
        num_at_once = min(max(1, PIECE_BYTES // step), num_slices)
        buffer = np.empty((num_at_once, step), np.uint8)
        index = np.empty((num_slices, 2), "<u8")
        index[:, 0], index[:, 1] = np.arange(num_slices) * step, step
        checksum = google_crc32c.value(index).to_bytes(CHECKSUM_BYTES, "little")
        num_wrong = 0
        with self._file.open("rb") as shard:
            for first in range(0, num_slices, num_at_once):
                piece = buffer[: num_slices - first]
                if shard.readinto(piece.data) != piece.nbytes:
                    yield "ends before its last slice"
                    return
                for problem in self._check_piece(piece, first):
                    num_wrong += 1
                    yield problem
            rest = shard.read(index.nbytes + CHECKSUM_BYTES + 1)
        if rest != index.tobytes() + checksum:
            yield "the index is not that of slices in order, or does not fit its checksum"
        if self._name == "superpixels" and not num_wrong and self._most_ids != self._row.num_superpixels:
            yield f"expected {self._row.num_superpixels} superpixels at most in a slice, found {self._most_ids}"

    def _check_piece(self, piece: np.ndarray, first: int) -> Iterator[str]:
        """`piece`: uint8 (n, bytes of a slice and its checksum), of which the first one is slice `first`."""
        content = piece[:, :-CHECKSUM_BYTES]
        stored = np.ascontiguousarray(piece[:, -CHECKSUM_BYTES:]).view("<u4")[:, 0]
        self.checksums[first : first + len(piece)] = stored
        computed = np.array([google_crc32c.value(slice_) for slice_ in content], np.uint32)
        if not np.array_equal(computed, stored):
            for index in _true(computed != stored):
                yield f"slice {first + index}: the content does not fit its checksum"
            return
        values = content.view(self._dtype).reshape(-1, *self._shape)
        with np.errstate(invalid="ignore"):  # a NaN that signals
            for index, problem in self._wrong_values(values):
                yield f"slice {first + index}: {problem}"

    def _wrong_values(self, values: np.ndarray) -> Iterator[tuple[int, str]]:
        """Slices whose values are not what the schema says."""
        match self._name:
            case "superpixels":
                yield from self._wrong_superpixels(np.ascontiguousarray(values))
                return
            case "image" if values.dtype.kind != "f":
                return
            case "image":
                good, problem = np.isfinite(values), "a value that is no finite number"
            case "ground_truth":
                good, problem = values < self._num_classes, f"a class above {self._num_classes - 1}"
            case _:
                good, problem = (values >= 0) & (values <= 1), "a value outside 0..1"
        for index in _true(~good.all(axis=tuple(range(1, values.ndim)))):
            yield index, problem

    def _wrong_superpixels(self, superpixels_ZYX: np.ndarray) -> Iterator[tuple[int, str]]:
        largest_Z = superpixels_ZYX.max(axis=(1, 2))
        # Counts are made for every id up to the largest: one that no gapless numbering has must not ask for memory.
        too_large_Z = largest_Z >= min(superpixels_ZYX[0].size, self._row.num_superpixels)
        if too_large_Z.any():
            for index in _true(too_large_Z):
                yield (
                    index,
                    f"superpixel {largest_Z[index]}, where there are {self._row.num_superpixels} at most",
                )
            return
        self._most_ids = max(self._most_ids, int(largest_Z.max()) + 1)
        counts = count_components(superpixels_ZYX)
        wrong = counts != (np.arange(counts.shape[1]) <= largest_Z[:, None])
        for index in _true(wrong.any(axis=1)):
            number = int(wrong[index].argmax())
            count = counts[index, number]
            yield index, f"superpixel {number} {'is missing' if not count else f'is in {count} pieces'}"


def _true(flags: np.ndarray) -> list[int]:
    """Indices of the true ones."""
    indices: list[int] = np.flatnonzero(flags).tolist()
    return indices
