"""Runs on Dask: equal bytes, resumption after a kill, changed and added cases, and every kind of bad input."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from cache_bytes import content
from distributed import Client, Future

from preprocess import cluster, plan, run, runner, worker
from preprocess.pipeline import PreprocessConfig
from supercl_core.cache import writer as cache_writer
from supercl_core.cache.reader import open_cache
from supercl_core.errors import CacheError, SuperCLError
from supercl_core.files import wip_path
from supercl_core.formats.volumes import read_volume
from supercl_core.locks import hold, lock_path

Textures = Callable[[tuple[int, ...], int], np.ndarray]


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
    untouched = path / "cases" / "case_a" / "image" / "zarr.json"
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
    assert "note: 1 cases (case_b): the input no longer has them, the cache keeps them" in outcome.err
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


def test_failed_cases_stay_in_the_table_until_their_files_change_or_a_retry_is_asked_for(
    small: Path, scheduler: str, supercl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small.parent / "out.zarr"
    compute = worker.process_case

    def refuses_b(image: Any, label: Any, **settings: Any) -> Any:
        if np.array_equal(image.array_CZYX[0], expected_b):
            raise SuperCLError("Not today.", next_step="Wait.")
        return compute(image, label, **settings)

    expected_b = open_volume(small / "imagesTs" / "case_b.nii.gz")
    monkeypatch.setattr(worker, "process_case", refuses_b)
    assert supercl("preprocess", small, path, "--scheduler", scheduler).code == 3
    [row] = open_cache(path).failed
    assert (row.id, row.reason, len(row.digest)) == ("case_b", "Not today", 64)
    monkeypatch.undo()
    before = content(path)
    again = supercl("preprocess", small, path, "--scheduler", scheduler)
    assert (again.code, "case_b: Not today" in again.err) == (3, True)
    assert "--retry-failed" in again.err
    assert content(path) == before
    retried = supercl("preprocess", small, path, "--scheduler", scheduler, "--retry-failed")
    assert retried.code == 0
    assert "1 cases computed, 2 kept from before, 0 failed" in retried.out
    run(small, small.parent / "fresh.zarr", scheduler=scheduler)
    assert content(path) == content(small.parent / "fresh.zarr")


def open_volume(path: Path) -> np.ndarray:
    return read_volume(path).array_CZYX[0]


def test_a_changed_source_that_cannot_be_read_any_more_leaves_the_cache(small: Path, scheduler: str) -> None:
    path = small.parent / "out.zarr"
    run(small, path, scheduler=scheduler)
    (small / "imagesTs" / "case_b.nii.gz").write_text("no volume")
    assert [row.id for row in run(small, path, scheduler=scheduler).failed] == ["case_b"]
    assert not (path / "cases" / "case_b").exists()
    assert [row.id for row in open_cache(path).done] == ["case_a", "case_c"]


def test_moved_data_is_recognised_by_its_content_and_then_by_its_stamp(
    small: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small.parent / "out.zarr"
    run(small, path, scheduler=scheduler)
    before = content(path)
    moved = Path(shutil.copytree(small, small.parent / "moved"))
    assert run(moved, path).num_kept == 3
    monkeypatch.setattr(plan, "source_digest", None)
    assert run(moved, path).num_kept == 3
    assert content(path) == before


def test_a_file_that_changes_while_it_is_read_fails(
    small: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = worker.process_case

    def disturbed(image: Any, label: Any, **settings: Any) -> Any:
        (small / "imagesTs" / "case_b.nii.gz").touch()
        return compute(image, label, **settings)

    monkeypatch.setattr(worker, "process_case", disturbed)
    [row] = run(small, small.parent / "out.zarr", scheduler=scheduler).failed
    assert (row.id, "changed while they were read" in row.reason) == ("case_b", True)


def test_a_deleted_shard_is_computed_again_by_the_same_command(small: Path, scheduler: str) -> None:
    path = small.parent / "out.zarr"
    run(small, path, scheduler=scheduler)
    before = content(path)
    shutil.rmtree(path / "cases" / "case_b" / "labels" / "superpixels" / "0" / "c")
    shutil.rmtree(path / "table")
    result = run(small, path, scheduler=scheduler)
    assert (result.num_computed, result.num_kept) == (1, 2)
    assert content(path) == before


def test_identical_cases_are_named(small: Path, scheduler: str, supercl: Callable[..., Any]) -> None:
    shutil.copy(small / "imagesTs" / "case_a.nii.gz", small / "imagesTs" / "case_z.nii.gz")
    declared = json.loads((small / "dataset.json").read_text())
    declared["test"].append("./imagesTs/case_z.nii.gz")
    (small / "dataset.json").write_text(json.dumps(declared))
    outcome = supercl("preprocess", small, small.parent / "out.zarr", "--scheduler", scheduler)
    assert "note: 2 cases (case_a, case_z): their content is identical" in outcome.err


def test_a_cache_in_use_is_refused_and_left_alone(
    small: Path, cache_copy: Path, msd_path: Path, supercl: Callable[..., Any]
) -> None:
    before = content(cache_copy)
    with hold(cache_copy):
        for command in (
            ("preprocess", msd_path, cache_copy),
            ("weak-labels", cache_copy),
            ("repair", cache_copy),
        ):
            outcome = supercl(*command)
            assert outcome.code == 4
            assert f"process {os.getpid()} on {socket.gethostname()}" in outcome.err
    assert content(cache_copy) == before


def test_a_worker_of_a_run_that_lost_its_lock_commits_nothing(
    small: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main process was stopped for so long that another one took over."""
    path = small.parent / "out.zarr"
    compute = worker.process_case

    def overtaken(image: Any, label: Any, **settings: Any) -> Any:
        shutil.rmtree(lock_path(path), ignore_errors=True)
        return compute(image, label, **settings)

    monkeypatch.setattr(worker, "process_case", overtaken)
    with pytest.raises(CacheError, match="lock of the cache was lost"):
        run(small, path, scheduler=scheduler)
    assert not list(path.glob("cases/*/zarr.json"))


