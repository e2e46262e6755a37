"""What a cache and an archive have beside their cases: the root, the tables, descriptors and weak labels.

They are the same files in both forms, but for one attribute of the root that tells them apart. Called by `forms`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from supercl_core.archive.case import check_seal
from supercl_core.archive.files import Files, no_archive
from supercl_core.cache.cases import CaseRow, case_id_problem
from supercl_core.cache.reader import Cache
from supercl_core.cache.schema import (
    ARCHIVE_FORM,
    CHECKSUM_BYTES,
    SCHEMA_VERSION,
    SETS,
    SLICE_ARRAYS,
    TABLE_ARRAYS,
    ArraySpec,
)
from supercl_core.cache.zarr_files import (
    attributes_of,
    chunk_path,
    damaged,
    fits_checksum,
    layout_of,
    node_text,
)
from supercl_core.errors import CacheError

TABLES: Final = ("table", "slices", *SETS)
"""The groups beside `cases`."""


def archive_attributes(files: Files) -> dict[str, Any]:
    """The attributes that the root of the archived cache has. Raises CacheError where there is no sound archive."""
    try:
        root = files.node("")
        attributes = attributes_of(root, files.path, "/")
        if attributes.pop("form", None) != ARCHIVE_FORM:
            raise damaged(files.path, "an archive written by `supercl pack`", "a cache, or something else")
        if attributes["schema_version"] != SCHEMA_VERSION:
            raise damaged(files.path, f"schema version {SCHEMA_VERSION}", attributes["schema_version"])
        if root["attributes"].keys() != {"supercl"} or not attributes["complete"]:
            raise damaged(files.path, "the attributes of a complete cache", "others")
        check_seal(files.path, {"": root})
    except CacheError as error:
        raise no_archive(files.path, f"expected {error.expected}, found {error.found}") from error
    return attributes


def table_files(files: Files) -> Iterator[tuple[str, bytes]]:
    """Name and content, checked, of every file of the groups beside `cases`; they are the same in both forms."""
    groups: dict[str, tuple[ArraySpec, ...]] = {"table": TABLE_ARRAYS, "slices": SLICE_ARRAYS}
    for group, specs in SETS.items():
        groups[group] = ()
        for name in files.groups(group):
            if problem := case_id_problem(name):
                raise damaged(files.path / group, "names of sets", f"{name[:200]!r}, which {problem}")
            groups[f"{group}/{name}"] = specs
    for group, specs in groups.items():
        node = files.node(group)
        if node.keys() != {"attributes", "zarr_format", "node_type"} or node["node_type"] != "group":
            raise damaged(files.path / group / "zarr.json", "the metadata of a group", "others")
        yield f"{group}/zarr.json", node_text(node)
        for spec in specs:
            name = f"{group}/{spec.name}"
            node = files.node(name)
            shape, dtype = layout_of(node, files.path / name, spec)
            yield f"{name}/zarr.json", node_text(node)
            file = chunk_path(Path(name), len(shape)).as_posix()
            size = math.prod(shape) * dtype.itemsize + CHECKSUM_BYTES
            content = files.read(file, limit_bytes=size)
            if len(content) != size or not fits_checksum(content):
                raise damaged(files.path / file, f"{size:,} bytes that fit their checksum", "other content")
            yield file, content


def write_tables(files: Files, folder: Path) -> None:
    for name, content in table_files(files):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def checked_rows(folder: Path, attributes: dict[str, Any]) -> list[CaseRow]:
    """The rows of the cases that are done, from tables, descriptors and weak labels that are checked altogether."""
    cache = Cache(folder, attributes)
    cache.weak_labels()
    for group, read in (("weak_labels", cache.weak_labels), ("descriptors", cache.descriptors)):
        for name in cache.set_names(group):
            if not cache.is_stale(group, name):
                read(name)
    return cache.done


def check_known(folder: Path) -> None:
    """Raise CacheError where a cache, or the archive that grows in its place, holds what would be lost."""
    known = {"zarr.json", "cases", *TABLES}
    if unknown := sorted({entry.name for entry in folder.iterdir()} - known):
        raise CacheError(
            "The folder holds something that is no part of a cache.",
            where=folder,
            expected=", ".join(sorted(known)),
            found=", ".join(name[:80] for name in unknown[:5]),
            next_step="Move it elsewhere.",
        )
