"""`supercl doctor`: what this machine and this installation have, and what keeps which command from running well.

Nothing is changed: a file of 32 MiB is written to a folder to see how fast that is, and removed. A half that is not
installed is no problem, since a node often needs only one. Facts are gathered first; `problems` judges them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from supercl_core.cli import COMMANDS
from supercl_core.errors import storage_error
from supercl_core.machine import core_limits, memory_limits, num_cores

if TYPE_CHECKING:
    from packaging.requirements import Requirement

LEAST_BYTES: Final = 1_000_000_000
"""Of free disk and of memory, below which even a small data set is at risk. Our choice."""

WRITTEN_BYTES: Final = 32 << 20

_EXTRAS: Final = {
    "core": ["every command"],
    **{
        extra: [name for name, entry in COMMANDS.items() if entry.extra == extra]
        for extra in ("preprocess", "train")
    },
    "slurm": ["preprocess --slurm"],
    "index": ["weak-labels --search approximate"],
    "backbones": ["--set backbone=..."],
    "hdf5": ["preprocess of .h5 files"],
    "export": ["export --to onnx"],
}
"""What needs the packages of each extra; `core` are those without one."""


def examine(folder: Path) -> dict[str, Any]:
    """The facts, as values that JSON can hold; sizes are in bytes, and what the system does not tell is left out.

    `cores` and `memory` are those of `supercl_core.machine`. `folder`: `free_bytes`, and either `write_bytes_per_s` or
    the `refusal` of the system. `extras`: for each its `commands`, the packages `missing` and `too_old`, and how to
    `install` it. `torch`: None where it is not installed, the `failure` to load it, or its `threads` and `devices`, and
    the `refusal` where it cannot use them.
    """
    versions, extras = _installation()
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": {**core_limits(), "usable": num_cores()},
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "memory": memory_limits(),
        "folder": _folder(folder.resolve()),
        "has_nvidia_driver": shutil.which("nvidia-smi") is not None,
        "torch": _torch() if "torch" in versions else None,
        "extras": extras,
        "versions": versions,
    }


def problems(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with what `examine` found, each with what to do about it."""
    if not facts["versions"]:
        yield "SuperCL is not installed here", "in its folder: pip install '.[preprocess,train]'"
    for name, extra in facts["extras"].items():
        if extra["too_old"] or (name == "core" and extra["missing"]):
            yield f"{name} lacks {', '.join(extra['missing'] + extra['too_old'])}", extra["install"]
    torch, usable = facts["torch"] or {}, facts["cores"]["usable"]
    if "failure" in torch:
        yield (
            f"torch cannot be loaded: {torch['failure']}",
            "install it again: pip install --force-reinstall torch",
        )
    elif "refusal" in torch:
        yield (
            f"torch cannot use the GPU of this machine: {torch['refusal']}",
            "see nvidia-smi, the driver and CUDA_VISIBLE_DEVICES",
        )
    elif torch and not torch["devices"] and facts["has_nvidia_driver"]:
        yield (
            "torch does not see the GPU of this machine",
            "install a build for its driver, or see CUDA_VISIBLE_DEVICES",
        )
    if torch.get("threads", 0) > usable:
        yield (
            f"training on the CPU starts {torch['threads']} threads, and may use {usable} cores",
            f"export OMP_NUM_THREADS={usable}",
        )
    if facts["memory"] and (least := min(facts["memory"].values())) < LEAST_BYTES:
        yield f"{_size(least)} of memory can be used", "end other work, or ask for more"
    folder = facts["folder"]
    if folder["free_bytes"] < LEAST_BYTES:
        yield (
            f"{_size(folder['free_bytes'])} are free in {folder['path']}",
            "free some space, or use another disk",
        )
    if "refusal" in folder:
        yield (
            f"{folder['path']} cannot be written to: {folder['refusal']}",
            "caches and runs need another folder",
        )


def rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts for people, as names and texts, with the problems first."""
    cores, folder, torch = facts["cores"], facts["folder"], facts["torch"]
    limits = [f"{name} {cores[name]:g}" for name in ("affinity", "cgroup") if name in cores]
    threads = facts["omp_num_threads"]
    found = [("problem", f"{what}; {next_step}") for what, next_step in problems(facts)]
    found += [
        ("system", f"{facts['platform']}, Python {facts['python']}"),
        (
            "cores",
            f"{cores['usable']} of {cores['machine']}{''.join(f', {limit}' for limit in limits)}; OMP_NUM_THREADS "
            f"{'is not set' if threads is None else f'is {threads}'}",
        ),
        (
            "memory",
            ", ".join(f"{name} {_size(size)}" for name, size in facts["memory"].items()) or "not known",
        ),
        (
            "folder",
            f"{folder['path']}: {_size(folder['free_bytes'])} free, "
            + (
                f"writes {_size(folder['write_bytes_per_s'])}/s"
                if "refusal" not in folder
                else "cannot be written to"
            ),
        ),
    ]
    if torch is not None:
        devices = [f"{one['name']} ({_size(one['memory_bytes'])})" for one in torch.get("devices", ())]
        found.append(("devices", ", ".join(devices) or "no GPU: training runs on the CPU"))
    for name, extra in facts["extras"].items():
        lacking = ", ".join(extra["missing"] + extra["too_old"])
        state = f"lacks {lacking}: {extra['install']}" if lacking else "ready"
        found.append((name, f"{state} ({', '.join(extra['commands'])})"))
    return [
        *found,
        ("versions", ", ".join(" ".join(pair) for pair in facts["versions"].items()) or "not known"),
    ]


def _folder(path: Path) -> dict[str, Any]:
    found = {"path": str(path), "free_bytes": shutil.disk_usage(path).free}
    try:
        return {**found, "write_bytes_per_s": round(_write_speed(path))}
    except OSError as error:
        return {**found, "refusal": str(storage_error(error).found)}


def _write_speed(path: Path) -> float:
    """Bytes a second that reach the disk of a folder."""
    block = os.urandom(1 << 20)  # some disks compress
    with tempfile.TemporaryFile(dir=path) as file:
        start = time.perf_counter()
        for _ in range(WRITTEN_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN_BYTES / (time.perf_counter() - start)


def _installation() -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Versions of what is installed of all that SuperCL declares, and the extras; both empty where it is not itself."""
    from packaging.requirements import Requirement

    try:
        versions = {"supercl": importlib.metadata.version("supercl")}
        declared = [Requirement(text) for text in importlib.metadata.requires("supercl") or ()]
    except importlib.metadata.PackageNotFoundError:
        return {}, {}
    extras = {}
    for extra, commands in _EXTRAS.items():
        missing, too_old = [], []
        for package in declared:
            if not _needs(extra, package) or (extra != "core" and _needs("core", package)):
                continue
            try:
                versions[package.name] = importlib.metadata.version(package.name)
            except importlib.metadata.PackageNotFoundError:
                missing.append(package.name)
            else:
                if not package.specifier.contains(versions[package.name], prereleases=True):
                    too_old.append(f"{package.name}{package.specifier} (has {versions[package.name]})")
        install = f"pip install 'supercl[{extra}]'" if extra != "core" else "pip install supercl"
        extras[extra] = {"commands": commands, "missing": missing, "too_old": too_old, "install": install}
    return versions, extras


def _needs(extra: str, package: Requirement) -> bool:
    return package.marker is None or package.marker.evaluate({"extra": extra})


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # such as a library of the driver that is not there
        return {"failure": str(error).splitlines()[0]}
    found = {"threads": torch.get_num_threads(), "devices": []}
    try:
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except (
        RuntimeError
    ) as error:  # such as a driver that is too old, or a GPU that another process has to itself
        return {**found, "refusal": str(error).splitlines()[0]}
    return {**found, "devices": [{"name": one.name, "memory_bytes": one.total_memory} for one in devices]}


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"
