"""Which cases a folder of DICOM files holds, and what they are called."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from made_dicom import PATIENT, dicom_file, encoded, image, series

from supercl_core.cache.cases import case_id_problem
from supercl_core.errors import SuperCLError, UsageError
from supercl_core.sources import discover
from supercl_core.sources.dicom import matches, read

VOLUME = np.random.default_rng(0).integers(0, 900, (4, 6, 8)).astype(np.int16)
REPORT = dicom_file({0x0008_0060: ("CS", "SR"), 0x0020_000E: ("UI", "5.5"), 0x0020_0011: ("IS", 9)})

DICOMDIR = bytes(128) + b"DICM" + encoded({0x0002_0002: ("UI", "1.2.840.10008.1.3.10")})


def study(folder: Path) -> None:
    """Two patients: one with two series and a report in one folder, one with a series that has a gap."""
    series(folder / "p1" / "export", VOLUME, uid="1.1", number=2)
    series(folder / "p1" / "export", VOLUME, uid="1.2", number="003", names="{}.dcm", modality="MR")
    (folder / "p1" / "export" / "SR1").write_bytes(REPORT)
    series(folder / "p2", VOLUME, uid="2.1", number=2, skip=(1,))
    (folder / "DICOMDIR").write_bytes(DICOMDIR)


def test_each_series_of_images_is_a_case_named_by_folder_and_number(tmp_path: Path) -> None:
    study(tmp_path)
    source = discover(tmp_path)
    assert [(case.id, case.name, len(case.image_paths), case.reading) for case in source.cases] == [
        ("p1_export_series_2", "p1/export/series_2", 4, "series"),
        ("p1_export_series_3", "p1/export/series_3", 4, "series"),
        ("p2_series_2", "p2/series_2", 3, "series"),
    ]
    assert [case.problem.partition(";")[0] for case in source.cases] == [
        "",
        "",
        "Slices of a series are missing or unevenly spaced",
    ]
    assert source.cases[0].label_paths == ()
    assert (source.name, source.channel_names, source.class_names) == (tmp_path.name, None, None)
    assert source.left_out == {tmp_path / "p1" / "export" / "SR1": "no measured image (SR)"}
    assert PATIENT not in repr(source)


def test_a_series_is_named_by_the_folder_that_holds_all_of_it(tmp_path: Path) -> None:
    series(tmp_path / "p1" / "a", VOLUME, skip=(0, 1))
    series(tmp_path / "p1" / "b", VOLUME, skip=(2, 3), number=5)
    assert [(case.id, len(case.image_paths)) for case in discover(tmp_path).cases] == [("p1_series_5", 4)]
    assert [case.id for case in discover(tmp_path / "p1" / "a").cases] == ["series_5"]


def test_equal_numbers_in_one_folder_are_told_apart_by_a_hash(tmp_path: Path) -> None:
    """Of two studies, say; no UID is shown, since an archive finds the patient by it."""
    series(tmp_path, VOLUME, uid="1.1", names="a{}")
    series(tmp_path, VOLUME, uid="1.2", names="b{}")
    series(tmp_path, VOLUME, uid="1.3", names="c{}", number="")
    hashes = sorted(hashlib.sha256(uid).hexdigest()[:6] for uid in (b"1.1", b"1.2"))
    assert [case.id for case in discover(tmp_path).cases] == [
        *(f"series_5_{digits}" for digits in hashes),
        "series_unnumbered",
    ]


def test_unreadable_files_are_a_case_with_a_problem(tmp_path: Path) -> None:
    series(tmp_path / "p1", VOLUME)
    (tmp_path / "p1" / "bad.dcm").write_text("nothing")
    good, bad = discover(tmp_path).cases
    assert (good.id, good.problem) == ("p1_series_5", "")
    assert (bad.id, bad.name) == ("p1_unreadable", "p1/unreadable")
    assert "bad.dcm: no DICOM file" in bad.problem


def test_names_that_cannot_be_printed_are_problems_and_no_crash(tmp_path: Path) -> None:
    series(tmp_path / "a\nb", VOLUME)
    (case,) = discover(tmp_path).cases
    assert case_id_problem(case.id) is None
    assert case.name == "a\\nb/series_5"
    assert case.problem


@pytest.mark.parametrize(
    ("lines", "ids"),
    [
        ("p1_export_series_3\n", ["p1_export_series_3"]),
        ("# the T2\n\n *_series_2 \r\n", ["p1_export_series_2", "p2_series_2"]),
        ("p1_*\np2_*\n", ["p1_export_series_2", "p1_export_series_3", "p2_series_2"]),
    ],
)
def test_a_file_chooses_series(lines: str, ids: list[str], tmp_path: Path) -> None:
    study(tmp_path)
    (tmp_path / "series.txt").write_text(lines)
    source = discover(tmp_path)
    assert [case.id for case in source.cases] == ids
    reasons = {file: reason for file, reason in source.left_out.items() if "SR1" not in file.name}
    assert len(reasons) == 11 - sum(len(case.image_paths) for case in source.cases)
    assert {*reasons.values()} <= {"not chosen in series.txt"}


@pytest.mark.parametrize(
    ("lines", "found"), [("p1_*\nseries_7\n", "\n    series_7"), ("# none\n", "no line")]
)
def test_a_choice_of_nothing_lists_what_there_is(lines: str, found: str, tmp_path: Path) -> None:
    study(tmp_path)
    (tmp_path / "series.txt").write_text(lines)
    with pytest.raises(UsageError) as caught:
        discover(tmp_path)
    assert caught.value.found == found
    assert caught.value.expected == (
        "\n    p1_export_series_2 (CT, 4 images of 8 x 6)"
        "\n    p1_export_series_3 (MR, 4 images of 8 x 6)"
        "\n    p2_series_2 (CT, 3 images of 8 x 6)"
    )


def test_a_choice_that_is_no_text_is_refused(tmp_path: Path) -> None:
    study(tmp_path)
    (tmp_path / "series.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SuperCLError, match=r"series\.txt cannot be read"):
        discover(tmp_path)


def test_objects_without_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(REPORT)
    (tmp_path / "y").write_bytes(dicom_file(image(VOLUME[0], uid="3.3", modality="SEG")))
    with pytest.raises(SuperCLError) as caught:
        read(tmp_path)
    assert (
        str(caught.value.found)
        == "\n    series_9: no measured image (SR)\n    series_5: no measured image (SEG)"
    )


def test_a_list_of_files_that_were_not_copied_is_named(tmp_path: Path) -> None:
    (tmp_path / "DICOMDIR").write_bytes(DICOMDIR)
    with pytest.raises(SuperCLError, match=r"found:    only a list of other files \(DICOMDIR\)"):
        discover(tmp_path)


def test_a_folder_without_dicom_does_not_match(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("text")
    (tmp_path / "a.nii").touch()
    assert not matches(tmp_path, [tmp_path / "a.nii"])
