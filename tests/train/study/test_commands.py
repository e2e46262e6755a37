"""The command `study`: the plan, a real study of seconds, a stop in the middle, workers side by side, failures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import training
from training import assert_same_weights, call_at

import train.loop
from train.runs import read_metrics, read_run
from train.study.results import read_results

SMALL = {
    name: training.SMALL[name]
    for name in ("batch_size", "filters", "precision", "log_every", "checkpoint_every")
}


@pytest.fixture
def declaration(tmp_path, cache_path):
    """Two arms, two counts and two seeds on the tiny cache."""
    (tmp_path / "split.json").write_text(
        json.dumps({"labelled": {"1": ["case_a"], "2": ["case_a", "case_b"]}, "test": ["case_c"]})
    )
    settings = "\n".join(f"{name} = {json.dumps(value)}" for name, value in SMALL.items())
    (tmp_path / "tiny.toml").write_text(f"""
cache = "{cache_path}"
split = "split.json"
labelled = [1, 2]
seeds = [0, 1]
[pretrain]
steps = 4
patch_size = [32, 32]
warmup_steps = 2
{settings}
[recipes.short]
steps = 6
patch_size = [32, 32]
warmup_steps = 2
{settings}
[arms.scratch]
init = "scratch"
[arms.pcl]
preset = "pcl"
""")
    return tmp_path / "tiny.toml"


def scores(out):
    """What a study found, without what two equal ones differ in."""
    results = read_results(out)
    return results.rows, results.saved, [(cell.status, cell.arm, cell.seed) for cell in results.cells]


def run_path(out, arm="pcl", labelled=2, seed=1):
    return out / "finetune/short" / arm / f"labelled_{labelled}" / f"seed_{seed}"


def test_the_plan_names_all_runs_and_changes_nothing(declaration, tmp_path, supercl):
    outcome = supercl(
        "study", declaration, tmp_path / "out", "--dry-run", "--set", "recipes.short.labelled.2.steps=9"
    )
    assert outcome.code == 0
    for text in (
        r"pre-training, pcl, seed 1 +4 steps x 6, 4 filters +waiting",
        r"short, scratch, 1 labelled, seed 0 +6 steps x 6, 4 filters +waiting",
        r"short, pcl, 2 labelled, seed 1 +9 steps x 6, 4 filters +waiting",
    ):
        assert re.search(text, outcome.out), outcome.out
    last = " ".join(outcome.out.split())
    assert last.endswith(
        "8 cells = 2 arms x 1 recipes x 2 labelled counts x 2 seeds, and 2 pre-trainings; scored on test cases"
    )
    assert not (tmp_path / "out").exists()


def test_only_some_of_the_runs(declaration, tmp_path, supercl):
    command = ("study", declaration, tmp_path / "out", "--only", "arm=scratch", "--only", "labelled=1")
    planned = supercl(*command, "--dry-run").out
    assert re.findall(r"^ *(\w+, .*?)  ", planned, re.M) == [
        f"short, scratch, 1 labelled, seed {seed}" for seed in (0, 1)
    ]
    assert "and 2 pre-trainings" in planned
    outcome = supercl(*command, "--jobs", "2")
    assert outcome.code == 0, outcome.err
    finished = [cell.run_path for cell in read_results(tmp_path / "out").cells if cell.status == "finished"]
    assert finished == [run_path(tmp_path / "out", "scratch", 1, seed) for seed in (0, 1)]
    assert not (tmp_path / "out/pretrain").exists()


def test_the_help_shows_a_study_that_can_be_read(tmp_path, supercl):
    from train.study.declaration import read_study

    text = supercl("study", "--help").out
    _, _, example = text.partition("A study, STUDY.toml:")
    (tmp_path / "heart.toml").write_text(example)
    study = read_study(tmp_path / "heart.toml")
    assert list(study.arms) == ["scratch", "simclr", "supercl"]
    assert study.labelled == (2, 4, "all")
    assert max(map(len, example.splitlines())) <= 80


def test_a_study_is_scored_and_cleaned_and_goes_on_with_a_new_seed(declaration, tmp_path, supercl):
    out = tmp_path / "out"
    options = (declaration, out, "--device", "cpu", "--set", "labelled=[2]")
    outcome = supercl("study", *options, "--set", "seeds=[0]")
    assert outcome.code == 0, outcome.err
    for text in ("short", "scratch", "pcl", "DSC in % on test cases"):
        assert text in outcome.out
    run = read_run(run_path(out, seed=0))
    assert run["init"]["source"] == str(out / "pretrain/pcl/seed_0")
    assert run["unlabelled_test_cases_seen"] == 0
    assert read_run(out / "pretrain/pcl/seed_0")["cases"]["train"] == ["case_a", "case_b", "case_d"]
    assert not list(out.rglob("checkpoints"))
    assert not list(out.rglob("*.lock")) + list(out.rglob("*.wip"))
    before = training.snapshot(out / "finetune")
    outcome = supercl("study", *options)
    assert "note: new in this study: seeds.1" in outcome.err
    after = training.snapshot(out / "finetune")
    assert before.items() <= after.items()
    assert [row.num_seeds for row in read_results(out).rows] == [2] * len(read_results(out).rows)
    assert read_run(run_path(out))["config"]["seed"] == 1
    assert supercl("study", *options, "--set", "pretrain.steps=5").code == 2


def test_validation_scores_never_read_a_test_case(declaration, tmp_path, supercl, monkeypatch):
    from supercl_core.cache.reader import CachedCase

    read = []
    original = CachedCase.read
    monkeypatch.setattr(
        CachedCase, "read", lambda case, *rest: read.append((case.row.id, rest[0])) or original(case, *rest)
    )
    out = tmp_path / "out"
    settings = ("labelled=[2]", "seeds=[0, 1]", "scored_on=validation", "folds=2")
    outcome = supercl("study", declaration, out, *(part for text in settings for part in ("--set", text)))
    assert outcome.code == 0, outcome.err
    assert "validation cases" in outcome.out
    parts = {seed: read_run(run_path(out, "scratch", seed=seed))["cases"] for seed in (0, 1)}
    assert {seed: (cases["train"], cases["validation"]) for seed, cases in parts.items()} == {
        0: (["case_b"], ["case_a"]),
        1: (["case_a"], ["case_b"]),
    }
    assert ("case_a", "ground_truth") in read
    assert ("case_c", "ground_truth") not in read


def test_a_failed_cell_is_listed_and_the_others_are_done(declaration, tmp_path, supercl, monkeypatch):
    out = tmp_path / "out"
    options = (declaration, out, "--set", "seeds=[0]", "--set", "labelled=[1]")
    original = train.loop._read_back

    def broken(losses):
        values = original(losses)
        return {name: float("nan") for name in values} if "loss_ins" in values else values

    with monkeypatch.context() as patch:
        patch.setattr(train.loop, "_read_back", broken)
        outcome = supercl("study", *options)
    assert outcome.code == 3
    assert "2 of 3 runs of the study failed" in outcome.err
    assert "short, pcl, 1 labelled, seed 0: its pre-training failed: The loss is not finite" in outcome.err
    assert "scratch" in outcome.out
    assert supercl("study", *options).code == 0


def test_a_stop_in_the_middle_changes_nothing_in_the_results(declaration, tmp_path, supercl, monkeypatch):
    options = ("--set", "labelled=[2]", "--set", "seeds=[1]", "--device", "cpu")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert supercl("study", declaration, whole, *options).code == 0
    with monkeypatch.context() as patch:
        # It is asked twice a step: in the fourth of the last fine-tuning, after 4 of pre-training and 6 from scratch.
        stop = call_at(2 * (4 + 6 + 4), lambda: os.kill(os.getpid(), signal.SIGTERM), train.loop.step_seed)
        patch.setattr(train.loop, "step_seed", stop)
        outcome = supercl("study", declaration, stopped, *options)
    assert outcome.code == 5, outcome.err
    assert len(read_metrics(run_path(stopped))) > 0
    assert read_run(run_path(stopped))["status"] == "running"
    # What is there by then is in the results, and nothing of it on the terminal.
    assert [cell.status for cell in read_results(stopped).cells] == ["finished", "waiting"]
    assert {row.arm for row in read_results(stopped).rows} == {"scratch"}
    assert supercl("study", declaration, stopped, *options).code == 0
    assert_same_weights(run_path(whole), run_path(stopped))
    assert scores(whole) == scores(stopped)


@pytest.mark.slow
def test_two_killed_workers_and_two_more_find_what_one_finds(declaration, tmp_path, supercl):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert supercl("study", declaration, whole).code == 0
    command = [sys.executable, "-m", "supercl_core.cli", "study", declaration, shared]
    killed = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    while len(list(shared.rglob("metrics.jsonl"))) < 3:
        time.sleep(0.05)
    for worker in killed:
        worker.kill()
        worker.communicate()
    assert not list(shared.rglob("results.json"))
    # Their locks are theirs for as long as nobody knows that they are dead.
    outcome = subprocess.run(
        [*command, "--jobs", "2"], capture_output=True, text=True, timeout=300, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    said = [log.read_text() for log in (shared / "logs").iterdir()]
    assert len(said) == 2
    for cell in read_results(shared).cells:
        assert_same_weights(cell.run_path, whole / cell.run_path.relative_to(shared))
    assert scores(whole) == scores(shared)
    begun = re.findall(r"^note: (.*) \(\d+ of 10 runs finished\)$", "".join(said), re.M)
    assert len(begun) == len(set(begun))
