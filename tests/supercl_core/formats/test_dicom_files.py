"""DICOM series found, judged and read."""

from __future__ import annotations

import locale
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from made_dicom import BIG_ENDIAN, EXPLICIT, IMPLICIT, PATIENT, dicom_file, encoded, enhanced, image, series

from supercl_core.errors import SuperCLError
from supercl_core.formats import dicom_pixels
from supercl_core.formats.dicom_files import Series, find_series, holds_dicom, read_series, read_series_header

VOLUME = np.random.default_rng(0).integers(-500, 2000, (6, 12, 16)).astype(np.int16)
AXIAL = (1, 0, 0, 0, 1, 0)
SAGITTAL = (0, 1, 0, 0, 0, -1)


def only(folder: Path) -> Series:
    (found,) = find_series(folder)
    return found


def test_slices_are_sorted_by_position_and_not_by_name_or_number(tmp_path: Path) -> None:
    paths = series(tmp_path, VOLUME)
    found = only(tmp_path)
    assert (found.uid, found.number, found.problem, found.left_out) == ("1.2.3.4", "5", "", "")
    assert found.paths == tuple(paths)
    assert [path.name for path in paths] == sorted((path.name for path in paths), reverse=True)
    assert found.description == "CT, 6 images of 16 x 12"
    volume = read_series(sorted(paths))
    assert volume.array_CZYX.dtype == np.int16
    np.testing.assert_array_equal(volume.array_CZYX, VOLUME[None])
    assert volume.geometry.spacing_mm == (0.7, 0.8, 2.5)
    assert volume.geometry.origin_mm == (-10, -20, 5)
    assert volume.geometry.direction == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert (volume.geometry.oriented, volume.geometry.spacing_problem) == (True, "")
    header = read_series_header(paths)
    assert (header.shape, header.dtype) == ((1, 6, 12, 16), "16-bit integer")


