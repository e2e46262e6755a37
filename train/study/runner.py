"""Runs a study: any number of workers, on any machines that share its folder, take one run after the other.

    OUT/study.json                                              the declaration, resolved
    OUT/pretrain/ARM/seed_S/                                    a pre-training run
    OUT/finetune/RECIPE/ARM/labelled_N/seed_S/                  a fine-tuned run with its evaluation
    OUT/.../seed_S.failed.json                                  why a run failed
    OUT/logs/                                                   what the workers of --jobs said

What a folder holds is all that workers know of each other. A run is taken by its lock (`supercl_core.locks`), which the
others take over when its holder is dead, so there is nothing to set up and nothing to clean up. What is declared is
`train.study.declaration`; what came of it, `train.study.results`. Called by `supercl study`.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import socket
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from supercl_core.cache.reader import Cache
from supercl_core.errors import (
    CacheError,
    CasesFailedError,
    PreemptedError,
    StorageError,
    SuperCLError,
    UsageError,
    some_of,
)
from supercl_core.files import read_json, write_json
from supercl_core.locks import check_lock, hold, hold_in_turn, lock_path
from supercl_core.machine import num_cores
from supercl_core.messages import note
from supercl_core.progress import Advance, progress
from supercl_core.splits import Split, fold_numbers, read_split
from train import runs
from train.evaluate import evaluate
from train.finetuning import finetune
from train.models.weights import WEIGHTS_NAME
from train.pretraining import pretrain
from train.stopping import stop_requests
from train.study.declaration import CellKey, Labelled, Status, Study, pretrain_path

FORMAT_VERSION: Final = 1
"""Version of study.json."""

_STOPPING: Final = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EPIPE}
"""What the system says where no other run could go on either."""

LOOK_S: Final = 5.0
"""Seconds from one look for something to do to the next, for a worker that waits for others."""

_KEYS: Final = tuple(field.name for field in dataclasses.fields(CellKey))

Perform = Callable[["Task", Callable[[], None]], None]
"""Does a task. The function it gets is to be called between its parts: it raises where the task is no longer ours."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run of a study: a pre-training, or a cell."""

    path: Path
    title: str
    result: str
    """A file of the run folder; once the run is finished and has it, nothing is left to do."""
    arm: str
    seed: int
    cell: CellKey | None = None
    """None for a pre-training."""
    needs: Task | None = None
    """The pre-training that a cell starts from."""

    @property
    def failure_path(self) -> Path:
        """Where a failure is recorded."""
        return self.path.with_name(f"{self.path.name}.failed.json")

    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        try:
            return (self.path / self.result).is_file() and runs.read_run(self.path)["status"] == "finished"
        except SuperCLError:
            return False  # a damaged run.json, which whoever takes the task will name

    def failure(self) -> str | None:
        """Why it failed, or the pre-training that it needs; None where neither did."""
        try:
            return str(read_json(self.failure_path, limit_bytes=1 << 20)["error"])
        except FileNotFoundError:
            reason = self.needs.failure() if self.needs and not self.needs.is_finished() else None
            return reason and f"its pre-training failed: {reason}"
        except (OSError, ValueError, TypeError, KeyError) as error:
            return f"for a reason that cannot be read: {error}"

    def status(self) -> tuple[Status, str | None]:
        """How far it is, and why it failed. `running`: somebody holds its lock."""
        if self.is_finished():
            return "finished", None
        if lock_path(self.path).exists():
            return "running", None
        error = self.failure()
        return ("waiting", None) if error is None else ("failed", error)


def tasks_of(study: Study, out_path: Path) -> list[Task]:
    """All runs of a study, seed by seed, each pre-training before the cells that need it."""
    tasks: list[Task] = []
    for seed in study.seeds:
        pretrainings = {
            arm: Task(
                path=pretrain_path(out_path, arm, seed),
                title=f"pre-training, {arm}, seed {seed}",
                result=WEIGHTS_NAME,
                arm=arm,
                seed=seed,
            )
            for arm, declared in study.arms.items()
            if declared.pretrain is not None
        }
        tasks += pretrainings.values()
        tasks += [
            Task(
                path=cell.path(out_path),
                title=cell.title(),
                result=runs.EVALUATION_OF[study.scored_on],
                arm=cell.arm,
                seed=seed,
                cell=cell,
                needs=pretrainings.get(cell.arm),
            )
            for cell in study.cells()
            if cell.seed == seed
        ]
    return tasks