# ---- repair


@pytest.mark.parametrize(
    "where", ["cases/case_b/image/c/0/0/0/0", "table/shape/c/0/0", "weak_labels/intensity/ccl/c/0/0"]
)
def test_repair_computes_what_is_damaged_and_nothing_else(
    where: str, small: Path, scheduler: str, supercl: Callable[..., Any]
) -> None:
    path = small.parent / "out.zarr"
    run(small, path, scheduler=scheduler)
    before = content(path)
    kept = {file: file.stat().st_mtime_ns for file in path.glob("cases/case_[ac]/**/*") if file.is_file()}
    damaged = bytearray((path / where).read_bytes())
    damaged[7] ^= 16
    (path / where).write_bytes(damaged)
    outcome = supercl("repair", path, "--workers", 1)
    assert outcome.code == 0
    assert where.rpartition("/c/")[0] in outcome.out
    assert f"{1 if where.startswith('cases') else 0} cases computed again" in outcome.out
    assert content(path) == before
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert "no damage" in supercl("repair", path).out


def test_repair_keeps_a_damaged_case_whose_source_is_gone(
    small: Path, scheduler: str, supercl: Callable[..., Any]
) -> None:
    path = small.parent / "out.zarr"
    run(small, path, scheduler=scheduler)
    file = path / "cases/case_b/image/c/0/0/0/0"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    (small / "imagesTs" / "case_b.nii.gz").rename(small / "case_b.nii.gz")
    declared = json.loads((small / "dataset.json").read_text())
    declared["test"] = [entry for entry in declared["test"] if "case_b" not in entry]
    (small / "dataset.json").write_text(json.dumps(declared))
    outcome = supercl("repair", path, "--workers", 1)
    assert outcome.code == 4
    assert "could not be mended" in outcome.err
    assert "case_b" in outcome.err
    assert file.exists()


def test_repair_asks_for_the_volumes_where_the_cache_does_not_name_them(
    cache_copy: Path, supercl: Callable[..., Any]
) -> None:
    (cache_copy / "cases/case_b/asp/c/0/0/0").unlink()
    cache_writer.set_root_attributes(cache_copy, {"provenance": {}})
    outcome = supercl("repair", cache_copy, "--workers", 1)
    assert (outcome.code, "supercl repair CACHE INPUT" in outcome.err) == (2, True)


def test_repair_finds_the_volumes_where_they_are_now(
    small: Path, scheduler: str, supercl: Callable[..., Any]
) -> None:
    path = small.parent / "out.zarr"
    run(small, path, scheduler=scheduler)
    before = content(path)
    (path / "cases/case_b/asp/c/0/0/0").unlink()
    small.rename(small.parent / "moved")
    outcome = supercl("repair", path, "--workers", 1)
    assert (outcome.code, "input folder does not exist" in outcome.err) == (1, True)
    assert supercl("repair", path, small.parent / "moved", "--workers", 1).code == 0
    assert content(path) == before


