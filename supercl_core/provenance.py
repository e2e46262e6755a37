"""Where a result comes from: versions, commit, machine, time and command line.

The record goes into one attribute of a cache or run. It is the only part that varies between two otherwise
identical runs, so comparisons of bytes leave it out.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = (
    "supercl",
    "numpy",
    "zarr",
    "SimpleITK",
    "scikit-image",
    "numba",
    "dask",
    "torch",
    "monai",
)


def record() -> dict[str, Any]:
    """The provenance of what is being written now: plain values that JSON can hold."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on; packages not installed are left out."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the source tree this runs from, with `+changes` where the tree differs; None outside git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    finished = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return finished.stdout.strip()