def only_tasks(tasks: Sequence[Task], wanted: Iterable[str]) -> list[Task]:
    """The cells that fit `wanted`, such as `arm=scratch`, and the pre-trainings that they need; all, where it is empty.

    Several values of one key are alternatives, several keys hold together. Raises UsageError for another key than
    recipe, arm, labelled and seed, and for a value that no cell has.
    """
    cells = [task for task in tasks if task.cell is not None]
    wanted_of: dict[str, set[str]] = {}
    for text in wanted:
        key, _, value = text.partition("=")
        known = list(dict.fromkeys(str(getattr(task.cell, key)) for task in cells)) if key in _KEYS else []
        if value not in known:
            raise UsageError(
                "No run of the study fits --only.",
                expected=f"{key}= one of {', '.join(known)}" if known else f"{'=, '.join(_KEYS)}=",
                found=text,
                next_step="Name what the study has: `--dry-run` lists its runs.",
            )
        wanted_of.setdefault(key, set()).add(value)
    chosen = [
        task
        for task in cells
        if all(str(getattr(task.cell, key)) in values for key, values in wanted_of.items())
    ]
    kept = {id(task) for cell in chosen for task in (cell, cell.needs)}
    return [task for task in tasks if id(task) in kept]


def read_splits(study: Study, cache: Cache) -> dict[Labelled, Split]:
    """The split of every labelled count.

    Raises UsageError where one makes no sense, has too few cases for folds, or no test case that can be scored.
    """
    ids = [row.id for row in cache.rows]
    splits = {
        count: read_split(study.split, ids, data_set=cache.name, num_labelled=count, rows=cache.rows)
        for count in study.labelled
    }
    if study.folds is not None:
        for split in splits.values():
            fold_numbers(split.labelled, cache.rows, num_folds=study.folds)
        return splits
    with_truth = {row.id for row in cache.rows if row.has_ground_truth}
    for split in splits.values():
        without = [case_id for case_id in split.test if case_id not in with_truth]
        if without or not split.test:
            raise UsageError(
                "The study cannot be scored on the test cases of the split.",
                where=study.split,
                expected="test cases, each with a label map",
                found=f"no label map of {some_of(without)}" if without else "an empty test list",
                next_step="Mend the test list, or declare scored_on = 'validation'.",
            )
    return splits


# ---------------------------------------------------------------- the folder of the study


def start_study(study: Study, out_path: Path) -> list[str]:
    """Create the folder of a study, or find that it holds a part of the same one; return what is new in it.

    Seeds, counts, arms and recipes may be added, and the baseline changed, on which no run depends. Raises UsageError
    where it holds another study; what differs is named.
    """
    file = out_path / "study.json"
    wanted = {"format_version": FORMAT_VERSION, **study.as_dict()}
    with hold_in_turn(file):
        if not file.exists():
            write_json(file, wanted)
            return []
        try:
            stored = _flat(read_json(file, limit_bytes=runs.LARGEST_FILE_BYTES))
        except (OSError, ValueError, AttributeError) as error:
            raise SuperCLError(
                "The declaration in the folder of the study is damaged.",
                where=file,
                found=error,
                next_step="Delete this file; the runs beside it are kept where the declaration is the same.",
            ) from error
        now = _flat(wanted)
        # Runs keep what they know of the cache, wherever it lies: `train.study.collection` compares that.
        free = {("cache",), ("name",), ("baseline",)}
        changed = [key for key in stored if key not in free and now.get(key) != stored[key]]
        if changed:
            raise UsageError(
                "The folder holds another study.",
                where=out_path,
                expected="the declaration of that study; seeds, labelled counts, arms and recipes may be added",
                found="; ".join(
                    f"{'.'.join(key)}: {stored[key]!r} there, {now.get(key)!r} here" for key in changed[:5]
                ),
                next_step="Name another folder for the new study, or declare what the old one had.",
            )
        write_json(file, wanted)
        names, known = ({".".join(key[:2]) for key in keys} for keys in (now, stored))
        return sorted(names - known)