def test_rubbish_of_a_killed_run_does_not_reach_the_cache(small: Path, scheduler: str) -> None:
    path = small.parent / "out.zarr"
    half = wip_path(path) / "case_a" / "image"
    half.mkdir(parents=True)
    (half / "rubbish").write_text("x")
    run(small, path, scheduler=scheduler)
    assert not list(small.parent.rglob("rubbish"))


# ---- workers that die, runs that are stopped: real processes

DEADLY, DEADLY_ONCE, SLOW = 666, 667, 668
"""First value of a volume that kills its worker, that does so once, or that takes long."""
HOOK = """
import os, pathlib, signal, time
from preprocess import worker

compute = getattr(worker, "unhooked", worker.process_case)  # Dask may load this file twice
worker.unhooked = compute
marker = pathlib.Path({marker!r})

def process_case(image, label, **settings):
    first = image.array_CZYX[0, 0, 0, 0]
    if first == {deadly} or (first == {once} and not marker.exists()):
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if first == {slow} and image.array_CZYX.shape[1] > 1:  # not while others wait for compiled kernels
        time.sleep(60)
    return compute(image, label, **settings)

worker.process_case = process_case
"""


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes started meanwhile behave as DEADLY, DEADLY_ONCE and SLOW say."""
    from dask import config

    file = tmp_path / "hook" / "hook.py"
    file.parent.mkdir()
    marker = str(file.parent / "marker")
    file.write_text(HOOK.format(marker=marker, deadly=DEADLY, once=DEADLY_ONCE, slow=SLOW))
    monkeypatch.setitem(config.config["distributed"]["worker"], "preload", [str(file)])
    monkeypatch.setenv("DASK_DISTRIBUTED__WORKER__PRELOAD", str(file))


def write_marked(
    write_msd: Callable[..., Path], texture: Textures, path: Path, marks: dict[int, int], *, count: int = 10
) -> Path:
    """`count` cases, some of which start with a value of DEADLY, DEADLY_ONCE or SLOW."""
    cases = {f"case_{index}": (integers(texture, index), None) for index in range(count)}
    for index, mark in marks.items():
        cases[f"case_{index}"][0][0, 0, 0] = mark
    return write_msd(path, cases)


@pytest.mark.usefixtures("hook")
def test_a_case_that_kills_its_workers_fails_alone_and_one_whose_worker_was_lost_is_done(
    write_msd: Callable[..., Path], texture: Textures, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_marked(write_msd, texture, tmp_path / "in", {3: DEADLY, 5: DEADLY_ONCE})
    result = run(source, tmp_path / "out.zarr", num_workers=2)
    assert result.num_computed == 9
    [row] = result.failed
    assert row.id == "case_3"
    assert "dies, also with this case alone; most likely memory" in row.reason
    cache = open_cache(tmp_path / "out.zarr")
    assert cache.case("case_5").image_ZCYX[0, 0, 0, 0] == DEADLY_ONCE
    assert "Traceback" not in capfd.readouterr().err


def wait_for_case(cache_path: Path, process: subprocess.Popen[Any] | None = None) -> None:
    """Return once a case is committed."""
    deadline = time.monotonic() + 60
    while not list(cache_path.glob("cases/*/zarr.json")):
        assert process is None or process.poll() is None, "the run ended before a case was committed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("hook")
@pytest.mark.parametrize(
    ("signum", "code", "message"),
    [
        (signal.SIGINT, 130, "of 10 cases are finished; the same command goes on with the others.\n"),
        (signal.SIGTERM, 5, "error: Preprocessing was told to stop.\n  found:    "),
    ],
)
def test_a_stopped_run_says_what_is_finished_and_leaves_no_process(
    signum: int, code: int, message: str, write_msd: Callable[..., Path], texture: Textures, tmp_path: Path
) -> None:
    source = write_marked(write_msd, texture, tmp_path / "in", {8: SLOW, 9: SLOW})
    command = [sys.executable, "-m", "supercl_core.cli", "preprocess", source, tmp_path / "out.zarr"]
    process = subprocess.Popen(
        [*command, "--workers", "2"],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # The background jobs of a shell ignore Ctrl-C, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for_case(tmp_path / "out.zarr", process)
        os.killpg(process.pid, signum)  # as a terminal does with Ctrl-C
        _, said = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code
    assert message in said
    assert "Traceback" not in said
    deadline = time.monotonic() + 10
    while not all(state.startswith("Z") for state in states_of_session(process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def states_of_session(pid: int) -> list[str]:
    """What the processes that belong to a session are at."""
    states = subprocess.run(["ps", "-eo", "sess=,stat="], capture_output=True, text=True, check=True).stdout
    return [line.split()[1] for line in states.splitlines() if line.split()[0] == str(pid)]


@pytest.fixture
def dask_processes(hook: None) -> Iterator[tuple[str, subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """A scheduler and a worker, each a process that a test may kill, with the scheduler's address."""
    program = [sys.executable, "-c"]
    code = (
        "import time\nfrom distributed import LocalCluster\n"
        "cluster = LocalCluster(n_workers=0, processes=False, protocol='tcp', dashboard_address='127.0.0.1:0')\n"
        "print(cluster.scheduler_address, flush=True)\ntime.sleep(600)"
    )
    quiet = {"stderr": subprocess.DEVNULL}
    scheduler = subprocess.Popen([*program, code], stdout=subprocess.PIPE, **quiet)  # type: ignore[call-overload]
    address = scheduler.stdout.readline().decode().strip()
    worker_command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny"]
    worker = subprocess.Popen([*worker_command, "--nthreads", "2"], stdout=subprocess.DEVNULL, **quiet)  # type: ignore[call-overload]
    with Client(address) as client:
        client.wait_for_workers(1, timeout=30)
    yield address, scheduler, worker
    for process in (worker, scheduler):
        process.kill()
        process.communicate()


