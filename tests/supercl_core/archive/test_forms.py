"""Packing and unpacking: every byte comes back, also after a kill; damage is found; nothing foreign is touched."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_caches
import numpy as np
import pytest
import zarr

from supercl_core.archive import case as archive_case
from supercl_core.archive import files as archive_files
from supercl_core.archive import forms
from supercl_core.archive.files import checksum, open_files
from supercl_core.archive.forms import pack, unpack
from supercl_core.cache.cases import CaseRow
from supercl_core.cache.reader import open_cache
from supercl_core.cache.writer import set_root_attributes, write_tables, write_weak_labels
from supercl_core.cache.zarr_files import metadata_digest
from supercl_core.errors import CacheError, StorageError, UsageError
from supercl_core.locks import hold

NAMES = ("archive", "archive.zip")
SHARD = "cases/case_b/image/c/0/0/0/0"


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; empty folders end in `/`."""
    found = {}
    for entry in sorted(folder.rglob("*")):
        name = entry.relative_to(folder).as_posix()
        if entry.is_file():
            found[name] = entry.read_bytes()
        elif not any(entry.iterdir()):
            found[f"{name}/"] = b""
    return found


def content(path: Path) -> Any:
    return path.read_bytes() if path.is_file() else files_of(path)


def store(archive: Path) -> Any:
    """An archive as Zarr alone opens it."""
    return zarr.storage.ZipStore(archive, mode="r") if archive.suffix else archive


def enrich(cache: Path) -> None:
    """Add what not every cache has: a failed case, descriptors, and a second set of weak labels."""
    opened = open_cache(cache)
    failed = CaseRow(id="ünlesbar 1", state="failed", reason="Größe 0", source="imagesTr/x.nii.gz")
    write_tables(cache, [*opened.rows, failed], num_channels=opened.num_channels)
    labels = opened.weak_labels()
    arrays = {name: getattr(labels, name) for name in ("ccl", "nearest", "similarity")}
    attributes = made_caches.label_attributes(cache, labels.num_components)
    write_weak_labels(cache, "second set", arrays, attributes)
    values = np.random.default_rng(0).random((opened.num_slices, 7), np.float32)
    made_caches.write_descriptors(cache, "encoder 1", values)
    shutil.rmtree(cache.with_name(f"{cache.name}.wip"))


