"""Which cases a folder holds, and folders that hold none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supercl_core.cache.cases import case_id_problem
from supercl_core.errors import SuperCLError
from supercl_core.sources import discover
from supercl_core.sources.walk import stem


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
    ("name", "bare"),
    [
        ("a.nii.gz", "a"),
        ("a.b.NII", "a.b"),
        ("x.nrrd", "x"),
        ("x.PNG", "x"),
        ("x.npz", "x"),
        ("notes.txt", "notes.txt"),
        ("a.gz", "a.gz"),
        (".mha", ".mha"),
    ],
)
def test_data_is_known_by_the_ending_of_its_name(name: str, bare: str) -> None:
    assert stem(name) == bare


def test_two_files_for_one_case_are_one_case_with_a_problem(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii", tmp_path / "a.nii.gz", tmp_path / "site" / "b.nii", tmp_path / "site_b.nii")
    assert [(case.id, case.problem) for case in discover(tmp_path).cases] == [
        ("a", "Several entries would become the case 'a'; expected one, found a.nii and a.nii.gz"),
        (
            "site_b",
            "Several entries would become the case 'site_b'; expected one, found site/b.nii and site_b.nii",
        ),
    ]


def test_whatever_has_the_name_of_a_volume_is_a_case(tmp_path: Path) -> None:
    """Left out are hidden things, and folders that other tools have unpacked a volume into."""
    touch(tmp_path / "a.nii" / "inner.nii", tmp_path / ".git" / "b.nii", tmp_path / "c" / "._d.nii")
    (tmp_path / "empty.nii").mkdir()
    (tmp_path / "gone.nii").symlink_to("nowhere")
    (tmp_path / "again").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.nii")
    cases = discover(tmp_path).cases
    assert [case.name for case in cases] == ["a.nii/inner.nii", "empty.nii", "gone.nii", "pipe.nii"]
    assert not any(case.problem for case in cases)


def test_names_that_cannot_be_ids_get_ids_of_their_own(tmp_path: Path) -> None:
    names = [
        "a\nb.nii",
        "a_nb.nii.nii",
        "back\\slash.nii",
        "__x.nii",
        "zarr.json.nii",
        " .nii",
        "é" * 110 + ".nii",
    ]
    touch(*(tmp_path / name for name in names))
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff.nii", os.O_CREAT))
    cases = {case.name: case for case in discover(tmp_path).cases}
    assert len({case.id for case in cases.values()}) == len(cases) == 8
    for case in cases.values():
        assert case_id_problem(case.id) is None
        assert case.name.isprintable()
        assert case.problem.isprintable()
    assert [name for name, case in cases.items() if not case.problem] == ["a_nb.nii.nii"]
    assert cases["a_nb.nii.nii"].id == "a_nb.nii"
    assert cases["a\\nb.nii"].id == "a_nb.nii-2"
    assert "'a\\nb' holds a slash, a control character" in cases["a\\nb.nii"].problem
    assert cases["\\udcff.nii"].id == "udcff.nii"
    assert len(cases["é" * 110 + ".nii"].id.encode()) == 150


def test_a_bad_entry_takes_no_id_from_a_good_one(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    entries = [
        {"image": image, "label": "l.nii"}
        for image in ("../a.nii", "imagesTr/a.nii", "/b/a.nii", "zarr.json", "../a.nii")
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({**GOOD, "training": entries}))
    cases = discover(tmp_path).cases
    assert [case.id for case in cases] == ["a", "a.nii", "a.nii-2", "b_a.nii", "zarr.json-2"]
    assert [bool(case.problem) for case in cases] == [False, True, True, True, True]


def test_name_of_a_case_is_its_path_in_the_data_set(msd_path: Path, tmp_path: Path) -> None:
    assert [case.name for case in discover(msd_path).cases][2:] == [
        "imagesTr/case_c.nii.gz",
        "imagesTs/case_d.nii.gz",
    ]
    touch(tmp_path / "site" / "a.nii")
    assert discover(tmp_path).cases[0].name == "site/a.nii"


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
        ({**GOOD, "training": {"image": "a"}}, "training is no list"),
        ({**GOOD, "test": 5}, "test is no list"),
        ("[" * 100_000, "RecursionError"),
        ('{"labels": {"0": "a", "0": "b"}}', "the key .0. appears twice"),
        ('{"labels": {"' + "9" * 5000 + '": "a"}, "modality": {}, "training": []}', "ValueError"),
        ("\udcff", "UnicodeDecodeError"),
        (" " * (1 << 26) + "{}", "more than 67,108,864 bytes"),
        ({**GOOD, "labels": {"0": "background", "00": "organ"}}, "not numbered 0, 1, 2"),
        ({**GOOD, "labels": {str(number): "x" for number in range(257)}}, "at most 255"),
        ({**GOOD, "labels": {"zero": "background"}}, "not one of"),
        ({**GOOD, "labels": {"0": "background", "2": "organ"}}, "not numbered 0, 1, 2"),
        ({**GOOD, "training": []}, "lists no case"),
    ],
)
def test_a_broken_dataset_json_is_refused(declared: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    text = declared if isinstance(declared, str) else json.dumps(declared)
    (tmp_path / "dataset.json").write_text(text, errors="surrogateescape")
    with pytest.raises(SuperCLError, match=message):
        discover(tmp_path)


@pytest.mark.parametrize(
    ("entry", "case_id", "problem"),
    [
        ("./imagesTr/a.nii.gz", "a", "dataset.json does not name the label"),
        (7, "training-1", "does not name the image; expected a path below its folder, found 7"),
        ({"image": None, "label": "l.nii"}, "training-1", "does not name the image"),
        ({"image": "a.nii"}, "a", "dataset.json does not name the label"),
        ({"image": "a.nii", "label": ["l.nii"]}, "a", "found ['l.nii']"),
        ({"image": "", "label": "l.nii"}, "training-1", "is no path of a file"),
        ({"image": ".", "label": "l.nii"}, "training-1", "is no path of a file"),
        (
            {"image": "/etc/a.nii", "label": "l.nii"},
            "a",
            "The image in dataset.json leads outside the data set",
        ),
        ({"image": "x/../../a.nii", "label": "l.nii"}, "a", "leads outside"),
        (
            {"image": "a.nii", "label": "/etc/l.nii"},
            "a",
            "The label in dataset.json leads outside the data set",
        ),
        ({"image": "a.nii", "label": "l\0.nii"}, "a", "is no path of a file"),
        ({"image": "imagesTr/b.nii.gz", "label": "l.nii"}, "b", ""),
    ],
)
def test_one_bad_entry_is_one_case_with_a_problem(
    entry: Any, case_id: str, problem: str, tmp_path: Path
) -> None:
    """And what it leads to is not looked at, not even for a digest."""
    (tmp_path / "imagesTr").mkdir()
    good = {"image": "imagesTr/good.nii.gz", "label": "labelsTr/good.nii.gz"}
    (tmp_path / "dataset.json").write_text(
        json.dumps({**GOOD, "training": [good, entry]}), encoding="utf-8-sig"
    )
    bad, case = sorted(discover(tmp_path).cases, key=lambda case: case.id == "good")
    assert (bad.id, case.id, case.problem) == (case_id, "good", "")
    assert problem in bad.problem
    assert bool(problem) == bool(bad.problem)
    if problem:
        assert bad.paths == (tmp_path / "dataset.json",)


def test_raw_data_of_nnunet_v1_have_a_file_for_each_channel_of_an_entry(tmp_path: Path) -> None:
    """A channel that lacks its file is the case's problem when it is read."""
    touch(*(tmp_path / f"imagesTr/{name}.nii.gz" for name in ("a_0000", "a_0001", "b_0001", "c", "c_0000")))
    declared = {"labels": {"0": "background"}, "modality": {"0": "T1", "1": "T2"}, "test": []}
    entries = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in "abcd"]
    (tmp_path / "dataset.json").write_text(json.dumps({**declared, "training": entries}))
    found = {case.id: [path.name for path in case.image_paths] for case in discover(tmp_path).cases}
    assert found == {
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "b": ["b_0000.nii.gz", "b_0001.nii.gz"],
        "c": ["c.nii.gz"],
        "d": ["d.nii.gz"],
    }


def test_name_of_a_task_without_one_is_that_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps(GOOD))
    assert discover(tmp_path).name == tmp_path.name
