"""How many cores and how much memory this process may use, and what limits them.

A container or a job of a scheduler often gets a part of its machine: by the cores that it is bound to, or by a quota of
its control group (cgroup, version 1 or 2), which Python's own counts leave out. What a system does not tell is left
out here too. Called by `supercl doctor` and by what starts workers or threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_CGROUPS: Final = Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Cores that this process may use: the least of `core_limits`, rounded up."""
    return math.ceil(min(core_limits().values()))


def core_limits() -> dict[str, float]:
    """Cores that the `machine` has, and where they are limited, that `affinity` and `cgroup` allow, maybe in parts."""
    limits: dict[str, float] = {"machine": os.cpu_count() or 1}
    if hasattr(os, "sched_getaffinity"):
        limits["affinity"] = len(os.sched_getaffinity(0))
    texts = _cgroup_texts("cpu", ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    quotas = [int(words[0]) / int(words[1]) for words in map(str.split, texts) if words[0].isdecimal()]
    return {**limits, "cgroup": min(quotas)} if quotas else limits


def memory_limits() -> dict[str, int]:
    """Bytes that the `machine` has, that are `available` without swapping, and that a `cgroup` allows, if known."""
    limits = {}
    if hasattr(os, "sysconf"):
        limits["machine"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _text(_PROC / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            limits["available"] = int(line.split()[1]) * 1024
    texts = _cgroup_texts("memory", ("memory.max",), ("memory.limit_in_bytes",))
    allowed = [int(text) for text in texts if text.isdecimal()]
    # Version 1 says "no limit" by a number beyond all memory.
    allowed = [limit for limit in allowed if limit < limits.get("machine", math.inf)]
    return {**limits, "cgroup": min(allowed)} if allowed else limits


def _cgroup_texts(controller: str, names: tuple[str, ...], names_v1: tuple[str, ...]) -> Iterator[str]:
    """What a controller's files say, in one line, of this process's group and of each group around it."""
    for line in _text(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # In a container the path may be one of the host, of which nothing but the root is there.
        root = _CGROUPS / controllers
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            texts = [_text(place / name) for name in (names_v1 if controllers else names)]
            if all(texts):
                yield " ".join(texts)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
