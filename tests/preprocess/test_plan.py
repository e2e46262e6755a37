"""What there is to do: order, what is kept, what cannot be opened, and channels."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from preprocess.pipeline import PreprocessConfig
from preprocess.plan import make_plan
from supercl_core.config import as_dict, digest
from supercl_core.errors import CacheError
from supercl_core.sources import discover

CONFIG = PreprocessConfig()


def image(num_slices: int, num_channels: int = 1) -> np.ndarray:
    array = np.zeros((num_channels, num_slices, 4, 5), np.int16)
    return array[0] if num_channels == 1 else array


def test_everything_is_to_do_for_a_new_cache(msd_path: Path, tmp_path: Path) -> None:
    plan = make_plan(discover(msd_path), tmp_path / "out.zarr", CONFIG)
    assert (plan.kept, plan.failed, plan.vanished) == ((), (), ())
    # case_d has 7 * 18 * 26 voxels, case_b 6 * 24 * 20, the others 5 * 24 * 20.
    assert [case.id for case in plan.todo] == ["case_d", "case_b", "case_a", "case_c"]
    assert (plan.num_channels, plan.num_classes) == (1, 3)
    assert plan.attributes["name"] == "Task99_Tiny"
    assert plan.attributes["config"] == as_dict(CONFIG)
    assert plan.attributes["config_digest"] == digest(as_dict(CONFIG))
    assert not (tmp_path / "out.zarr").exists()


def test_nothing_is_to_do_for_a_finished_cache(msd_path: Path, cache_path: Path) -> None:
    plan = make_plan(discover(msd_path), cache_path, CONFIG)
    assert plan.todo == plan.failed == plan.vanished == ()
    assert [row.id for row in plan.kept] == ["case_a", "case_b", "case_c", "case_d"]


@pytest.mark.parametrize("part", ["imagesTr/case_a.nii.gz", "labelsTr/case_a.nii.gz"])
def test_a_touched_image_or_label_is_to_do_again(
    part: str, msd_path: Path, tmp_path: Path, scheduler: str
) -> None:
    from preprocess import run

    source = Path(shutil.copytree(msd_path, tmp_path / "in"))
    run(source, tmp_path / "out.zarr", scheduler=scheduler)
    (source / part).touch()
    plan = make_plan(discover(source), tmp_path / "out.zarr", CONFIG)
    assert [case.id for case in plan.todo] == ["case_a"]


def test_the_same_files_elsewhere_are_to_do_again(msd_path: Path, cache_path: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(msd_path, tmp_path / "moved"))
    assert len(make_plan(discover(source), cache_path, CONFIG).todo) == 4


def test_files_that_cannot_be_opened_fail_before_any_work(
    write_msd: Callable[..., Path], tmp_path: Path
) -> None:
    label = np.zeros((2, 4, 5), np.uint8)
    source = write_msd(
        tmp_path / "in", {name: (image(2), label) for name in ("bad_image", "bad_label", "good")}
    )
    (source / "imagesTr" / "bad_image.nii.gz").write_text("x")
    (source / "labelsTr" / "bad_label.nii.gz").unlink()
    plan = make_plan(discover(source), tmp_path / "out.zarr", CONFIG)
    assert [case.id for case in plan.todo] == ["good"]
    reasons = {row.id: row.reason for row in plan.failed}
    assert "cannot be read as a volume" in reasons["bad_image"]
    assert reasons["bad_label"] == f"The file does not exist ({source / 'labelsTr' / 'bad_label.nii.gz'})"
    assert {row.state for row in plan.failed} == {"failed"}


def test_channels_are_those_of_most_volumes_where_nobody_says(
    write_volume: Callable[..., Path], tmp_path: Path
) -> None:
    for name, num_channels in (("a", 2), ("b", 3), ("c", 3)):
        write_volume(tmp_path / "in" / f"{name}.nii.gz", image(2, num_channels))
    plan = make_plan(discover(tmp_path / "in"), tmp_path / "out.zarr", CONFIG)
    assert plan.attributes["channel_names"] == ["0", "1", "2"]
    assert plan.num_classes == 0


def test_cases_that_vanished_are_kept(msd_path: Path, cache_path: Path) -> None:
    source = discover(msd_path)
    smaller = type(source)(
        name=source.name,
        cases=source.cases[1:],
        channel_names=source.channel_names,
        class_names=source.class_names,
    )
    plan = make_plan(smaller, cache_path, CONFIG)
    assert plan.vanished == ("case_a",)
    assert sorted(row.id for row in plan.kept) == ["case_a", "case_b", "case_c", "case_d"]


def test_other_settings_are_named(msd_path: Path, cache_path: Path) -> None:
    with pytest.raises(CacheError, match="other settings") as caught:
        make_plan(discover(msd_path), cache_path, PreprocessConfig(n_segments=50, spacing="unknown"))
    assert caught.value.expected == "n_segments = 100, spacing = file"
    assert caught.value.found == "n_segments = 50, spacing = unknown"


def test_a_cache_of_another_data_set_is_refused(
    cache_copy: Path, write_volume: Callable[..., Path], tmp_path: Path
) -> None:
    write_volume(tmp_path / "other" / "heart_001.nii.gz", np.zeros((2, 8, 8), np.int16))
    with pytest.raises(CacheError, match="another data set"):
        make_plan(discover(tmp_path / "other"), cache_copy, PreprocessConfig())
