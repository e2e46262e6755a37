"""Writing: whole or absent, only what the schema declares, and shards in the order the map needs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from supercl_core import cache_writer
from supercl_core.cache_reader import open_cache
from supercl_core.cases import CaseRow
from supercl_core.errors import SuperCLError
from supercl_core.files import wip_path
from supercl_core.schema import ASP_GRID

ROW = CaseRow(
    id="one",
    source="one.nii.gz",
    shape=(1, 2, 3, 4),
    image_dtype="int16",
    superpixels_dtype="uint8",
    num_superpixels=1,
    statistics=((0.0, 0.0, 1.0, 1.0, 0.5, 0.5),),
)


def arrays(fill: int = 7) -> dict[str, np.ndarray]:
    return {
        "image": np.full((1, 2, 3, 4), fill, np.int16),
        "superpixels": np.zeros((2, 3, 4), np.uint8),
        "asp": np.ones((2, ASP_GRID, ASP_GRID), np.float16),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    cache_writer.create_cache(
        tmp_path / "cache.zarr", {"name": "x", "channel_names": ["0"], "class_names": []}
    )
    return tmp_path / "cache.zarr"


def test_new_cache_is_not_complete(path: Path) -> None:
    attributes: Any = zarr.open_group(path, mode="r").attrs["supercl"]
    assert attributes["complete"] is False
    cache_writer.set_root_attributes(path, {"complete": True})
    attributes = zarr.open_group(path, mode="r").attrs["supercl"]
    assert (attributes["complete"], attributes["name"]) == (True, "x")


def test_a_case_replaces_the_older_one_and_leaves_nothing_beside_it(path: Path) -> None:
    for fill in (7, 8):
        cache_writer.write_case(path, ROW, arrays(fill), attributes={"largest_error": 0.0})
        committed = cache_writer.committed_case(path, "one")
        assert committed is not None
        assert CaseRow.from_dict(committed["row"]) == ROW
    stored: Any = zarr.open_group(path, mode="r")["cases/one/image"]
    assert (stored[:] == 8).all()
    assert sorted(entry.name for entry in (path / "cases").iterdir()) == ["one", "zarr.json"]
    assert cache_writer.committed_case(path, "two") is None


def test_a_half_written_case_of_a_killed_run_is_replaced(path: Path) -> None:
    half = wip_path(path) / "one" / "image"
    half.mkdir(parents=True)
    (half / "rubbish").write_text("x")
    cache_writer.write_case(path, ROW, arrays(), attributes={})
    assert not list((path / "cases" / "one").rglob("rubbish"))


def test_a_run_killed_between_the_two_renames_leaves_nothing_foreign_in_the_cache(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replacing takes two renames; whatever stops the process between them, `cases/` holds cases only."""
    cache_writer.write_case(path, ROW, arrays(), attributes={})
    rename, renamed = Path.rename, []

    def killed_at_the_second(self: Path, target: Path) -> Path:
        renamed.append(target)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        cache_writer.write_case(path, ROW, arrays(8), attributes={})
    assert {entry.name for entry in (path / "cases").iterdir()} <= {"one", "zarr.json"}


@pytest.mark.parametrize(
    ("name", "array"),
    [("image", np.zeros((1, 2, 3, 4), np.int64)), ("superpixels", np.zeros((1, 2, 3, 4), np.uint8))],
)
def test_undeclared_dtype_or_axes_are_a_programming_error(path: Path, name: str, array: np.ndarray) -> None:
    with pytest.raises(AssertionError, match=name):
        cache_writer.write_case(path, ROW, {**arrays(), name: array}, attributes={})
    assert cache_writer.committed_case(path, "one") is None


def test_shards_in_another_order_are_refused_before_the_case_is_committed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = cache_writer._check_offsets

    def swapped(file: Path, slice_bytes: int) -> None:
        content = file.read_bytes()
        index = len(content) - 4 - 2 * 16
        file.write_bytes(
            content[:index] + content[index + 16 : index + 32] + content[index : index + 16] + content[-4:]
        )
        check(file, slice_bytes)

    monkeypatch.setattr(cache_writer, "_check_offsets", swapped)
    with pytest.raises(SuperCLError, match="another order"):
        cache_writer.write_case(path, ROW, arrays(), attributes={})
    assert cache_writer.committed_case(path, "one") is None


def test_tables_and_labels_are_replaced_as_a_whole(path: Path) -> None:
    cache_writer.write_case(path, ROW, arrays(), attributes={})
    failed = CaseRow(id="two", state="failed", reason="no volume")
    cache_writer.write_tables(path, [ROW, failed], num_channels=1)
    for components in (2, 1):
        labels = np.arange(2, dtype=np.int32)[None] % components
        parts = {"ccl": labels, "nearest": labels, "similarity": labels.astype(np.float32)}
        cache_writer.write_weak_labels(path, "mine", parts, {"num_components": [components]})
    cache_writer.set_root_attributes(path, {"complete": True, "default_weak_labels": "mine"})
    cache = open_cache(path)
    assert cache.rows == [dataclasses.replace(ROW), failed]
    np.testing.assert_array_equal(cache.slice_case, [0, 0])
    np.testing.assert_array_equal(cache.slice_position, np.float32([0.5, 1]))
    assert cache.weak_labels().num_components == (1,)
    assert not wip_path(path).exists() or not list(wip_path(path).rglob("zarr.json"))
    shutil.rmtree(path)
