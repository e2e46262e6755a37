"""What a cache holds and whether its files were touched: for the tests of preprocessing and for `stress.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from re import fullmatch

Stamps = dict[Path, tuple[int, int]]
"""Inode and time of change (ns) of files."""


def content(cache_path: Path) -> dict[str, bytes]:
    """Every file of a cache by its path below it, but for what varies from run to run; empty folders end in `/`.

    Left out are the attributes `provenance` of the root, of every case and of every set over slices, which must be
    there.
    """
    found = {}
    for entry in sorted(cache_path.rglob("*")):
        name = entry.relative_to(cache_path).as_posix()
        if entry.is_file():
            found[name] = entry.read_bytes()
        elif not any(entry.iterdir()):
            found[f"{name}/"] = b""
    for name in found:
        if name == "zarr.json" or fullmatch("(cases|descriptors|weak_labels)/[^/]+/zarr.json", name):
            node = json.loads(found[name])
            del node["attributes"]["supercl"]["provenance"]
            found[name] = json.dumps(node).encode()
    return found


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """What is different between what `content` gave for two caches, a line for every file."""
    missing = [f"{name} is missing" for name in expected if name not in found]
    foreign = [f"{name} is foreign" for name in found if name not in expected]
    return [
        *missing,
        *foreign,
        *(f"{name} differs" for name in found if expected.get(name, found[name]) != found[name]),
    ]


def stamps(folders: Iterable[Path]) -> Stamps:
    """Inode and time of change of every file below some folders."""
    found = {}
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file():
                stat = file.stat()
                found[file] = (stat.st_ino, stat.st_mtime_ns)
    return found


def changed_cases(before: Stamps) -> set[str]:
    """Cases of which a file is not the one that it was."""
    changed = set()
    for file, stamp in before.items():
        stat = file.stat() if file.is_file() else None
        if stat is None or (stat.st_ino, stat.st_mtime_ns) != stamp:
            changed.add(str(file).partition("/cases/")[2].split("/")[0])
    return changed
