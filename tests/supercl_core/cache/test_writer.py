"""Writing: whole or absent, only what the schema declares, and shards in the order the map needs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import made_caches
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from supercl_core.cache import writer as cache_writer
from supercl_core.cache.cases import CaseRow
from supercl_core.cache.reader import open_cache
from supercl_core.cache.schema import ASP_GRID
from supercl_core.errors import CacheError
from supercl_core.files import wip_path
from supercl_core.locks import hold, lock_path

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


ROOT: dict[str, Any] = {
    "name": "x",
    "channel_names": ["0"],
    "class_names": [],
    "config": {},
    "kernels": "1",
    "config_digest": "d",
    "default_weak_labels": "",
    "provenance": {},
}
CASE: dict[str, Any] = {
    "key": "k",
    "provenance": {"source_stamp": [[1, 2, 3]]},
    "geometry": {},
    "orientation": "LPS",
    "largest_error": 0.5,
    "num_clipped": 0,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    cache_writer.create_cache(tmp_path / "cache.zarr", ROOT)
    return tmp_path / "cache.zarr"


def write(path: Path, fill: int = 7, *, token: str = "") -> CaseRow:
    return cache_writer.write_case(path, ROW, arrays(fill), attributes=CASE, token=token)


def test_new_cache_is_not_complete(path: Path) -> None:
    attributes: Any = zarr.open_group(path, mode="r").attrs["supercl"]
    assert attributes["complete"] is False
    cache_writer.set_root_attributes(path, {"complete": True})
    attributes = zarr.open_group(path, mode="r").attrs["supercl"]
    assert (attributes["complete"], attributes["name"]) == (True, "x")


def test_a_case_replaces_the_older_one_and_leaves_nothing_beside_it(path: Path) -> None:
    for fill in (7, 8):
        row = write(path, fill)
        committed = cache_writer.committed_case(path, "one")
        assert committed is not None
        assert CaseRow.from_dict(committed["row"]) == row
        assert dataclasses.replace(row, content_digest="") == ROW
    stored: Any = zarr.open_group(path, mode="r")["cases/one/image"]
    assert (stored[:] == 8).all()
    assert sorted(entry.name for entry in (path / "cases").iterdir()) == ["one", "zarr.json"]
    assert cache_writer.committed_case(path, "two") is None


def test_a_half_written_case_of_a_killed_run_is_replaced(path: Path) -> None:
    half = wip_path(path) / "one" / "image"
    half.mkdir(parents=True)
    (half / "rubbish").write_text("x")
    write(path)
    assert not list((path / "cases" / "one").rglob("rubbish"))


def test_a_run_killed_between_the_two_renames_leaves_nothing_foreign_in_the_cache(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replacing takes two renames; whatever stops the process between them, `cases/` holds cases only."""
    write(path)
    rename, renamed = Path.rename, []

    def killed_at_the_second(self: Path, target: Path) -> Path:
        renamed.append(target)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        write(path, 8)
    assert {entry.name for entry in (path / "cases").iterdir()} <= {"one", "zarr.json"}


@pytest.mark.parametrize(
    ("name", "array"),
    [("image", np.zeros((1, 2, 3, 4), np.int64)), ("superpixels", np.zeros((1, 2, 3, 4), np.uint8))],
)
def test_undeclared_dtype_or_axes_are_a_programming_error(path: Path, name: str, array: np.ndarray) -> None:
    with pytest.raises(AssertionError, match=name):
        cache_writer.write_case(path, ROW, {**arrays(), name: array}, attributes={})
    assert cache_writer.committed_case(path, "one") is None


def assert_as_zarr_writes(folder: Path, array: np.ndarray, written_by_zarr: Path) -> None:
    """Files of one array: the same ones, with the same bytes, as Zarr makes of the same metadata."""
    theirs = zarr.open_array(folder, mode="r")
    stored = zarr.create_array(
        written_by_zarr,
        shape=theirs.shape,
        dtype=theirs.dtype,
        chunks=theirs.chunks,
        shards=theirs.shards,
        serializer=theirs.serializer,
        compressors=theirs.compressors,
        fill_value=theirs.fill_value,
        dimension_names=theirs.metadata.dimension_names,  # type: ignore[union-attr]
        config={"write_empty_chunks": True},
    )
    stored[...] = array
    files = [
        sorted(f.relative_to(top) for f in top.rglob("*") if f.is_file()) for top in (folder, written_by_zarr)
    ]
    assert files[0] == files[1]
    for file in files[0]:
        assert (folder / file).read_bytes() == (written_by_zarr / file).read_bytes(), file


