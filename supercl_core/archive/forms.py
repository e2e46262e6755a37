"""The two forms of a cache: mapped, for training, and the archive, compressed, for object stores and for keeping.

An archive is the same Zarr group as the cache, with the same nodes and attributes; only the slices of cases are
compressed (`supercl_core.archive.case`). Cases are written beside their place and committed by a rename, so that a run
which was killed goes on with the others. Called by `supercl pack` and `supercl unpack`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supercl_core.archive.case import check_seal, convert_case, is_packed, is_unpacked
from supercl_core.archive.files import Files, no_archive, open_files, write_node, write_zip
from supercl_core.archive.root import (
    TABLES,
    archive_attributes,
    check_known,
    checked_rows,
    table_files,
    write_tables,
)
from supercl_core.cache.cases import CaseRow
from supercl_core.cache.reader import open_cache
from supercl_core.cache.schema import ARCHIVE_FORM
from supercl_core.cache.writer import create_cache, remove_cases, set_root_attributes
from supercl_core.cache.zarr_files import attributes_of, shard_sizes
from supercl_core.errors import CacheError, StorageError, UsageError, storage_error
from supercl_core.files import replace_folder, sync, wip_path
from supercl_core.locks import check_lock, hold
from supercl_core.progress import progress


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What packing or unpacking left behind."""

    num_cases: int
    num_kept: int
    """Cases that an earlier run had finished."""
    cache_bytes: int
    """Of the arrays of all cases, as the cache stores them."""
    archive_bytes: int
    """Of the whole archive."""


def pack(cache_path: Path, archive_path: Path, *, num_workers: int) -> Conversion:
    """Write a complete cache as an archive: a folder, or one file where the name ends in `.zip`.

    The cache is only read, by `num_workers` threads. Run again after a stop, it goes on with the cases that
    `ARCHIVE.wip` does not have yet; where the archive is there and holds this cache, nothing is done.

    Raises CacheError where the cache is not complete, changes meanwhile, or is damaged (after packing all other
    cases), where another process packs to the same place, and where something else lies there; StorageError where
    the disk is full.
    """
    cache_path, archive_path = cache_path.resolve(), archive_path.resolve()
    _check_apart(cache_path, archive_path)
    rows = open_cache(cache_path).done
    check_known(cache_path)
    files = Files(cache_path)
    root = files.node("")
    check_seal(cache_path, {"": root})
    packed_root = {
        **root,
        "attributes": {"supercl": {**root["attributes"]["supercl"], "form": ARCHIVE_FORM}},
    }
    wip = wip_path(archive_path)
    with hold(wip) as token:
        if archive_path.exists():
            if not _is_archive_of(archive_path, packed_root, files, rows):
                raise _something_else(archive_path, "the archive of this cache")
            shutil.rmtree(wip, ignore_errors=True)
            return _conversion(rows, len(rows), archive_path)
        (wip / "cases").mkdir(parents=True, exist_ok=True)
        check_known(wip)
        remove_cases(wip, keep={row.id for row in rows})
        num_kept, damages = _convert_cases(files, rows, wip, token, packing=True, num_workers=num_workers)
        if damages:
            raise _damaged_cases(
                damages,
                f"of {len(rows):,} cases of the cache are damaged; the others are packed",
                cache_path,
                f"supercl repair {cache_path}, then run the same command again: it goes on with these cases.",
            )
        _place_tables(files, wip, token)
        write_node(wip / "cases", files.node("cases"))
        write_node(wip, packed_root)
        if files.node("") != root:
            raise CacheError(
                "The cache was changed while it was packed.",
                where=cache_path,
                next_step="Run the same command again once nothing writes to it.",
            )
        _commit_archive(wip, archive_path, token)
    return _conversion(rows, num_kept, archive_path)


