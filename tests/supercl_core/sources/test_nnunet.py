"""Raw data sets of nnU-Net v2: what dataset.json may say, and file names that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made_layouts
import numpy as np
import pytest
from made_layouts import write_nifti, write_picture

from supercl_core.errors import SuperCLError
from supercl_core.formats.case_files import read_image
from supercl_core.sources import discover
from supercl_core.sources.nnunet import class_names

GOOD: dict[str, Any] = {"channel_names": {"0": "CT"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}


def test_channels_are_in_the_order_of_their_numbers_and_test_cases_have_no_labels(tmp_path: Path) -> None:
    made_layouts.write("nnunet", tmp_path, 1)
    for channel in range(2):
        write_nifti(tmp_path / f"imagesTs/new_{channel:04}.nii.gz", np.full((2, 3, 4), channel, np.int16))
    source = discover(tmp_path)
    assert [(case.id, bool(case.label_paths)) for case in source.cases] == [
        ("case_001", True),
        ("new", False),
    ]
    assert read_image(source.cases[1]).array_CZYX[:, 0, 0, 0].tolist() == [0, 1]


def test_missing_and_odd_files_are_cases_with_a_problem(tmp_path: Path) -> None:
    made_layouts.write("nnunet", tmp_path, 2)
    (tmp_path / "imagesTr/case_001_0001.nii.gz").unlink()
    write_nifti(tmp_path / "imagesTr/case_002_0002.nii.gz", np.zeros((2, 3, 4), np.int16))
    write_nifti(tmp_path / "imagesTr/plain.nii.gz", np.zeros((2, 3, 4), np.int16))
    write_nifti(tmp_path / "labelsTr/case_009.nii.gz", np.zeros((2, 3, 4), np.int16))
    problems = {case.id: case.problem for case in discover(tmp_path).cases}
    assert problems == {
        "case_001": "Channel files are missing; expected 0000, 0001, found case_001_0000.nii.gz and none for 0001",
        "case_002": "There are more channel files than channels; expected 0000, 0001, found case_002_0000.nii.gz, "
        "case_002_0001.nii.gz, case_002_0002.nii.gz",
        "case_009": "A label map has no image: case_009.nii.gz",
        "imagesTr_plain": "The file's name is not what dataset.json lets expect; expected CASE_0000 and its "
        "file_ending, found plain.nii.gz",
    }


def test_colour_images_of_one_file_have_three_channels(tmp_path: Path) -> None:
    declared = {**GOOD, "channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}
    (tmp_path / "dataset.json").write_text(json.dumps(declared))
    write_picture(tmp_path / "imagesTr/a_0000.png", np.zeros((4, 5, 3), np.uint8))
    (case,) = discover(tmp_path).cases
    assert case.problem == ""
    assert read_image(case).array_CZYX.shape == (3, 1, 4, 5)


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"file_ending": ".exe"}, "the file_ending '.exe'"),
        ({"file_ending": "_x.nii.gz"}, "the file_ending '_x.nii.gz'"),
        ({"channel_names": {"1": "CT"}}, "channel_names that are not numbered"),
        ({"channel_names": {}}, "channel_names that are not numbered"),
        ({"channel_names": ["CT"]}, "AttributeError"),
        ({"labels": {"background": 0, "ignore": 1}}, "the label `ignore`"),
        ({"labels": {"background": 0, "organ": 2}}, "not numbered 0, 1, 2"),
        ({"labels": {"background": "x"}}, "ValueError"),
        ({"labels": {"background": 0, "organ": 1.5}}, "ValueError"),
        ({"labels": [0]}, "labels that are not numbers by name"),
        ({"dataset": {"a": {"images": ["/etc/passwd"]}}}, "files in other places"),
    ],
)
def test_a_dataset_json_that_cannot_be_is_refused(
    changed: dict[str, Any], found: str, tmp_path: Path
) -> None:
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps({**GOOD, **changed}))
    with pytest.raises(SuperCLError, match="not one of nnU-Net v2") as caught:
        discover(tmp_path)
    assert found in str(caught.value.found)


def test_numbers_are_named_by_their_smallest_region() -> None:
    regions = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumour": 2}
    assert class_names(regions) == ("background", "kidney", "tumour", "masses")
