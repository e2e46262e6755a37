"""What a preprocessing run would take, from a few slices that are really computed. Writes nothing that stays.

Called by `supercl preprocess --dry-run`, with the plan of the run.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from preprocess.pipeline import PreprocessConfig, process_case
from preprocess.plan import Plan
from preprocess.worker import compile_kernels, middle_slices
from supercl_core.cache.cases import CaseRow
from supercl_core.cache.writer import create_cache, write_case
from supercl_core.errors import SuperCLError
from supercl_core.formats.case_files import read_image, read_label_map
from supercl_core.sources import CaseSource

NUM_CASES: Final = 3
"""Cases measured: the smallest, the median and the largest."""

NUM_SLICES: Final = 32
"""Slices computed of each at most, from its middle."""

STAGES: Final = ("read", "compute", "write")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is to do and what it would take; sizes in bytes, times in seconds."""

    num_cases: int
    num_slices: int
    smallest_shape: tuple[int, int, int, int]
    largest_shape: tuple[int, int, int, int]
    """(c, z, y, x), by number of voxels."""
    measured: tuple[str, ...]
    """The cases that were measured."""
    stage_s: dict[str, float]
    """Of one core, for everything, by the names of STAGES."""
    largest_case_s: float
    disk_bytes: int
    free_bytes: int
    largest_case_bytes: int

    @property
    def core_s(self) -> float:
        """What one core would take for everything."""
        return sum(self.stage_s.values())

    @property
    def worker_bytes(self) -> int:
        """Peak memory of a worker process, which has two cases in hand: the bound that `preprocess.pipeline` keeps."""
        return 3 * self.largest_case_bytes + 500_000_000

    def wall_s(self, num_workers: int) -> float:
        """How long `num_workers` processes would take, each on a core of its own."""
        return max(self.core_s / num_workers, self.largest_case_s)


def estimate(plan: Plan, cache_path: Path, *, config: PreprocessConfig) -> Estimate:
    """Measure a few slices of the cases that `plan` is to compute, and project.

    Raises SuperCLError when none of them can be computed.
    """
    todo = plan.todo
    picked = {todo[round(i * (len(todo) - 1) / (NUM_CASES - 1))] for i in range(NUM_CASES)}
    samples, failures = [], []
    for case in sorted(picked, key=todo.index, reverse=True):  # from small to large
        try:
            samples.append(_measure(case, plan, config))
        except SuperCLError as failure:
            failures.append(failure)
    if not samples:
        raise failures[0]
    shapes = [plan.headers[case.id].shape for case in todo]
    sizes, known_sizes = [math.prod(shape) for shape in shapes], [sample.num_voxels for sample in samples]
    # Some of the work goes with the cases and some with their voxels: between the samples, both are interpolated.
    stage_s_N = np.array(
        [np.interp(sizes, known_sizes, [sample.stage_s[stage] for sample in samples]) for stage in STAGES]
    )
    num_bytes = np.interp(sizes, known_sizes, [sample.num_bytes for sample in samples])
    return Estimate(
        num_cases=len(todo),
        num_slices=sum(shape[1] for shape in shapes),
        smallest_shape=shapes[-1],
        largest_shape=shapes[0],
        measured=tuple(sample.case_id for sample in samples),
        stage_s=dict(zip(STAGES, stage_s_N.sum(axis=1).tolist(), strict=True)),
        largest_case_s=float(stage_s_N.sum(axis=0).max()),
        disk_bytes=round(num_bytes.sum()),
        free_bytes=shutil.disk_usage(_existing_parent(cache_path)).free,
        largest_case_bytes=round(num_bytes.max()),
    )


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """What one whole case takes."""

    case_id: str
    num_voxels: int
    stage_s: dict[str, float]
    num_bytes: float
    """Of its arrays as stored."""


def _measure(case: CaseSource, plan: Plan, config: PreprocessConfig) -> _Sample:
    start = time.perf_counter()
    image, label = read_image(case), read_label_map(case)
    read_s = time.perf_counter() - start
    num_voxels = image.array_CZYX.size
    counts = {"num_channels": plan.num_channels, "num_classes": plan.num_classes}
    compile_kernels(image, label, config=config, **counts)
    image, label = middle_slices(image, NUM_SLICES), label and middle_slices(label, NUM_SLICES)
    start = time.perf_counter()
    computed = process_case(image, label, config=config, **counts)
    compute_s = time.perf_counter() - start
    row = CaseRow(id=case.id, source=case.name, **computed.row)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.zarr"
        create_cache(path, plan.attributes)
        start = time.perf_counter()
        write_case(path, row, computed.arrays, attributes=computed.attributes)
        write_s = time.perf_counter() - start
    share = image.array_CZYX.size / num_voxels
    return _Sample(
        case_id=case.id,
        num_voxels=num_voxels,
        stage_s={"read": read_s, "compute": compute_s / share, "write": write_s / share},
        num_bytes=sum(array.nbytes for array in computed.arrays.values()) / share,
    )


def _existing_parent(path: Path) -> Path:
    return path if path.exists() else _existing_parent(path.parent)


def render(values: Estimate, plan: Plan, num_workers: int) -> str:
    """The estimate as lines for people."""
    shapes = sorted({values.smallest_shape, values.largest_shape}, key=math.prod)
    stages = ", ".join(f"{stage} {value / values.core_s:.0%}" for stage, value in values.stage_s.items())
    lines = [
        ("data set", plan.attributes["name"]),
        (
            "cases",
            f"{values.num_cases:,} to compute, {len(plan.kept):,} kept, {len(plan.failed):,} cannot be read",
        ),
        ("slices", f"{values.num_slices:,}"),
        ("(c, z, y, x)", " to ".join(" x ".join(map(str, shape)) for shape in shapes)),
        ("disk", f"{_size(values.disk_bytes)}; {_size(values.free_bytes)} are free"),
        ("memory", f"up to {_size(values.worker_bytes)} for each worker"),
        ("CPU time", f"{_duration(values.core_s)} of one core ({stages})"),
        (
            "wall time",
            f"{_duration(values.wall_s(num_workers))} with {num_workers} workers, each on a core of its own",
        ),
        ("measured", f"up to {NUM_SLICES} slices each of {', '.join(values.measured)}"),
    ]
    return "\n".join(f"{name:<14}{text}" for name, text in lines)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
