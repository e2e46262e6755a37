"""Files that are whole or absent when written, and that can do no harm when read.

Writing goes beside the place, then renames: atomic within one folder on local and on network file systems; a killed
process leaves at most a `.wip` sibling, which the next run replaces. Reading text, JSON or TOML takes nothing but
regular files of a bounded size, and gives nothing but values that the rest of the project can handle; whatever else
is there raises ValueError or OSError with one line of reason, which callers turn into an error of their own.
Called wherever something of ours reaches the disk or comes from it, volumes and the cache's arrays excepted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

DEEPEST: Final = 50
"""Levels of nesting at most in what is read, far from where Python's recursion ends."""


def wip_path(path: Path) -> Path:
    """The sibling under which `path` is written before it is complete."""
    return path.with_name(path.name + ".wip")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a sibling path to write to; it replaces `path` on success and vanishes on an error.

    The sibling keeps the suffix of `path`, since image writers choose the format by it.
    """
    wip = path.with_name(f".wip_{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield wip
        with wip.open("r+b") as written:  # Windows syncs nothing that is open for reading only
            os.fsync(written.fileno())  # a rename may reach the disk before the content it names
        wip.replace(path)
    finally:
        wip.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path) as wip:
        wip.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Not-a-number values are refused: JSON has none (use null)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def replace_folder(wip: Path, path: Path) -> None:
    """Move the finished folder `wip` to `path`, replacing an older folder of that name.

    The older one waits beside `wip`, where the next run removes it: a process killed between the two renames must
    leave nothing foreign beside `path`.
    """
    if path.exists():
        old = wip.with_name(f".old_{path.name}")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        wip.rename(path)
        shutil.rmtree(old)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        wip.rename(path)


def sync() -> None:
    """Have what was written so far on the disk, where the system can (Windows cannot)."""
    if hasattr(os, "sync"):
        os.sync()


def digest_of(paths: Iterable[Path], prefix: bytes = b"") -> str:
    """SHA-256 (hex) over `prefix` and the SHA-256 of each file, in order. Raises OSError where one cannot be read."""
    total = hashlib.sha256(prefix)
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def read_text(path: Path, *, limit_bytes: int) -> str:
    """The text of a regular UTF-8 file of at most `limit_bytes`; a byte order mark is left out.

    Raises OSError where the file cannot be opened, and ValueError for a pipe, a device or a folder, for a larger file
    and for other bytes than UTF-8.
    """
    with open(path, "rb", opener=without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        content = file.read(
            min(status.st_size, limit_bytes) + 1
        )  # as much memory as is asked for is taken at once
    if len(content) > limit_bytes:
        raise ValueError(f"a file of more than {limit_bytes:,} bytes")
    return content.decode("utf-8-sig")


def read_json(path: Path, *, limit_bytes: int) -> Any:
    """The value in a JSON file of at most `limit_bytes`. Raises as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, limit_bytes=limit_bytes))


def read_toml(path: Path, *, limit_bytes: int) -> dict[str, Any]:
    """The table in a TOML file of at most `limit_bytes`. Raises as `read_text` and `parse_toml` do."""
    return parse_toml(read_text(path, limit_bytes=limit_bytes))


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError for bad JSON and for what is legal in a text but not safe in a program: keys that appear twice,
    nesting below `DEEPEST` levels, integers beyond 64 bits, NaN and infinities, and texts that are no Unicode or hold
    the character NUL.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from None
    check_plain(value)
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML text. Raises ValueError as `parse_json` does; NaN and infinities are refused too."""
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from None
    check_plain(table)
    return table


def check_plain(value: Any, levels: int = DEEPEST) -> None:
    """Raise ValueError for what no `parse_json` gives, anywhere in `value` (of dicts, lists, texts and numbers)."""
    if levels == 0 and isinstance(value, dict | list):
        raise ValueError(f"nested deeper than {DEEPEST} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(key, levels)
            check_plain(item, levels - 1)
    elif isinstance(value, list):
        for item in value:
            check_plain(item, levels - 1)
    elif isinstance(value, str):
        if "\0" in value:
            raise ValueError("a text with the character NUL")
        value.encode()  # half of a surrogate pair is no text
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        raise ValueError("an integer of more than 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the number {value}")


def without_waiting(path: str | Path, flags: int) -> int:
    """Open a file as `os.open` does, for the built-in `open`; a pipe without a writer would block for ever."""
    # Windows has no pipes among its files, and two kinds of files.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text, for `json.loads`. Raises ValueError for a key that appears twice."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key[:80]!r} appears twice")
        values[key] = value
    return values
