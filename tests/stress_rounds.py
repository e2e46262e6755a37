"""The rounds of `stress.py`: one cache each, made by real processes while SIGKILL hits them, then resumed and compared.

Kills come from outside at a random moment, or from `kill_hook` inside at the instant before a random change of a file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
from cache_bytes import Stamps, changed_cases, content, differences, stamps

from preprocess.phantom import write_phantom

CASES: Final = 20
LIMIT_S: Final = 300
"""A run that takes longer hangs."""
ENVIRONMENT: Final = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "kill_hook")}


@dataclass(kw_only=True)
class Outcome:
    """What a round, a batch of flips or the corrupt inputs came to; outcomes add up."""

    problems: list[str] = field(default_factory=list)
    recomputed_finished_cases: int = 0
    bytes_flipped: int = 0
    flips_found: int = 0
    flips_repaired: int = 0
    corrupt_reported: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    """By victim and by moment."""
    second_runs_refused: int = 0

    def add(self, other: Outcome) -> None:
        for item in dataclasses.fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The undisturbed run that all others are compared with."""

    data: Path
    cache: Path
    files: dict[str, bytes]
    seconds: float
    changes: dict[str, int]
    """How often a process of a role makes a change of a kind in a run, by both as in an order of `kill_hook`."""


class Lane:
    """A Dask scheduler and a worker, each a process of its own, for one round at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[bytes] | None = None

    def address(self) -> str:
        """The scheduler's address, after whatever is dead was started again."""
        file = self.path / "scheduler.json"
        if self.scheduler is None or self.scheduler.poll() is not None:
            self.close()
            file.unlink(missing_ok=True)
            anywhere = ("--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0")
            self.scheduler = self._start("scheduler", *anywhere, "--no-dashboard", "--scheduler-file", file)
            _wait_for(file)
        address: str = json.loads(file.read_text())["address"]
        if self.worker is None or self.worker.poll() is not None:
            self.worker = self._start("worker", address, "--no-nanny", "--nthreads", "2", "--no-dashboard")
        return address

    def replace_worker(self) -> None:
        """Start another worker after this one was killed."""
        if self.worker is not None:
            self.worker.wait()
        self.address()

    def close(self) -> None:
        """Kill both."""
        for process in (self.worker, self.scheduler):
            if process is not None:
                process.kill()
                process.wait()

    def _start(self, kind: str, *options: object) -> subprocess.Popen[bytes]:
        self.path.mkdir(exist_ok=True)
        return start_python(["-m", f"distributed.cli.dask_{kind}", *options], self.path / "log")


