"""What there is to do: order, what is kept, what cannot be opened, and channels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from preprocess import pipeline
from preprocess import plan as plan_module
from preprocess.pipeline import COMPUTATION, PreprocessConfig
from preprocess.plan import make_plan
from supercl_core.config import as_dict, digest
from supercl_core.errors import CacheError, SuperCLError
from supercl_core.sources import CaseSource, discover

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
    assert plan.attributes["config_digest"] == digest({"config": as_dict(CONFIG), "kernels": COMPUTATION})
    assert plan.is_new
    assert not plan.is_finished
    assert not (tmp_path / "out.zarr").exists()


def test_nothing_is_to_do_for_a_finished_cache(msd_path: Path, cache_path: Path) -> None:
    plan = make_plan(discover(msd_path), cache_path, CONFIG)
    assert plan.todo == plan.failed == plan.vanished == plan.changed == ()
    assert plan.is_finished
    assert not plan.restamped
    assert [row.id for row in plan.kept] == ["case_a", "case_b", "case_c", "case_d"]


@pytest.mark.parametrize("part", ["imagesTr/case_a.nii.gz", "labelsTr/case_a.nii.gz"])
def test_a_changed_image_or_label_is_to_do_again_and_a_touched_one_is_not(
    part: str, msd_path: Path, cache_path: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(msd_path, tmp_path / "in"))
    (source / part).touch()
    plan = make_plan(discover(source), cache_path, CONFIG)
    assert (plan.todo, plan.changed) == ((), ())
    assert "case_a" in plan.restamped
    other = next(entry for entry in (source / part).parent.iterdir() if "case_b" in entry.name)
    shutil.copyfile(other, source / part)
    plan = make_plan(discover(source), cache_path, CONFIG)
    assert [case.id for case in plan.todo] == ["case_a"]
    assert plan.changed == ("case_a",)
    assert not plan.is_finished


def test_the_same_files_elsewhere_are_the_same_cases(
    msd_path: Path, cache_path: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(msd_path, tmp_path / "moved"))
    plan = make_plan(discover(source), cache_path, CONFIG)
    assert plan.is_finished
    assert sorted(plan.restamped) == ["case_a", "case_b", "case_c", "case_d"]


@pytest.mark.parametrize(("header", "values"), [("a.mhd", "a.raw"), ("a.hdr", "a.img")])
def test_values_beside_their_header_count_too(header: str, values: str, tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 3, 4), np.int16)), str(tmp_path / header))
    case = CaseSource(id="a", name=header, image_paths=(tmp_path / header,))
    before = plan_module.source_digest(case), plan_module.source_stamp(case)
    assert len(before[1]) == 2
    (tmp_path / values).write_bytes(b"x" * (tmp_path / values).stat().st_size)
    assert plan_module.source_digest(case) != before[0]
    assert plan_module.source_stamp(case) != before[1]


def test_labels_without_declared_classes_are_refused_with_what_to_write(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in/a.npz", image=np.zeros((2, 3)), label=np.zeros((2, 3), np.uint8))
    with pytest.raises(SuperCLError, match="nothing says which classes") as caught:
        make_plan(discover(tmp_path / "in"), tmp_path / "out.zarr", CONFIG)
    (tmp_path / "in/dataset.json").write_text(str(caught.value.expected).split("such as ")[1])
    plan = make_plan(discover(tmp_path / "in"), tmp_path / "out.zarr", CONFIG)
    assert (plan.num_classes, len(plan.todo)) == (2, 1)


def test_the_way_of_reading_counts_where_files_allow_several(tmp_path: Path) -> None:
    """One image and at most one label file are read in one way, and keep the digests that they had."""
    files = tuple(tmp_path / name for name in ("a.npz", "b.nii.gz"))
    for file in files:
        file.write_bytes(file.name.encode())
    simple = CaseSource(id="a", name="a", image_paths=files[:1], label_paths=files[1:])
    plain = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
    assert plan_module.source_digest(simple) == plain
    others = [
        dataclasses.replace(simple, image_paths=files, reading="channels", label_paths=()),
        dataclasses.replace(simple, image_paths=files[::-1], reading="channels", label_paths=()),
        dataclasses.replace(simple, image_paths=files, reading="channels", label_paths=files[1:]),
        dataclasses.replace(simple, label_classes={0: 0, 255: 1}),
        dataclasses.replace(simple, label_classes={0: 0, 254: 1}),
    ]
    cases = [simple, *others]
    assert len({plan_module.source_digest(case) for case in cases}) == len(cases)
    stamps = [json.dumps(plan_module.source_stamp(case)) for case in cases]
    assert len(set(stamps)) == len(cases)


def test_the_digest_decides_only_where_size_or_times_differ(
    msd_path: Path, cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        plan_module, "source_digest", None
    )  # reading all files again would take as long as a run
    assert make_plan(discover(msd_path), cache_path, CONFIG).is_finished


def test_cases_to_recompute_are_not_kept(msd_path: Path, cache_path: Path) -> None:
    plan = make_plan(discover(msd_path), cache_path, CONFIG, recompute={"case_c"})
    assert [case.id for case in plan.todo] == ["case_c"]
    assert plan.changed == ()


@pytest.mark.parametrize(
    "part", ["table/id/c/0/0", "slices/z/zarr.json", "weak_labels/intensity/ccl/c/0/0", "weak_labels"]
)
def test_a_cache_without_whole_tables_or_labels_is_not_finished(
    part: str, msd_path: Path, cache_copy: Path
) -> None:
    if (cache_copy / part).is_dir():
        shutil.rmtree(cache_copy / part)
    else:
        (cache_copy / part).write_bytes(b"x")
    plan = make_plan(discover(msd_path), cache_copy, CONFIG)
    assert plan.todo == ()
    assert not plan.is_finished


@pytest.mark.parametrize("damage", ["missing", "no JSON", "empty"])
def test_a_damaged_root_is_written_again_around_its_cases(
    damage: str, msd_path: Path, cache_copy: Path
) -> None:
    if damage == "missing":
        (cache_copy / "zarr.json").unlink()
    else:
        (cache_copy / "zarr.json").write_text("" if damage == "empty" else "{")
    plan = make_plan(discover(msd_path), cache_copy, CONFIG)
    assert plan.is_new
    assert (plan.todo, len(plan.kept)) == ((), 4)
    # Without a root it is the key of each case that tells other settings.
    other = make_plan(discover(msd_path), cache_copy, PreprocessConfig(n_segments=50))
    assert (len(other.todo), other.kept) == (4, ())


@pytest.mark.parametrize("content", ["cases/mine.txt", "mine.txt", "zarr.json"])
def test_a_folder_of_somebody_else_is_refused(content: str, msd_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.zarr" / content
    file.parent.mkdir(parents=True)
    file.write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(CacheError):
        make_plan(discover(msd_path), tmp_path / "out.zarr", CONFIG)
    assert file.exists()


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
    assert "content is not what its name says" in reasons["bad_image"]
    assert "does not exist" in reasons["bad_label"]
    assert str(source / "labelsTr" / "bad_label.nii.gz") in reasons["bad_label"]
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


def test_other_kernels_are_other_settings(
    msd_path: Path, cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "COMPUTATION", "a later one")
    with pytest.raises(CacheError, match="other settings") as caught:
        make_plan(discover(msd_path), cache_path, CONFIG)
    assert (caught.value.expected, caught.value.found) == ("kernels = 1", "kernels = a later one")


def test_scikit_images_version_is_part_of_the_kernels_where_it_computes() -> None:
    assert pipeline.kernels_version(PreprocessConfig(slic="skimage")).endswith(version("scikit-image"))


def test_classes_may_be_added_and_not_taken_away(msd_path: Path, cache_path: Path) -> None:
    source = discover(msd_path)
    assert source.class_names is not None
    more = dataclasses.replace(source, class_names=(*source.class_names, "tumour"))
    plan = make_plan(more, cache_path, CONFIG)
    assert plan.num_classes == 4
    assert not plan.is_finished
    fewer = dataclasses.replace(source, class_names=source.class_names[:-1])
    with pytest.raises(CacheError, match="classes"):
        make_plan(fewer, cache_path, CONFIG)
    channels = dataclasses.replace(source, channel_names=("T1", "T2"))
    with pytest.raises(CacheError, match="channels"):
        make_plan(channels, cache_path, CONFIG)


def test_a_case_with_a_problem_is_listed_and_not_opened(msd_path: Path, tmp_path: Path) -> None:
    source = discover(msd_path)
    bad = dataclasses.replace(source.cases[0], problem="Two files would become this case.")
    plan = make_plan(
        dataclasses.replace(source, cases=(bad, *source.cases[1:])), tmp_path / "out.zarr", CONFIG
    )
    assert [(row.id, row.reason) for row in plan.failed] == [("case_a", "Two files would become this case.")]
    assert len(plan.todo) == 3


def test_a_cache_of_another_data_set_is_refused(
    cache_copy: Path, write_volume: Callable[..., Path], tmp_path: Path
) -> None:
    write_volume(tmp_path / "other" / "heart_001.nii.gz", np.zeros((2, 8, 8), np.int16))
    with pytest.raises(CacheError, match="another data set"):
        make_plan(discover(tmp_path / "other"), cache_copy, PreprocessConfig())
