"""A disk that is full, read-only or forbidden, a system that opens no more files: said once, and nothing is lost."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from cache_bytes import changed_cases, content, stamps

from preprocess import run
from preprocess.cluster import FILES, FILES_PER_WORKER
from supercl_core.cache import writer as cache_writer
from supercl_core.errors import StorageError

Textures = Callable[[tuple[int, ...], int], np.ndarray]

NUM_CASES: Final = 10
CASE_BYTES: Final = 120_000
"""About what a case takes on a disk; the tables and weak labels take twice as much."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def source(write_msd: Callable[..., Path], texture: Textures, place: Path) -> Path:
    """Ten cases of six slices; the first one is larger."""
    cases = {}
    for index in range(NUM_CASES):
        shape = (6, 64, 64) if index else (6, 96, 96)
        cases[f"case_{index}"] = (np.rint(texture(shape, index) * 300).astype(np.int16), None)
    return write_msd(place / "in", cases)


@pytest.fixture(scope="module")
def whole(source: Path, scheduler: str, place: Path) -> Path:
    """The cache that a run without trouble makes."""
    run(source, place / "whole.zarr", scheduler=scheduler)
    return place / "whole.zarr"


def command(
    *arguments: object, inside: Sequence[str] = (), **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, through the command `inside`."""
    line = [*inside, sys.executable, "-m", "supercl_core.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, check=False, **settings)


def refused(ended: subprocess.CompletedProcess[str], message: str) -> str:
    """Check that a command ended with one message and nothing else; returns what it said."""
    said = ended.stderr
    assert ended.returncode == 1, said
    assert said.count("error: ") == said.count(message) == 1, said
    assert "Traceback" not in said
    assert "\n    case_" not in said, "single cases are listed"
    return said


def num_said_to_be_safe(said: str) -> int:
    """Of the cases, in a message; workers may commit a few more before they are stopped."""
    found = re.search(f"; ([0-9]+) of {NUM_CASES} cases are finished and safe in the cache", said)
    assert found is not None, said
    return int(found[1])


def num_committed(cache_path: Path) -> int:
    return len(list(cache_path.glob("cases/*/zarr.json")))


# ---- file systems of a test's own


class Disk:
    """A file system in memory, seen by the processes that are started through it."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        path.mkdir()
        self._holder = subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size={size_bytes} none {path} && echo && cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._holder.stdout is not None
        self.is_there = self._holder.stdout.readline() == b"\n"

    @property
    def seen(self) -> Path:
        """The path of the disk for this process."""
        return Path(f"/proc/{self._holder.pid}/root{self.path}")

    def remount(self, option: str) -> None:
        """Change the disk, such as to `size=9m` or `ro`."""
        subprocess.run([*self._inside(), "mount", "-o", f"remount,{option}", self.path], check=True)

    def command(self, *arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run the command line where the disk is seen."""
        return command(*arguments, inside=self._inside(), **settings)

    def close(self) -> None:
        self._holder.communicate()

    def _inside(self) -> list[str]:
        return ["nsenter", f"--target={self._holder.pid}", "--user", "--mount", "--preserve-credentials"]


@pytest.fixture
def disk(place: Path) -> Iterator[Callable[[int], Disk]]:
    """Makes a disk of so many bytes."""
    disks: list[Disk] = []

    def make(size_bytes: int) -> Disk:
        disks.append(Disk(place / "disk", size_bytes))
        if not disks[-1].is_there:
            pytest.skip("this system lets no user mount a file system (unshare -rm)")
        return disks[-1]

    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("no unshare and nsenter to mount a file system with")
    yield make
    for opened in disks:
        opened.close()
        opened.path.rmdir()


@pytest.mark.parametrize("room", ["for half of the cases", "for the cases but not for the tables"])
def test_a_full_disk_is_said_once_and_the_run_goes_on_once_there_is_room(
    room: str, source: Path, whole: Path, disk: Callable[[int], Disk]
) -> None:
    size_bytes = NUM_CASES // 2 * CASE_BYTES
    if room != "for half of the cases":
        used = sum(
            -(-file.stat().st_size // 4096) * 4096 for file in whole.rglob("cases/**/*") if file.is_file()
        )
        size_bytes = used + CASE_BYTES // 2
    small = disk(size_bytes)
    cache = small.seen / "out.zarr"
    line = ("preprocess", source, small.path / "out.zarr", "--workers", "2")

    said = refused(small.command(*line), "The disk is full.")
    finished = sorted(cache.glob("cases/*/zarr.json"))
    assert num_said_to_be_safe(said) <= len(finished)
    assert (len(finished) == NUM_CASES) == (room != "for half of the cases")
    assert finished
    before = stamps(file.parent for file in finished)

    small.remount("size=50m")
    again = small.command(*line)
    assert again.returncode == 0, again.stderr
    assert (
        f"{NUM_CASES - len(finished)} cases computed, {len(finished)} kept from before, 0 failed"
        in again.stdout
    )
    assert changed_cases(before) == set()
    assert content(cache) == content(whole)
    assert [entry.name for entry in small.seen.iterdir()] == ["out.zarr"]


@pytest.mark.parametrize(
    "size_bytes",
    [4096, *(pytest.param(size, marks=pytest.mark.slow) for size in (8192, 12288)), 16384],
)
def test_a_disk_too_full_to_begin_on_is_said(
    size_bytes: int, source: Path, whole: Path, disk: Callable[[int], Disk]
) -> None:
    small = disk(size_bytes)
    line = ("preprocess", source, small.path / "out.zarr", "--workers", "1")
    refused(small.command(*line), "The disk is full.")
    small.remount("size=50m")
    assert small.command(*line).returncode == 0
    assert content(small.seen / "out.zarr") == content(whole)
    assert [entry.name for entry in small.seen.iterdir()] == ["out.zarr"]


def test_a_full_disk_of_the_compiled_kernels_is_not_blamed_on_the_cases(
    source: Path, disk: Callable[[int], Disk], tmp_path: Path
) -> None:
    small = disk(64 << 10)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(small.path)}
    ended = small.command("preprocess", source, tmp_path / "out.zarr", "--workers", "1", env=environment)
    assert "NUMBA_CACHE_DIR" in refused(ended, "The disk is full.")


def test_a_read_only_file_system_takes_no_cache_and_shows_the_one_on_it(
    source: Path, whole: Path, disk: Callable[[int], Disk]
) -> None:
    small = disk(50 << 20)
    shutil.copytree(whole, small.seen / "whole.zarr")
    small.remount("ro")
    for name in ("new.zarr", "whole.zarr"):
        refused(small.command("preprocess", source, small.path / name), "The file system is read-only.")
    assert small.command("inspect", small.path / "whole.zarr").returncode == 0
    assert content(small.seen / "whole.zarr") == content(whole)


def test_a_limit_on_the_size_of_files_is_said_once_and_the_run_goes_on_without_it(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    limit = 80_000  # between the image of the first case and that of the others
    line = ("preprocess", source, tmp_path / "out.zarr", "--workers", "2")
    limited = command(*line, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    said = refused(limited, "A file would be larger than the system allows.")
    finished = num_committed(tmp_path / "out.zarr")
    assert num_said_to_be_safe(said) <= finished
    again = command(*line)
    assert again.returncode == 0, again.stderr
    assert f"{NUM_CASES - finished} cases computed, {finished} kept from before, 0 failed" in again.stdout
    assert content(tmp_path / "out.zarr") == content(whole)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.zarr"]


# ---- permissions and limits


def without_rights() -> None:
    """Make this process one that permissions bind also where it is root's (Linux: capabilities, prctl)."""
    drop_from_bounding_set, dac_override, dac_read_search = 24, 1, 2
    for capability in (dac_override, dac_read_search):
        ctypes.CDLL(None).prctl(drop_from_bounding_set, capability)


@pytest.fixture
def closed(whole: Path, place: Path) -> Iterator[Path]:
    """A folder with a cache, where nobody may write."""
    path = place / "closed"
    shutil.copytree(whole, path / "whole.zarr")
    entries = [path, *path.rglob("*")]
    for entry in entries:
        entry.chmod(0o555 if entry.is_dir() else 0o444)
    yield path
    for entry in entries:
        entry.chmod(0o755)
    shutil.rmtree(path)


@pytest.mark.parametrize("name", ["new.zarr", "whole.zarr"])
def test_a_missing_permission_is_said(name: str, source: Path, closed: Path) -> None:
    said = refused(
        command("preprocess", source, closed / name, preexec_fn=without_rights), "The permission is missing."
    )
    assert str(closed) in said
    assert [entry.name for entry in closed.iterdir()] == ["whole.zarr"]


READ: Final = """
import sys
from supercl_core.cache.reader import open_cache
cache = open_cache(sys.argv[1])
case = cache.case("case_3")
print(cache.num_slices, int(case.image_ZCYX.max()), int(case.superpixels_ZYX.max()), cache.weak_labels().name)
"""


def test_a_cache_opens_where_nothing_can_be_written(closed: Path) -> None:
    shown = command("inspect", closed / "whole.zarr", preexec_fn=without_rights)
    assert shown.returncode == 0, shown.stderr
    assert str(closed) in shown.stdout
    line = [sys.executable, "-c", READ, str(closed / "whole.zarr")]
    read = subprocess.run(line, capture_output=True, text=True, check=True, preexec_fn=without_rights)
    assert read.stdout.split()[:2] == [str(NUM_CASES * 6), "300"]
    assert [entry.name for entry in closed.iterdir()] == ["whole.zarr"]


def test_too_many_open_files_are_said_before_a_run_and_as_many_as_are_asked_for_suffice(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    needed = FILES + 2 * FILES_PER_WORKER

    def limited(limit: int) -> subprocess.CompletedProcess[str]:
        line = ("preprocess", source, tmp_path / "out.zarr", "--workers", "2")
        return command(*line, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))

    said = refused(limited(needed - 1), "Too many files are open.")
    assert f"at most {needed - 1} may be; 2 worker processes take {needed}" in said
    assert list(tmp_path.iterdir()) == []
    enough = limited(needed)
    assert enough.returncode == 0, enough.stderr
    assert "Traceback" not in enough.stderr
    assert content(tmp_path / "out.zarr") == content(whole)


def test_a_used_up_quota_is_said_once_and_the_run_goes_on(
    source: Path, whole: Path, scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = cache_writer.replace_folder

    def until_the_fourth(wip: Path, path: Path) -> None:
        if num_committed(tmp_path / "out.zarr") >= 3:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(wip))
        write(wip, path)

    monkeypatch.setattr(cache_writer, "replace_folder", until_the_fourth)
    with pytest.raises(StorageError, match="The quota of this user is used up") as caught:
        run(source, tmp_path / "out.zarr", scheduler=scheduler)
    assert f"3 of {NUM_CASES} cases are finished and safe in the cache" in str(caught.value)
    monkeypatch.undo()
    result = run(source, tmp_path / "out.zarr", scheduler=scheduler)
    assert (result.num_kept, result.num_computed) == (3, NUM_CASES - 3)
    assert content(tmp_path / "out.zarr") == content(whole)
