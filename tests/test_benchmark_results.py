"""The tables of docs/results.md from a study of runs written by hand."""

from __future__ import annotations

import json

import click
import pytest
from made_runs import write_run

from benchmarks.results import lines, main
from train.study.collection import collect, update_results
from train.study.declaration import read_study
from train.study.runner import start_study

STUDY = """
cache = "a.zarr"
split = "split.json"
labelled = [2, 8]
seeds = [0, 1]
[recipes.strong]
steps = 40
[arms.scratch]
init = "scratch"
[arms.foreign]
init = "weights.pth"
"""


def test_a_table_says_whose_commit_budget_time_and_seeds_its_numbers_have(tmp_path):
    (tmp_path / "weights.pth").touch()
    (tmp_path / "small.toml").write_text(STUDY)
    study, out = read_study(tmp_path / "small.toml"), tmp_path / "out"
    dsc = {("scratch", 2): 0.5, ("foreign", 2): 0.7, ("scratch", 8): 0.6, ("foreign", 8): 0.6}
    for cell in study.cells():
        if (cell.arm, cell.labelled, cell.seed) == ("foreign", 8, 1):
            continue
        path, value = cell.path(out), dsc[cell.arm, cell.labelled]
        write_run(path, {f"case_{n}": (value, value) for n in range(5)}, labelled=cell.labelled)
        (path / "metrics.jsonl").write_text(json.dumps({"step": 40, "seconds": 30.0 + cell.labelled}) + "\n")
        run = json.loads((path / "run.json").read_text())
        run["provenance"] = {"commit": "c" * 40, "versions": {"supercl": "0.7", "torch": "2.1"}}
        (path / "run.json").write_text(json.dumps(run))
    text = lines(collect(study, out))
    assert text[0].startswith(
        "7 of 8 cells, seeds 0, 1, scored on test cases. Budgets: `strong`, for all arms: 40 steps"
    )
    assert "32 to 38 s a run; unknown pre-training made elsewhere: foreign." in text[0]
    assert text[0].endswith("Runs made with commit ccccccc, supercl 0.7, torch 2.1.")
    assert len({line.count("|") for line in text[2:]}) == 1
    assert [line.split(" | ")[1:3] for line in text[4:]] == [
        ["scratch", "2"],
        ["foreign", "2"],
        ["scratch", "2"],
        ["foreign", "1"],
    ]
    assert text[5].endswith("| +20.0 [+20.0, +20.0]* | 3.50 | 0/20 | at least 8 |")
    assert text[7].endswith("| 8 (not told apart) |")


def test_the_page_gets_tables_and_for_several_counts_a_picture(tmp_path):
    (tmp_path / "weights.pth").touch()
    (tmp_path / "small.toml").write_text(STUDY)
    page = tmp_path / "docs" / "page.md"
    (page.parent / "images").mkdir(parents=True)
    page.write_text("Above.\n<!-- study small strong -->\nOld.\n<!-- end -->\nBelow.\n")
    for name, counts in (("several", "labelled=[2, 8]"), ("one", "labelled=[2]")):
        study, out = read_study(tmp_path / "small.toml", assignments=[counts]), tmp_path / name
        for cell in study.cells():
            write_run(cell.path(out), {f"case_{n}": (0.5, 0.5) for n in range(3)}, labelled=cell.labelled)
        start_study(study, out)
        update_results(out)
        main([str(out), "--page", str(page)], standalone_mode=False)
        above, *part, below = page.read_text().splitlines()
        assert (above, below) == ("Above.", "Below.")
        assert part[0] == "<!-- study small strong -->"
        assert part[-1] == "<!-- end -->"
        assert "Old." not in part
        assert ("(images/study-small-strong.svg)" in page.read_text()) == (name == "several")
    assert "foreign" in (page.parent / "images" / "study-small-strong.svg").read_text()
    page.write_text("No part.\n")
    with pytest.raises(click.ClickException, match="0 parts"):
        main([str(out), "--page", str(page)], standalone_mode=False)


def test_parts_of_recipes_without_finished_runs_stay(tmp_path):
    (tmp_path / "weights.pth").touch()
    (tmp_path / "small.toml").write_text(STUDY + "[recipes.published]\nsteps = 20\n")
    study, out, page = read_study(tmp_path / "small.toml"), tmp_path / "out", tmp_path / "page.md"
    (tmp_path / "images").mkdir()
    start_study(study, out)
    parts = {recipe: f"<!-- study small {recipe} -->\n" for recipe in ("strong", "published")}
    page.write_text(f"{parts['published']}<!-- end -->\n{parts['strong']}Earlier.\n<!-- end -->\n")
    for cell in study.cells():
        if cell.recipe == "published":
            write_run(cell.path(out), {f"case_{n}": (0.5, 0.5) for n in range(3)}, labelled=cell.labelled)
    update_results(out)
    main([str(out), "--page", str(page)], standalone_mode=False)
    text = page.read_text()
    assert f"{parts['strong']}Earlier.\n<!-- end -->" in text
    assert f"{parts['published']}8 of 8 cells, seeds 0, 1, scored on test cases. Budgets: `published`" in text
    assert text.count("40 steps") == 0


def test_a_study_of_one_count_has_no_column_of_saved_labels(tmp_path):
    (tmp_path / "weights.pth").touch()
    (tmp_path / "small.toml").write_text(STUDY)
    study, out = read_study(tmp_path / "small.toml", assignments=["labelled=[2]"]), tmp_path / "out"
    for cell in study.cells():
        write_run(cell.path(out), {"case_0": (0.5, 0.5), "case_1": (0.6, 0.6)}, labelled=2)
    results = collect(study, out)
    assert results.saved == ()
    text = lines(results)
    assert "needs" not in text[2]
    assert len({line.count("|") for line in text[2:]}) == 1
