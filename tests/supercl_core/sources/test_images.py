"""Folders of 2-D images: with and without masks, and classes that a dataset.json declares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_layouts import write_dataset_json, write_picture

from supercl_core.errors import SuperCLError
from supercl_core.formats.case_files import read_image, read_label_map
from supercl_core.sources import discover

GREY = np.arange(20, dtype=np.uint8).reshape(4, 5)


def test_images_anywhere_of_any_size_and_format_are_cases(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.PNG", GREY)
    write_picture(tmp_path / "site/b.jpeg", np.zeros((7, 3, 3), np.uint8))
    write_picture(tmp_path / "site/c.tif", GREY[:2])
    write_picture(tmp_path / ".hidden.png", GREY)
    source = discover(tmp_path)
    assert [case.id for case in source.cases] == ["a", "site_b", "site_c"]
    assert [read_image(case).array_CZYX.shape for case in source.cases] == [
        (1, 1, 4, 5),
        (3, 1, 7, 3),
        (1, 1, 2, 5),
    ]
    assert (source.channel_names, source.class_names) == (None, None)


@pytest.mark.parametrize(
    ("folder", "name"),
    [("masks", "a"), ("labels", "a_mask"), ("masks", "a_segmentation"), ("masks", "a_seg")],
)
@pytest.mark.parametrize("foreground", [1, 255])
def test_masks_lie_beside_the_images(folder: str, name: str, foreground: int, tmp_path: Path) -> None:
    write_picture(tmp_path / "images/a.png", GREY)
    write_picture(tmp_path / f"{folder}/{name}.bmp", (GREY > 9) * np.uint8(foreground))
    source = discover(tmp_path)
    assert source.class_names == ("background", "foreground")
    label = read_label_map(source.cases[0])
    assert label is not None
    np.testing.assert_array_equal(label.array_CZYX[0, 0], GREY > 9)


def test_a_mask_of_other_values_is_refused_with_its_slice(tmp_path: Path) -> None:
    write_picture(tmp_path / "images/a.png", GREY)
    write_picture(tmp_path / "masks/a.png", GREY)
    with pytest.raises(SuperCLError, match="stand for no class") as caught:
        read_label_map(discover(tmp_path).cases[0])
    assert (caught.value.expected, caught.value.found) == ("only 0, 1, 255", "[2, 3, 4, 5, 6] in slice 0")


def test_declared_classes_are_the_numbers_in_the_masks(tmp_path: Path) -> None:
    write_dataset_json(tmp_path, labels={"background": 0, "nevus": 1, "hair": 2})
    write_picture(tmp_path / "images/a.png", GREY)
    write_picture(tmp_path / "masks/a.png", GREY // 10)
    source = discover(tmp_path)
    assert source.class_names == ("background", "nevus", "hair")
    label = read_label_map(source.cases[0])
    assert label is not None
    np.testing.assert_array_equal(label.array_CZYX[0, 0], GREY // 10)


def test_masks_and_images_without_a_counterpart(tmp_path: Path) -> None:
    write_picture(tmp_path / "images/a.png", GREY)
    write_picture(tmp_path / "images/b.png", GREY)
    write_picture(tmp_path / "masks/b.png", GREY)
    write_picture(tmp_path / "masks/c_mask.png", GREY)
    assert [(case.id, len(case.label_paths), case.problem) for case in discover(tmp_path).cases] == [
        ("a", 0, ""),
        ("b", 1, ""),
        ("c_mask", 1, "A label map has no image: c_mask.png"),
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"labels": {"a": 7}}', '{"names": []}'])
def test_a_dataset_json_without_classes_is_refused(text: str, tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", GREY)
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(SuperCLError, match="does not say which classes"):
        discover(tmp_path)
