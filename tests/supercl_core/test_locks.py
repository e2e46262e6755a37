"""One writer a cache: refused while it lives, taken over when it is dead or silent, never by two at once."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from supercl_core import locks
from supercl_core.errors import CacheError
from supercl_core.files import wip_path
from supercl_core.locks import check_lock, hold, lock_path

HOLDER = """
import sys, time
from pathlib import Path
from supercl_core.locks import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.zarr"


def start_holder(path: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def change_owner(path: Path, **changes: object) -> None:
    file = lock_path(path) / "owner.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_lock_leaves_nothing_behind(path: Path) -> None:
    with hold(path) as token:
        check_lock(path, token)
        (wip_path(path) / token).mkdir(parents=True)
        assert lock_path(path).is_dir()
    assert list(path.parent.iterdir()) == []


def test_the_remains_of_a_dead_holder_are_removed(path: Path) -> None:
    (wip_path(path) / "half" / "image").mkdir(parents=True)
    with hold(path):
        assert not wip_path(path).exists()


def test_a_second_holder_is_refused_with_the_name_of_the_first(path: Path) -> None:
    with hold(path), pytest.raises(CacheError, match="in use") as caught, hold(path):
        pass
    assert f"process {os.getpid()} on {os.uname().nodename}" in str(caught.value.found)
    assert caught.value.exit_code == 4
    assert list(path.parent.iterdir()) == []


def test_the_lock_of_another_process_is_respected_while_it_lives_and_taken_over_at_once_when_it_is_dead(
    path: Path,
) -> None:
    holder = start_holder(path)
    with pytest.raises(CacheError, match=f"process {holder.pid} on "), hold(path):
        pass
    holder.kill()
    holder.communicate()
    with hold(path) as token:
        check_lock(path, token)


@pytest.mark.parametrize(
    "elsewhere", [{"host": "another"}, {"pid_namespace": "pid:[1]", "pid": 2**22 - 1}, {"boot": ""}]
)
def test_a_process_that_cannot_be_looked_at_counts_as_alive(path: Path, elsewhere: dict[str, object]) -> None:
    with hold(path):
        change_owner(path, **elsewhere)
        with pytest.raises(CacheError, match="in use"), hold(path):
            pass


@pytest.mark.parametrize(
    "dead", [{"pid": 2**22 - 1}, {"started": "1"}, {"boot": "before the machine started again"}]
)
def test_a_process_known_to_be_dead_is_succeeded_at_once(path: Path, dead: dict[str, object]) -> None:
    with pytest.raises(CacheError, match="lost"), hold(path) as first:
        change_owner(path, **dead)
        with hold(path) as token:
            check_lock(path, token)
        check_lock(path, first)


def test_five_minutes_of_silence_end_a_lock_by_the_clock_of_the_file_system(path: Path) -> None:
    with hold(path):
        change_owner(path, host="another")
        for age_s, is_free in ((290, False), (310, True)):
            past = time.time() - age_s
            os.utime(lock_path(path) / "owner.json", (past, past))
            if not is_free:
                with pytest.raises(CacheError, match="sign of life 29. s ago"), hold(path):
                    pass
        with hold(path):
            pass


def test_a_lock_that_says_nothing_is_judged_by_its_age(path: Path) -> None:
    lock_path(path).mkdir()
    (lock_path(path) / "rubbish").write_text("x")
    with pytest.raises(CacheError, match="an unknown process"), hold(path):
        pass
    past = time.time() - 310
    os.utime(lock_path(path), (past, past))
    with hold(path):
        pass


def test_who_lost_the_lock_learns_it_and_leaves_the_successor_alone(path: Path) -> None:
    with hold(path) as first:
        change_owner(path, host="another")
        past = time.time() - 310
        os.utime(lock_path(path) / "owner.json", (past, past))
        second = hold(path)
        token = second.__enter__()
        with pytest.raises(CacheError, match=f"one of process {os.getpid()}"):
            check_lock(path, first)
    check_lock(path, token)  # giving back what is lost already gives back nothing
    second.__exit__(None, None, None)
    with pytest.raises(CacheError, match="found:    none"):
        check_lock(path, token)


def test_a_holder_gives_signs_of_life(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.01)
    with hold(path):
        file = lock_path(path) / "owner.json"
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime < 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


CONTENDER = """
import sys, time
from pathlib import Path
from supercl_core.errors import CacheError
from supercl_core.locks import hold
path, counted = Path(sys.argv[1]), Path(sys.argv[3])
for _ in range(int(sys.argv[2])):
    while True:
        try:
            with hold(path):
                number = int(counted.read_text())
                time.sleep(0.0005)
                counted.write_text(str(number + 1))
            break
        except CacheError:
            time.sleep(0.0005)
"""
"""Takes a lock several times; what is counted under it counts right only where nobody else holds it."""


def contend(path: Path, num_rounds: int, counted: Path) -> None:
    """Have four processes take the lock, each `num_rounds` times."""
    command = [sys.executable, "-c", CONTENDER, path, str(num_rounds), counted]
    contenders = [subprocess.Popen(command) for _ in range(4)]
    assert [contender.wait(60) for contender in contenders] == [0] * 4


def test_of_many_processes_only_one_holds_it(path: Path) -> None:
    counted = path.parent / "counted"
    counted.write_text("0")
    contend(path, 25, counted)
    assert counted.read_text() == "100"
    assert list(path.parent.iterdir()) == [counted]


def test_of_many_heirs_of_a_dead_holder_only_one_takes_over(path: Path) -> None:
    """Each judges the same dead lock; whoever comes second must not take away what the first has made of it."""
    counted = path.parent / "counted"
    counted.write_text("0")
    for round_ in range(5):
        holder = start_holder(path)
        holder.kill()
        holder.communicate()
        contend(path, 1, counted)
        assert counted.read_text() == str(4 * (round_ + 1))


def test_an_owner_survives_its_file(path: Path) -> None:
    with hold(path):
        owner = locks._owner(lock_path(path))
        assert owner is not None
        assert not owner.is_dead()
        assert dataclasses.asdict(owner)["command"]


def test_on_windows_a_process_is_never_asked_by_a_signal_that_would_end_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(pid: int, number: int) -> None:
        raise AssertionError("a signal that would end the process")

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(sys, "platform", "win32")
    with hold(path), pytest.raises(CacheError, match="in use"), hold(path):
        pass
