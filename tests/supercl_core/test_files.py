"""Files and folders are whole or absent, whatever stops the writer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from supercl_core.files import atomic_file, replace_folder, wip_path, write_json, write_text


def test_file_replaces_the_older_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for text in ("first", "größer"):
        write_text(tmp_path / "deep" / "x.txt", text)
        assert (tmp_path / "deep" / "x.txt").read_text(encoding="utf-8") == text
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["x.txt"]


def test_an_error_while_writing_keeps_the_older_file(tmp_path: Path) -> None:
    write_text(tmp_path / "x.nii.gz", "old")

    def write_half() -> None:
        with atomic_file(tmp_path / "x.nii.gz") as wip:
            assert wip.name.endswith(".nii.gz")
            assert wip.parent == tmp_path
            wip.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert (tmp_path / "x.nii.gz").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.nii.gz"]


def test_json_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1, None]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, None]}


def test_folder_replaces_the_older_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    for name in ("first", "second"):
        wip = wip_path(tmp_path / "out")
        wip.mkdir()
        (wip / name).touch()
        replace_folder(wip, target)
        assert [file.name for file in target.iterdir()] == [name]
        assert not wip.exists()
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"]
    assert [file.name for file in tmp_path.iterdir()] == ["deep"]


def test_wip_is_a_sibling(tmp_path: Path) -> None:
    assert wip_path(tmp_path / "a.zarr") == tmp_path / "a.zarr.wip"