@pytest.fixture(scope="module")
def rich_cache(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in a folder of its own: with and without ground truth, a failed case, two sets of labels."""
    path = Path(shutil.copytree(cache_path, tmp_path_factory.mktemp("rich") / "cache.zarr"))
    enrich(path)
    return path


@pytest.fixture(scope="module", params=NAMES)
def archive(
    request: pytest.FixtureRequest, rich_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its archive, for reading only; a folder and a zip file."""
    path = tmp_path_factory.mktemp("archive") / request.param
    pack(rich_cache, path, num_workers=2)
    return path


@pytest.fixture(scope="module")
def packed(rich_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "archive"
    pack(rich_cache, path, num_workers=1)
    return path


@pytest.fixture
def packed_copy(packed: Path, tmp_path: Path) -> Path:
    """An archive, as a folder, that a test may change."""
    return Path(shutil.copytree(packed, tmp_path / "archive"))


# ---------------------------------------------------------------- both ways


def test_every_byte_comes_back_both_ways(archive: Path, rich_cache: Path, tmp_path: Path) -> None:
    done = unpack(archive, tmp_path / "back.zarr", num_workers=2)
    assert (done.num_cases, done.num_kept) == (4, 0)
    assert files_of(tmp_path / "back.zarr") == files_of(rich_cache)
    again = tmp_path / archive.name
    pack(tmp_path / "back.zarr", again, num_workers=1)
    assert content(again) == content(archive)
    assert {entry.name for entry in tmp_path.iterdir()} == {"back.zarr", archive.name}


def test_folder_and_zip_hold_the_same_files(rich_cache: Path, packed: Path, tmp_path: Path) -> None:
    pack(rich_cache, tmp_path / "a.zip", num_workers=1)
    shutil.unpack_archive(tmp_path / "a.zip", tmp_path / "a")
    assert files_of(tmp_path / "a") == files_of(packed)


def test_zarr_alone_reads_the_same_from_an_archive(archive: Path, rich_cache: Path) -> None:
    cache, packed = zarr.open_group(rich_cache, mode="r"), zarr.open_group(store(archive), mode="r")
    theirs, ours = dict(packed.members(max_depth=None)), dict(cache.members(max_depth=None))
    assert theirs.keys() == ours.keys()
    for name, node in ours.items():
        other: Any = theirs[name]
        assert dict(other.attrs) == dict(node.attrs), name
        if isinstance(node, zarr.Array):
            assert (other.shape, other.dtype, other.shards) == (node.shape, node.dtype, node.shards)
            assert other.chunks == node.chunks, "one inner chunk a slice"
            assert other[...].tobytes() == node[...].tobytes(), name
    root: Any = dict(packed.attrs)["supercl"]
    assert root.pop("form") == "archive"
    assert root == dict(cache.attrs)["supercl"]


def test_an_archive_is_smaller_than_what_it_holds(rich_cache: Path, packed: Path) -> None:
    for name, shard in files_of(rich_cache).items():
        if "/c/" in name and name.startswith("cases/") and "labels" in name:
            assert (packed / name).stat().st_size < len(shard)


@pytest.mark.parametrize("size", [1, 100, 40_000, 200_000])
def test_slices_that_cannot_be_compressed_come_back(tmp_path: Path, size: int) -> None:
    random = np.random.default_rng(size)
    mapped = [part + checksum(part) for part in (random.bytes(size), random.bytes(size))]

    def through(convert: Callable[..., Iterator[bytes]], name: str, chunks: list[bytes]) -> list[bytes]:
        archive_files.write_shard(tmp_path / name / "shard", chunks)
        with open_files(tmp_path / name) as files, files.open("shard") as part:
            return list(convert(part, size + 4, np.zeros(2, np.uint32)))

    compressed = through(archive_case._compressed, "mapped", mapped)
    assert through(archive_case._restored, "packed", compressed) == mapped


def test_what_is_done_already_is_not_done_again(
    archive: Path, rich_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = tmp_path / "back.zarr"
    unpack(archive, back, num_workers=1)
    monkeypatch.setattr(forms, "convert_case", None)
    monkeypatch.setattr(forms, "set_root_attributes", None)
    before = [archive.stat().st_mtime_ns, *(file.stat().st_mtime_ns for file in sorted(back.rglob("*")))]
    for _ in range(2):
        assert pack(rich_cache, archive, num_workers=1).num_kept == 4
        assert unpack(archive, back, num_workers=1).num_kept == 4
    assert before == [
        archive.stat().st_mtime_ns,
        *(file.stat().st_mtime_ns for file in sorted(back.rglob("*"))),
    ]


def test_what_a_kill_after_the_last_rename_left_is_removed(rich_cache: Path, archive: Path) -> None:
    wip = archive.with_name(f"{archive.name}.wip")
    (wip / "cases").mkdir(parents=True)
    assert pack(rich_cache, archive, num_workers=1).num_kept == 4
    assert not wip.exists()


def test_packing_leaves_nothing_beside_the_cache(rich_cache: Path, archive: Path) -> None:
    assert [entry.name for entry in rich_cache.parent.iterdir()] == ["cache.zarr"]
    assert [entry.name for entry in archive.parent.iterdir()] == [archive.name]


def without_rights() -> None:
    """Make this process one that permissions bind also where it is root's (Linux: capabilities, prctl)."""
    drop_from_bounding_set, dac_override, dac_read_search = 24, 1, 2
    for capability in (dac_override, dac_read_search):
        ctypes.CDLL(None).prctl(drop_from_bounding_set, capability)


PACK = """
import sys
from pathlib import Path
from supercl_core.archive.forms import pack
source, target = map(Path, sys.argv[1:])
try:
    (source / "x").write_text("")
except PermissionError:
    pack(source, target, num_workers=1)
"""


def test_a_cache_without_permission_to_write_is_packed(rich_cache: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(rich_cache, tmp_path / "source" / "cache.zarr"))
    entries = [source.parent, source, *source.rglob("*")]
    for entry in entries:
        entry.chmod(0o555 if entry.is_dir() else 0o444)
    try:
        line = [sys.executable, "-c", PACK, str(source), str(tmp_path / "a.zip")]
        subprocess.run(line, check=True, timeout=120, preexec_fn=without_rights)
    finally:
        for entry in entries:
            entry.chmod(0o755)
    unpack(tmp_path / "a.zip", tmp_path / "back.zarr", num_workers=1)
    assert files_of(tmp_path / "back.zarr") == files_of(rich_cache)


# ---------------------------------------------------------------- stopped in the middle

STEPS = ("write_shard", "write_node", "replace_folder", "write_zip", "create_cache", "set_root_attributes")
"""Functions before whose n-th call a process is killed."""

KILLED = """
import os, signal, sys
from pathlib import Path
from supercl_core.archive import case as archive_case, forms
direction, source, target, step, at = sys.argv[1:]
module = archive_case if step == "write_shard" else forms
function, calls = getattr(module, step), []
def killed(*arguments, **options):
    calls.append(step)
    if len(calls) == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)
setattr(module, step, killed)
getattr(forms, direction)(Path(source), Path(target), num_workers=1)
"""


@pytest.mark.parametrize(
    ("name", "step", "at"),
    [
        *(("archive", "write_shard", at) for at in (1, 6, 15)),
        ("archive", "replace_folder", 3),
        ("archive", "replace_folder", 6),
        ("archive", "write_node", 2),
        ("archive.zip", "write_shard", 9),
        ("archive.zip", "write_zip", 1),
    ],
)
def test_packing_goes_on_after_a_kill(
    rich_cache: Path, packed: Path, tmp_path: Path, name: str, step: str, at: int
) -> None:
    target = tmp_path / name
    killed = [sys.executable, "-c", KILLED, "pack", str(rich_cache), str(target), step, str(at)]
    assert subprocess.run(killed, timeout=120, check=False).returncode == -signal.SIGKILL
    assert not target.exists()
    kept = len(list((tmp_path / f"{name}.wip" / "cases").glob("*/zarr.json")))
    assert pack(rich_cache, target, num_workers=2).num_kept == kept
    with open_files(target) as files:
        assert all(files.read(part, limit_bytes=1 << 20) == text for part, text in files_of(packed).items())
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("step", "at"),
    [
        *(("write_shard", at) for at in (1, 6, 15)),
        ("create_cache", 1),
        ("replace_folder", 3),
        ("replace_folder", 6),
        ("set_root_attributes", 1),
    ],
)
def test_unpacking_goes_on_after_a_kill(
    packed: Path, rich_cache: Path, tmp_path: Path, step: str, at: int
) -> None:
    target = tmp_path / "back.zarr"
    killed = [sys.executable, "-c", KILLED, "unpack", str(packed), str(target), step, str(at)]
    assert subprocess.run(killed, timeout=120, check=False).returncode == -signal.SIGKILL
    with pytest.raises(CacheError):
        open_cache(target)
    kept = len(list((target / "cases").glob("*/zarr.json")))
    assert unpack(packed, target, num_workers=2).num_kept == kept
    assert files_of(target) == files_of(rich_cache)
    assert [entry.name for entry in tmp_path.iterdir()] == ["back.zarr"]


@pytest.mark.parametrize("packing", [True, False])
def test_a_full_disk_is_said_once_and_what_was_done_is_kept(
    rich_cache: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    write_shard, calls = archive_files.write_shard, []

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_shard(*arguments)

    monkeypatch.setattr(archive_case, "write_shard", full)
    convert, source = (pack, rich_cache) if packing else (unpack, packed)
    with pytest.raises(StorageError, match="The disk is full") as caught:
        convert(source, tmp_path / "out", num_workers=1)
    assert "2 of 4 cases are done, and kept" in str(caught.value)
    assert convert(source, tmp_path / "out", num_workers=1).num_kept == 2
    assert files_of(tmp_path / "out") == files_of(packed if packing else rich_cache)


def test_a_packed_case_that_the_disk_lost_is_packed_again(
    rich_cache: Path, packed: Path, tmp_path: Path
) -> None:
    wip = Path(shutil.copytree(packed, tmp_path / "archive.wip"))
    (wip / "zarr.json").unlink()
    (wip / SHARD).write_bytes(bytes((wip / SHARD).stat().st_size))
    assert pack(rich_cache, tmp_path / "archive", num_workers=1).num_kept == 3
    assert files_of(tmp_path / "archive") == files_of(packed)


def test_a_packed_case_that_has_changed_since_is_packed_again(
    rich_cache: Path, packed: Path, tmp_path: Path
) -> None:
    wip = Path(shutil.copytree(packed, tmp_path / "archive.wip"))
    edit(wip / "cases" / "case_b", lambda node: node["attributes"]["supercl"].update(key="old"))
    assert pack(rich_cache, tmp_path / "archive", num_workers=1).num_kept == 3
    assert files_of(tmp_path / "archive") == files_of(packed)


def test_cases_that_the_cache_no_longer_has_do_not_get_into_its_archive(
    rich_cache: Path, packed: Path, tmp_path: Path
) -> None:
    wip = Path(shutil.copytree(packed, tmp_path / "archive.wip"))
    shutil.copytree(wip / "cases" / "case_a", wip / "cases" / "case_z")
    pack(rich_cache, tmp_path / "archive", num_workers=1)
    assert files_of(tmp_path / "archive") == files_of(packed)


def test_a_vast_cache_is_refused_before_it_is_unpacked(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match="too little room"):
        unpack(packed, tmp_path / "back.zarr", num_workers=1)
    assert not (tmp_path / "back.zarr").exists()


# ---------------------------------------------------------------- what is not touched


def test_something_else_is_never_overwritten(
    rich_cache: Path, packed: Path, cache_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    (tmp_path / "file.zip").write_text("x")
    other = Path(shutil.copytree(cache_path, tmp_path / "other.zarr"))
    set_root_attributes(other, {"name": "another"})
    pack(other, tmp_path / "other.zip", num_workers=1)
    shutil.rmtree(tmp_path / "other.zarr.wip")
    before = files_of(tmp_path)
    for target in ("folder", "file.zip", "other.zarr", "other.zip"):
        for convert, source in ((pack, rich_cache), (unpack, packed)):
            with pytest.raises(CacheError, match="There is something else here already"):
                convert(source, tmp_path / target, num_workers=1)
    assert files_of(tmp_path) == before


def test_an_archive_of_an_older_state_of_the_cache_is_not_taken_for_its_archive(
    cache_copy: Path, tmp_path: Path
) -> None:
    pack(cache_copy, tmp_path / "a", num_workers=1)
    labels = open_cache(cache_copy).weak_labels()
    arrays = {name: getattr(labels, name).copy() for name in ("ccl", "nearest", "similarity")}
    arrays["similarity"][:] = 0.5
    attributes = made_caches.label_attributes(cache_copy, labels.num_components)
    write_weak_labels(cache_copy, labels.name, arrays, attributes)
    with pytest.raises(CacheError, match="There is something else here already"):
        pack(cache_copy, tmp_path / "a", num_workers=1)


def test_a_case_that_was_taken_out_of_an_unpacked_cache_is_unpacked_again(
    packed: Path, rich_cache: Path, tmp_path: Path
) -> None:
    back = tmp_path / "back.zarr"
    unpack(packed, back, num_workers=1)
    shutil.rmtree(back / "cases" / "case_c")
    shutil.rmtree(back / "slices")
    assert unpack(packed, back, num_workers=1).num_kept == 3
    assert files_of(back) == files_of(rich_cache)


@pytest.mark.parametrize("place", [".", "inside.zip", ".."])
def test_cache_and_archive_lie_apart(rich_cache: Path, packed: Path, place: str) -> None:
    for convert, source in ((pack, rich_cache), (unpack, packed)):
        with pytest.raises(UsageError, match="lie in each other"):
            convert(source, source / place, num_workers=1)


def test_what_no_archive_would_hold_is_not_lost_silently(cache_copy: Path, tmp_path: Path) -> None:
    (cache_copy / "notes").mkdir()
    with pytest.raises(CacheError, match="no part of a cache") as caught:
        pack(cache_copy, tmp_path / "a", num_workers=1)
    assert caught.value.found == "notes"


def test_a_foreign_folder_in_place_of_unfinished_work_stays(rich_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.wip").mkdir()
    (tmp_path / "a.wip" / "thesis.tex").write_text("x")
    with pytest.raises(CacheError, match="no part of a cache"):
        pack(rich_cache, tmp_path / "a", num_workers=1)
    assert (tmp_path / "a.wip" / "thesis.tex").read_text() == "x"


def test_a_cache_that_is_written_to_is_not_packed(
    cache_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_case = archive_case.convert_case

    def changing(*arguments: Any, **options: Any) -> None:
        set_root_attributes(cache_copy, {"default_weak_labels": "other"})
        convert_case(*arguments, **options)

    monkeypatch.setattr(forms, "convert_case", changing)
    with pytest.raises(CacheError, match="was changed while it was packed"):
        pack(cache_copy, tmp_path / "a", num_workers=1)
    assert not (tmp_path / "a").exists()


def test_an_unfinished_cache_is_not_packed(cache_copy: Path, tmp_path: Path) -> None:
    set_root_attributes(cache_copy, {"complete": False})
    with pytest.raises(CacheError, match="not complete"):
        pack(cache_copy, tmp_path / "a", num_workers=1)


def test_a_root_that_was_changed_by_hand_is_not_packed(cache_copy: Path, tmp_path: Path) -> None:
    edit(cache_copy, lambda node: node["attributes"]["supercl"]["config"].update(n_segments=7))
    with pytest.raises(CacheError, match="metadata that fits `metadata_digest`"):
        pack(cache_copy, tmp_path / "a", num_workers=1)


def test_two_at_a_time_are_refused(rich_cache: Path, packed: Path, tmp_path: Path) -> None:
    with hold(tmp_path / "a.wip"), pytest.raises(CacheError, match="in use"):
        pack(rich_cache, tmp_path / "a", num_workers=1)
    with hold(tmp_path / "b.zarr"), pytest.raises(CacheError, match="in use"):
        unpack(packed, tmp_path / "b.zarr", num_workers=1)


# ---------------------------------------------------------------- damage


def flip(file: Path, at: int = -30) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_damage_is_not_archived_and_the_rest_is(cache_copy: Path, tmp_path: Path) -> None:
    whole = (cache_copy / SHARD).read_bytes()
    flip(cache_copy / SHARD, 100)
    (cache_copy / "cases" / "case_d" / "asp" / "zarr.json").write_text("{")
    with pytest.raises(
        CacheError, match="2 of 4 cases of the cache are damaged; the others are packed"
    ) as caught:
        pack(cache_copy, tmp_path / "a", num_workers=1)
    assert "case_b: " in str(caught.value.found)
    assert "slice 0 that fits its checksum" in str(caught.value.found)
    assert f"supercl repair {cache_copy}" in caught.value.next_step
    assert not (tmp_path / "a").exists()
    (cache_copy / SHARD).write_bytes(whole)
    with pytest.raises(CacheError, match="1 of 4 cases"):
        pack(cache_copy, tmp_path / "a", num_workers=1)


@pytest.mark.parametrize(
    "shard", ["image/c/0/0/0/0", "labels/superpixels/0/c/0/0/0", "labels/ground_truth/0/c/0/0/0"]
)
def test_every_flipped_byte_of_a_packed_shard_is_found(packed_copy: Path, tmp_path: Path, shard: str) -> None:
    row = next(row for row in _rows(packed_copy, tmp_path) if row.id == "case_a")
    file = packed_copy / "cases" / "case_a" / shard
    size = file.stat().st_size
    places = {*range(size - 100, size), *np.random.default_rng(0).integers(0, size, 60).tolist(), 0}
    for number, at in enumerate(sorted(places)):
        flip(file, at)
        with open_files(packed_copy) as files, pytest.raises(CacheError):
            archive_case.convert_case(files, row, tmp_path / f"{number}", packing=False)
        flip(file, at)
    with open_files(packed_copy) as files:
        archive_case.convert_case(files, row, tmp_path / "whole", packing=False)


def _rows(packed: Path, tmp_path: Path) -> list[CaseRow]:
    unpack(packed, tmp_path / "rows.zarr", num_workers=1)
    return open_cache(tmp_path / "rows.zarr").done


def test_damaged_cases_are_named_and_come_from_a_sound_copy_later(
    packed_copy: Path, packed: Path, rich_cache: Path, tmp_path: Path
) -> None:
    flip(packed_copy / SHARD)
    (packed_copy / "cases" / "case_c" / "asp" / "c" / "0" / "0" / "0").unlink()
    back = tmp_path / "back.zarr"
    with pytest.raises(
        CacheError, match="2 of 4 cases of the archive are damaged; the others are unpacked"
    ) as caught:
        unpack(packed_copy, back, num_workers=2)
    assert "\n    case_b: " in str(caught.value)
    assert "\n    case_c: " in str(caught.value)
    assert f"supercl preprocess INPUT {back}" in caught.value.next_step
    with pytest.raises(CacheError, match="not complete"):
        open_cache(back)
    assert unpack(packed, back, num_workers=2).num_kept == 2
    assert files_of(back) == files_of(rich_cache)


def test_preprocessing_computes_what_a_damaged_archive_lacks(
    cache_path: Path, msd_path: Path, scheduler: str, tmp_path: Path
) -> None:
    from preprocess import run

    pack(cache_path, tmp_path / "a", num_workers=1)
    flip(tmp_path / "a" / SHARD)
    with pytest.raises(CacheError, match="1 of 4 cases"):
        unpack(tmp_path / "a", tmp_path / "back.zarr", num_workers=1)
    result = run(msd_path, tmp_path / "back.zarr", scheduler=scheduler)
    assert (result.num_computed, result.num_kept) == (1, 3)
    for name in (SHARD, "table/id/c/0/0"):
        assert (tmp_path / "back.zarr" / name).read_bytes() == (cache_path / name).read_bytes()


# ---------------------------------------------------------------- crafted archives


def edit(folder: Path, change: Callable[[Any], None], *, seal: bool = False) -> None:
    """Change a zarr.json; `seal` makes the digest of a root fit again."""
    node = json.loads((folder / "zarr.json").read_text())
    change(node)
    if seal:
        ours = node["attributes"]["supercl"]
        form = ours.pop("form")
        ours["metadata_digest"] = metadata_digest({"": node})
        ours["form"] = form
    (folder / "zarr.json").write_text(json.dumps(node))


def refused(packed: Path, tmp_path: Path) -> CacheError:
    """The error of unpacking; nothing may be left where the cache would have been."""
    with pytest.raises(CacheError) as caught:
        unpack(packed, tmp_path / "back.zarr", num_workers=1)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"archive", "archive.zip", "back.zarr"}
    return caught.value


ROOTS: dict[str, Callable[[Any], None]] = {
    "a cache": lambda node: node["attributes"]["supercl"].pop("form"),
    "another form": lambda node: node["attributes"]["supercl"].update(form="mapped"),
    "not complete": lambda node: node["attributes"]["supercl"].update(complete=False),
    "another version": lambda node: node["attributes"]["supercl"].update(schema_version=1),
    "other attributes": lambda node: node["attributes"].update(ome={"version": "0.5"}),
    "no attributes": lambda node: node.pop("attributes"),
    "an array": lambda node: node.update(zarr_format=2),
}


@pytest.mark.parametrize("what", ROOTS)
def test_roots_that_are_none_of_an_archive(packed_copy: Path, tmp_path: Path, what: str) -> None:
    edit(packed_copy, ROOTS[what], seal=what in ("not complete", "another version", "other attributes"))
    assert "This is no archive of a cache, or a damaged one" in refused(packed_copy, tmp_path).what
    assert not (tmp_path / "back.zarr").exists()


def test_settings_changed_by_hand_are_found(packed_copy: Path, tmp_path: Path) -> None:
    edit(packed_copy, lambda node: node["attributes"]["supercl"]["config"].update(n_segments=7))
    assert "metadata that fits `metadata_digest`" in str(refused(packed_copy, tmp_path))


@pytest.mark.parametrize("case_id", ["../../x", "/x", ".x", "zarr.json"])
def test_case_ids_cannot_leave_the_cache(packed_copy: Path, tmp_path: Path, case_id: str) -> None:
    file = packed_copy / "table" / "id" / "c" / "0" / "0"
    ids = np.frombuffer(file.read_bytes()[:-4], np.uint8).reshape(5, -1).copy()
    ids[0] = 0
    ids[0, : len(case_id)] = [*case_id.encode()]
    file.write_bytes(ids.tobytes() + checksum(ids.tobytes()))
    assert "case id" in str(refused(packed_copy, tmp_path))
    assert not (tmp_path / "back.zarr").exists()


def test_names_of_weak_labels_cannot_leave_the_cache(packed_copy: Path, tmp_path: Path) -> None:
    (packed_copy / "weak_labels" / "second set").rename(packed_copy / "weak_labels" / "..x")
    assert "names of sets" in str(refused(packed_copy, tmp_path))


CASES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "another row": ("", lambda node: node["attributes"]["supercl"]["row"].update(source="other")),
    "no row": ("", lambda node: node["attributes"]["supercl"].pop("row")),
    "another key": ("", lambda node: node["attributes"]["supercl"].update(key="0")),
    "another shape": ("image", lambda node: node["shape"].reverse()),
    "a vast shape": ("image", lambda node: node.update(shape=[1, 1 << 30, 1 << 30, 1 << 30])),
    "another dtype": ("asp", lambda node: node.update(data_type="object")),
    "no codecs": ("asp", lambda node: node.update(codecs=[])),
    "codecs that are none": ("asp", lambda node: node.update(codecs="zstd")),
    "another level": (
        "asp",
        lambda node: node["codecs"][0]["configuration"]["codecs"][2]["configuration"].update(level=4),
    ),
    "foreign codecs": (
        "asp",
        lambda node: node["codecs"][0]["configuration"]["codecs"].append({"name": "numcodecs.pickle"}),
    ),
    "mapped": ("asp", lambda node: node["codecs"][0]["configuration"]["codecs"].__delitem__(slice(-2, None))),
    "other attributes": ("labels/superpixels", lambda node: node["attributes"].update(x=1)),
}


@pytest.mark.parametrize("what", CASES)
def test_metadata_of_a_case_that_its_seal_does_not_bear_out(
    packed_copy: Path, tmp_path: Path, what: str
) -> None:
    name, change = CASES[what]
    edit(packed_copy / "cases" / "case_b" / name, change)
    error = refused(packed_copy, tmp_path)
    assert "1 of 4 cases" in error.what
    assert "case_b: " in str(error.found)
    assert not (tmp_path / "back.zarr" / "cases" / "case_b").exists()


def test_a_table_that_differs_from_its_cases_is_found(packed_copy: Path, tmp_path: Path) -> None:
    file = packed_copy / "table" / "num_superpixels" / "c" / "0"
    counts = np.frombuffer(file.read_bytes()[:-4], "<i4").copy()
    counts[2] += 1
    file.write_bytes(counts.tobytes() + checksum(counts.tobytes()))
    error = refused(packed_copy, tmp_path)
    assert "1 of 4 cases" in error.what
    assert "case_c: " in str(error.found)
    assert "the row that `table` has" in str(error.found)


def test_slices_in_another_order_are_found(packed_copy: Path, tmp_path: Path) -> None:
    """Each one fits its checksum; of the ground truth, whose content no other digest covers."""
    file = packed_copy / "cases" / "case_b" / "labels" / "ground_truth" / "0" / "c" / "0" / "0" / "0"
    with open_files(packed_copy) as files, files.open(file.relative_to(packed_copy).as_posix()) as part:
        chunks = list(archive_files.read_chunks(part, 6, longest=part.size))
    shutil.rmtree(file.parents[2])
    archive_files.write_shard(file, chunks[::-1])
    assert "slices that fit the digests" in str(refused(packed_copy, tmp_path).found)


def frame_of(content: bytes) -> bytes:
    return archive_case.zstd.compress(content, 3, False)


FRAMES: dict[str, Callable[[bytes], bytes]] = {
    "a longer frame": lambda raw: frame_of(raw + b"x"),
    "a shorter frame": lambda raw: frame_of(raw[:-1]),
    "two frames": lambda raw: frame_of(raw) * 2,
    "a terabyte declared": lambda raw: (
        b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x23\x03\x00a"
    ),
    "a bomb that declares nothing": lambda raw: (
        b"\x28\xb5\x2f\xfd\x00\x58" + b"\x02\x00\x10a" * 9999 + b"\x03\x00\x10a"
    ),
    "no frame": lambda raw: b"x" * 50,
    "another content": lambda raw: frame_of(bytes(len(raw))),
}


@pytest.mark.parametrize("what", FRAMES)
def test_crafted_frames_are_refused(tmp_path: Path, what: str) -> None:
    raw = bytes(range(200)) + checksum(bytes(range(200)))
    frame = FRAMES[what](raw)
    archive_files.write_shard(tmp_path / "a" / "shard", [frame + checksum(frame)])
    with open_files(tmp_path / "a") as files, files.open("shard") as part, pytest.raises(CacheError):
        list(archive_case._restored(part, 204, np.zeros(1, np.uint32)))


def test_slices_that_zstd_does_not_take_are_refused(
    packed_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_case, "LARGEST_SLICE_BYTES", 900)
    assert "slices of at most 900 bytes" in str(refused(packed_copy, tmp_path))


# ---------------------------------------------------------------- the command line


def test_commands_say_what_they_did(supercl: Callable[..., Any], rich_cache: Path, tmp_path: Path) -> None:
    archive, back = tmp_path / "a.zip", tmp_path / "back.zarr"
    outcome = supercl("pack", rich_cache, archive, "--workers", "2")
    assert (
        outcome.code,
        outcome.out.startswith(f"{archive}: 4 cases, 0 from before; 0.1 MB in the cache, "),
    ) == (0, True)
    assert "pack: 4/4 cases" in outcome.err
    assert "MB/s" in outcome.err
    outcome = supercl("unpack", archive, back)
    assert (outcome.code, outcome.out.startswith(f"{back}: 4 cases, 0 from before; ")) == (0, True)
    assert "unpack: 4/4 cases" in outcome.err
    for command in (("pack", rich_cache, archive), ("unpack", archive, back)):
        assert "4 cases, all of them from before" in supercl(*command).out


def test_commands_end_with_the_codes_of_their_errors(
    supercl: Callable[..., Any], rich_cache: Path, tmp_path: Path
) -> None:
    outcome = supercl("unpack", tmp_path / "none.zip", tmp_path / "back.zarr")
    assert (outcome.code, "error: This is no archive of a cache" in outcome.err) == (4, True)
    assert not list(tmp_path.iterdir())
    assert supercl("pack", rich_cache, rich_cache / "a.zip").code == 2
    assert supercl("pack", tmp_path / "none.zarr", tmp_path / "a.zip").code == 4


def test_commands_for_caches_refuse_an_archive_and_touch_nothing(
    cache_path: Path, msd_path: Path, tmp_path: Path, supercl: Callable[..., Any]
) -> None:
    archive = tmp_path / "archive"
    pack(cache_path, archive, num_workers=1)
    before = {file: file.read_bytes() for file in archive.rglob("*") if file.is_file()}
    for command in (
        ("inspect", archive),
        ("verify", archive),
        ("repair", archive),
        ("weak-labels", archive),
        ("preprocess", msd_path, archive),
        ("pack", archive, tmp_path / "again"),
    ):
        outcome = supercl(*command)
        assert outcome.code == 4, command
        assert f"supercl unpack {archive} CACHE" in outcome.err
    assert {file: file.read_bytes() for file in archive.rglob("*") if file.is_file()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["archive"]