@given(
    image=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(["int16", "uint16", "float32"]),
    ids=st.sampled_from(["uint8", "uint16"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=15, deadline=None)
def test_files_of_a_case_are_those_that_zarr_writes(
    tmp_path_factory: pytest.TempPathFactory, image: tuple[int, ...], dtype: str, ids: str, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(seed)
    content = {
        "image": random.integers(0, 99, image).astype(dtype),
        "superpixels": random.integers(0, 99, image[1:]).astype(ids),
        "asp": random.random((image[1], ASP_GRID, ASP_GRID)).astype(np.float16),
        "ground_truth": np.zeros(image[1:], np.uint8),  # all fill value: Zarr would leave such chunks out
    }
    cache_writer.create_cache(folder / "cache.zarr", ROOT)
    cache_writer.write_case(folder / "cache.zarr", ROW, content, attributes={})
    case = folder / "cache.zarr" / "cases" / "one"
    names = {"image": "image", "asp": "asp"} | {
        name: f"labels/{name}/0" for name in ("superpixels", "ground_truth")
    }
    for name, array in content.items():
        np.testing.assert_array_equal(zarr.open_array(case / names[name], mode="r")[...], array)
        assert_as_zarr_writes(case / names[name], array, folder / name)


def test_a_view_in_another_order_is_written_as_its_copy_is(path: Path) -> None:
    """Channels that were the last axis of the file, and big-endian values."""
    image = np.random.default_rng(0).integers(-999, 999, (2, 3, 4, 1)).astype(">i2")
    cache_writer.write_case(path, ROW, {**arrays(), "image": np.moveaxis(image, -1, 0)}, attributes={})
    stored: Any = zarr.open_array(path / "cases/one/image", mode="r")
    np.testing.assert_array_equal(stored[...], np.moveaxis(image, -1, 0))


def test_groups_of_a_case_are_those_that_zarr_writes(path: Path, tmp_path: Path) -> None:
    row = write(path)
    case: Any = zarr.open_group(path / "cases/one", mode="r")
    for name in ("", "labels", "labels/superpixels"):
        ours = case[name] if name else case
        zarr.create_group(tmp_path / "theirs", attributes=dict(ours.attrs), overwrite=True)
        written = (path / "cases/one" / name / "zarr.json").read_text()
        assert written == (tmp_path / "theirs" / "zarr.json").read_text()
    stored: Any = case.attrs["supercl"]
    assert len(stored.pop("metadata_digest")) == len(stored.pop("shards_digest")) == 64
    assert stored == json.loads(json.dumps({**CASE, "row": row.as_dict()}))
    assert sorted(case["labels"].group_keys()) == ["superpixels"]


def test_large_shards_are_on_the_disk_before_their_case_is_committed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        assert not (path / "cases/one").exists()
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    large = np.random.default_rng(0).integers(0, 9, (1, 2, 1024, 512)).astype(np.int16)
    cache_writer.write_case(path, ROW, {**arrays(), "image": large}, attributes={})
    assert synced == [large.nbytes + 2 * (4 + 16) + 4]  # whole, and the small ones are left to the system
    stored: Any = zarr.open_array(path / "cases/one/image", mode="r")
    np.testing.assert_array_equal(stored[...], large)


def test_a_flipped_bit_is_found_by_zarr(path: Path) -> None:
    write(path)
    file = path / "cases/one/image/c/0/0/0/0"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    stored: Any = zarr.open_array(path / "cases/one/image", mode="r")
    with pytest.raises(ValueError, match="checksum"):
        stored[...]


def test_tables_and_labels_are_replaced_as_a_whole(path: Path) -> None:
    row = write(path)
    failed = CaseRow(id="two", state="failed", reason="no volume")
    cache_writer.write_tables(path, [row, failed], num_channels=1)
    for components in (2, 1):
        labels = np.arange(2, dtype=np.int32)[None] % components
        parts = {"ccl": labels, "nearest": labels, "similarity": labels.astype(np.float32)}
        more = made_caches.label_attributes(path, [components])
        cache_writer.write_weak_labels(path, "mine", parts, more)
    cache_writer.set_root_attributes(path, {"complete": True, "default_weak_labels": "mine"})
    cache = open_cache(path)
    assert cache.rows == [row, failed]
    np.testing.assert_array_equal(cache.slice_case, [0, 0])
    np.testing.assert_array_equal(cache.slice_position, np.float32([0.5, 1]))
    assert cache.weak_labels().num_components == (1,)
    assert not wip_path(path).exists() or not list(wip_path(path).rglob("zarr.json"))
    shutil.rmtree(path)


def test_content_digest_is_that_of_the_content_alone(path: Path, tmp_path: Path) -> None:
    same, other = write(path), write(path, 8)
    cache_writer.create_cache(tmp_path / "b.zarr", ROOT)
    named = dataclasses.replace(ROW, id="another", digest="other files", source="b.nii")
    row = cache_writer.write_case(tmp_path / "b.zarr", named, arrays(), attributes={**CASE, "key": "k2"})
    assert row.content_digest == same.content_digest != other.content_digest


@pytest.mark.parametrize("part", ["image", "asp", "labels/superpixels/0"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer"])
def test_a_case_with_a_missing_or_cut_shard_is_not_committed(path: Path, part: str, damage: str) -> None:
    write(path)
    [file] = [entry for entry in (path / "cases/one" / part / "c").rglob("0") if entry.is_file()]
    if damage == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[:-1] if damage == "shorter" else content + b"x")
    assert cache_writer.committed_case(path, "one") is None


@pytest.mark.parametrize(
    ("node", "before", "after"),
    [
        ("", '"orientation": "LPS"', '"orientation": "RAS"'),
        ("", '"key": "k"', '"key": "l"'),
        ("", '"z"', '"y"'),
        ("image", '"int16"', '"uint16"'),
        ("labels", '"superpixels"', '"superpixel2"'),
        ("labels/superpixels/0", '"uint8"', '"uint16"'),
        ("", "{", "["),
    ],
)
def test_a_case_with_changed_metadata_is_not_committed(
    path: Path, node: str, before: str, after: str
) -> None:
    write(path)
    file = path / "cases/one" / node / "zarr.json"
    text = file.read_text()
    file.write_text(text.replace(before, after, 1))
    assert file.read_text() != text
    assert cache_writer.committed_case(path, "one") is None


def test_a_restamped_case_is_the_same_case(path: Path) -> None:
    write(path)
    before = cache_writer.committed_case(path, "one")
    assert before is not None
    cache_writer.restamp_case(path, "one", {"source_stamp": [[4, 5, 6]]})
    after = cache_writer.committed_case(path, "one")
    assert after == {**before, "provenance": {"source_stamp": [[4, 5, 6]]}}


def test_a_lost_root_is_written_again_around_its_cases(path: Path) -> None:
    write(path)
    (path / "zarr.json").unlink()
    cache_writer.create_cache(path, ROOT)
    assert cache_writer.committed_case(path, "one") is not None


def test_who_lost_the_lock_commits_nothing(path: Path) -> None:
    with hold(path) as token:
        write(path, token=token)
        shutil.rmtree(lock_path(path))  # somebody else's doing
        with pytest.raises(CacheError, match="lock of the cache was lost"):
            write(path, 8, token=token)
    stored: Any = zarr.open_group(path, mode="r")["cases/one/image"]
    assert (stored[:] == 7).all()


def test_cases_that_the_table_does_not_name_are_removed(path: Path) -> None:
    write(path)
    (path / "cases" / "remains" / "image").mkdir(parents=True)
    cache_writer.remove_cases(path, keep={"one"})
    assert sorted(entry.name for entry in (path / "cases").iterdir()) == ["one", "zarr.json"]
    cache_writer.remove_cases(path, keep={"two"})
    assert sorted(entry.name for entry in (path / "cases").iterdir()) == ["zarr.json"]
