"""Runs on Dask: equal bytes, resumption after a kill, changed and added cases, and every kind of bad input."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zarr

from preprocess import run, runner
from preprocess.pipeline import PreprocessConfig
from supercl_core.cache_reader import open_cache
from supercl_core.errors import CacheError, SuperCLError
from supercl_core.files import wip_path

Textures = Callable[[tuple[int, ...], int], np.ndarray]


def content(cache_path: Path) -> dict[str, bytes]:
    """Every file of a cache but for the provenance attribute."""
    files = {
        str(file.relative_to(cache_path)): file.read_bytes()
        for file in cache_path.rglob("*")
        if file.is_file()
    }
    root = json.loads(files["zarr.json"])
    assert root["attributes"]["supercl"].pop("provenance")
    return {**files, "zarr.json": json.dumps(root).encode()}


def integers(texture: Textures, seed: int, shape: tuple[int, ...] = (3, 16, 16)) -> np.ndarray:
    return np.rint(texture(shape, seed) * 300).astype(np.int16)


@pytest.fixture
def small(write_msd: Callable[..., Path], texture: Textures, tmp_path: Path) -> Path:
    """Three small cases, which a test may change."""
    cases = {f"case_{name}": (integers(texture, seed), None) for seed, name in enumerate("abc")}
    return write_msd(tmp_path / "small", cases)


# ---- equal bytes


def test_two_runs_give_equal_bytes_whatever_the_workers(
    cache_path: Path, msd_path: Path, scheduler: str, tmp_path: Path
) -> None:
    run(msd_path, tmp_path / "threads.zarr", scheduler=scheduler)
    run(msd_path, tmp_path / "processes.zarr", num_workers=2)
    first = content(cache_path)  # one worker process
    assert len(first) > 60
    assert content(tmp_path / "threads.zarr") == first
    assert content(tmp_path / "processes.zarr") == first


def test_a_finished_run_leaves_a_complete_cache_and_nothing_beside_it(small: Path, scheduler: str) -> None:
    path = small.parent / "out.zarr"
    result = run(small, path, scheduler=scheduler)
    assert (result.num_computed, result.num_kept, result.failed, result.vanished) == (3, 0, (), ())
    assert result.cache_path == path.resolve()
    assert open_cache(path).attributes["complete"] is True
    assert {entry.name for entry in small.parent.iterdir()} == {"small", "out.zarr"}


def test_digest_is_that_of_the_source_files(cache_path: Path, msd_path: Path) -> None:
    parts = [msd_path / f"{kind}sTr" / "case_b.nii.gz" for kind in ("image", "label")]
    digests = b"".join(hashlib.sha256(part.read_bytes()).digest() for part in parts)
    assert open_cache(cache_path).case("case_b").row.digest == hashlib.sha256(digests).hexdigest()


# ---- resumption


def test_a_second_run_computes_nothing_and_changes_nothing(
    small: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small.parent / "out.zarr"
    run(small, path, scheduler=scheduler)
    before = content(path)
    monkeypatch.setattr(runner, "_compute", None)
    result = run(small, path)
    assert (result.num_computed, result.num_kept) == (0, 3)
    assert content(path) == before


def test_a_killed_run_goes_on_and_ends_with_the_bytes_of_an_uninterrupted_one(
    write_msd: Callable[..., Path], texture: Textures, scheduler: str, tmp_path: Path
) -> None:
    cases = {f"case_{index}": (integers(texture, index, (24, 64, 64)), None) for index in range(10)}
    source = write_msd(tmp_path / "in", cases)
    path = tmp_path / "killed.zarr"
    command = [sys.executable, "-m", "supercl_core.cli", "preprocess", source, path, "--workers", "1"]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (finished := list(path.glob("cases/*/zarr.json"))):
        assert process.poll() is None, "the run ended before a case was committed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = list(path.glob("cases/*/zarr.json"))
    assert 1 <= len(finished) < len(cases)
    with pytest.raises(CacheError, match="not complete"):
        open_cache(path)
    kept = {file: file.stat().st_mtime_ns for file in finished}

    result = run(source, path, scheduler=scheduler)
    assert (result.num_kept, result.num_computed) == (len(kept), len(cases) - len(kept))
    assert {file: file.stat().st_mtime_ns for file in finished} == kept
    assert not wip_path(path).exists()
    run(source, tmp_path / "whole.zarr", scheduler=scheduler)
    assert content(path) == content(tmp_path / "whole.zarr")


def test_a_changed_source_is_computed_again_and_a_new_case_added(
    small: Path, write_msd: Callable[..., Path], texture: Textures, scheduler: str
) -> None:
    path = small.parent / "out.zarr"
    run(small, path, scheduler=scheduler)
    untouched = path / "cases" / "case_a" / "zarr.json"
    before = untouched.stat().st_mtime_ns
    # Case b becomes another image and case d comes; writing would touch the others, so their times are put back.
    times = {file: file.stat() for file in (small / "imagesTs").iterdir()}
    write_msd(
        small,
        {
            f"case_{name}": (integers(texture, seed), None)
            for name, seed in (("a", 0), ("b", 70), ("c", 2), ("d", 3))
        },
    )
    for name in ("case_a.nii.gz", "case_c.nii.gz"):
        file = small / "imagesTs" / name
        os.utime(file, ns=(times[file].st_atime_ns, times[file].st_mtime_ns))
    result = run(small, path, scheduler=scheduler)
    assert (result.num_computed, result.num_kept) == (2, 2)
    assert untouched.stat().st_mtime_ns == before
    cache = open_cache(path)
    assert [row.id for row in cache.rows] == ["case_a", "case_b", "case_c", "case_d"]
    np.testing.assert_array_equal(cache.case("case_b").image_ZCYX[:, 0], integers(texture, 70))
    assert cache.num_slices == cache.weak_labels().ccl.shape[1] == 12
    run(small, small.parent / "fresh.zarr", scheduler=scheduler)
    assert content(path) == content(small.parent / "fresh.zarr")


def test_a_case_that_vanished_is_kept_and_noted(
    small: Path, scheduler: str, supercl: Callable[..., Any]
) -> None:
    path = small.parent / "out.zarr"
    run(small, path, scheduler=scheduler)
    (small / "imagesTs" / "case_b.nii.gz").unlink()
    declared = json.loads((small / "dataset.json").read_text())
    declared["test"] = [entry for entry in declared["test"] if "case_b" not in entry]
    (small / "dataset.json").write_text(json.dumps(declared))
    outcome = supercl("preprocess", small, path)
    assert outcome.code == 0
    assert "no longer has the case case_b; the cache keeps it" in outcome.err
    assert "0 cases computed, 3 kept from before, 0 failed" in outcome.out
    assert open_cache(path).case("case_b").image_ZCYX.shape == (3, 1, 16, 16)


def test_a_failed_case_is_tried_again_once_it_is_mended(
    small: Path, write_volume: Callable[..., Path], texture: Textures, scheduler: str
) -> None:
    path = small.parent / "out.zarr"
    broken = small / "imagesTs" / "case_b.nii.gz"
    broken.write_text("no volume")
    assert [row.id for row in run(small, path, scheduler=scheduler).failed] == ["case_b"]
    assert open_cache(path).num_slices == 6
    write_volume(broken, integers(texture, 1))
    result = run(small, path, scheduler=scheduler)
    assert (result.num_computed, result.num_kept, result.failed) == (1, 2, ())
    run(small, small.parent / "fresh.zarr", scheduler=scheduler)
    assert content(path) == content(small.parent / "fresh.zarr")


def test_rubbish_of_a_killed_run_does_not_reach_the_cache(small: Path, scheduler: str) -> None:
    path = small.parent / "out.zarr"
    half = wip_path(path) / "case_a" / "image"
    half.mkdir(parents=True)
    (half / "rubbish").write_text("x")
    run(small, path, scheduler=scheduler)
    assert not list(small.parent.rglob("rubbish"))


def test_a_worker_killed_by_the_system_fails_its_case_only(
    small: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import KilledWorker

    def killed(case: object, *arguments: object, **settings: object) -> object:
        if case.id == "case_b":  # type: ignore[attr-defined]
            raise KilledWorker("case_b", SimpleNamespace(address="tcp://gone"), 3)  # type: ignore[arg-type]
        return compute(case, *arguments, **settings)

    compute = runner.compute_case
    monkeypatch.setattr(runner, "compute_case", killed)
    result = run(small, small.parent / "out.zarr", scheduler=scheduler)
    assert result.num_computed == 2
    [row] = result.failed
    assert row.id == "case_b"
    assert row.reason.startswith("KilledWorker")


def test_a_scheduler_that_does_not_answer_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    def refuse(address: str, timeout: float) -> None:
        raise OSError(f"Timed out trying to connect to {address}")

    monkeypatch.setattr(distributed, "Client", refuse)
    with pytest.raises(SuperCLError, match="does not answer") as caught:
        run(small, small.parent / "out.zarr", scheduler="tcp://nowhere:1")
    assert caught.value.where == "tcp://nowhere:1"


# ---- bad input: one data set with every kind of bad case among good ones


def zero_dimension_nifti(path: Path) -> None:
    """A NIfTI-1 file, written by hand, whose third axis has length 0."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, 16, 16, 0, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, 4, 16)
    struct.pack_into("<8f", header, 76, 1, 1, 1, 1, 1, 1, 1, 1)
    struct.pack_into("<f", header, 108, 352)
    header[344:348] = b"n+1\0"
    path.write_bytes(bytes(header))


