"""What `preprocess --dry-run` projects, against what a run then really leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from preprocess.estimate import Estimate, estimate, render
from preprocess.pipeline import PreprocessConfig
from preprocess.plan import Plan, make_plan
from supercl_core.cache.reader import open_cache
from supercl_core.cache.schema import CASE_ARRAYS
from supercl_core.errors import SuperCLError
from supercl_core.sources import discover

CONFIG = PreprocessConfig()


def planned(source: Path, cache_path: Path) -> tuple[Plan, Estimate]:
    plan = make_plan(discover(source), cache_path, CONFIG)
    return plan, estimate(plan, cache_path, config=CONFIG)


def test_disk_and_slices_are_those_of_the_cache_that_a_run_makes(
    msd_path: Path, cache_path: Path, tmp_path: Path
) -> None:
    plan, found = planned(msd_path, tmp_path / "out.zarr")
    cache = open_cache(cache_path)
    stored = [
        sum(
            cache.mapped(row, spec.name).nbytes
            for spec in CASE_ARRAYS
            if spec.name != "ground_truth" or row.has_ground_truth
        )
        for row in cache.done
    ]
    assert (found.num_cases, found.num_slices) == (4, cache.num_slices)
    # One of the four is not measured; cases differ in dtype, and one has no label.
    assert found.disk_bytes == pytest.approx(sum(stored), rel=0.15)
    assert found.largest_shape == (1, 7, 18, 26)
    assert found.smallest_shape == (1, 5, 24, 20)
    assert found.free_bytes > found.disk_bytes
    assert len(found.measured) == 3
    assert list(tmp_path.iterdir()) == []
    text = render(found, plan, 2)
    assert "4 to compute, 0 kept, 0 cannot be read" in text
    assert "with 2 workers" in text


def test_volumes_longer_than_the_sample_count_in_full(write_msd: Callable[..., Path], tmp_path: Path) -> None:
    image = np.arange(70 * 6 * 5, dtype=np.int16).reshape(70, 6, 5)
    label = np.zeros(image.shape, np.uint8)
    source = write_msd(tmp_path / "in", {"long": (image, label), "short": (image[:35], label[:35])})
    _, found = planned(source, tmp_path / "out.zarr")
    assert found.num_slices == 105
    slice_bytes = 6 * 5 * (2 + 1 + 1) + 32 * 32 * 2
    assert found.disk_bytes == 105 * slice_bytes
    assert found.largest_case_bytes == 70 * slice_bytes
    assert found.worker_bytes == 3 * 70 * slice_bytes + 500_000_000


def test_more_workers_are_faster_until_the_largest_case_is_all_that_is_left() -> None:
    found = Estimate(
        num_cases=3,
        num_slices=3,
        smallest_shape=(1, 1, 1, 1),
        largest_shape=(1, 1, 1, 1),
        measured=("a",),
        stage_s={"read": 10.0, "compute": 20.0, "write": 10.0},
        largest_case_s=15.0,
        disk_bytes=0,
        free_bytes=0,
        largest_case_bytes=0,
    )
    assert [found.wall_s(workers) for workers in (1, 2, 4)] == [40.0, 20.0, 15.0]


def test_a_sample_that_cannot_be_read_leaves_the_others(
    write_msd: Callable[..., Path], tmp_path: Path
) -> None:
    image = np.random.default_rng(0).integers(0, 999, (20, 200, 200)).astype(np.int16)
    label = np.zeros(image.shape, np.uint8)
    source = write_msd(tmp_path / "in", dict.fromkeys("abc", (image, label)))
    damaged = source / "imagesTr" / "b.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-8] + bytes(8))  # a wrong checksum
    _, found = planned(source, tmp_path / "out.zarr")
    assert found.num_cases == 3  # its header can be read, so a run would try it
    assert sorted(found.measured) == ["a", "c"]
    for name in "ac":
        path = source / "imagesTr" / f"{name}.nii.gz"
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(SuperCLError, match="damaged"):
        planned(source, tmp_path / "out.zarr")
