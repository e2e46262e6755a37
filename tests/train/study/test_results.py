"""Results of a study of runs written by hand: means, spread, differences, saved labels, files and the table."""

from __future__ import annotations

import csv
import io
import itertools
import json

import numpy as np
import pytest
from made_runs import write_run
from rich.console import Console

from supercl_core.errors import SuperCLError
from supercl_core.locks import hold
from train.bootstrap import Difference
from train.metrics import MEAN
from train.study.collection import collect, labels_needed, update_results
from train.study.declaration import CellKey, pretrain_path, read_study
from train.study.results import read_results, render_results, write_results
from train.study.runner import start_study

STUDY = """
cache = "a.zarr"
split = "split.json"
labelled = [2, 8]
seeds = [0, 1]
[pretrain]
steps = 30
filters = 4
[recipes.strong]
[arms.scratch]
init = "scratch"
[arms.pcl]
preset = "pcl"
"""

GAIN = {"scratch": 0.0, "pcl": 0.1}
CASES = [f"case_{index}" for index in range(8)]


def dsc(arm, labelled, seed):
    """DSC by case of two classes, the second a tenth below; `pcl` is 0.1 above, more labels are 0.2 above."""
    base = 0.3 + GAIN[arm] + (0.2 if labelled == 8 else 0.0) + 0.02 * seed
    return {case: (base + 0.01 * index, base + 0.01 * index - 0.1) for index, case in enumerate(CASES)}


@pytest.fixture
def study(tmp_path):
    (tmp_path / "small.toml").write_text(STUDY)
    return read_study(tmp_path / "small.toml")


def key(arm, labelled, seed):
    return CellKey(recipe="strong", arm=arm, labelled=labelled, seed=seed)


