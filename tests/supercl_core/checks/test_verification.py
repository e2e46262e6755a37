"""Verification finds every damage, names it, and finds none in a cache that is whole."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import made_caches
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import weak_labels
from supercl_core.cache.reader import open_cache
from supercl_core.cache.schema import CASE_ARRAYS
from supercl_core.cache.writer import (
    set_root_attributes,
    write_case,
    write_descriptors,
    write_tables,
    write_weak_labels,
)
from supercl_core.cache.zarr_files import chunk_path, metadata_digest, read_node
from supercl_core.checks import case_check, verification
from supercl_core.checks.verification import Damage, Verification, num_committed, verify
from supercl_core.errors import CacheError, SuperCLError

CASE = "case_b"  # float32, so that an image can hold what is no number
SHARDS = [chunk_path(Path(spec.path.format(case=CASE)), len(spec.axes)).as_posix() for spec in CASE_ARRAYS]
IMAGE, SUPERPIXELS, GROUND_TRUTH, ASP = SHARDS


def check(path: Path, *, num_workers: int = 1) -> Verification:
    return verify(path, num_workers=num_workers, on_case=lambda: None)


def found(path: Path) -> list[tuple[str, str]]:
    """Where damage was found, and what it is."""
    return [(damage.where, damage.problem) for damage in check(path).damages]


def places(path: Path) -> set[str]:
    return {where for where, _ in found(path)}


def flip(file: Path, position: int, mask: int = 1) -> None:
    with file.open("r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ mask]))


@pytest.fixture(scope="module")
def shared_copy(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy for tests that put back what they change."""
    return Path(shutil.copytree(cache_path, tmp_path_factory.mktemp("verify") / "shared.zarr"))


def rewritten(path: Path, row_changes: dict[str, Any], **changed: np.ndarray) -> None:
    """Write CASE again with other arrays or another row, everything sealed as if it were right."""
    cache = open_cache(path)
    case = cache.case(CASE)
    truth = case.ground_truth_ZYX
    assert truth is not None
    arrays = {
        "image": np.moveaxis(case.image_ZCYX, 1, 0),
        "superpixels": case.superpixels_ZYX,
        "ground_truth": truth,
        "asp": case.asp_ZGG,
    }
    arrays = {name: np.array(changed.get(name, array)) for name, array in arrays.items()}
    row = dataclasses.replace(case.row, **row_changes)
    row = write_case(path, row, arrays, attributes=case.attributes)
    rows = [row if row.id == other.id else other for other in cache.rows]
    write_tables(path, rows, num_channels=cache.num_channels)


# ---------------------------------------------------------------- what is whole


def test_a_whole_cache_has_no_damage(cache_path: Path) -> None:
    cache = open_cache(cache_path)
    calls: list[None] = []
    result = verify(cache_path, num_workers=1, on_case=lambda: calls.append(None))
    assert result.damages == ()
    assert result.is_complete
    assert (result.num_cases, result.num_slices) == (4, cache.num_slices) == (len(calls), 23)
    groups = [cache_path / name for name in ("cases", "table", "slices", "weak_labels")]
    below = [file for group in groups for file in group.rglob("*") if file.is_file()]
    uncounted = {cache_path / "cases/zarr.json", cache_path / "weak_labels/zarr.json"}
    assert result.num_bytes == sum(file.stat().st_size for file in below if file not in uncounted)
    assert num_committed(cache_path) == 4


def test_processes_find_what_one_finds(cache_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in (IMAGE, SUPERPIXELS):
        flip(cache_copy / shard, 100)
    alone = check(cache_copy)
    monkeypatch.setattr(verification, "ALONE_S", 0.0)
    together = check(cache_copy, num_workers=2)
    assert dataclasses.replace(together, seconds=alone.seconds) == alone
    assert len(alone.damages) == 2


def test_a_dead_process_is_an_error_and_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "ALONE_S", 0.0)

    class Deadly:
        def __reduce__(self) -> tuple[Any, ...]:
            return os._exit, (1,)

    job: Any = (Deadly(), None)
    with pytest.raises(SuperCLError, match="A process of the verification died"):
        list(verification._reports([job, job], 2))


