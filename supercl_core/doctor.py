"""What is installed and what is missing for which command. Called by `supercl doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path

from supercl_core.cli import COMMANDS
from supercl_core.provenance import versions

_NEEDED = {
    "preprocess": ("numba", "dask", "distributed", "skimage"),
    "train": ("torch", "monai", "safetensors", "matplotlib"),
}


def report() -> list[tuple[str, str]]:
    """Rows of (name, text): system, versions, accelerator, disk, and each half with its commands."""
    rows = [
        ("system", f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores"),
        ("disk here", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free in {Path.cwd()}"),
    ]
    rows += list(versions().items())
    for extra, modules in _NEEDED.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        commands = " ".join(name for name, entry in COMMANDS.items() if entry.extra == extra)
        state = f"missing {', '.join(missing)}: pip install 'supercl[{extra}]'" if missing else "ready"
        rows.append((f"extra {extra}", f"{state} ({commands})"))
    if importlib.util.find_spec("torch") is not None:
        import torch

        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        rows.append(("accelerators", ", ".join(devices) or "none: training runs on the CPU"))
    return rows