REASONS = {
    "bad_axes_zero": "empty; expected at least one voxel along every axis, found shape (0, 16, 16), columns last",
    "bad_channels": "another number of channels than the data set; expected 1, found 2",
    "bad_image_missing": "does not exist",
    "bad_image_text": "cannot be read as a volume",
    "bad_infinite": "NaN or infinite; expected finite values, found 1 such voxels, the first at (c, z, y, x) = "
    "(0, 1, 2, 3)",
    "bad_label_classes": "values that are no declared class; expected integers from 0 to 2, found [7]",
    "bad_label_fractions": "values that are no declared class; expected integers from 0 to 2, found [0.5]",
    "bad_label_missing": "labelsTr/bad_label_missing.nii.gz",
    "bad_label_nan": "labelsTr/bad_label_nan.nii.gz",
    "bad_label_shape": "another shape than its image; expected (z, y, x) = (3, 16, 16), found (4, 16, 16)",
    "bad_nan": "NaN or infinite; expected finite values, found 2 such voxels",
}


@pytest.fixture(scope="module")
def bad_path(
    write_msd: Callable[..., Path], texture: Textures, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    image = integers(texture, 0)
    label = np.zeros(image.shape, np.uint8)
    infinite, missing_values = image.astype(np.float32), image.astype(np.float32)
    infinite[1, 2, 3] = np.inf
    missing_values[0, 0, :2] = np.nan
    cases = dict.fromkeys([*REASONS, "good_one", "good_two"], (image, label))
    cases["bad_channels"] = (np.stack([image, image]), label)
    cases["bad_infinite"] = (infinite, label)
    cases["bad_nan"] = (missing_values, label)
    cases["bad_label_shape"] = (image, np.zeros((4, 16, 16), np.uint8))
    cases["bad_label_classes"] = (image, label + 7)
    cases["bad_label_fractions"] = (image, label + np.float32(0.5))
    cases["bad_label_nan"] = (image, label + np.float32(np.nan))
    path = write_msd(tmp_path_factory.mktemp("bad") / "in", cases)
    (path / "imagesTr" / "bad_image_text.nii.gz").write_text("not a volume")
    (path / "imagesTr" / "bad_image_missing.nii.gz").unlink()
    (path / "labelsTr" / "bad_label_missing.nii.gz").unlink()
    (path / "imagesTr" / "bad_axes_zero.nii.gz").unlink()
    zero_dimension_nifti(path / "imagesTr" / "bad_axes_zero.nii")
    declared = (path / "dataset.json").read_text()
    (path / "dataset.json").write_text(
        declared.replace("imagesTr/bad_axes_zero.nii.gz", "imagesTr/bad_axes_zero.nii")
    )
    return path


def test_bad_cases_are_listed_and_the_rest_is_done(
    bad_path: Path, scheduler: str, supercl: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = supercl("preprocess", bad_path, tmp_path / "out.zarr", "--scheduler", scheduler)
    assert outcome.code == 3
    assert f"2 cases computed, 0 kept from before, {len(REASONS)} failed" in outcome.out
    assert (
        f"error: {len(REASONS)} cases failed; the others are in the cache.\n  where:    {tmp_path}"
        in outcome.err
    )
    assert "next:     Mend these files and run the same command again" in outcome.err
    for case_id, reason in REASONS.items():
        [line] = [line for line in outcome.err.splitlines() if line.startswith(f"    {case_id}: ")]
        assert reason in line
    cache = open_cache(tmp_path / "out.zarr")
    assert [row.id for row in cache.done] == ["good_one", "good_two"]
    assert [row.id for row in cache.failed] == list(REASONS)
    assert sorted(zarr.open_group(cache.path, mode="r")["cases"].group_keys()) == ["good_one", "good_two"]
    assert not wip_path(cache.path).exists()
    with pytest.raises(CacheError, match=r"failed case: .*NaN or infinite"):
        cache.case("bad_nan")
    again = supercl("preprocess", bad_path, tmp_path / "out.zarr", "--scheduler", scheduler)
    assert again.code == 3
    assert f"0 cases computed, 2 kept from before, {len(REASONS)} failed" in again.out


@pytest.mark.parametrize("kind", ["unreadable", "computed in vain"])
def test_when_all_cases_fail_nothing_is_left_behind(
    kind: str,
    write_msd: Callable[..., Path],
    scheduler: str,
    supercl: Callable[..., Any],
    tmp_path: Path,
) -> None:
    image = np.full((2, 8, 8), np.nan, np.float32)
    source = write_msd(tmp_path / "in", {"one": (image, None), "two": (image, None)})
    if kind == "unreadable":
        for file in (source / "imagesTs").iterdir():
            file.write_text("not a volume")
    outcome = supercl("preprocess", source, tmp_path / "out.zarr", "--scheduler", scheduler)
    assert outcome.code == 1
    assert "No case could be computed; nothing was written." in outcome.err
    assert "one: " in outcome.err
    assert "two: " in outcome.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_changed_settings_are_refused(cache_copy: Path, msd_path: Path, supercl: Callable[..., Any]) -> None:
    before = content(cache_copy)
    outcome = supercl("preprocess", msd_path, cache_copy, "--set", "n_segments=50")
    assert outcome.code == 4
    assert "made with other settings" in outcome.err
    assert "expected: n_segments = 100" in outcome.err
    assert "found:    n_segments = 50" in outcome.err
    assert content(cache_copy) == before


def test_settings_decide_what_is_in_the_cache(small: Path, scheduler: str) -> None:
    config = PreprocessConfig(n_segments=4, spacing="unknown")
    run(small, small.parent / "out.zarr", config=config, scheduler=scheduler)
    cache = open_cache(small.parent / "out.zarr")
    assert cache.attributes["config"]["n_segments"] == 4
    assert all(row.num_superpixels <= 9 for row in cache.done)
    assert all(row.spacing_mm is None for row in cache.done)


def test_a_plain_folder_is_read_without_labels(
    write_volume: Callable[..., Path], texture: Textures, scheduler: str, tmp_path: Path
) -> None:
    write_volume(tmp_path / "in" / "scan.nrrd", integers(texture, 0))
    write_volume(tmp_path / "in" / "site" / "scan.mha", integers(texture, 1))
    run(tmp_path / "in", tmp_path / "out.zarr", scheduler=scheduler)
    cache = open_cache(tmp_path / "out.zarr")
    assert [row.id for row in cache.done] == ["scan", "site_scan"]
    assert (cache.name, cache.class_names, cache.attributes["channel_names"]) == ("in", (), ["0"])


def test_source_is_found_wherever_the_command_runs(
    small: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small.parent)
    assert run(Path("small"), Path("out.zarr"), scheduler=scheduler).num_computed == 3
    assert run(small, small.parent / "out.zarr", scheduler=scheduler).num_kept == 3
    shutil.rmtree(small.parent / "out.zarr")