def test_an_oblique_series_lies_where_simpleitk_puts_it(tmp_path: Path) -> None:
    """The reference is SimpleITK's own reader of a series, given the order."""
    rotation = sitk.Euler3DTransform((0, 0, 0), 0.3, -0.4, 1.1)
    axes = np.reshape(rotation.GetMatrix(), (3, 3))
    for z, values in enumerate(VOLUME):
        position = np.array([5, -7, 30]) + 1.75 * z * axes[:, 2]
        elements = image(
            values, position=position.round(9).tolist(), orientation=axes[:, :2].T.ravel().tolist()
        )
        (tmp_path / f"{z}.dcm").write_bytes(dicom_file(elements))
    paths = [tmp_path / f"{z}.dcm" for z in range(6)]
    reference = sitk.ReadImage([str(path) for path in paths])
    volume = read_series(paths[::-1])
    np.testing.assert_array_equal(volume.array_CZYX[0], sitk.GetArrayFromImage(reference))
    np.testing.assert_allclose(volume.geometry.spacing_mm, reference.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(volume.geometry.origin_mm, reference.GetOrigin(), atol=1e-6)
    np.testing.assert_allclose(volume.geometry.direction, reference.GetDirection(), atol=1e-6)


def test_each_slice_is_rescaled_as_it_says(tmp_path: Path) -> None:
    slopes, intercepts = [1, 2, 0.5, 1, 3, 1.25], [0, -1024, 7, 0, 1, 0.5]
    for z, values in enumerate(VOLUME):
        elements = image(values, position=(0, 0, z), rescaling=(slopes[z], intercepts[z]))
        (tmp_path / str(z)).write_bytes(dicom_file(elements))
    array_CZYX = read_series(only(tmp_path).paths).array_CZYX
    expected = VOLUME * np.reshape(slopes, (-1, 1, 1)) + np.reshape(intercepts, (-1, 1, 1))
    assert array_CZYX.dtype == np.float32
    np.testing.assert_allclose(array_CZYX[0], expected, rtol=1e-6)


def test_whole_slopes_give_integers_also_where_types_differ(tmp_path: Path) -> None:
    for z, values in enumerate(VOLUME[:2]):
        elements = image(values, position=(0, 0, z), rescaling=(1 + 99 * z, 0))
        (tmp_path / str(z)).write_bytes(dicom_file(elements))
    array_CZYX = read_series(only(tmp_path).paths).array_CZYX
    assert array_CZYX.dtype == np.int32
    np.testing.assert_array_equal(array_CZYX[0], VOLUME[:2] * np.reshape([1, 100], (2, 1, 1)))


def test_series_are_found_by_uid_whatever_files_are_called(tmp_path: Path) -> None:
    series(tmp_path / "a", VOLUME, names="IM{}", skip=(0, 2, 4))
    series(tmp_path / "b", VOLUME, names="{}.DCM", skip=(1, 3, 5))
    series(tmp_path / "a", VOLUME, uid="7.7", number=6, names="1.2.840.{}")
    series(tmp_path / "b", VOLUME, uid="8.8", number="", names="{}.IMA")
    series(tmp_path / ".hidden", VOLUME, uid="9.9")
    (tmp_path / "DICOMDIR").write_bytes(
        bytes(128)
        + b"DICM"
        + encoded({0x0002_0002: ("UI", "1.2.840.10008.1.3.10"), 0x0004_1220: ("SQ", [{}])})
    )
    (tmp_path / "README").write_text("notes")
    (tmp_path / "scan.nii").write_bytes(dicom_file(image(VOLUME[0])))
    found = {one.uid: one for one in find_series(tmp_path)}
    assert {uid: (one.number, len(one.paths), one.problem) for uid, one in found.items()} == {
        "1.2.3.4": ("5", 6, ""),
        "7.7": ("6", 6, ""),
        "8.8": ("", 6, ""),
    }
    assert {path.parent.name for path in found["1.2.3.4"].paths} == {"a", "b"}


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
def test_frames_of_a_file_are_slices(syntax: str, tmp_path: Path) -> None:
    positions = [(0, 0, 2.5 * z) for z in (3, 1, 0, 2, 5, 4)]
    (tmp_path / "x").write_bytes(dicom_file(enhanced(VOLUME, positions), syntax))
    found = only(tmp_path)
    assert found.description == "MR, 6 images of 16 x 12"
    volume = read_series(found.paths)
    np.testing.assert_array_equal(volume.array_CZYX[0], VOLUME[[2, 1, 3, 0, 5, 4]] * 2 - 10)
    assert volume.geometry.spacing_mm == (0.7, 0.8, 2.5)


def write_compressed(folder: Path, compressor: str) -> None:
    before = locale.setlocale(locale.LC_ALL)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    for z, values in enumerate(VOLUME):
        slice_image = sitk.GetImageFromArray(values[None])
        for tag, value in {
            "0020|000e": "1.2.3",
            "0020|0032": f"0\\0\\{z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }.items():
            slice_image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{z}.dcm"))
        writer.Execute(slice_image)
    # This writer leaves the whole process with the locale C, in which text is ASCII.
    locale.setlocale(locale.LC_ALL, before)


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_compressed_series_are_read(compressor: str, tmp_path: Path) -> None:
    """Lossless JPEG, and JPEG 2000, written by SimpleITK."""
    write_compressed(tmp_path, compressor)
    found = only(tmp_path)
    assert found.problem == ""
    np.testing.assert_array_equal(read_series(found.paths).array_CZYX[0], VOLUME)


def test_modules_in_the_working_folder_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    write_compressed(tmp_path / "data", "JPEG")
    for name in ("subprocess.py", "numpy.py"):
        (tmp_path / "data" / name).write_text("open('was_run', 'w')")
    monkeypatch.chdir(tmp_path / "data")
    read_series(only(tmp_path / "data").paths)
    assert not Path("was_run").exists()


def test_damaged_compressed_pixels_are_an_error(tmp_path: Path) -> None:
    content = dicom_file({**image(VOLUME[0]), 0x7FE0_0010: ("OB", b"")}, "1.2.840.10008.1.2.4.90")[:-12]
    item = b"\xfe\xff\x00\xe0"
    pixels = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" + item + bytes(4) + item + b"\x08\0\0\0" + b"no jpeg!"
    (tmp_path / "x").write_bytes(content + pixels + b"\xfe\xff\xdd\xe0" + bytes(4))
    found = only(tmp_path)
    assert found.problem == ""
    with pytest.raises(SuperCLError, match="compressed pixels of a DICOM file cannot be read"):
        read_series(found.paths)


def test_compressed_pixels_must_have_room(tmp_path: Path) -> None:
    write_compressed(tmp_path, "JPEG")
    for path in tmp_path.iterdir():
        rows = struct.pack("<HH2sHH", 0x28, 0x10, b"US", 2, 12)
        assert rows in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(rows, rows[:-2] + b"\xff\xff"))
    assert "where the header asks for 12,582,720" in only(tmp_path).problem


@pytest.mark.parametrize(
    "does",
    [
        pytest.param("kill -SEGV $$", id="crashes"),
        pytest.param("printf '\\377\\0\\0\\0\\0\\0\\0\\0half'; kill -SEGV $$", id="crashes while it answers"),
        pytest.param("exec sleep 60", id="never answers"),
    ],
)
def test_a_decoder_that_gives_nothing_is_an_error_of_the_series(
    does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_compressed(tmp_path, "JPEG")
    decoder = tmp_path / "python.sh"
    decoder.write_text(f"#!/bin/sh\n{does}\n")
    decoder.chmod(0o755)
    paths = only(tmp_path).paths
    monkeypatch.setattr(sys, "executable", str(decoder))
    monkeypatch.setattr(dicom_pixels, "_LONGEST_S", 0.2)
    begun_s = time.monotonic()
    with pytest.raises(SuperCLError) as caught:
        read_series(paths)
    assert time.monotonic() - begun_s < 30
    assert (caught.value.what, caught.value.where) == (
        "The compressed pixels of a DICOM file cannot be read.",
        paths[0],
    )


def test_colours_are_channels(tmp_path: Path) -> None:
    colours = np.random.default_rng(1).integers(0, 255, (12, 16, 3)).astype(np.uint8)
    (tmp_path / "x").write_bytes(dicom_file(image(colours)))
    array_CZYX = read_series(only(tmp_path).paths).array_CZYX
    np.testing.assert_array_equal(array_CZYX[:, 0], np.moveaxis(colours, -1, 0))


def test_a_single_image_without_position_has_no_place(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(dicom_file(image(VOLUME[0], position=None, orientation=None)))
    geometry = read_series(only(tmp_path).paths).geometry
    assert (geometry.oriented, geometry.has_spacing, geometry.spacing_mm) == (False, False, (1, 1, 1))


def test_a_spacing_that_cannot_be_is_said(tmp_path: Path) -> None:
    series(tmp_path, VOLUME, spacing=(0, 0.7))
    geometry = read_series(only(tmp_path).paths).geometry
    assert geometry.spacing_mm == (0.7, 1, 2.5)
    assert geometry.spacing_problem == "a spacing (x, y, z) of (0.7, 0.0, 2.5)"


def write_more(folder: Path, **given: Any) -> None:
    """Slices 6 and 7 of the series, as others than its first six."""
    for z in (6, 7):
        elements = image(
            given.pop("values", VOLUME[0]),
            **{"position": (-10, -20, 5 + 2.5 * z), "instance": 10 + z, **given},
        )
        (folder / f"more_{z}").write_bytes(dicom_file(elements))


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (
            lambda folder: series(folder, VOLUME, skip=(2, 3)),
            "Slices of a series are missing or unevenly spaced; expected a slice every 2.5 mm,"
            " found 7.5 mm between image 5 and image 2 (2 missing)",
        ),
        (
            lambda folder: [series(folder, VOLUME), write_more(folder, position=(-10, -20, 22))],
            "Several images of a series lie at the same position; expected one at each, of one echo and one time,"
            " without copies, found 8 images at 7 positions, such as image 16 and image 17",
        ),
        (
            lambda folder: [series(folder, VOLUME), write_more(folder, orientation=SAGITTAL)],
            "The images of a series have different orientations; expected parallel images, as a localiser has not,"
            " found 2 of 8 unlike image 1, such as image 16",
        ),
        (
            lambda folder: [series(folder, VOLUME), write_more(folder, spacing=(0.8, 0.9))],
            "The images of a series have different spacings of pixels; expected one spacing,"
            " found 2 of 8 unlike image 1, such as image 16",
        ),
        (
            lambda folder: [series(folder, VOLUME), write_more(folder, values=VOLUME[0, :8])],
            "The images of a series have different sizes; expected one size,"
            " found 7 of 16 x 12 (1 values a pixel), 1 of 16 x 8 (1 values a pixel)",
        ),
        (
            lambda folder: series(folder, VOLUME, position=None),
            "Images of a series do not say where they lie; expected position and orientation of each,"
            " found 6 of 6 images without, such as image 1",
        ),
        (
            lambda folder: series(folder, VOLUME, position=("a", 0, 0)),
            "Images of a series do not say where they lie; expected position and orientation of each,"
            " found 6 of 6 images without, such as image 1",
        ),
        (
            lambda folder: series(folder, VOLUME, orientation=(1, 0, 0, 0.6, 0.8, 0)),
            "The volume's axes are not perpendicular; expected columns, rows and slices at right angles,"
            " found direction 1, 0.6, 0, 0, 0.8, 0, 0, 0, 0.8",
        ),
        (
            lambda folder: series(folder, VOLUME, orientation=("1e300",) * 6),
            "The volume's axes are not perpendicular; expected columns, rows and slices at right angles,"
            " found direction 1e+300, 1e+300, nan, 1e+300, 1e+300, nan, 1e+300, 1e+300, nan",
        ),
        (
            lambda folder: (folder / "x").write_bytes(dicom_file(image(VOLUME[0], position=("1e300", 0, 0)))),
            "The file is damaged; expected an undamaged file, found a position more than 1,000,000,000 mm away",
        ),
        (
            lambda folder: [
                (folder / str(z)).write_bytes(
                    dicom_file(image(VOLUME[z], position=(0, z, 5 * z), instance=z))
                )
                for z in range(3)
            ],
            "The slices of a series are shifted against each other; expected each straight above the other,"
            " without gantry tilt, found a shift of 2 mm at image 2",
        ),
        (
            lambda folder: (folder / "x").write_bytes(dicom_file(enhanced(VOLUME, [(0, 0, 0)] * 6))),
            "Several images of a series lie at the same position; expected one at each, of one echo and one time,"
            " without copies, found 6 images at 1 positions, such as frame 1 of image 1 and frame 2 of image 1",
        ),
        (
            lambda folder: [path.write_bytes(path.read_bytes()[:-9]) for path in series(folder, VOLUME)[1:3]],
            "DICOM files cannot be used; expected whole files of images,"
            " found IM0004: a file that is cut off, and 1 more files",
        ),
    ],
)
def test_a_series_that_is_no_volume_says_why(
    write: Callable[[Path], object], problem: str, tmp_path: Path
) -> None:
    write(tmp_path)
    found = only(tmp_path)
    assert found.problem == problem
    with pytest.raises(SuperCLError) as caught:
        read_series(found.paths)
    assert caught.value.one_line() == problem
    assert PATIENT not in str(caught.value)


def test_positions_as_scanners_round_them_are_even(tmp_path: Path) -> None:
    jitter = np.random.default_rng(2).uniform(-0.04, 0.04, (6, 3))
    for z, values in enumerate(VOLUME):
        position = (np.array([0, 0, 2.5 * z]) + jitter[z]).tolist()
        elements = image(values, position=position, orientation=(1, 4e-4, 0, -4e-4, 1, 0))
        (tmp_path / str(z)).write_bytes(dicom_file(elements))
    assert only(tmp_path).problem == ""


@pytest.mark.parametrize(
    ("elements", "left_out"),
    [
        (
            {0x0008_0060: ("CS", "SR"), 0x0020_000E: ("UI", "1.2"), 0x0040_A730: ("SQ", [{}])},
            "no measured image (SR)",
        ),
        (image(VOLUME[0], modality="SEG"), "no measured image (SEG)"),
        (
            image(VOLUME[0], others={0x0008_0008: ("CS", "ORIGINAL\\PRIMARY\\LOCALIZER")}),
            "a localiser, which shows where other series lie",
        ),
    ],
)
def test_what_nobody_wants_as_a_volume_is_left_out(
    elements: dict[int, Any], left_out: str, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(dicom_file(elements))
    found = only(tmp_path)
    assert (found.left_out, found.problem) == (left_out, "")


def test_unreadable_files_are_listed_by_folder(tmp_path: Path) -> None:
    series(tmp_path / "a", VOLUME)
    for name, content in {
        "empty.dcm": b"",
        "text.dcm": b"x" * 500,
        "cut": dicom_file(image(VOLUME[0]))[:160],
    }.items():
        (tmp_path / "a" / name).write_bytes(content)
    os.mkfifo(tmp_path / "a" / "pipe.dcm")
    whole, bad = sorted(find_series(tmp_path), key=lambda one: one.number, reverse=True)
    assert (whole.problem, len(whole.paths)) == ("", 6)
    assert [path.name for path in bad.paths] == ["cut", "empty.dcm", "pipe.dcm", "text.dcm"]
    assert bad.problem == (
        "DICOM files cannot be used; expected whole files of images,"
        " found cut: a file that is cut off, and 3 more files"
    )


def test_files_that_changed_since_they_were_found_are_errors(tmp_path: Path) -> None:
    paths = series(tmp_path, VOLUME)
    paths[0].write_bytes(b"something else" * 20)
    with pytest.raises(SuperCLError, match="not what its name says"):
        read_series(paths)
    paths[0].unlink()
    with pytest.raises(SuperCLError, match="does not exist"):
        read_series_header(paths)


def test_a_palette_that_makes_colours_of_numbers_is_refused(tmp_path: Path) -> None:
    table = {
        0x0028_0002: ("US", 1),
        0x0028_0004: ("CS", "PALETTE COLOR"),
        **{0x0028_1101 + colour: ("US", struct.pack("<3H", 256, 0, 16)) for colour in range(3)},
        **{0x0028_1201 + colour: ("OW", np.arange(256, dtype=np.uint16)) for colour in range(3)},
        0x7FE0_0010: ("OW", bytes(12 * 16)),
    }
    (tmp_path / "x").write_bytes(dicom_file(image(np.zeros((12, 16, 3), np.uint8), others=table)))
    with pytest.raises(SuperCLError) as caught:
        read_series([tmp_path / "x"])
    assert caught.value.one_line() == (
        "The pixels of a DICOM file are not what its header declares;"
        " expected (c, z, y, x) = (1, 1, 12, 16), found (3, 1, 12, 16)"
    )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a/x", dicom_file(image(VOLUME[0])), True),
        ("a/x.dcm", b"", True),
        ("a/x", b"some text", False),
        ("a/x.nii", dicom_file(image(VOLUME[0])), False),
        (".a/x", dicom_file(image(VOLUME[0])), False),
    ],
)
def test_whether_a_folder_holds_dicom(name: str, content: bytes, expected: bool, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(content)
    assert holds_dicom(tmp_path) is expected


def test_a_folder_that_cannot_be_listed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series(tmp_path / "a", VOLUME)
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path) == str(refused):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    refused = tmp_path / "b"
    refused.mkdir()
    monkeypatch.setattr(os, "scandir", refusing)
    assert [one.problem.partition("found ")[2] for one in find_series(tmp_path)] == [
        "",
        "b: a folder that cannot be listed: Permission denied",
    ]
    refused = tmp_path
    with pytest.raises(PermissionError):
        find_series(tmp_path)