class Round:
    """One cache that is made against resistance."""

    def __init__(self, number: int, seed: int, path: Path, reference: Reference, lane: Lane) -> None:
        self.path, self.reference, self.lane = path, reference, lane
        self.cache = path / "target" / "cache.zarr"
        self.cache.parent.mkdir(parents=True)
        self.random = random.Random(f"{seed} {number}")
        self.is_remote = number % 3 == 2
        self.outcome = Outcome()
        self.committed: Stamps = {}
        """Files of cases that were there before a run was resumed."""
        self.runs: list[subprocess.Popen[bytes]] = []

    def play(self) -> Outcome:
        """Kill, resume, compare."""
        try:
            if self.random.random() < 0.15:
                self._refused()
            for _ in range(self.random.choice((1, 1, 1, 2, 3))):
                self._attack()
            self._expect(self._start(), {0}, "when resumed")
            self._compare()
        finally:
            for run in self.runs:
                with suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGKILL)
        return self.outcome

    def _refused(self) -> None:
        """Start a second run beside one that holds the lock, and then kill the first with all its processes."""
        run = self._start()
        while run.poll() is None and self._holder() != run.pid:
            time.sleep(0.01)
        second = subprocess.run(self._command(), capture_output=True, text=True, env=ENVIRONMENT)
        if second.returncode == 4 and f"process {run.pid} on {socket.gethostname()}" in second.stderr:
            self.outcome.second_runs_refused += 1
        else:
            self.outcome.problems.append(f"a second run was not refused: {second.stderr}")
        moment = self._moment()
        self._kill("all", run)
        self.outcome.kills.update(("all killed", moment))
        self._expect(run, {0, -signal.SIGKILL}, "beside a second run")

    def _left(self) -> float:
        """The share of cases that are not committed yet."""
        return 1 - len([*self.cache.glob("cases/*/zarr.json")]) / CASES

    def _attack(self) -> None:
        victim = self.random.choice(("main", "worker", "all", *(["scheduler"] if self.is_remote else [])))
        outside = victim == "scheduler" or (victim == "all" and self.is_remote)
        if outside or self.random.random() < 0.4:
            left = self._left()
            run = self._start()
            with suppress(subprocess.TimeoutExpired):
                run.wait(self.random.uniform(0, self.reference.seconds * max(left, 0.5)))
            moment = self._moment()
            if run.poll() is not None or not self._kill(victim, run):
                victim, moment = "none", ""
        else:
            run, moment = self._killed_at_a_change(victim)
        if moment:
            self.outcome.kills.update((f"{victim} killed", moment))
        if victim == "worker" and moment and self.is_remote:
            self.lane.replace_worker()
        # A run outlives its workers, but for one that is killed while it starts.
        expected = {"none": {0}, "worker": {0, 1}, "scheduler": {0, 1}}.get(victim, {0, -signal.SIGKILL})
        self._expect(run, expected, f"after {victim} was killed {moment}")

    def _killed_at_a_change(self, victim: str) -> tuple[subprocess.Popen[bytes], str]:
        """A run that is killed just before a random change of a file, and which one; empty where it ended before."""
        role = self.random.choice(("main", "worker")) if victim == "all" else victim
        kind = self.random.choice(("any", "os.rename"))  # commits are renames, and few among all changes
        most = self.reference.changes[f"{role} {kind}"]
        number = self.random.randint(1, max(1, round(most * self._left())) if role == "worker" else most)
        order, killed = self.path / "order", self.path / "killed"
        serial, scope = len(self.runs), "group" if victim == "all" else "self"
        _write_whole(order, f"{serial} {role} {kind} {number} {scope}")
        run = self._start()
        while run.poll() is None and not killed.exists():
            time.sleep(0.01)
        order.unlink(missing_ok=True)
        if not killed.exists():
            return run, ""
        moment = f"at a change: {_kind_of_change(killed.read_text())}"
        killed.unlink()
        return run, moment

    def _moment(self) -> str:
        """What a run is at, as its files tell."""
        wip = Path(f"{self.cache}.wip")
        if not Path(f"{self.cache}.lock").exists():
            return "at a time: start or exit"
        if not (self.cache / "zarr.json").exists():
            return "at a time: plan"
        if (self.cache / "weak_labels/intensity").exists() or (wip / "weak_labels").exists():
            return "at a time: weak labels and end"
        if (self.cache / "table").exists() or (wip / "table").exists():
            return "at a time: tables"
        return "at a time: cases"

    def _kill(self, victim: str, run: subprocess.Popen[bytes]) -> bool:
        """Kill a process of a run from outside; False where there is none of that role."""
        if victim == "worker":
            pids = [self.lane.worker.pid] if self.is_remote and self.lane.worker else _workers(run)
            if not pids:
                return False
            os.kill(self.random.choice(pids), signal.SIGKILL)
        elif victim == "scheduler":
            assert self.lane.scheduler is not None
            self.lane.scheduler.kill()
        else:
            if victim == "all" and self.is_remote:
                self.lane.close()
            send = os.killpg if victim == "all" else os.kill
            send(run.pid, signal.SIGKILL)
        return True

    def _holder(self) -> int | None:
        """The process that the lock names."""
        try:
            pid: int = json.loads(Path(f"{self.cache}.lock/owner.json").read_text())["pid"]
        except FileNotFoundError:
            return None
        return pid

    def _compare(self) -> None:
        """Look for every difference to the undisturbed run, for cases computed again, and for errors of our own."""
        if "Traceback" in (self.path / "log").read_text():
            self.outcome.problems.append(f"a traceback in {self.path / 'log'}")
        self.outcome.problems += differences(self.reference.files, content(self.cache))
        beside = sorted(entry.name for entry in self.cache.parent.iterdir())
        if beside != [self.cache.name]:
            self.outcome.problems.append(f"left beside the cache: {beside}")
        changed = changed_cases(self.committed)
        self.outcome.recomputed_finished_cases += len(changed)
        self.outcome.problems += [f"{case} was finished, and computed again" for case in sorted(changed)]

    def _command(self) -> list[str]:
        workers = ["--scheduler", self.lane.address()] if self.is_remote else ["--workers", "2"]
        return [sys.executable, *preprocess_command(self.reference.data, self.cache), *workers]

    def _start(self) -> subprocess.Popen[bytes]:
        command = self._command()
        self.committed.update(stamps(folder.parent for folder in self.cache.glob("cases/*/zarr.json")))
        run = start_python(command[1:], self.path / "log")
        self.runs.append(run)
        return run

    def _expect(self, run: subprocess.Popen[bytes], codes: set[int], when: str) -> None:
        try:
            code: int | str = run.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            code = f"none within {LIMIT_S} s"
        if code not in codes:
            self.outcome.problems.append(f"exit code {code} {when}; see {self.path / 'log'}")


