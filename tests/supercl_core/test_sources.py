"""Which cases a folder holds, and folders that hold none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supercl_core.errors import SuperCLError
from supercl_core.sources import discover
from supercl_core.sources.base import without_suffix


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_msd_task_lists_training_with_labels_and_test_without(msd_path: Path) -> None:
    source = discover(msd_path)
    assert source.name == "Task99_Tiny"
    assert source.channel_names == ("MRI",)
    assert source.class_names == ("background", "anterior", "posterior")
    assert [case.id for case in source.cases] == ["case_a", "case_b", "case_c", "case_d"]
    first, last = source.cases[0], source.cases[-1]
    assert first.paths == (msd_path / "imagesTr/case_a.nii.gz", msd_path / "labelsTr/case_a.nii.gz")
    assert last.paths == (msd_path / "imagesTs/case_d.nii.gz",)


def test_plain_folder_names_cases_by_their_path(tmp_path: Path) -> None:
    touch(
        tmp_path / "b.nii.gz",
        tmp_path / "site" / "a.MHA",
        tmp_path / ".hidden.nii.gz",
        tmp_path / "notes.txt",
        tmp_path / ".nii.gz",
    )
    source = discover(tmp_path)
    assert [case.id for case in source.cases] == ["b", "site_a"]
    assert (source.name, source.channel_names, source.class_names) == (tmp_path.name, None, None)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a.nii.gz", "a"),
        ("a.b.NII", "a.b"),
        ("x.nrrd", "x"),
        ("notes.txt", None),
        ("a.gz", None),
        (".mha", None),
    ],
)
def test_volumes_are_known_by_their_suffix(name: str, stem: str | None) -> None:
    assert without_suffix(name) == stem


def test_two_files_for_one_case_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii", tmp_path / "a.nii.gz")
    with pytest.raises(SuperCLError, match="Two files would become the case 'a'"):
        discover(tmp_path)


@pytest.mark.parametrize(
    ("prepare", "found"),
    [
        (lambda path: None, "nothing"),
        (lambda path: path.touch(), "a file"),
        (lambda path: path.mkdir(), "an empty folder"),
        (lambda path: touch(path / "notes.txt", path / "more" / "x.csv"), "more/, notes.txt"),
        (lambda path: touch(*(path / f"{i}.txt" for i in range(10))), "7.txt and 2 more"),
    ],
)
def test_folders_without_volumes_are_refused(
    prepare: Callable[[Path], None], found: str, tmp_path: Path
) -> None:
    prepare(tmp_path / "in")
    with pytest.raises(SuperCLError) as caught:
        discover(tmp_path / "in")
    assert str(caught.value.found).endswith(found)
    assert caught.value.where == tmp_path / "in"
    assert "folder" in str(caught.value.expected) or "msd: " in str(caught.value.expected)


GOOD: dict[str, Any] = {
    "labels": {"0": "background"},
    "modality": {"0": "CT"},
    "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
}


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("{", "not one of the Medical Segmentation Decathlon"),
        ("[1, 2]", "not one of"),
        ({key: value for key, value in GOOD.items() if key != "labels"}, "KeyError: 'labels'"),
        ({**GOOD, "training": ["./imagesTr/a.nii.gz"]}, "not one of"),
        ({**GOOD, "labels": {"zero": "background"}}, "not one of"),
        ({**GOOD, "labels": {"0": "background", "2": "organ"}}, "not numbered 0, 1, 2"),
        ({**GOOD, "training": []}, "lists no case"),
        ({**GOOD, "test": ["./imagesTs/a.nii.gz"]}, "Two files would become the case 'a'"),
    ],
)
def test_a_broken_dataset_json_is_refused(declared: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    text = declared if isinstance(declared, str) else json.dumps(declared)
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(SuperCLError, match=message):
        discover(tmp_path)


def test_name_of_a_task_without_one_is_that_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps(GOOD))
    assert discover(tmp_path).name == tmp_path.name
