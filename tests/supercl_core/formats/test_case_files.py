"""From the files of a case to its volume: channels joined, labels in classes, and files that do not fit each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import made_dicom
import numpy as np
import pytest
from made_layouts import write_picture

from supercl_core.errors import SuperCLError
from supercl_core.formats.case_files import all_files, read_headers, read_image, read_label_map
from supercl_core.sources import CaseSource

IMAGE = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
Write = Callable[..., Path]


def case(*image_paths: Path, reading: str = "volume", **given: object) -> CaseSource:
    return CaseSource(id="a", name="a", image_paths=image_paths, reading=reading, **given)  # type: ignore[arg-type]


def test_channels_are_joined_in_the_order_of_the_files(tmp_path: Path, write_volume: Write) -> None:
    """In the type that holds the values of all of them."""
    first = write_volume(tmp_path / "z.nii.gz", IMAGE)
    second = write_volume(tmp_path / "a.nrrd", IMAGE + np.float32(0.5))
    both = case(first, second, reading="channels")
    volume = read_image(both)
    np.testing.assert_array_equal(volume.array_CZYX, np.stack([IMAGE, IMAGE + 0.5]))
    assert volume.array_CZYX.dtype == np.float32
    assert read_headers(both).shape == (2, 2, 3, 4)


def test_channels_of_other_shape_or_place_are_refused(tmp_path: Path, write_volume: Write) -> None:
    first = write_volume(tmp_path / "a_0000.nii.gz", IMAGE)
    shorter = write_volume(tmp_path / "a_0001.nii.gz", IMAGE[:1])
    wrong = case(first, shorter, reading="channels")
    for read in (read_headers, read_image):
        with pytest.raises(SuperCLError, match="differ in shape") as caught:
            read(wrong)
        assert caught.value.where == shorter
    elsewhere = write_volume(tmp_path / "a_0001.nii.gz", IMAGE, spacing_mm=(3.0, 0.9, 0.9))
    with pytest.raises(SuperCLError, match=r"a_0001\.nii\.gz lies elsewhere than a_0000\.nii\.gz"):
        read_image(case(first, elsewhere, reading="channels"))


def test_the_slices_of_a_label_map_are_stacked_and_turned_into_classes(tmp_path: Path) -> None:
    label_ZYX = np.random.default_rng(0).integers(0, 3, (3, 4, 5))
    paths = []
    for z, label_YX in enumerate(label_ZYX):
        paths.append(tmp_path / f"{z}.png")
        write_picture(paths[-1], np.array([7, 0, 63], np.uint8)[label_YX])
    source = case(tmp_path / "a.png", label_paths=tuple(paths), label_classes={7: 0, 0: 1, 63: 2})
    label = read_label_map(source)
    assert label is not None
    np.testing.assert_array_equal(label.array_CZYX, label_ZYX[None])
    assert label.array_CZYX.dtype == np.uint8


def test_a_value_that_stands_for_no_class_is_named(tmp_path: Path, write_volume: Write) -> None:
    path = write_volume(tmp_path / "label.nii.gz", np.array([[[0, 205]], [[206, 9999]]], np.int16))
    with pytest.raises(SuperCLError, match="stand for no class") as caught:
        read_label_map(case(path, label_paths=(path,), label_classes={0: 0, 205: 1}))
    assert (caught.value.expected, caught.value.found) == ("only 0, 205", "[206, 9999] in slice 1")


def test_a_series_is_one_volume_and_all_its_files(tmp_path: Path) -> None:
    paths = tuple(made_dicom.series(tmp_path / "ct", IMAGE))
    source = case(*paths, reading="series")
    np.testing.assert_array_equal(read_image(source).array_CZYX[0], IMAGE)
    assert read_headers(source).shape == (1, 2, 3, 4)
    assert all_files(source) == paths


def test_headers_include_those_of_label_maps(tmp_path: Path, write_volume: Write) -> None:
    path = write_volume(tmp_path / "a.nii.gz", IMAGE)
    with pytest.raises(SuperCLError, match="does not exist"):
        read_headers(case(path, label_paths=(tmp_path / "gone.png",)))


def test_files_beside_a_header_count_and_each_once(tmp_path: Path, write_volume: Write) -> None:
    header = write_volume(tmp_path / "a.mhd", IMAGE)
    arrays = tmp_path / "a.npz"
    source = case(header, arrays, reading="channels", label_paths=(arrays,))
    assert [file.name for file in all_files(source)] == ["a.mhd", "a.zraw", "a.npz"]


def test_a_file_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gif").touch()
    with pytest.raises(SuperCLError, match="not that of a volume"):
        read_image(case(tmp_path / "a.gif"))
