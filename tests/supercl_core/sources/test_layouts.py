"""Every layout, written and read back: which one it is, its cases, channels and classes, and every voxel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import made_dicom
import made_layouts
import numpy as np
import pytest
from made_layouts import write, write_nifti, write_picture

from supercl_core.errors import SuperCLError, UsageError
from supercl_core.formats.case_files import read_headers, read_image, read_label_map
from supercl_core.sources import discover, layout_names
from supercl_core.sources.walk import data_suffix

DECLARED = {
    "nnunet": (("T1", "T2"), 3),
    "msd": (("MRI",), 2),
    "chd": (("CT",), 8),
    "brats2018": (("FLAIR", "T1", "T1ce", "T2"), 4),
    "kits2019": (("CT",), 3),
    "acdc": (("MRI",), 4),
    "mmwhs": (("CT",), 8),
    "mmwhs-mr": (("MRI",), 8),
    "hvsmr": (("MRI",), 3),
    "isic2018": (("red", "green", "blue"), 2),
    "chaos": (("MRI",), 5),
    "images": (None, 2),
    "arrays": (None, 3),
}
"""Channel names, and number of classes; the other layouts declare nothing."""

LEFT_OUT = {
    "acdc": [
        "left out: 2 files such as training/patient001/patient001_4d.nii.gz (all frames of a patient, most of them "
        "without labels)"
    ],
    "isic2018": [
        "left out: 2 files such as ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_attribute_streaks.png (part of "
        "another task of the challenge)"
    ],
    "bids": [
        "left out: 8 files such as derivatives/x/sub-01/anat/sub-01_ses-1_T1w.nii.gz (no anatomical image of a subject)"
    ],
    "chaos": [
        "left out: 2 files such as Train_Sets/CT/1/Ground/liver_GT_000.png (CT, with a ground truth of the liver "
        "alone)",
        "left out: 8 files such as Train_Sets/MR/1/T1DUAL/DICOM_anon/OutPhase/IMG-0003-00001.dcm (out of phase, of a "
        "patient whose images in phase are a case)",
    ],
}
"""Of two cases as `made_layouts` writes them; other layouts leave nothing out."""


def test_each_layout_has_a_phantom() -> None:
    assert set(made_layouts.WRITERS) == set(layout_names())


@pytest.mark.parametrize("name", layout_names())
def test_layout_is_recognised_and_every_voxel_is_read_back(name: str, tmp_path: Path) -> None:
    written = write(name, tmp_path, 2)
    source, named = discover(tmp_path), discover(tmp_path, name)
    assert source == named
    assert [*source.notes(tmp_path)] == LEFT_OUT.get(name, [])
    assert [case.problem for case in source.cases] == [""] * len(written)
    assert [case.id for case in source.cases] == sorted(written)
    channel_names, num_classes = DECLARED.get(name, (None, 0))
    assert source.channel_names == channel_names
    assert len(source.class_names or ()) == num_classes
    for case in source.cases:
        image, label = written[case.id]
        volume = read_image(case)
        np.testing.assert_array_equal(volume.array_CZYX, image)
        assert read_headers(case).shape == image.shape
        label_map = read_label_map(case)
        if label is None:
            assert label_map is None
        else:
            assert label_map is not None
            np.testing.assert_array_equal(label_map.array_CZYX[0], label)
            assert label_map.geometry.spacing_mm == volume.geometry.spacing_mm or name == "chaos"


PUBLISHED = {
    "acdc": ("ACDC", [2, 1], ["patient002_frame01", "patient001_frame01"]),
    "mmwhs": ("MMWHS", [1003], ["patient1003"]),
    "hvsmr": ("HVSMR", [0, 2], ["patient0_axial_full", "patient2_axial_full"]),
    "chaos": ("CHAOS", [3], ["patient3_t1dual", "patient3_t2spir"]),
    "isic2018": ("ISIC2018", [1], ["ISIC_0000001"]),
    "msd": ("MSD-Heart", [0], ["heart_001"]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys_name_the_cases(name: str, tmp_path: Path) -> None:
    from supercl_core.splits import read_split

    write(name, tmp_path / "data", 3)
    source = discover(tmp_path / "data")
    section, keys, cases = PUBLISHED[name]
    file = tmp_path / "split.txt"
    file.write_text(f"# other\ntest: [77]\n# {section}\nsample 1 train_keys: {keys}\ntest: []\n")
    split = read_split(str(file), [case.id for case in source.cases], data_set=source.name, num_labelled=1)
    assert split.labelled == tuple(cases)


@pytest.mark.parametrize("name", ["msd", "nnunet"])
def test_files_that_a_declaration_does_not_name_are_said(name: str, tmp_path: Path) -> None:
    write(name, tmp_path, 2)
    write_nifti(tmp_path / "labelsTs/spare.nii.gz", np.zeros((2, 3, 4), np.int16))
    assert discover(tmp_path).notes(tmp_path) == (
        f"left out: the file labelsTs/spare.nii.gz (no part of the layout {name})",
    )


# ---- what does not fit


def test_a_case_that_lacks_a_channel_names_files_and_stops_no_other(tmp_path: Path) -> None:
    write("brats2018", tmp_path, 2)
    (tmp_path / "HGG/Brats18_TCIA_1_1/Brats18_TCIA_1_1_t1ce.nii.gz").unlink()
    bad, good = discover(tmp_path).cases
    assert good.problem == ""
    assert "Channel files are missing; expected flair, t1, t1ce, t2, found" in bad.problem
    assert "Brats18_TCIA_1_1_flair.nii.gz" in bad.problem
    assert bad.problem.endswith("and none for t1ce")


def test_a_label_map_without_an_image_is_a_problem(tmp_path: Path) -> None:
    write("kits2019", tmp_path, 2)
    (tmp_path / "data/case_00001/imaging.nii.gz").unlink()
    assert [case.problem for case in discover(tmp_path).cases] == [
        "A label map has no image: segmentation.nii.gz",
        "",
    ]


def test_two_files_for_one_channel_are_a_problem(tmp_path: Path) -> None:
    write("mmwhs", tmp_path, 1)
    shutil.copytree(tmp_path / "ct_train", tmp_path / "copy")
    (case,) = discover(tmp_path).cases
    assert case.problem.startswith("Several files would be the same part of the case; expected one, found")


def test_chaos_labels_follow_the_slices_whatever_the_order_of_names(tmp_path: Path) -> None:
    write("chaos", tmp_path, 1)
    ground = tmp_path / "Train_Sets/MR/1/T2SPIR/Ground"
    assert discover(tmp_path).cases[1].label_paths[0] == sorted(ground.iterdir())[-1]
    (ground / "IMG-0004-00002.png").rename(ground / "IMG-0004-00009.png")
    good, bad = discover(tmp_path).cases
    assert (good.problem, good.id) == ("", "patient1_t1dual")
    assert "expected 4 images called like the slices, found 4, IMG-0004-00002" in bad.problem
    image = tmp_path / "Train_Sets/MR/1/T1DUAL/DICOM_anon/InPhase/IMG-0004-00001.dcm"
    report = made_dicom.dicom_file({0x0008_0060: ("CS", "SR"), 0x0020_000E: ("UI", "5.5")})
    for other in (b"no", report):
        image.write_bytes(other)
        assert "expected a DICOM image" in discover(tmp_path).cases[0].problem
        assert image.name in discover(tmp_path).cases[0].problem


def test_chaos_needs_no_common_number_of_the_series(tmp_path: Path) -> None:
    write("chaos", tmp_path, 1)
    folder = tmp_path / "Train_Sets/MR/1/T2SPIR/DICOM_anon"
    for index, file in enumerate(sorted(folder.iterdir())):
        file.write_bytes(file.read_bytes().replace(b"1.2.77.1", b"1.2.77.%d" % (index + 2)))
    assert [case.problem for case in discover(tmp_path).cases] == ["", ""]


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (
            "plain",
            "images",
            ["images: 6 files such as b/images/photo_0.bmp", "plain: 3 files such as a/site/scan_0.nii.gz"],
        ),
        ("plain", "arrays", ["arrays: 3 files", "plain: 3 files"]),
        ("plain", "dicom", ["dicom: 3 cases, such as b/study_0", "plain: 3 files"]),
        ("mmwhs", "mmwhs-mr", ["mmwhs: 3 cases", "mmwhs-mr: 3 cases"]),
        ("acdc", "plain", ["3 cases of acdc; 3 files such as b/site/scan_0.nii.gz in none of them"]),
        ("isic2018", "plain", ["3 cases of isic2018; 3 files such as"]),
    ],
)
def test_mixed_layouts_are_refused_by_name(first: str, second: str, found: list[str], tmp_path: Path) -> None:
    write(first, tmp_path / "a")
    write(second, tmp_path / "b")
    with pytest.raises(SuperCLError, match="holds data of several layouts") as caught:
        discover(tmp_path)
    for text in found:
        assert text in str(caught.value.found)
    assert "--layout " in caught.value.next_step
    source = discover(tmp_path, first)
    assert len(source.cases) == 3
    others = {file for case in discover(tmp_path / "b").cases for file in case.paths}
    assert {file for file in others if data_suffix(file.name)} <= {*source.left_out}


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"),
        ("image/a.nii.gz", "mask/a.nii.gz"),
        ("a/a_flair.nii.gz", "a/a_seg.nii.gz"),
        ("a/t1.nrrd", "a/Segmentation.nrrd"),
        ("a.mha", "GroundTruth/a.mha"),
        ("a.png", "a_mask.png"),
        ("a.npy", "a-label.npy"),
    ],
)
def test_label_maps_do_not_become_images_unasked(image: str, label: str, tmp_path: Path) -> None:
    for name in (image, label):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "organ": 1}}')
    if image.startswith("imagesTr"):
        (tmp_path / "dataset.json").unlink()
    with pytest.raises(SuperCLError, match="called like label maps") as caught:
        discover(tmp_path)
    assert caught.value.found == f"the file {label}"
    layout = caught.value.next_step.split()[-1].rstrip(".")
    assert len(discover(tmp_path, layout).cases) == 2
    (tmp_path / image).unlink()
    assert len(discover(tmp_path, layout).cases) == 1, "a folder of nothing else was meant"


def test_volumes_have_labels_beside_them(tmp_path: Path) -> None:
    image, label = np.zeros((2, 3, 4), np.int16), np.ones((2, 3, 4), np.uint8)
    write_nifti(tmp_path / "images/a.nii.gz", image)
    write_nifti(tmp_path / "images/b.nii.gz", image)
    write_nifti(tmp_path / "labels/a_seg.nii.gz", label)
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "organ": 1}}')
    source = discover(tmp_path)
    assert [(case.id, len(case.label_paths)) for case in source.cases] == [("a", 1), ("b", 0)]
    assert source.class_names == ("background", "organ")
    label_map = read_label_map(source.cases[0])
    assert label_map is not None
    np.testing.assert_array_equal(label_map.array_CZYX[0], label)


def test_a_stray_picture_among_volumes_is_named(tmp_path: Path) -> None:
    write("images", tmp_path, 2)
    write_picture(tmp_path / "preview.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(SuperCLError, match=r"2 cases of images; the file preview\.png in none"):
        discover(tmp_path)


def test_a_folder_that_resembles_layouts_says_which(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SuperCLError) as caught:
        discover(tmp_path)
    assert "imagesTr/, notes.txt" in str(caught.value.found)
    assert "It resembles nnunet (by imagesTr); msd (by imagesTr)" in str(caught.value.found)
    assert "bids" not in str(caught.value.expected)


@pytest.mark.parametrize(
    ("folder", "found"),
    [
        ("imagesTr/sub", "left out: the file imagesTr/sub/a_0000.nii.gz (no part of the layout nnunet)"),
        (
            "sub-01/anat/more",
            "left out: the file sub-01/anat/more/a_0000.nii.gz (no anatomical image of a subject)",
        ),
        ("imagesTs/.hidden", "dataset.json, imagesTs/"),
    ],
)
def test_a_layout_without_a_case_is_refused(folder: str, found: str, tmp_path: Path) -> None:
    file = tmp_path / folder / "a_0000.nii.gz"
    file.parent.mkdir(parents=True)
    file.touch()
    if not folder.startswith("sub-"):
        declared = {"channel_names": {"0": "CT"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}
        (tmp_path / "dataset.json").write_text(json.dumps(declared))
    with pytest.raises(SuperCLError, match="but no case") as caught:
        discover(tmp_path)
    assert caught.value.found == found


def test_links_to_folders_are_named_where_nothing_else_is_found(tmp_path: Path) -> None:
    write("plain", tmp_path / "elsewhere")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/patient").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SuperCLError, match="no volume") as caught:
        discover(tmp_path / "in")
    assert caught.value.found == "patient (a link, not followed)"


def test_a_layout_that_there_is_not_or_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", np.zeros((2, 3, 4), np.int16))
    with pytest.raises(UsageError, match="no such layout") as caught:
        discover(tmp_path, "bidz")
    assert "bids, " in str(caught.value.expected)
    with pytest.raises(SuperCLError, match="does not hold the layout bids") as refused:
        discover(tmp_path, "bids")
    assert refused.value.found == "a.nii.gz"
