"""What figures were measured with, for the first line of a benchmark and the keys of its JSON."""

from __future__ import annotations

import os
import platform
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """Processor, number of cores, and versions of Python and of the named installed packages."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def conditions(data: Path, *packages: str, quick: bool) -> dict[str, Any]:
    """What a benchmark was run with: the machine, the data set and whether it was a quick run."""
    return {**machine(*packages), "data": data.resolve().name, "quick": quick}


def as_text(values: dict[str, Any]) -> str:
    """Such values as one line for people."""
    return ", ".join(f"{key} {value}" for key, value in values.items())


def peak_bytes() -> int:
    """The most memory that this process ever held."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peak = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return peak[0] if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