def test_small_pieces_give_the_same(cache_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(cache_copy / SUPERPIXELS, (cache_copy / SUPERPIXELS).stat().st_size // 2)
    whole = check(cache_copy)
    for piece_bytes in (1, 1500):
        monkeypatch.setattr(case_check, "PIECE_BYTES", piece_bytes)
        assert check(cache_copy).damages == whole.damages


# ---------------------------------------------------------------- bytes


@given(st.sampled_from(SHARDS), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_any_byte_of_any_shard(shared_copy: Path, shard: str, position: float, mask: int) -> None:
    file = shared_copy / shard
    byte = int(position * file.stat().st_size)
    flip(file, byte, mask)
    try:
        damages = check(shared_copy).damages
    finally:
        flip(file, byte, mask)
    assert [(damage.case_id, damage.where) for damage in damages] == [(CASE, shard)]


def files_of_each_kind(path: Path) -> Iterator[str]:
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and (not name.startswith("cases/case") or name.startswith(f"cases/{CASE}/")):
            yield name


def test_the_first_middle_and_last_byte_of_every_file(shared_copy: Path) -> None:
    names = list(files_of_each_kind(shared_copy))
    assert len(names) >= 60
    for name in names:
        if name == "zarr.json":
            continue  # without the root there is nothing to check by: see below
        file = shared_copy / name
        size = file.stat().st_size
        # The middle of the metadata of a case or a set may lie in its provenance, which is not sealed.
        has_provenance = name in (f"cases/{CASE}/zarr.json", "weak_labels/intensity/zarr.json")
        for position in {0, size // 2, size - 1} - ({size // 2} if has_provenance else set()):
            flip(file, position)
            try:
                # Metadata that is still JSON is found by the digest, which lies with the case.
                sealed = {f"cases/{CASE}/zarr.json"} if name.endswith("zarr.json") else set()
                assert places(shared_copy) & {name, *sealed}, (name, position)
            finally:
                flip(file, position)
    assert found(shared_copy) == []


@pytest.mark.parametrize("name", [*SHARDS, f"cases/{CASE}/zarr.json", "table/shape/c/0/0", "slices/z/c/0"])
def test_truncated_lengthened_missing_and_replaced_files(shared_copy: Path, name: str) -> None:
    file = shared_copy / name
    content = file.read_bytes()
    for changed in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
        if name.endswith("zarr.json") and changed == content + b"\0":
            continue
        file.write_bytes(changed)
        assert name in places(shared_copy)
    file.unlink()
    assert (name, "missing") in found(shared_copy)
    file.symlink_to("nowhere")
    assert name in places(shared_copy)
    file.unlink()
    os.mkfifo(file)  # to open it would wait for ever
    assert name in places(shared_copy)
    file.unlink()
    file.mkdir()
    assert any(where.startswith(name) for where in places(shared_copy))
    file.rmdir()
    file.write_bytes(content)
    assert found(shared_copy) == []


def test_a_shard_that_is_damaged_throughout(cache_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few problems of one file are enough."""
    monkeypatch.setattr(case_check, "MOST_PROBLEMS", 3)
    (cache_copy / IMAGE).write_bytes(b"U" * (cache_copy / IMAGE).stat().st_size)
    problems = [f"slice {z}: the content does not fit its checksum" for z in range(3)]
    problems.append("and more: the rest of the file was not looked at")
    assert found(cache_copy) == [(IMAGE, problem) for problem in problems]


# ---------------------------------------------------------------- shards


def shard_parts(path: Path, shard: str) -> tuple[np.ndarray, np.ndarray]:
    """The slices of a shard with their checksums, (z, bytes); and its index, (z, 2)."""
    num_slices = open_cache(path).case(CASE).row.shape[1]
    content = (path / shard).read_bytes()
    index_bytes = num_slices * 16
    slices = np.frombuffer(content[: -index_bytes - 4], np.uint8).reshape(num_slices, -1)
    return slices.copy(), np.frombuffer(content[-index_bytes - 4 : -4], "<u8").reshape(num_slices, 2).copy()


def write_shard(path: Path, shard: str, slices: np.ndarray, index: np.ndarray) -> None:
    checksum = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    (path / shard).write_bytes(slices.tobytes() + index.tobytes() + checksum)


@pytest.mark.parametrize("shard", SHARDS)
def test_swapped_slices_with_an_index_that_says_so(cache_copy: Path, shard: str) -> None:
    """Zarr reads the right slices from such a shard; the memory map does not."""
    slices, index = shard_parts(cache_copy, shard)
    slices[[0, 1]], index[[0, 1]] = slices[[1, 0]], index[[1, 0]]
    write_shard(cache_copy, shard, slices, index)
    problem = "the index is not that of slices in order, or does not fit its checksum"
    assert (shard, problem) in found(cache_copy)


@pytest.mark.parametrize("shard", SHARDS)
def test_swapped_slices_with_their_checksums(cache_copy: Path, shard: str) -> None:
    slices, index = shard_parts(cache_copy, shard)
    slices[[0, 1]] = slices[[1, 0]]
    write_shard(cache_copy, shard, slices, index)
    assert found(cache_copy) == [(f"cases/{CASE}/zarr.json", "`shards_digest` is not that of the arrays")]


@pytest.mark.parametrize("value", [2**40, 2**64 - 1, 1])
@pytest.mark.parametrize("column", [0, 1])
def test_an_index_that_points_elsewhere(cache_copy: Path, column: int, value: int) -> None:
    slices, index = shard_parts(cache_copy, IMAGE)
    index[2, column] = value
    write_shard(cache_copy, IMAGE, slices, index)
    assert places(cache_copy) == {IMAGE}


def test_shards_of_two_cases_swapped(cache_copy: Path) -> None:
    one, other = (cache_copy / SUPERPIXELS.replace(CASE, case_id) for case_id in ("case_a", "case_c"))
    content = one.read_bytes()
    assert len(content) == other.stat().st_size
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert {damage.case_id for damage in check(cache_copy).damages} == {"case_a", "case_c"}


# ---------------------------------------------------------------- values with valid checksums


def superpixels_of(path: Path) -> np.ndarray:
    return np.array(open_cache(path).case(CASE).superpixels_ZYX)


def test_superpixels_with_a_gap(cache_copy: Path) -> None:
    superpixels_ZYX = superpixels_of(cache_copy)
    slice_YX = superpixels_ZYX[2]
    slice_YX[slice_YX == 3] = slice_YX.max()
    rewritten(cache_copy, {}, superpixels=superpixels_ZYX)
    assert (SUPERPIXELS, "slice 2: superpixel 3 is missing") in found(cache_copy)


def test_a_superpixel_in_two_pieces(cache_copy: Path) -> None:
    superpixels_ZYX = superpixels_of(cache_copy)
    last = int(superpixels_ZYX[4, -1, -1])
    superpixels_ZYX[4, 0, 0] = last
    rewritten(cache_copy, {}, superpixels=superpixels_ZYX)
    assert (SUPERPIXELS, f"slice 4: superpixel {last} is in 2 pieces") in found(cache_copy)


def test_another_number_of_superpixels(cache_copy: Path) -> None:
    largest = open_cache(cache_copy).case(CASE).row.num_superpixels
    rewritten(cache_copy, {"num_superpixels": largest + 1})
    assert found(cache_copy) == [
        (SUPERPIXELS, f"expected {largest + 1} superpixels at most in a slice, found {largest}")
    ]
    rewritten(cache_copy, {"num_superpixels": largest - 1})
    assert any(f"where there are {largest - 1} at most" in problem for _, problem in found(cache_copy))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_that_is_no_number(cache_copy: Path, value: float) -> None:
    image_CZYX = np.moveaxis(np.array(open_cache(cache_copy).case(CASE).image_ZCYX), 1, 0)
    image_CZYX[0, 5, 3, 2] = value
    rewritten(cache_copy, {}, image=image_CZYX)
    assert found(cache_copy) == [(IMAGE, "slice 5: a value that is no finite number")]


@pytest.mark.parametrize("value", [np.nan, -0.01, 1.01, np.inf])
def test_an_asp_map_beyond_its_range(cache_copy: Path, value: float) -> None:
    asp_ZGG = np.array(open_cache(cache_copy).case(CASE).asp_ZGG)
    asp_ZGG[0, 31, 31] = value
    rewritten(cache_copy, {}, asp=asp_ZGG)
    assert found(cache_copy) == [(ASP, "slice 0: a value outside 0..1")]


def test_a_signalling_nan(cache_copy: Path) -> None:
    """Comparing it makes NumPy warn, and a warning is an error here."""
    asp_ZGG = np.array(open_cache(cache_copy).case(CASE).asp_ZGG)
    asp_ZGG.view(np.uint16)[2, 0, 0] = 0x7C01
    rewritten(cache_copy, {}, asp=asp_ZGG)
    assert found(cache_copy) == [(ASP, "slice 2: a value outside 0..1")]


def test_a_class_that_is_not_declared(cache_copy: Path) -> None:
    truth_ZYX = np.array(open_cache(cache_copy).case(CASE).ground_truth_ZYX)
    truth_ZYX[1, 0, 0] = 3
    rewritten(cache_copy, {}, ground_truth=truth_ZYX)
    assert found(cache_copy) == [(GROUND_TRUTH, "slice 1: a class above 2")]


# ---------------------------------------------------------------- metadata of a case


def change_case(path: Path, change: Callable[[dict[str, Any]], object], *, sealed: bool) -> None:
    """Change the metadata of CASE, and its digest too if `sealed`."""
    folder = path / "cases" / CASE
    node = read_node(folder)
    change(node["attributes"])
    if sealed:
        nodes = {
            file.parent.relative_to(folder).as_posix().removeprefix("."): read_node(file.parent)
            for file in folder.rglob("zarr.json")
        }
        node["attributes"]["supercl"]["metadata_digest"] = metadata_digest({**nodes, "": node})
    (folder / "zarr.json").write_text(json.dumps(node))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda a: a["supercl"].update(key="0" * 64), "`key` belongs to other settings or another source"),
        (lambda a: a["supercl"]["row"].update(id="case_a"), "holds the row of another case: 'case_a', done"),
        (lambda a: a["supercl"]["row"].update(source="x"), "`row` differs from the row in `table`"),
        (
            lambda a: a["supercl"]["row"].update(shape=[0, 1, 2, 3]),
            "a row whose shape, dtypes and statistics",
        ),
        (
            lambda a: a["supercl"].pop("orientation"),
            "expected the attribute orientation: string, found nothing",
        ),
        (lambda a: a.pop("ome"), "expected metadata of OME-NGFF 0.5, found none"),
        (lambda a: a.update(ome=3), "expected metadata of OME-NGFF 0.5, found none"),
    ],
)
def test_metadata_that_is_sealed_but_wrong(
    cache_copy: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    change_case(cache_copy, change, sealed=True)
    where = f"cases/{CASE}/zarr.json"
    assert [p for w, p in found(cache_copy) if w == where and p.startswith(problem)]
    assert all(damage.case_id == CASE for damage in check(cache_copy).damages)


def test_metadata_that_is_not_sealed(cache_copy: Path) -> None:
    change_case(cache_copy, lambda a: a["supercl"]["provenance"].update(more=1), sealed=False)
    assert found(cache_copy) == []
    change_case(cache_copy, lambda a: a["supercl"].update(orientation="other"), sealed=False)
    problem = "the metadata of the case is not what `metadata_digest` was made of"
    assert found(cache_copy) == [(f"cases/{CASE}/zarr.json", problem)]


def test_an_array_that_says_something_else(cache_copy: Path) -> None:
    file = cache_copy / "cases" / CASE / "labels/superpixels/0/zarr.json"
    node = json.loads(file.read_text())
    for key, value in (
        ("shape", [6, 24, 19]),
        ("shape", [6, 24, 20.0]),
        ("data_type", "uint16"),
        ("codecs", []),
    ):
        file.write_text(json.dumps({**node, key: value}))
        assert f"cases/{CASE}/labels/superpixels/0/zarr.json" in places(cache_copy)


# ---------------------------------------------------------------- files and folders


@pytest.mark.parametrize(
    ("name", "case_id"),
    [
        ("notes.txt", ""),
        ("cases/notes.txt", ""),
        (f"cases/{CASE}/notes.txt", CASE),
        (f"cases/{CASE}/image/c/0/0/0/1", CASE),
        (f"cases/{CASE}/labels/other/notes.txt", CASE),
        ("table/notes.txt", ""),
        ("slices/z/c/1", ""),
        ("weak_labels/notes.txt", ""),
        ("weak_labels/intensity/notes.txt", ""),
    ],
)
def test_foreign_files(cache_copy: Path, name: str, case_id: str) -> None:
    (cache_copy / name).parent.mkdir(exist_ok=True)
    (cache_copy / name).write_text("x")
    assert check(cache_copy).damages == (
        Damage(case_id=case_id, where=name, problem="not a part of a cache"),
    )


def test_an_empty_folder_is_foreign(cache_copy: Path) -> None:
    (cache_copy / "cases" / CASE / "labels" / "more").mkdir()
    assert found(cache_copy) == [(f"cases/{CASE}/labels/more", "not a part of a cache")]


def test_a_missing_case_and_one_that_is_not_listed(cache_copy: Path) -> None:
    (cache_copy / "cases" / CASE).rename(cache_copy / "cases" / "case_x")
    assert check(cache_copy).damages == (
        Damage(case_id="case_x", where="cases/case_x", problem="not listed as done in `table`"),
        Damage(case_id=CASE, where=f"cases/{CASE}", problem="missing"),
    )


def test_the_folders_of_two_cases_swapped(cache_copy: Path) -> None:
    cases = cache_copy / "cases"
    (cases / CASE).rename(cases / "away")
    (cases / "case_a").rename(cases / CASE)
    (cases / "away").rename(cases / "case_a")
    assert {damage.case_id for damage in check(cache_copy).damages} == {"case_a", CASE}


def test_a_file_that_the_system_cannot_read(cache_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> dict[str, int]:
        raise OSError(5, "Input/output error", str(folder / "image"))

    monkeypatch.setattr(case_check, "list_files", fail)
    assert (f"cases/{CASE}/image", "cannot be read: Input/output error") in found(cache_path)


# ---------------------------------------------------------------- tables and root


def test_a_stale_table(cache_copy: Path) -> None:
    cache = open_cache(cache_copy)
    rows = [dataclasses.replace(row, image_scale=2.0) if row.id == CASE else row for row in cache.rows]
    write_tables(cache_copy, rows, num_channels=1)
    assert found(cache_copy) == [(f"cases/{CASE}/zarr.json", "`row` differs from the row in `table`")]


def test_a_case_that_the_table_calls_failed(cache_copy: Path) -> None:
    cache = open_cache(cache_copy)
    rows = [
        dataclasses.replace(row, state="failed", shape=(0, 0, 0, 0), statistics=()) if row.id == CASE else row
        for row in cache.rows
    ]
    write_tables(cache_copy, rows, num_channels=1)
    assert (f"cases/{CASE}", "not listed as done in `table`") in found(cache_copy)


def test_slices_of_another_table(cache_copy: Path) -> None:
    rows = open_cache(cache_copy).rows
    shutil.copytree(cache_copy / "table", cache_copy.parent / "table")
    write_tables(cache_copy, rows[:-1], num_channels=1)
    shutil.rmtree(cache_copy / "table")
    shutil.move(cache_copy.parent / "table", cache_copy / "table")
    assert found(cache_copy) == [("slices", "expected the slices of the cases in `table`, found others")]


def test_cases_are_checked_without_a_table(cache_copy: Path) -> None:
    shutil.rmtree(cache_copy / "table")
    flip(cache_copy / IMAGE, 7)
    assert {IMAGE, "table/zarr.json"} <= places(cache_copy)
    assert check(cache_copy).num_cases == 4


def test_a_root_that_is_not_sealed(cache_copy: Path) -> None:
    node = read_node(cache_copy)
    node["attributes"]["supercl"]["class_names"][0] = "other"
    (cache_copy / "zarr.json").write_text(json.dumps(node))
    assert found(cache_copy) == [("zarr.json", "the metadata is not what `metadata_digest` was made of")]


def test_other_settings_at_the_root(cache_copy: Path) -> None:
    set_root_attributes(cache_copy, {"config_digest": "0" * 64})
    problems = {problem for _, problem in found(cache_copy)}
    assert problems == {"`key` belongs to other settings or another source"}


def test_an_unfinished_cache(cache_copy: Path) -> None:
    set_root_attributes(cache_copy, {"complete": False})
    shutil.rmtree(cache_copy / "table")
    shutil.rmtree(cache_copy / "cases" / "case_a")
    result = check(cache_copy)
    assert (result.damages, result.is_complete, result.num_cases) == ((), False, 3)
    assert result.summary().endswith("no damage; not complete yet, without tables and weak labels")
    flip(cache_copy / SUPERPIXELS, 7)
    assert SUPERPIXELS in places(cache_copy)


def test_no_cache_to_verify(tmp_path: Path, cache_copy: Path) -> None:
    with pytest.raises(CacheError, match="There is no cache here"):
        check(tmp_path)
    with pytest.raises(CacheError, match="too long"):
        check(tmp_path / ("long" * 100))
    set_root_attributes(cache_copy, {"schema_version": 1})
    with pytest.raises(CacheError, match="another schema version"):
        check(cache_copy)
    (cache_copy / "zarr.json").write_text("{")
    with pytest.raises(CacheError, match="damaged"):
        check(cache_copy)


# ---------------------------------------------------------------- weak labels


def test_default_labels_that_are_not_there(cache_copy: Path) -> None:
    set_root_attributes(cache_copy, {"default_weak_labels": "encoder"})
    assert found(cache_copy) == [("zarr.json", "`default_weak_labels` names labels that are not there")]


Labels = dict[str, np.ndarray]


def two_levels(path: Path) -> tuple[Labels, list[int]]:
    """Labels of a cache and, above their six components, a level that merges 0 and 1, 2 and 3, 4 and 5."""
    name = weak_labels(open_cache(path), neighbours="any", make_default=False)
    stored = open_cache(path).weak_labels(name)
    (count,) = stored.num_components
    assert count == 6
    size = stored.ccl.shape[1]
    pairs, halves = np.full(size, -1), np.full(size, np.nan)
    pairs[:6], halves[:6] = [1, 0, 3, 2, 5, 4], 0.5
    labels = {
        "ccl": np.concatenate([stored.ccl, stored.ccl // 2]),
        "nearest": np.concatenate([stored.nearest, pairs[None]]).astype(np.int32),
        "similarity": np.concatenate([stored.similarity, halves[None]]).astype(np.float32),
    }
    return labels, [count, 3]


def write_labels(path: Path, labels: Labels, num_components: list[int]) -> None:
    attributes = made_caches.label_attributes(path, num_components)
    write_weak_labels(path, "intensity", labels, attributes)


def test_labels_of_two_levels(cache_copy: Path) -> None:
    write_labels(cache_copy, *two_levels(cache_copy))
    assert found(cache_copy) == []


def test_labels_of_other_cases_link_no_slices_of_one_case(cache_copy: Path) -> None:
    labels, num_components = two_levels(cache_copy)
    attributes = made_caches.label_attributes(cache_copy, num_components)
    for neighbours, expected in (
        (
            "other-cases",
            [("weak_labels/intensity/nearest", "level 0: a slice is linked to one of its own case")],
        ),
        (
            "all",
            [("weak_labels/intensity/zarr.json", "expected neighbours any or other-cases, found 'all'")],
        ),
    ):
        write_weak_labels(cache_copy, "intensity", labels, {**attributes, "neighbours": neighbours})
        assert found(cache_copy) == expected


def test_descriptors(cache_copy: Path) -> None:
    values = np.random.default_rng(0).random((23, 5), np.float32)
    made_caches.write_descriptors(cache_copy, "encoder", values)
    assert found(cache_copy) == []
    made_caches.write_descriptors(cache_copy, "encoder", values[1:])
    assert found(cache_copy) == [("descriptors/encoder/values", "expected 23 rows, found 22")]
    made_caches.write_descriptors(cache_copy, "encoder", np.where(values > 0.5, np.nan, values))
    assert found(cache_copy) == [("descriptors/encoder/values", "values that are not finite")]
    made_caches.write_descriptors(cache_copy, "encoder", values)
    chunk = cache_copy / "descriptors/encoder/values/c/0/0"
    of_encoder = chunk.read_bytes()
    made_caches.write_descriptors(cache_copy, "encoder", 1 - values)
    chunk.write_bytes(of_encoder)
    assert found(cache_copy) == [
        ("descriptors/encoder/values", "the values are not what `digest` was made of")
    ]


def test_of_a_stale_set_only_the_files_are_checked(cache_copy: Path) -> None:
    values = np.ones((23, 5), np.float32)
    made_caches.write_descriptors(cache_copy, "encoder", values)
    attributes = {"slices_digest": "", "encoder": {}, "provenance": {}}
    write_descriptors(cache_copy, "encoder", values[1:], attributes)
    assert found(cache_copy) == []
    flip(cache_copy / "descriptors/encoder/values/c/0/0", 7)
    [(where, _)] = found(cache_copy)
    assert where == "descriptors/encoder/values/c/0/0"


def finest_merged(labels: Labels) -> None:
    ccl = labels["ccl"][0]
    ccl[ccl == ccl.max()] = 0


def parted(labels: Labels) -> None:
    """Give one slice of a component of two or more another label of the second level."""
    fine, coarse = labels["ccl"][:2]
    first = np.flatnonzero(fine == fine[0])[0]
    coarse[first] = (coarse[first] + 1) % (coarse.max() + 1)


def other_neighbour(labels: Labels) -> None:
    ccl, nearest = labels["ccl"][0], labels["nearest"][0]
    nearest[0] = np.flatnonzero(ccl != ccl[0])[0]


def nearest_to_itself(labels: Labels) -> None:
    labels["nearest"][0, 3] = 3


@pytest.mark.parametrize(
    ("array", "change", "problem"),
    [
        ("ccl", finest_merged, "expected all labels 0 to"),
        ("ccl", lambda labels: labels["ccl"].__setitem__((0, 0), -1), "expected all labels 0 to"),
        ("ccl", parted, "slices with one label in the finer level have different ones"),
        ("nearest", other_neighbour, "a node and its nearest neighbour have different labels"),
        ("nearest", nearest_to_itself, "a node is its own nearest neighbour"),
        (
            "nearest",
            lambda labels: labels["nearest"].__setitem__((0, 0), 1000),
            "expected 23 nodes from 0 to 22",
        ),
        ("nearest", lambda labels: labels["nearest"].__setitem__((1, -1), 0), "and then -1, found others"),
        ("similarity", lambda labels: labels["similarity"].__setitem__((0, 0), 1.1), "values from -1 to 1"),
        (
            "similarity",
            lambda labels: labels["similarity"].__setitem__((0, 0), np.nan),
            "values from -1 to 1",
        ),
        (
            "similarity",
            lambda labels: labels["similarity"].__setitem__((1, -1), 0),
            "and then NaN, found others",
        ),
        (
            "similarity",
            lambda labels: labels.update(similarity=labels["similarity"][:, 1:]),
            "expected shape",
        ),
    ],
)
def test_weak_labels_that_cannot_be(
    cache_copy: Path, array: str, change: Callable[[Labels], object], problem: str
) -> None:
    labels, num_components = two_levels(cache_copy)
    change(labels)
    write_labels(cache_copy, labels, num_components)
    ((where, message),) = found(cache_copy)
    assert where == f"weak_labels/intensity/{array}"
    assert problem in message


def test_labels_that_join_what_nothing_links(cache_copy: Path) -> None:
    """Two components under one label, with every other array adapted."""
    labels, (count, _) = two_levels(cache_copy)
    labels = {name: array[:1] for name, array in labels.items()}
    labels["ccl"] = labels["ccl"] % (count - 1)
    write_labels(cache_copy, labels, [count - 1])
    where, problem = "weak_labels/intensity/ccl", "slices that no nearest neighbours link have one label"
    assert found(cache_copy) == [(where, f"level 0: {problem}")]


# ---------------------------------------------------------------- the command


def test_command_on_a_whole_cache(supercl: Callable[..., Any], cache_path: Path) -> None:
    outcome = supercl("verify", cache_path, "--workers", 1)
    assert outcome.code == 0
    assert outcome.out.startswith(f"{cache_path}: 4 cases, 23 slices, ")
    assert outcome.out.endswith("no damage\n")
    assert "verify: 4/4 cases" in outcome.err


def test_command_on_a_damaged_cache(supercl: Callable[..., Any], cache_copy: Path) -> None:
    flip(cache_copy / IMAGE, 0)
    (cache_copy / "cases" / CASE / "\x1b[31m\udcff[red]").write_text("x")
    outcome = supercl("verify", cache_copy, "--workers", 1)
    assert outcome.code == 4
    for text in (f"{IMAGE}: slice 0: the content does", r"/\x1b[31m\udcff[red]: not a part", "2 damages"):
        assert text in outcome.out
    assert f"next:     supercl repair {cache_copy}" in outcome.err
    assert "2 damages, 1 damaged cases" in outcome.err


def test_command_for_machines(supercl: Callable[..., Any], cache_copy: Path) -> None:
    flip(cache_copy / IMAGE, 0)
    outcome = supercl("verify", cache_copy, "--workers", 1, "--json")
    assert outcome.code == 4
    values = json.loads(outcome.out)
    problem = "slice 0: the content does not fit its checksum"
    assert values["damages"] == [{"case_id": CASE, "where": IMAGE, "problem": problem}]
    assert (values["num_cases"], values["is_complete"]) == (4, True)