@pytest.mark.parametrize("victim", ["scheduler", "worker"])
def test_a_lost_cluster_ends_the_run_and_a_rerun_goes_on(
    victim: str,
    dask_processes: tuple[str, subprocess.Popen[bytes], subprocess.Popen[bytes]],
    write_msd: Callable[..., Path],
    texture: Textures,
    scheduler: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, scheduler_process, worker_process = dask_processes
    monkeypatch.setattr(cluster, "NO_WORKER_S", 0.5)
    source = write_marked(write_msd, texture, tmp_path / "in", {8: SLOW, 9: SLOW})
    path = tmp_path / "out.zarr"

    def kill() -> None:
        wait_for_case(path)
        (scheduler_process if victim == "scheduler" else worker_process).kill()

    killer = threading.Thread(target=kill)
    killer.start()
    message = "The Dask scheduler is gone" if victim == "scheduler" else "All Dask workers are gone"
    with pytest.raises(SuperCLError, match=message) as caught:
        run(source, path, scheduler=address)
    killer.join()
    assert caught.value.where == address
    finished = len(list(path.glob("cases/*/zarr.json")))
    assert finished >= 1
    result = run(source, path, scheduler=scheduler)
    assert (result.num_kept, result.failed) == (finished, ())
    assert open_cache(path).attributes["complete"] is True


def test_no_more_than_a_few_cases_for_each_thread_wait_at_the_scheduler(
    write_msd: Callable[..., Path], scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_running, most = 0, 0
    submit, add_done_callback = Client.submit, Future.add_done_callback

    def counted(*arguments: Any, **settings: Any) -> Any:
        nonlocal num_running, most
        num_running += 1
        most = max(most, num_running)
        return submit(*arguments, **settings)

    def ended(future: Any, callback: Callable[[Any], None]) -> None:
        def count(future: Any) -> None:
            nonlocal num_running
            num_running -= 1
            callback(future)

        add_done_callback(future, count)

    monkeypatch.setattr(Client, "submit", counted)
    monkeypatch.setattr(Future, "add_done_callback", ended)
    monkeypatch.setattr(runner, "MIN_TASKS", 1)
    image = np.arange(128, dtype=np.int16).reshape(2, 8, 8)
    source = write_msd(tmp_path / "in", {f"case_{index}": (image, None) for index in range(20)})
    assert run(source, tmp_path / "out.zarr", scheduler=scheduler).num_computed == 20
    assert 1 < most <= runner.TASKS_PER_THREAD  # the scheduler's only worker has one thread


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
    "bad_image_text": "content is not what its name says",
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
