"""Folders of arrays: labels in the same file or beside it, and the classes that must be declared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_layouts import write_dataset_json

from supercl_core.formats.case_files import read_image, read_label_map
from supercl_core.sources import discover

IMAGE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
LABEL = (IMAGE > 9).astype(np.uint8)


def test_labels_lie_in_the_file_of_the_image_or_beside_it(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    write_dataset_json(tmp_path, labels={"background": 0, "liver": 1})
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"], file["label"], file["scribble"] = IMAGE, LABEL, LABEL
    np.savez(tmp_path / "b.npz", data=IMAGE, label=LABEL)
    np.save(tmp_path / "c.npy", IMAGE)
    source = discover(tmp_path)
    assert [(case.id, len(case.label_paths)) for case in source.cases] == [("a", 1), ("b", 1), ("c", 0)]
    assert source.cases[0].paths == (tmp_path / "a.h5",)
    for case in source.cases:
        np.testing.assert_array_equal(read_image(case).array_CZYX[0], IMAGE)
        label = read_label_map(case)
        assert label is None or np.array_equal(label.array_CZYX[0], LABEL)


def test_label_files_of_one_array_need_no_name_in_them(tmp_path: Path) -> None:
    write_dataset_json(tmp_path, labels={"background": 0, "liver": 1})
    for folder, array in (("images", IMAGE), ("labels", LABEL)):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "a.npy", array)
        np.savez(tmp_path / folder / "b.npz", array)
    for case in discover(tmp_path).cases:
        label = read_label_map(case)
        assert label is not None
        np.testing.assert_array_equal(label.array_CZYX[0], LABEL)


def test_a_file_that_cannot_be_opened_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK no")
    (tmp_path / "b.npz").touch()
    np.save(tmp_path / "c.npy", IMAGE)
    problems = [case.problem for case in discover(tmp_path).cases]
    assert ["damaged" in problem for problem in problems] == [True, True, False]
