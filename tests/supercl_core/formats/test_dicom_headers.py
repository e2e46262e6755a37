"""What is read of single DICOM files, whole, damaged and hostile."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_dicom import BIG_ENDIAN, EXPLICIT, IMPLICIT, PATIENT, dicom_file, encoded, enhanced, image

from supercl_core.errors import SuperCLError
from supercl_core.formats import dicom_elements
from supercl_core.formats.dicom_headers import DicomHeader, read_dicom_header

VALUES = np.arange(6 * 8, dtype=np.int16).reshape(6, 8)
DEFLATED = "1.2.840.10008.1.2.1.99"
WHOLE = dicom_file(image(VALUES))


def item(content: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content


def header_of(path: Path, content: bytes) -> DicomHeader:
    path.write_bytes(content)
    header = read_dicom_header(path)
    assert header is not None
    return header


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
def test_every_encoding_gives_the_same_header(syntax: str, tmp_path: Path) -> None:
    content = dicom_file(image(VALUES, position=(1.5, -2, 3e1), instance=7), syntax)
    header = header_of(tmp_path / "x", content)
    assert (header.rows, header.columns, header.samples, header.bits) == (6, 8, 1, 16)
    assert (header.series_uid, header.series_number, header.instance_number) == ("1.2.3.4", "5", "7")
    assert (header.modality, header.is_image, header.is_localiser) == ("CT", True, False)
    assert (header.is_compressed, header.problem, header.size_bytes) == (False, "", len(content))
    (frame,) = header.frames
    assert frame.position_mm == (1.5, -2, 30)
    assert frame.orientation == (1, 0, 0, 0, 1, 0)
    assert frame.spacing_mm == (0.8, 0.7)


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
def test_frames_have_their_own_positions_and_share_the_rest(syntax: str, tmp_path: Path) -> None:
    frames = np.stack([VALUES, VALUES])
    header = header_of(tmp_path / "x", dicom_file(enhanced(frames, [(0, 0, 9), (0, 0, 4)]), syntax))
    assert header.problem == ""
    assert [frame.position_mm for frame in header.frames] == [(0, 0, 9), (0, 0, 4)]
    assert {frame.orientation for frame in header.frames} == {(1, 0, 0, 0, 1, 0)}
    assert {frame.spacing_mm for frame in header.frames} == {(0.8, 0.7)}


def test_sequences_of_defined_length_and_of_unknown_type_are_gone_through(tmp_path: Path) -> None:
    explicit = item(encoded({0x0020_000E: ("UI", "6.6.6")}))
    implicit = item(encoded({0x0020_000E: ("UI", "6.6.6")}, IMPLICIT))
    defined = b"\x09\x00\x05\x10SQ\0\0" + struct.pack("<I", len(explicit)) + explicit
    undefined = b"\x09\x00\x06\x10UN\0\0\xff\xff\xff\xff" + implicit + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    skipped = b"\x09\x00\x07\x10UN\0\0" + struct.pack("<I", len(implicit)) + implicit
    at = WHOLE.index(encoded({0x0010_0010: ("PN", PATIENT)}))
    header = header_of(tmp_path / "x", WHOLE[:at] + defined + undefined + skipped + WHOLE[at:])
    assert (header.problem, header.series_uid) == ("", "1.2.3.4")


def test_first_of_two_equal_elements_counts(tmp_path: Path) -> None:
    at = WHOLE.index(struct.pack("<HH", 0x28, 0x11))
    header = header_of(tmp_path / "x", WHOLE[:at] + encoded({0x0028_0010: ("US", 9999)}) + WHOLE[at:])
    assert header.rows == 6


def test_nothing_of_the_patient_is_kept(tmp_path: Path) -> None:
    header = header_of(tmp_path / "x", WHOLE)
    assert PATIENT.encode() in (tmp_path / "x").read_bytes()
    assert PATIENT not in repr(header)
    assert "4711" not in repr(header)


@pytest.mark.parametrize(
    ("content", "modality"),
    [
        (encoded({0x0008_0060: ("CS", "SR"), 0x0020_000E: ("UI", "1.2"), 0x0040_A730: ("SQ", [{}])}), "SR"),
        (
            encoded({0x0008_0060: ("CS", "RTSTRUCT"), 0x0020_000E: ("UI", "1.2"), 0x3006_0020: ("SQ", [])}),
            "RTSTRUCT",
        ),
        (dicom_file(image(VALUES, modality="SEG"))[132:], "SEG"),
        (dicom_file(image(VALUES, modality="RTDOSE"))[132:], "RTDOSE"),
    ],
)
def test_what_was_not_measured_is_no_image(content: bytes, modality: str, tmp_path: Path) -> None:
    header = header_of(tmp_path / "x", bytes(128) + b"DICM" + content)
    assert (header.is_image, header.modality, header.problem) == (False, modality, "")


@pytest.mark.parametrize("content", [b"", b"DICM", bytes(200), b"\x08\x00\x05\x00" + bytes(200)])
def test_other_files_are_no_dicom(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    assert read_dicom_header(tmp_path / "x") is None


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SuperCLError, match="a folder"):
        read_dicom_header(tmp_path)


def compressed(pieces: int, frames: object = 1) -> bytes:
    """An image whose compressed pixels are `pieces` pieces of four bytes behind a table."""
    elements = image(VALUES, others={0x0028_0008: ("IS", frames)})
    del elements[0x7FE0_0010]
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 4) + b"\xff\xd8\xff\xd9"
    pixels = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" + struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    return (
        dicom_file(elements, "1.2.840.10008.1.2.4.70") + pixels + item * pieces + b"\xfe\xff\xdd\xe0\0\0\0\0"
    )


def test_pieces_of_compressed_pixels_are_counted(tmp_path: Path) -> None:
    header = header_of(tmp_path / "x", compressed(2))
    assert (header.is_compressed, header.problem) == (True, "")


def without(elements: dict[int, Any], tag: int) -> dict[int, Any]:
    return {key: value for key, value in elements.items() if key != tag}


def deep_sequence(depth: int) -> dict[int, Any]:
    return {0x0009_1010: ("SQ", [deep_sequence(depth - 1)])} if depth else {}


FRAMES = np.stack([VALUES, VALUES])
PLACES = [(0, 0, 0), (0, 0, 1)]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (WHOLE[:-1], "a file that is cut off"),
        (WHOLE[:-200], "a file that is cut off"),
        (compressed(1)[:-9], "a file that is cut off"),
        (WHOLE + struct.pack("<HH2s2xI", 0xFFFC, 0xFFFC, b"OB", 1 << 31), "a file that is cut off"),
        (compressed(1, 2), "1 compressed images for 2 frames"),
        (compressed(0), "0 compressed images for 1 frames"),
        (compressed(1, "9" * 40), "'999999999999' frames, 0 of which are described"),
        (
            dicom_file(image(VALUES, others={0x0028_0010: ("US", 60_000)})),
            "96 bytes of pixels where the header asks",
        ),
        (
            dicom_file(image(FRAMES, others={0x0028_0008: ("IS", "3")})),
            "192 bytes of pixels where the header asks",
        ),
        (dicom_file(image(VALUES, others={0x0028_0008: ("IS", "-1")})), "'-1' frames"),
        (dicom_file(image(VALUES, others={0x0028_0008: ("IS", "0")})), "'0' frames"),
        (
            dicom_file(image(np.zeros((70_000, 1, 1), np.int16))),
            "70,000 frames where at most 65,536 are read",
        ),
        (dicom_file(image(VALUES, others={0x0028_0010: ("US", 0)})), "no rows, columns or bits"),
        (dicom_file(without(image(VALUES), 0x0028_0100)), "no rows, columns or bits"),
        (dicom_file(enhanced(FRAMES, PLACES[:1])), "'2' frames, 1 of which are described"),
        (dicom_file(image(VALUES, rescaling=("x", 0))), "a rescale slope or intercept that cannot be"),
        (dicom_file(image(VALUES, rescaling=(1, "nan"))), "a rescale slope or intercept that cannot be"),
        (dicom_file(image(VALUES, rescaling=(0, 5))), "a rescale slope or intercept that cannot be"),
        (dicom_file(image(VALUES), DEFLATED), "a deflated data set, which is not supported"),
        (dicom_file(image(VALUES, others=deep_sequence(30))), "sequences nested more than 16 deep"),
        (
            WHOLE.replace(b"LO\x05\x00", b"\0\0\x05\x00").replace(b"LO\x06\x00MAKER", b"\0\0\x06\x00MAKER"),
            "an element",
        ),
    ],
)
def test_damage_is_said(content: bytes, problem: str, tmp_path: Path) -> None:
    header = header_of(tmp_path / "x", content)
    assert header.problem.startswith(problem)
    assert header.is_image
    assert header.frames == ()


def test_a_name_on_which_simpleitk_ends_the_process_is_a_problem(tmp_path: Path) -> None:
    header = header_of(tmp_path / os.fsdecode(b"\xff"), WHOLE)
    assert header.problem == "a path that is not UTF-8"


def test_rescaling_that_simpleitk_would_pass_over_is_refused(tmp_path: Path) -> None:
    frames = enhanced(FRAMES, PLACES)
    assert header_of(tmp_path / "x", dicom_file(frames)).problem == ""
    of_other_class = {**frames, 0x0008_0016: ("UI", "1.2.840.10008.5.1.4.1.1.20")}
    problem = "a rescaling of single frames, which is not supported"
    assert header_of(tmp_path / "x", dicom_file(of_other_class)).problem == problem
    groups = [
        {0x0028_9145: ("SQ", [{0x0028_1052: ("DS", "0"), 0x0028_1053: ("DS", slope)}])}
        for slope in ("1", "2")
    ]
    frames[0x5200_9230] = ("SQ", groups)
    assert header_of(tmp_path / "x", dicom_file(frames)).problem == problem


def test_a_file_of_endless_elements_is_left_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_elements, "_MOST_ELEMENTS", 100)
    content = bytes(128) + b"DICM" + encoded({0x0009_1010: ("LO", "")}) * 101
    assert header_of(tmp_path / "x", content).problem == "more than 100 elements"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_changed_bytes_never_break_the_reader(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each file gives a header whose pixels have room in it, or a problem."""
    content = bytearray(
        data.draw(st.sampled_from([WHOLE, dicom_file(enhanced(FRAMES, PLACES)), compressed(2)]))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(132, len(content) - 1))] = data.draw(st.integers(0, 255))
    header = header_of(
        tmp_path_factory.getbasetemp() / "changed",
        bytes(content[: data.draw(st.integers(132, len(content)))]),
    )
    if header.is_image and not header.problem and not header.is_compressed:
        needed = len(header.frames) * header.rows * header.columns * header.samples * header.bits / 8
        assert 0 < needed <= header.size_bytes