def write_study(study, out, *, without=()):
    """The runs of a study, but for some cells."""
    for cell in study.cells():
        if cell in without:
            continue
        write_run(cell.path(out), dsc(cell.arm, cell.labelled, cell.seed), labelled=cell.labelled, steps=4)
        lines = [{"step": 2, "seconds": 1.5}, {"step": 4, "seconds": 2.0}, {"step": 4, "validation_dsc": 0.5}]
        (cell.path(out) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for seed in study.seeds:
        path = pretrain_path(out, "pcl", seed)
        write_run(path, {}, kind="pretrain")
        (path / "weights.safetensors").touch()
        (path / "metrics.jsonl").write_text(json.dumps({"step": 30, "seconds": 60.0 + seed}) + "\n")


@pytest.fixture
def out(study, tmp_path):
    write_study(study, tmp_path / "out")
    return tmp_path / "out"


def rewrite(run_path, change):
    """Change parts of run.json."""
    file = run_path / "run.json"
    run = json.loads(file.read_text())
    for name, value in change.items():
        run[name] = {**run[name], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(run))


def row(results, arm, labelled, class_name=MEAN):
    [found] = [
        row for row in results.rows if (row.arm, row.labelled, row.class_name) == (arm, labelled, class_name)
    ]
    return found


def printed(results, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(render_results(results))
    return console.file.getvalue()


def test_rows_hold_means_spread_and_differences(study, out):
    results = collect(study, out)
    assert [(row.labelled, row.arm, row.class_name) for row in results.rows] == [
        (labelled, arm, name)
        for labelled in (2, 8)
        for arm in ("scratch", "pcl")
        for name in ("anterior", "posterior", MEAN)
    ]
    scratch, pcl = row(results, "scratch", 2), row(results, "pcl", 2)
    assert scratch.dsc == pytest.approx(30 + 3.5 + 1 - 5)
    assert scratch.sd == pytest.approx(np.std([0, 2], ddof=1))
    assert row(results, "scratch", 2, "anterior").dsc == pytest.approx(34.5)
    assert (scratch.num_cases, scratch.num_seeds, scratch.num_missing) == (2 * 8 * 2, 2, 0)
    assert scratch.hd95 == 3.5
    assert scratch.difference is None
    assert scratch.interval[0] < scratch.dsc < scratch.interval[1]
    assert pcl.difference.mean == pytest.approx(10)
    assert pcl.difference.interval == pytest.approx((10, 10))
    assert (pcl.difference.num_cases, pcl.difference.num_seeds, pcl.difference.is_clear) == (8, 2, True)
    assert (results.unit, results.class_names, results.data_set) == ("mm", ("anterior", "posterior"), "a")


def test_the_budget_has_settings_and_measured_seconds(study, out):
    results = collect(study, out)
    assert results.budget["pretrain"]["steps"] == 30
    assert results.budget["finetune"]["strong"]["2"]["filters"] == 4
    assert results.budget["unknown"] == []
    cell = next(cell for cell in results.cells if (cell.arm, cell.seed) == ("pcl", 1))
    assert (cell.seconds, cell.pretrain_seconds, cell.status) == (3.5, 61.0, "finished")
    assert cell.pretrain_path == pretrain_path(out, "pcl", 1)


def test_missing_structures_are_counted(study, out):
    path = key("pcl", 2, 0).path(out)
    (path / "evaluation.json").unlink()
    values = dsc("pcl", 2, 0)
    values["case_0"], values["case_1"] = (0.0, None), (0.0, 0.0)
    write_run(path.with_name("other"), values)
    (path.with_name("other") / "evaluation.json").rename(path / "evaluation.json")
    results = collect(study, out)
    assert row(results, "pcl", 2, "anterior").num_missing == 2
    assert (row(results, "pcl", 2).num_missing, row(results, "pcl", 2).num_cases) == (3, 31)
    assert row(results, "pcl", 2).difference.num_cases == 8


def test_an_unfinished_study_has_the_results_that_there_are(study, tmp_path):
    out = tmp_path / "part"
    write_study(study, out, without=[key("scratch", 2, 0), key("pcl", 8, 0), key("pcl", 8, 1)])
    key("scratch", 2, 0).path(out).with_name("seed_0.failed.json").write_text('{"error": "no luck"}')
    with hold(key("pcl", 8, 1).path(out)):
        results = collect(study, out)
    states = {(cell.arm, cell.labelled, cell.seed): (cell.status, cell.error) for cell in results.cells}
    assert states["scratch", 2, 0] == ("failed", "no luck")
    assert states["pcl", 8, 0] == ("waiting", None)
    assert states["pcl", 8, 1] == ("running", None)
    assert states["pcl", 2, 1] == ("finished", None)
    assert (row(results, "scratch", 2).num_seeds, row(results, "scratch", 2).sd) == (1, None)
    paired = row(results, "pcl", 2)
    assert (paired.num_seeds, paired.difference.num_seeds) == (2, 1)
    assert not [row for row in results.rows if (row.arm, row.labelled) == ("pcl", 8)]
    notes = " ".join(results.notes)
    assert "Not all cells have results: 5 of 8, 1 failed." in notes
    assert "one seed" in notes
    assert {(one.labelled, one.baseline_labels is None) for one in results.saved} == {(2, False), (8, True)}
    assert collect(study, tmp_path / "nothing").rows == ()


def left_out(study, out):
    """Title and error of the one cell that is left out."""
    results = collect(study, out)
    [cell] = [cell for cell in results.cells if cell.status == "failed"]
    assert {
        row.num_seeds for row in results.rows if (row.arm, row.labelled) == (cell.arm, cell.labelled)
    } == {1}
    assert "7 of 8, 1 failed" in " ".join(results.notes)
    assert any(note.startswith(f"Left out: strong, {cell.arm}, {cell.labelled}") for note in results.notes)
    return cell.arm, cell.labelled, cell.seed, cell.error


def test_one_damaged_evaluation_costs_its_cell_alone(study, out):
    path = key("pcl", 2, 0).path(out) / "evaluation.json"
    text = path.read_text()
    path.write_text(text.replace('"mm"', '"voxel"'))
    assert left_out(study, out)[:3] == ("pcl", 2, 0)
    path.write_text("{")
    assert str(path) in left_out(study, out)[3]


@pytest.mark.parametrize(
    ("run_path", "change", "cell"),
    [
        (key("pcl", 2, 0).path, {"cache": {"config_digest": "another"}}, ("pcl", 2, 0, "cache")),
        (key("pcl", 8, 1).path, {"cases": {"train": ["z"]}}, ("pcl", 8, 1, "cases")),
        (key("pcl", 8, 1).path, {"content_digests": {"case_0": "f"}}, ("pcl", 8, 1, "contents of the cases")),
        (key("scratch", 8, 0).path, {"config": {"precision": "bfloat16"}}, ("scratch", 8, 0, "precision")),
    ],
)
def test_a_run_on_another_cache_split_or_precision_is_not_mixed_in(study, out, run_path, change, cell):
    rewrite(run_path(out), change)
    *found, error = left_out(study, out)
    if cell[1] == 8 and cell[3] != "precision":  # of two arms, it is the second that differs from the first
        assert found[1:] == list(cell[1:3])
    else:
        assert tuple(found) == cell[:3]
    assert f"another {cell[3]} than" in error


def test_another_place_of_the_cache_is_no_other_cache(study, out):
    rewrite(key("pcl", 2, 0).path(out), {"cache": {"path": "elsewhere.zarr"}})
    assert {cell.status for cell in collect(study, out).cells} == {"finished"}


def test_the_commits_are_those_of_the_runs(study, out):
    for seed, commit in enumerate(("a" * 40, "b" * 40 + "+changes")):
        for arm, labelled in itertools.product(("scratch", "pcl"), (2, 8)):
            record = {"commit": commit, "versions": {"supercl": "0.7", "torch": f"2.{seed}"}}
            rewrite(key(arm, labelled, seed).path(out), {"provenance": record})
    results = collect(study, out)
    assert results.provenance["runs"]["commit"] == ["a" * 40, "b" * 40 + "+changes"]
    said = "Runs made with commit aaaaaaa and bbbbbbb+changes, supercl 0.7, torch 2.0 and 2.1."
    assert said in " ".join(printed(results).split())


def test_notes_say_what_arms_do_not_share(study, out, tmp_path):
    (tmp_path / "weights.pth").touch()
    (tmp_path / "small.toml").write_text(STUDY + '[arms.foreign]\ninit = "weights.pth"\n')
    for seed in (0, 1):
        rewrite(key("pcl", 2, seed).path(out), {"unlabelled_test_cases_seen": 3})
        for arm in ("scratch", "pcl"):
            rewrite(key(arm, 2, seed).path(out), {"cases": {"train": ["x"]}})
            rewrite(key(arm, 8, seed).path(out), {"cases": {"train": ["y", "z"]}})
    notes = " ".join(collect(read_study(tmp_path / "small.toml"), out).notes)
    assert "Budget of pre-training unknown, as it was made elsewhere: foreign." in notes
    assert "Pre-training saw images of test cases, without labels, in: pcl." in notes
    assert "are among those of the next, so curves over the count compare other cases: 2 in 8." in notes


@pytest.mark.parametrize(
    ("seeds", "empty"), [([0, 1, 2], ""), ([0, 3], "Folds without a seed"), ([0, 1], ": 2.")]
)
def test_the_note_on_folds_fits_the_seeds(tmp_path, seeds, empty):
    (tmp_path / "small.toml").write_text(STUDY)
    settings = ["scored_on=validation", f"seeds={seeds}"]
    results = collect(read_study(tmp_path / "small.toml", assignments=settings), tmp_path / "nothing")
    [note] = [note for note in results.notes if note.startswith("Scored on labelled cases")]
    assert "resample patients alone" in note
    assert (empty in note) if empty else note.endswith("was read.")
    assert "± sd over seeds and their folds" in " ".join(printed(results).split())


def test_a_worker_begun_before_an_arm_was_added_does_not_drop_it(study, out, tmp_path):
    start_study(study, out)
    (tmp_path / "small.toml").write_text(STUDY + '[arms.simclr]\npreset = "simclr"\n')
    start_study(read_study(tmp_path / "small.toml", assignments=["baseline=pcl"]), out)
    results = update_results(out)
    assert (results.arms, results.baseline) == (("scratch", "pcl", "simclr"), "pcl")
    assert read_results(out) == results
    (out / "study.json").write_text('{"arms": 3}')
    with pytest.raises(SuperCLError, match=r"damaged(.|\n)*study\.json"):
        update_results(out)


# ---------------------------------------------------------------- labels saved


CURVE = [(3, 70.0), (12, 80.0), (48, 84.0)]


@pytest.mark.parametrize(
    ("dsc", "needed", "bound"),
    [
        (60.0, 3, "at most"),
        (70.0, 3, ""),
        (75.0, 6, ""),
        (80.0, 12, ""),
        (82.0, 24, ""),
        (84.0, 48, ""),
        (85.0, 48, "at least"),
    ],
)
def test_labels_needed_are_read_off_the_curve_in_its_logarithm(dsc, needed, bound):
    assert labels_needed(dsc, CURVE[::-1]) == (pytest.approx(needed), bound)


def test_on_a_curve_that_falls_the_first_crossing_counts():
    assert labels_needed(78.0, [(1, 70.0), (2, 80.0), (4, 75.0), (8, 90.0)])[0] == pytest.approx(2**0.8)
    assert labels_needed(71.0, [(8, 70.0)]) == (8, "at least")
    assert labels_needed(71.0, []) == (None, "")


def test_saved_labels_of_the_study(study, out):
    saved = {one.labelled: (one.baseline_labels, one.bound) for one in collect(study, out).saved}
    # The baseline gains 20 points from 2 to 8, so 10 points are half of the way: 4.
    assert saved == {2: (pytest.approx(4), ""), 8: (8, "at least")}


# ---------------------------------------------------------------- files and the table


def test_results_come_back_from_their_file(study, out):
    results = collect(study, out)
    write_results(results, out)
    assert read_results(out) == results
    assert '"run_path": "finetune/strong/scratch/labelled_2/seed_0"' in (out / "results.json").read_text()
    assert sorted(path.name for path in out.iterdir()) == [
        "finetune",
        "pretrain",
        "results.csv",
        "results.json",
    ]


def test_the_csv_has_a_line_a_row(study, out):
    write_results(collect(study, out), out)
    lines = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert len(lines) == 12
    pcl = lines[5]
    assert (pcl["arm"], pcl["labelled"], pcl["class_name"], pcl["num_seeds"]) == ("pcl", "2", "mean", "2")
    assert float(pcl["dsc"]) == pytest.approx(39.5)
    assert float(pcl["difference_low"]) == pytest.approx(10)
    assert lines[0]["difference"] == lines[0]["difference_low"] == ""


@pytest.mark.parametrize("damage", ["{", "[]", '{"format_version": 1}', None])
def test_damaged_results_are_refused(study, out, damage):
    with pytest.raises(SuperCLError, match="no results of a study"):
        read_results(out)
    write_results(collect(study, out), out)
    file = out / "results.json"
    file.write_text(damage or file.read_text().replace('"bound": ""', '"bound": 5'))
    with pytest.raises(SuperCLError, match=r"damaged(.|\n)*results\.json"):
        read_results(out)


def test_the_table_marks_what_is_clear_and_best(study, out):
    results = collect(study, out)
    text = printed(results)
    assert max(map(len, text.splitlines())) <= 80
    for content in (
        "strong",
        "29.50 ± 1.41",
        "39.50 ± 1.41",
        "+10.0 [+10.0, +10.0]*",
        "to scratch",
        "test cases",
    ):
        assert content in text
    assert "-0.0" not in text
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    console.print(render_results(results))
    bold = [line for line in console.file.getvalue().splitlines() if "\x1b[1m" in line and " ± " in line]
    assert len(bold) == 2
    assert all("pcl" in line for line in bold)


def test_a_difference_within_chance_is_not_marked():
    near = Difference(mean=0.1, interval=(-0.2, 0.4), num_cases=5, num_seeds=3)
    assert not near.is_clear
    below = Difference(mean=-0.3, interval=(-0.5, -0.1), num_cases=5, num_seeds=3)
    assert below.is_clear