def _flat(value: Any, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Values by all their keys; a list of counts or seeds as a key for each of them, so that some may be added."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, (*prefix, key))
        elif not prefix and isinstance(item, list):
            flat |= {(key, str(entry)): True for entry in item}
        else:
            flat[*prefix, key] = item
    return flat


# ---------------------------------------------------------------- one worker


def work(tasks: Sequence[Task], perform: Perform, *, look_s: float = LOOK_S) -> None:
    """Do what is to be done and nobody else does, until all tasks are finished or have failed.

    A task that fails is recorded and left; one that had failed before this call is tried again, by the first worker
    that comes to it. Raises PreemptedError when the process is told to stop, StorageError, or OSError for a full disk
    and the like, where no other task could go on.
    """
    before = {task.path: _stamp(task) for task in tasks}

    def has_failed(task: Task) -> bool:
        """Whether it failed in this call, here or elsewhere, or the pre-training that it needs."""
        return _stamp(task) not in (None, before[task.path]) or (
            task.needs is not None and has_failed(task.needs)
        )

    finished: set[Path] = set()
    with stop_requests() as stop_requested, ExitStack() as shown:
        advance: Advance | None = None
        while True:
            new = {task.path for task in tasks if task.path not in finished and task.is_finished()}
            finished |= new
            left = [task for task in tasks if task.path not in finished and not has_failed(task)]
            if not left:
                return
            if stop_requested():
                raise _preempted(tasks)
            for task in left:
                if task.needs is not None and task.needs.path not in finished:
                    continue
                with _taken(task) as token:
                    if token is None:
                        continue
                    shown.close()  # training has a progress bar of its own
                    advance = None
                    if not task.is_finished() and not has_failed(task):
                        note(f"{task.title} ({len(finished)} of {len(tasks)} runs finished)")
                        _do(task, perform, token, stop_requested, tasks)
                    break
            else:
                if advance is None:
                    advance = shown.enter_context(_progress(tasks))
                    new = set()
                advance(len(new), note=_counts(tasks))
                _sleep(look_s, stop_requested)


def run_task(
    task: Task,
    check: Callable[[], None],
    *,
    study: Study,
    cache: Cache,
    splits: Mapping[Labelled, Split],
    device: str,
) -> None:
    """Pre-train, or fine-tune and score, without keeping checkpoints. `check`: see `Perform`."""
    if task.cell is None:
        declared = study.arms[task.arm].pretrain
        assert declared is not None
        config = dataclasses.replace(declared, seed=task.seed, device=device)
        [test] = {split.test for split in splits.values()}
        pretrain(cache, task.path, config=config, excluded=test)
        _drop_checkpoints(task, check)
    else:
        init = study.arms[task.arm].init or str(task.needs and task.needs.path)
        finetune(
            cache,
            task.path,
            split=splits[task.cell.labelled],
            init=init,
            config=study.finetune_config(task.cell, device=device),
        )
        # Before the evaluation: with it the task is finished, and nobody comes back for them.
        _drop_checkpoints(task, check)
        evaluate(task.path, cache, device_name=device, part=study.scored_on, check=check)


def _drop_checkpoints(task: Task, check: Callable[[], None]) -> None:
    """Remove what a finished run needs no more: a study has many runs."""
    check()
    shutil.rmtree(task.path / "checkpoints", ignore_errors=True)


def failures(tasks: Sequence[Task]) -> CasesFailedError | None:
    """The error that lists the tasks which `work` left unfinished; None without any."""
    failed = [
        (task.title, task.failure() or "another worker tries it again")
        for task in tasks
        if not task.is_finished()
    ]
    if not failed:
        return None
    return CasesFailedError(
        f"{len(failed)} of {len(tasks)} runs of the study failed.",
        found="".join(f"\n    {title}: {error}" for title, error in failed),
        next_step="Mend what is named above and run the same command again; finished runs are not repeated.",
    )


@contextmanager
def _taken(task: Task) -> Iterator[str | None]:
    """The token of the task's lock while it is held here; None where somebody else holds it."""
    task.path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            token = stack.enter_context(hold(task.path))
        except CacheError:
            yield None
        else:
            yield token


def _do(
    task: Task, perform: Perform, token: str, stop_requested: Callable[[], bool], tasks: Sequence[Task]
) -> None:
    """Perform a task that is held here, and record where it fails."""

    def check() -> None:
        check_lock(task.path, token)
        if stop_requested():
            raise _preempted(tasks)

    task.failure_path.unlink(missing_ok=True)
    try:
        perform(task, check)
    except (PreemptedError, StorageError):
        raise
    except Exception as error:  # whatever it is, it must not stop the other cells
        if isinstance(error, OSError) and error.errno in _STOPPING:
            raise
        try:
            check_lock(task.path, token)
        except CacheError as lost:
            note(f"{task.title}: left to the worker that has taken it over ({lost.one_line()})")
            return
        if isinstance(error, SuperCLError):
            reason = error.one_line()
            note(f"{task.title} failed: {error.message()}")
        else:
            reason = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        write_json(task.failure_path, {"error": reason})


def _stamp(task: Task) -> int | None:
    """When a failure was recorded: changes when it fails again; None where it has not."""
    try:
        return task.failure_path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _preempted(tasks: Sequence[Task]) -> PreemptedError:
    num_finished = sum(task.is_finished() for task in tasks)
    return PreemptedError(
        "The study was told to stop.",
        found=f"{num_finished} of {len(tasks)} runs finished",
        next_step="Run the same command again; it goes on from there.",
    )


def _progress(tasks: Sequence[Task]) -> AbstractContextManager[Advance]:
    return progress("study", total=len(tasks), unit="runs", done=sum(task.is_finished() for task in tasks))


def _counts(tasks: Sequence[Task]) -> str:
    """How many runs are in which state, such as "2 running, 5 waiting"."""
    counts = Counter(task.status()[0] for task in tasks)
    return ", ".join(
        f"{counts[status]} {status}" for status in ("running", "waiting", "failed") if counts[status]
    )


def _sleep(seconds: float, stop_requested: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stop_requested():
        time.sleep(min(0.2, seconds))


# ---------------------------------------------------------------- several workers on one machine


def run_workers(
    commands: Sequence[Sequence[str]], tasks: Sequence[Task], *, logs_path: Path, look_s: float = LOOK_S
) -> None:
    """Run each of `commands`, which does what `work` does, in a process of its own, and show how far they are.

    Each has its share of the cores, unless OMP_NUM_THREADS says otherwise, and a file below `logs_path` for what it
    says. Being told to stop is passed on to them.

    Raises PreemptedError where they were told to stop, and SuperCLError where one ended for another reason than that
    runs failed.
    """
    logs_path.mkdir(parents=True, exist_ok=True)
    threads = max(1, num_cores() // len(commands))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    logs = [logs_path / f"{socket.gethostname()}-{os.getpid()}-{index}.log" for index in range(len(commands))]
    with stop_requests() as stop_requested, ExitStack() as stack:
        workers = []
        for command, log in zip(commands, logs, strict=True):
            file = stack.enter_context(log.open("a", encoding="utf-8"))
            # In a session of its own, Ctrl-C reaches it through us alone: a second one would stop it at once.
            worker = subprocess.Popen(
                command, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            stack.callback(_end, worker)
            workers.append(worker)
        advance = stack.enter_context(_progress(tasks))
        finished = sum(task.is_finished() for task in tasks)
        while any(worker.poll() is None for worker in workers):
            _sleep(look_s, lambda: stop_requested() or all(worker.poll() is not None for worker in workers))
            if stop_requested():
                break
            before, finished = finished, sum(task.is_finished() for task in tasks)
            advance(finished - before, note=_counts(tasks))
        if stop_requested():
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
        codes = [worker.wait() for worker in workers]
    if stop_requested() or PreemptedError.exit_code in codes:
        raise _preempted(tasks)
    bad = [
        (code, log)
        for code, log in zip(codes, logs, strict=True)
        if code not in (0, CasesFailedError.exit_code)
    ]
    if bad:
        raise SuperCLError(
            "Workers of the study ended before their work was done.",
            where=", ".join(str(log) for _, log in bad),
            expected="exit code 0, or 3 where runs failed",
            found=", ".join(str(code) for code, _ in bad),
            next_step="Look into these files, then run the same command again; finished runs are not repeated.",
        )


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Let no worker outlive its parent."""
    if worker.poll() is None:
        worker.terminate()
        worker.wait()
