"""Files and folders that are either whole or absent: written beside their place, then renamed.

Called wherever something of ours reaches the disk. A rename within one folder is atomic on local and on
network file systems; a killed process leaves at most a `.wip` sibling, which the next run replaces.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
        with wip.open("rb") as written:
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