def unpack(archive_path: Path, cache_path: Path, *, num_workers: int) -> Conversion:
    """Write the cache that an archive holds, equal in every byte to the one that was packed, by `num_workers` threads.

    Run again after a stop, it goes on with the cases that the cache does not have yet; where the cache is there and
    complete, nothing is done.

    Raises CacheError where the archive is damaged (after unpacking all other cases), where another process changes the
    cache, and where something else lies at its place; StorageError where the disk has too little room.
    """
    cache_path, archive_path = cache_path.resolve(), archive_path.resolve()
    _check_apart(archive_path, cache_path)
    with open_files(archive_path) as files:
        attributes = archive_attributes(files)
        with hold(cache_path) as token:
            stage = wip_path(cache_path) / token / "tables"
            try:
                write_tables(files, stage)
                rows = checked_rows(stage, attributes)
            except CacheError as error:
                raise no_archive(archive_path, _problem(error)) from error
            if _is_new(cache_path, attributes):
                _check_room(cache_path, rows)
                create_cache(cache_path, attributes)
            elif _is_whole(cache_path, files, rows):
                return _conversion(rows, len(rows), archive_path)
            else:
                set_root_attributes(cache_path, {"complete": False})
            num_kept, damages = _convert_cases(
                files, rows, cache_path, token, packing=False, num_workers=num_workers
            )
            if damages:
                raise _damaged_cases(
                    damages,
                    f"of {len(rows):,} cases of the archive are damaged; the others are unpacked",
                    archive_path,
                    "Unpack a sound copy of the archive to the same place, or compute what is missing: "
                    f"supercl preprocess INPUT {cache_path}",
                )
            _place_tables(files, cache_path, token)
            sync()  # no case may be less durable than the word that all are there
            set_root_attributes(cache_path, {"complete": True})
    return _conversion(rows, num_kept, archive_path)


def _convert_cases(
    files: Files, rows: Sequence[CaseRow], place: Path, token: str, *, packing: bool, num_workers: int
) -> tuple[int, dict[str, CacheError]]:
    """Write those cases of `files` that are not there yet below `place`, whose lock has the token `token`.

    Returns how many were there, and what is wrong with those that could not be read.
    """
    stage = wip_path(place) / token / "cases"
    is_there = is_packed if packing else is_unpacked

    def convert(row: CaseRow) -> bool:
        kept = is_there(place, files, row)
        if not kept:
            convert_case(files, row, stage / row.id, packing=packing)
        return kept

    num_done = num_kept = num_bytes = 0
    damages: dict[str, CacheError] = {}
    start = time.monotonic()
    title = "pack" if packing else "unpack"
    with ThreadPoolExecutor(num_workers) as pool, progress(title, total=len(rows), unit="cases") as advance:
        futures = {pool.submit(convert, row): row for row in rows}
        try:
            for future in as_completed(futures):
                row = futures[future]
                try:
                    kept = future.result()
                except CacheError as error:
                    damages[row.id] = error
                else:
                    if not kept:
                        check_lock(place, token)
                        replace_folder(stage / row.id, place / "cases" / row.id)
                        num_bytes += sum(shard_sizes(row).values())
                    num_kept += kept
                    num_done += 1
                advance(note=f"{num_bytes / 1e6 / (time.monotonic() - start):.0f} MB/s")
        except OSError as error:
            saved = f"{num_done} of {len(rows)} cases are done, and kept"
            raise storage_error(error, where=place).with_saved(saved) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return num_kept, damages


def _place_tables(files: Files, place: Path, token: str) -> None:
    """Put the groups beside `cases` below `place`, whose lock has the token `token`."""
    stage = wip_path(place) / token / "tables"
    write_tables(files, stage)
    check_lock(place, token)
    for name in TABLES:
        replace_folder(stage / name, place / name)


def _commit_archive(wip: Path, archive_path: Path, token: str) -> None:
    if archive_path.suffix.lower() == ".zip":
        file = wip_path(wip) / token / archive_path.name
        write_zip(file, wip)
        check_lock(wip, token)
        file.rename(archive_path)
        shutil.rmtree(wip)
    else:
        sync()  # no case may be less durable than the name of the whole
        check_lock(wip, token)
        wip.rename(archive_path)


