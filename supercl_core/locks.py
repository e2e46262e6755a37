"""One writer a cache: a lock beside it that carries host, process and a heartbeat, on any shared file system.

The lock of CACHE is the folder `CACHE.lock`, made whole under another name and then renamed: a folder cannot be renamed
onto one that holds something, which every file system decides for one process only. It is taken over after five minutes
without a heartbeat, or at once where its process is known to be dead; who lost it that way is told before he commits
anything (`check_lock`). Ages are differences of times that the file server wrote, so clocks need not agree.
Called by whatever changes a cache.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from supercl_core.errors import CacheError
from supercl_core.files import read_json, wip_path, write_json

HEARTBEAT_S: Final = 15.0
SILENCE_S: Final = 300.0
"""A lock without a heartbeat for so long may be taken over (DESIGN)."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a lock."""

    host: str
    boot: str
    """Changes with every start of the machine; empty where it is not known."""
    pid_namespace: str
    """Processes of one container see each other, those of two do not; empty where it is not known."""
    pid: int
    started: str
    """When the process started, in the units of its system: a number may be given to another process later."""
    command: str
    token: str
    """A name that no other holder has."""

    def is_dead(self) -> bool:
        """Whether the process is known to have ended."""
        here = _this_process("")
        if self.host != here.host:
            return False
        if self.boot != here.boot:
            return bool(self.boot and here.boot)
        if self.pid_namespace != here.pid_namespace:
            return False
        if sys.platform == "win32":
            return False  # there, the signal 0 ends a process
        try:
            with suppress(PermissionError):  # it is there, and another user's
                os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return self.started != _started(self.pid)


def lock_path(path: Path) -> Path:
    """The lock of the cache at `path`."""
    return path.with_name(path.name + ".lock")


@contextmanager
def hold(path: Path) -> Iterator[str]:
    """Hold the lock of the cache at `path`; yields the token of the lock.

    What earlier holders left beside the cache is removed first, and what this one leaves at the end.
    Raises CacheError where somebody else holds it, and OSError where nothing can be written beside the cache.
    """
    owner = _this_process(secrets.token_hex(8))
    _acquire(path, owner)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, owner.token, ended), daemon=True)
    heart.start()
    try:
        shutil.rmtree(wip_path(path), ignore_errors=True)
        yield owner.token
    finally:
        ended.set()
        heart.join()
        with suppress(CacheError):
            check_lock(path, owner.token)
            shutil.rmtree(wip_path(path), ignore_errors=True)
            _remove(path, owner.token)
            with suppress(OSError):  # another holder has work there
                wip_path(path).rmdir()


@contextmanager
def hold_in_turn(path: Path) -> Iterator[str]:
    """`hold`, after the others that want it too: for what is held for moments, such as one file of many writers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            try:
                owner = stack.enter_context(hold(path))
                break
            except CacheError:
                time.sleep(0.1)
        yield owner


def check_lock(path: Path, token: str) -> None:
    """Raise CacheError unless the lock of the cache at `path` is still that of `token`."""
    owner = _owner(lock_path(path))
    if owner is None or owner.token != token:
        raise CacheError(
            "The lock of the cache was lost: another run has taken it over, or somebody removed it.",
            where=lock_path(path),
            expected=f"the lock that was taken here, with a heartbeat within {SILENCE_S:.0f} s",
            found="none" if owner is None else f"one of {_described(owner)}",
            next_step="Finished cases are kept. See that no other run is at work, and run the same command again.",
        )


def _acquire(path: Path, owner: Owner) -> None:
    lock, mine = lock_path(path), _aside(path, owner.token)
    try:
        while True:
            try:
                write_json(mine / "owner.json", asdict(owner))
                mine.rename(lock)
                return
            except FileNotFoundError:
                continue  # another holder came or went, and removed what lay beside the cache
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            holder, silence_s = _owner(lock), _silence_s(lock, mine)
            if silence_s is None:
                continue  # it was given back just now
            if silence_s < SILENCE_S and not (holder and holder.is_dead()):
                raise _in_use(lock, holder, silence_s)
            _remove(path, "" if holder is None else holder.token)
    finally:
        shutil.rmtree(mine, ignore_errors=True)
        with suppress(OSError):  # another holder has work there
            wip_path(path).rmdir()


def _remove(path: Path, token: str) -> None:
    """Take a lock away, unless it is no longer that of `token`: only one process can rename it."""
    lock, away = lock_path(path), _aside(path, secrets.token_hex(8))
    while True:
        away.parent.mkdir(exist_ok=True)
        try:
            lock.rename(away)
            break
        except FileNotFoundError:  # the lock, or the folder for `away`, which others remove when they go
            if not lock.exists():
                return
    owner = _owner(away)
    if owner is not None and owner.token != token:
        # It was taken over in between; where a third has taken its place by now, its holder will notice.
        with suppress(OSError):
            away.rename(lock)
    shutil.rmtree(away, ignore_errors=True)


def _aside(path: Path, token: str) -> Path:
    """Where a lock is made and unmade: what a process killed there has left goes with the next holder."""
    return wip_path(path) / f".lock.{token}"


def _beat(path: Path, token: str, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        with suppress(CacheError, OSError):  # who commits something looks himself
            check_lock(path, token)
            os.utime(lock_path(path) / "owner.json")


def _owner(lock: Path) -> Owner | None:
    """Who holds a lock; None where there is none, or one that says nothing."""
    try:
        return Owner(**read_json(lock / "owner.json", limit_bytes=1 << 16))
    except (OSError, ValueError, TypeError):
        return None


def _silence_s(lock: Path, mine: Path) -> float | None:
    """Seconds since the last heartbeat, by the clock of the file server; None where a lock is gone."""
    try:
        os.utime(mine / "owner.json")
        now = (mine / "owner.json").stat().st_mtime
    except FileNotFoundError:
        return None
    for written in (lock / "owner.json", lock):
        with suppress(OSError):
            return now - written.stat().st_mtime
    return None


def _in_use(lock: Path, holder: Owner | None, silence_s: float) -> CacheError:
    return CacheError(
        "It is in use by another process.",
        where=lock,
        expected="no other process that changes it",
        found=f"{'an unknown process' if holder is None else _described(holder)}, "
        f"which gave a sign of life {max(silence_s, 0):.0f} s ago",
        next_step=f"Wait for its end, or stop it. A lock without a heartbeat is taken over after {SILENCE_S / 60:.0f} "
        "minutes.",
    )


def _described(owner: Owner) -> str:
    return f"process {owner.pid} on {owner.host} ({owner.command})"


def _this_process(token: str) -> Owner:
    return Owner(
        host=socket.gethostname(),
        boot=_text(Path("/proc/sys/kernel/random/boot_id")),
        pid_namespace=_link(Path("/proc/self/ns/pid")),
        pid=os.getpid(),
        started=_started(os.getpid()),
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:500],
        token=token,
    )


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did; empty where the system does not say."""
    _, _, fields = _text(Path(f"/proc/{pid}/stat")).rpartition(
        ")"
    )  # its name may hold anything but this last bracket
    return fields.split()[19] if fields else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""