def make_reference(work: Path, lanes: int) -> Reference:
    """Make the data set and its cache, with as many runs at a time as there will be rounds: these are as slow."""
    data = write_phantom(work / "data", num_cases=CASES)
    folders = [work / f"reference_{number}" for number in range(lanes)]
    start = time.monotonic()
    runs = []
    for folder in folders:
        (folder / "target").mkdir(parents=True)
        (folder / "order").write_text("log")
        command = [*preprocess_command(data, folder / "target" / "cache.zarr"), "--workers", "2"]
        runs.append(start_python(command, folder / "log"))
    codes = [run.wait(LIMIT_S) for run in runs]
    seconds = time.monotonic() - start
    cache = folders[0] / "target" / "cache.zarr"
    files = content(cache)
    if any(codes) or any(content(folder / "target" / "cache.zarr") != files for folder in folders):
        raise SystemExit(f"undisturbed runs end with {codes} and differ; see {work}")
    made = [line.split()[:2] for line in (folders[0] / "operations").read_text().splitlines()]
    changes = Counter(f"{role} {kind}" for role, event in made for kind in ("any", event))
    return Reference(
        data=data,
        cache=cache,
        files=files,
        seconds=seconds,
        changes={key: -(-count // (2 if key.startswith("worker") else 1)) for key, count in changes.items()},
    )


def preprocess_command(data: Path, cache: Path) -> list[object]:
    """Arguments of Python that preprocess a data set."""
    return ["-m", "supercl_core.cli", "preprocess", data, cache]


def start_python(arguments: Iterable[object], log: Path) -> subprocess.Popen[bytes]:
    """Start Python, with the hook, in a session of its own."""
    command = [sys.executable, *map(str, arguments)]
    with log.open("ab") as output:
        output.write(f"\n$ {' '.join(command[2:])}\n".encode())
        output.flush()
        return subprocess.Popen(
            command, stdout=output, stderr=output, env=ENVIRONMENT, start_new_session=True
        )


def _workers(run: subprocess.Popen[bytes]) -> list[int]:
    """Worker processes of a run on this machine."""
    with suppress(psutil.Error):
        children = psutil.Process(run.pid).children()
        return [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]
    return []


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() or not file.read_bytes().endswith(b"}"):
        if time.monotonic() > deadline:
            raise SystemExit(f"no {file} within 60 s")
        time.sleep(0.05)


def _write_whole(file: Path, text: str) -> None:
    part = file.with_suffix(".part")
    part.write_text(text)
    part.rename(file)


def _kind_of_change(change: str) -> str:
    """What `kill_hook` says of a change, without the names of cases and tokens."""
    event, _, name = change.partition(" ")
    kinds = {
        r"cache\.zarr\.lock.*": "the lock",
        r"cache\.zarr\.wip/[0-9a-f]{16}/.+": "a case being written",
        r"cache\.zarr/cases/[^/]+": "commit of a case",
        r"cache\.zarr(\.wip)?/(table|slices|descriptors)\b.*": "the tables",
        r"cache\.zarr(\.wip)?/weak_labels\b.*": "the weak labels",
        r"cache\.zarr(\.wip/\.file|/zarr\.json|/cases/zarr\.json)": "the root",
    }
    kind = next((kind for pattern, kind in kinds.items() if re.fullmatch(pattern, name)), "the folders")
    return f"{kind} ({event.removeprefix('os.')})"