def _is_archive_of(path: Path, root: dict[str, Any], files: Files, rows: Sequence[CaseRow]) -> bool:
    """Whether the archive at `path` holds the cache `files`, by all metadata, digests and tables."""
    try:
        with open_files(path) as archive:
            return (
                archive.node("") == root
                and all(archive.node(f"cases/{row.id}") == files.node(f"cases/{row.id}") for row in rows)
                and _same_tables(archive, files)
            )
    except CacheError:
        return False


def _is_whole(cache_path: Path, files: Files, rows: Sequence[CaseRow]) -> bool:
    """Whether the cache is marked complete and has all that the archive holds, by metadata, digests and tables."""
    try:
        open_cache(cache_path)
        return _same_tables(Files(cache_path), files) and all(
            is_unpacked(cache_path, files, row) for row in rows
        )
    except CacheError:
        return False


def _same_tables(one: Files, other: Files) -> bool:
    return dict(table_files(one)) == dict(table_files(other))


def _is_new(cache_path: Path, attributes: Mapping[str, Any]) -> bool:
    """Whether the cache to be has no root yet. Raises CacheError where something else lies there."""
    if not cache_path.exists():
        return True
    names = {entry.name for entry in cache_path.iterdir()} if cache_path.is_dir() else {""}
    if names <= {"cases"} and {entry.name for entry in cache_path.glob("cases/*")} <= {"zarr.json"}:
        return True  # empty, or what is there when `create_cache` was killed
    vary = {"complete": None, "metadata_digest": None}
    try:
        found = attributes_of(Files(cache_path).node(""), cache_path, "/")
    except CacheError:
        found = {}
    if {**found, **vary} != {**attributes, **vary}:
        raise _something_else(cache_path, "the cache that this archive holds")
    return False


def _check_apart(source: Path, target: Path) -> None:
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise UsageError(
            "Cache and archive lie in each other.",
            where=target,
            next_step=f"Name a place outside of {source}.",
        )


def _check_room(path: Path, rows: Sequence[CaseRow]) -> None:
    """Raise StorageError where the disk has no room for these cases: a small archive may declare a vast cache."""
    needed = sum(sum(shard_sizes(row).values()) for row in rows)
    disk = shutil.disk_usage(path.parent)
    if disk.total > 0 and disk.free < needed:  # some file systems do not say
        raise StorageError(
            "The disk has too little room for the cache.",
            where=path,
            expected=f"{needed / 1e9:,.1f} GB",
            found=f"{disk.free / 1e9:,.1f} GB",
            next_step="Free some space, or name another place.",
        )


def _conversion(rows: Sequence[CaseRow], num_kept: int, archive_path: Path) -> Conversion:
    files = archive_path.rglob("*") if archive_path.is_dir() else [archive_path]
    return Conversion(
        num_cases=len(rows),
        num_kept=num_kept,
        cache_bytes=sum(sum(shard_sizes(row).values()) for row in rows),
        archive_bytes=sum(file.stat().st_size for file in files if file.is_file()),
    )


def _something_else(path: Path, expected: str) -> CacheError:
    return CacheError(
        "There is something else here already.",
        where=path,
        expected=f"nothing, or {expected}",
        found="another content",
        next_step="Name another path, or remove it.",
    )


def _damaged_cases(damages: Mapping[str, CacheError], what: str, where: Path, next_step: str) -> CacheError:
    lines = [f"\n    {case_id}: {_problem(error)}" for case_id, error in sorted(damages.items())]
    return CacheError(f"{len(damages):,} {what}.", where=where, found="".join(lines), next_step=next_step)


def _problem(error: CacheError) -> str:
    return f"{error.where}: expected {error.expected}, found {error.found}"
