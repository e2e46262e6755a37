"""Workers of a study, with fake cells: order, sharing, failures, stopping, and the folder of another study."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_caches import write_noise
from made_runs import write_run

from supercl_core.cache.reader import open_cache
from supercl_core.errors import CasesFailedError, PreemptedError, StorageError, SuperCLError, UsageError
from supercl_core.locks import hold, lock_path
from train.study import runner
from train.study.declaration import read_study
from train.study.runner import failures, only_tasks, read_splits, run_workers, start_study, tasks_of, work

STUDY = """
cache = "noise.zarr"
split = "split.json"
labelled = [1, 2]
seeds = [0, 1]
[recipes.strong]
[arms.scratch]
init = "scratch"
[arms.simclr]
preset = "simclr"
"""


@pytest.fixture
def declaration(tmp_path):
    (tmp_path / "noise.toml").write_text(STUDY)
    return tmp_path / "noise.toml"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def tasks(declaration, out):
    return tasks_of(read_study(declaration), out)


class Fake:
    """Stands for training: writes a finished run, and knows in which order tasks were done."""

    def __init__(self, fails=(), seconds=0.0, error=None):
        self.done, self.fails, self.seconds = [], set(fails), seconds
        self.error = error or SuperCLError(
            "The loss is not finite.", found="nan", next_step="Lower the rate."
        )

    def __call__(self, task, check):
        self.done.append(task.title)
        time.sleep(self.seconds)
        check()
        if task.title in self.fails:
            raise self.error
        finish(task)


def finish(task):
    write_run(task.path, {"a": (0.5, 0.5)})
    (task.path / task.result).touch()


def states(tasks):
    return Counter(task.status()[0] for task in tasks)


def test_all_is_done_once_and_pretraining_before_what_needs_it(tasks):
    fake = Fake()
    work(tasks, fake)
    assert len(fake.done) == len(set(fake.done)) == 2 + 8
    for seed in (0, 1):
        needed = fake.done.index(f"pre-training, simclr, seed {seed}")
        assert needed < fake.done.index(f"strong, simclr, 1 labelled, seed {seed}")
    assert fake.done.index("strong, simclr, 2 labelled, seed 0") < fake.done.index(
        "strong, scratch, 1 labelled, seed 1"
    )
    assert states(tasks) == {"finished": 10}
    assert failures(tasks) is None
    work(tasks, Fake(fails=fake.done))  # nothing is left to do
    assert not list(tasks[0].path.parent.glob("*.lock")) + list(tasks[0].path.parent.glob("*.wip"))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (
            ["arm=scratch", "labelled=1"],
            ["strong, scratch, 1 labelled, seed 0", "strong, scratch, 1 labelled, seed 1"],
        ),
        (
            ["seed=1", "labelled=1", "labelled=2", "arm=simclr", "recipe=strong"],
            [
                "pre-training, simclr, seed 1",
                "strong, simclr, 1 labelled, seed 1",
                "strong, simclr, 2 labelled, seed 1",
            ],
        ),
    ],
)
def test_only_some_cells_with_the_pretrainings_that_they_need(tasks, wanted, expected):
    assert [task.title for task in only_tasks(tasks, wanted)] == expected


def test_only_without_a_wish_is_all(tasks):
    assert only_tasks(tasks, []) == tasks


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("arm=gcl", "arm= one of scratch, simclr"),
        ("seed=", "seed= one of 0, 1"),
        ("cell=1", "recipe=, arm=, labelled=, seed="),
        ("title=strong", "recipe=, arm=, labelled=, seed="),
        ("strong", "recipe=, arm=, labelled=, seed="),
    ],
)
def test_only_what_no_run_has(tasks, wanted, expected):
    with pytest.raises(UsageError) as caught:
        only_tasks(tasks, [wanted])
    assert caught.value.expected == expected
    assert caught.value.found == wanted


def test_workers_side_by_side_never_do_one_task_twice(tasks):
    fakes = [Fake(seconds=0.02) for _ in range(4)]
    workers = [threading.Thread(target=work, args=(tasks, fake), kwargs={"look_s": 0.01}) for fake in fakes]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    done = [title for fake in fakes for title in fake.done]
    assert len(done) == len(set(done)) == len(tasks)
    assert states(tasks) == {"finished": 10}
    assert sum(bool(fake.done) for fake in fakes) >= 2


def test_a_worker_waits_for_what_another_does(tasks, capsys):
    first = Fake()
    with hold(tasks[0].path):
        assert states(tasks)["running"] == 1
        waiting = threading.Thread(target=work, args=(tasks, first), kwargs={"look_s": 0.01})
        waiting.start()
        while states(tasks)["finished"] < 9 - 2:
            time.sleep(0.01)
        time.sleep(0.1)
        assert waiting.is_alive()
        assert states(tasks) == {"finished": 7, "running": 1, "waiting": 2}
        finish(tasks[0])
    waiting.join(60)
    assert states(tasks) == {"finished": 10}
    assert "pre-training, simclr, seed 0" not in first.done
    said = capsys.readouterr().err
    assert "study: 7/10 runs" in said
    assert "2 waiting" in said


def test_the_task_of_a_dead_worker_is_taken_over(tasks):
    script = (
        "import sys, os, pathlib\n"
        "from supercl_core.locks import hold\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "path.parent.mkdir(parents=True)\n"
        "with hold(path):\n"
        "    os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", script, tasks[0].path], check=False, timeout=60)
    assert lock_path(tasks[0].path).exists()
    work(tasks, fake := Fake())
    assert fake.done[0] == tasks[0].title
    assert states(tasks) == {"finished": 10}


def test_a_failure_stops_only_what_needs_it_and_is_tried_again_by_the_next_call(tasks):
    pretraining, cell = "pre-training, simclr, seed 0", "strong, scratch, 1 labelled, seed 1"
    fake = Fake(fails=[pretraining, cell])
    work(tasks, fake)
    assert states(tasks) == {"finished": 6, "failed": 4}
    assert Counter(fake.done)[cell] == Counter(fake.done)[pretraining] == 1
    error = failures(tasks)
    assert isinstance(error, CasesFailedError)
    assert error.exit_code == 3
    for text in (
        "4 of 10 runs",
        f"{pretraining}: The loss is not finite; expected None, found nan",
        "strong, simclr, 2 labelled, seed 0: its pre-training failed: The loss is not finite",
    ):
        assert text in str(error)
    again = Fake()
    work(tasks, again)
    assert sorted(again.done) == sorted(
        [pretraining, cell, "strong, simclr, 1 labelled, seed 0", "strong, simclr, 2 labelled, seed 0"]
    )
    assert failures(tasks) is None


def test_what_failed_in_this_call_is_not_tried_again_by_another_worker(tasks):
    title = tasks[0].title
    work(tasks, Fake(fails=[title]))
    # Both find the failure of an earlier call; the first to come tries it again.
    fakes = [Fake(fails=[title], seconds=0.05) for _ in range(2)]
    workers = [threading.Thread(target=work, args=(tasks, fake), kwargs={"look_s": 0.01}) for fake in fakes]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [title for fake in fakes for title in fake.done] == [title]


def test_an_error_of_any_kind_is_recorded(tasks, capsys):
    work(tasks, Fake(fails=[tasks[-1].title], error=RuntimeError("out of memory")))
    assert failures(tasks).found.strip() == f"{tasks[-1].title}: RuntimeError: out of memory"
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [StorageError("The disk is full.", next_step="Free some space"), OSError(errno.ENOSPC, "No space left")],
)
def test_a_full_disk_ends_the_worker(tasks, error):
    with pytest.raises(type(error)):
        work(tasks, Fake(fails=[tasks[1].title], error=error))
    assert states(tasks) == {"finished": 1, "waiting": 9}


def test_a_file_that_one_run_lacks_does_not_end_the_worker(tasks):
    work(tasks, Fake(fails=[tasks[-1].title], error=FileNotFoundError(errno.ENOENT, "No such file")))
    assert states(tasks) == {"finished": 9, "failed": 1}
    assert "FileNotFoundError" in str(failures(tasks))


def test_a_failed_run_that_another_worker_tries_again_is_no_success(tasks):
    work(tasks, Fake(fails=[tasks[-1].title]))
    tasks[-1].failure_path.unlink()  # as who tries it again does
    with hold(tasks[-1].path):
        assert failures(tasks).found.strip() == f"{tasks[-1].title}: another worker tries it again"


def test_no_checkpoints_are_left_by_a_worker_killed_while_it_evaluates(declaration, tasks, monkeypatch):
    def killed(run_path, cache, *, check, **_):
        assert not (run_path / "checkpoints").exists()
        check()  # a stop is noticed between cases
        raise KeyboardInterrupt

    def trained(cache, run_path, **_):
        (run_path / "checkpoints").mkdir(parents=True)

    monkeypatch.setattr(runner, "finetune", trained)
    monkeypatch.setattr(runner, "evaluate", killed)
    checked = []
    with pytest.raises(KeyboardInterrupt):
        runner.run_task(
            tasks[1],
            lambda: checked.append(True),
            study=read_study(declaration),
            cache=None,
            splits={1: None},
            device="cpu",
        )
    assert len(checked) == 2


def test_being_told_to_stop_ends_between_the_parts_of_a_task(tasks):
    def stopped(task, check):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        check()

    with pytest.raises(PreemptedError, match="told to stop") as caught:
        work(tasks, stopped)
    assert caught.value.found == "0 of 10 runs finished"
    assert states(tasks) == {"waiting": 10}
    work(tasks, Fake())
    assert states(tasks) == {"finished": 10}


def test_who_lost_a_task_leaves_it_to_the_other(tasks, capsys):
    def robbed(task, check):
        if task is tasks[0]:
            owner = lock_path(task.path) / "owner.json"
            owner.write_text(json.dumps({**json.loads(owner.read_text()), "token": "another"}))
            finish(task)  # by the other
        else:
            finish(task)
        check()

    work(tasks, robbed)
    assert "left to the worker that has taken it over" in capsys.readouterr().err
    assert failures(tasks) is None


def test_a_failure_that_cannot_be_read_is_one(tasks):
    work(tasks, Fake(fails=[tasks[-1].title]))
    tasks[-1].failure_path.write_text("{")
    assert "cannot be read" in str(failures(tasks))


# ---------------------------------------------------------------- processes


def run_scripts(tasks, scripts, logs_path):
    commands = [[sys.executable, "-c", script] for script in scripts]
    run_workers(commands, tasks, logs_path=logs_path, look_s=0.05)


def test_workers_get_their_share_of_the_cores_and_a_file_for_what_they_say(tasks, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(runner, "num_cores", lambda: 7)
    script = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit(3)"
    run_scripts(tasks, [script] * 3, tmp_path / "logs")
    assert [log.read_text() for log in (tmp_path / "logs").iterdir()] == ["2\n"] * 3


def test_a_worker_that_dies_is_named_with_its_file(tasks, tmp_path):
    with pytest.raises(SuperCLError, match="Workers of the study ended") as caught:
        run_scripts(tasks, ["pass", "import sys; sys.exit(7)"], tmp_path / "logs")
    assert caught.value.found == "7"
    assert Path(str(caught.value.where)).name.endswith("-1.log")


def test_being_told_to_stop_is_passed_on(tasks, tmp_path):
    script = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready').touch()\n"
        "time.sleep(60)\n"
    )

    def stop():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop).start()
    with pytest.raises(PreemptedError):
        run_scripts(tasks, [script], tmp_path / "logs")


# ---------------------------------------------------------------- the folder and the splits


def test_a_changed_declaration_is_refused_and_what_differs_is_named(declaration, out):
    assert start_study(read_study(declaration), out) == []
    for free in ("cache=elsewhere.zarr", "baseline=simclr"):
        assert start_study(read_study(declaration, assignments=[free]), out) == []
    for assignment, named in (
        ("recipes.strong.lr=0.5", "recipes.strong.1.lr: 0.001 there, 0.5 here"),
        ("arms.simclr.temperature=0.5", "arms.simclr.pretrain.temperature: 0.1 there, 0.5 here"),
        ("seeds=[0]", "seeds.1: True there, None here"),
        ("labelled=[1]", "labelled.2: True there, None here"),
    ):
        with pytest.raises(UsageError, match="holds another study") as caught:
            start_study(read_study(declaration, assignments=[assignment]), out)
        assert named in str(caught.value.found)
    (out / "study.json").write_text("[]")
    with pytest.raises(SuperCLError, match="damaged"):
        start_study(read_study(declaration), out)


def test_seeds_counts_arms_and_recipes_may_be_added(declaration, out):
    start_study(read_study(declaration), out)
    more = [
        "seeds=[0, 1, 7]",
        "labelled=[1, 2, 3]",
        "arms.pcl.preset=pcl",
        "recipes.published.preset=published",
    ]
    added = start_study(read_study(declaration, assignments=more), out)
    assert added == ["arms.pcl", "labelled.3", "recipes.published", "seeds.7"]
    assert start_study(read_study(declaration, assignments=more), out) == []


def test_an_arm_whose_name_begins_with_that_of_another_is_another_arm(declaration, out):
    for added, text in ("arms.pcl.2", '[arms."pcl.2"]\n'), ("arms.pcl.3", '[arms."pcl.3"]\n'):
        assert start_study(read_study(declaration), out) == []
        declaration.write_text(declaration.read_text() + text + 'preset = "pcl"\n')
        assert start_study(read_study(declaration), out) == [added]


def test_splits_are_checked_before_anything_runs(declaration, tmp_path):
    cache = open_cache(
        write_noise(tmp_path / "noise.zarr", {name: index for index, name in enumerate("abcd")})
    )
    (tmp_path / "split.json").write_text(
        json.dumps({"labelled": {"1": ["a"], "2": ["a", "b"]}, "test": ["d"]})
    )
    splits = read_splits(read_study(declaration, assignments=['labelled=[1, 2, "all"]']), cache)
    assert {count: split.labelled for count, split in splits.items()} == {
        1: ("a",),
        2: ("a", "b"),
        "all": ("a", "b", "c"),
    }
    rows = [dataclasses.replace(row, has_ground_truth=row.id != "d") for row in cache.rows]
    unlabelled = SimpleNamespace(name=cache.name, rows=rows)
    for test, found in ([], "empty test list"), (["c", "d"], "no label map of d"):
        (tmp_path / "bad.json").write_text(json.dumps({"labelled": {"1": ["a"]}, "test": test}))
        declared = read_study(declaration, assignments=["labelled=[1]", f"split={tmp_path / 'bad.json'}"])
        with pytest.raises(UsageError, match=f"cannot be scored(.|\n)*{found}"):
            read_splits(declared, unlabelled)
    with pytest.raises(UsageError, match="no 9 labelled"):
        read_splits(read_study(declaration, assignments=["labelled=[9]"]), cache)
    with pytest.raises(UsageError, match="into 3 folds"):
        read_splits(read_study(declaration, assignments=["scored_on=validation"]), cache)
