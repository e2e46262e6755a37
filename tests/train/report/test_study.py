"""The report of a fabricated study over a small real cache: what it says of results, and how wide it gets."""

import json
import re
import shutil

import pytest
from reports import (
    CASE_IDS,
    check_asks_nothing_outside,
    check_in_a_browser,
    evaluate,
    read_page,
    write_cache,
    write_run,
)

from supercl_core.errors import SuperCLError, UsageError
from train import runs
from train.bootstrap import Difference
from train.report.page import write_report
from train.report.study import _compared
from train.study.collection import collect
from train.study.declaration import CellKey, pretrain_path, read_study
from train.study.results import read_results, write_results
from train.study.runner import start_study

DECLARATION = """
cache = "phantom.zarr"
split = "split.json"
labelled = [2, 8]
seeds = [0, 1]
[pretrain]
steps = 40
[recipes.strong]
preset = "strong"
steps = 60
[recipes.published]
preset = "published"
steps = 60
[arms.scratch]
init = "scratch"
[arms.theirs]
preset = "simclr"
[arms.ours]
ilcp_stride = 4
"""

SHIFTS = {"scratch": {2: 9, 8: 1}, "theirs": {2: 6, 8: 2}, "ours": {2: 3, 8: 1}}
"""By how many columns the segmentations of an arm and count are off."""


def fabricate(folder, *, waiting=(), failed=None, assignments=(), declaration=DECLARATION):
    """The folder of a study whose cells are finished, but for those that are `waiting` or have `failed`."""
    write_cache(folder / "phantom.zarr", with_truth=True)
    (folder / "study.toml").write_text(declaration)
    study, out = read_study(folder / "study.toml", assignments=assignments), folder / "out"
    start_study(study, out)
    for arm, declared in study.arms.items():
        for seed in study.seeds if declared.pretrain else ():
            config = {
                "weights": [1.0, float(arm == "ours"), 0.0],
                "ilcp_stride": declared.pretrain.ilcp_stride,
            }
            write_run(pretrain_path(out, arm, seed), folder / "phantom.zarr", kind="pretrain", config=config)
    for cell in study.cells():
        if cell not in waiting:
            run = write_run(cell.path(out), folder / "phantom.zarr", labelled=cell.labelled)
            evaluate(run, folder / "phantom.zarr", shift=SHIFTS[cell.arm][cell.labelled] + (cell.seed == 1))
            if study.scored_on == "validation":
                (run / "evaluation.json").rename(run / "validation.json")
                (run / "predictions").rename(run / "validation_predictions")
    if failed:
        path = failed.path(out)
        path.parent.mkdir(parents=True)
        path.with_name(f"{path.name}.failed.json").write_text('{"error": "The loss is not finite."}')
    write_results(collect(study, out), out)
    return out


@pytest.fixture(scope="module")
def study_path(tmp_path_factory):
    return fabricate(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page_path(tmp_path_factory, study_path):
    return write_report([study_path], tmp_path_factory.mktemp("page") / "study.html")


def test_the_page_asks_for_nothing_outside(page_path):
    check_asks_nothing_outside(page_path)


def test_every_kind_of_picture_is_there_and_has_an_alternative_text(page_path):
    page = read_page(page_path)
    # By recipe: a curve of DSC, for each of 2 counts a box plot, a loss and a validation curve, and 3 cases with the
    # ground truth and 2 arms. Once: 4 terms of pre-training, 4 pictures of superpixels, 2 components x 6 slices.
    assert len(page.links) == len(page.alts) == 2 * (1 + 2 * 3 + 3 * 3) + 4 + 4 + 12
    assert all(len(alt) > 10 for alt in page.alts)
    assert page_path.stat().st_size < 2e6


def test_the_page_holds_the_numbers_of_the_results(page_path, study_path):
    page = read_page(page_path)
    text = page.text
    results = read_results(study_path)
    assert len(results.rows) == 2 * 2 * 3 * 3
    for row in results.rows:
        assert f"{row.dsc:.2f} {row.sd:.2f} {row.interval[0]:.2f} to {row.interval[1]:.2f}" in text
        assert f"{row.jc:.2f} {row.hd95:.2f} {row.asd:.2f}" in text
    curves = " ".join(alt for alt in page.alts if "over the labelled count" in alt)
    for recipe in results.recipes:
        for key, arm in zip("ABC", results.arms, strict=True):
            few, more = (
                row.dsc
                for row in results.rows
                if (row.recipe, row.arm, row.class_name) == (recipe, arm, "mean")
            )
            assert f"{key} {few:.1f}, {more:.1f}" in curves
    assert len(results.saved) == 2 * 2 * 2
    for one in results.saved:
        needed = f"{one.bound} {one.baseline_labels:.3g}".strip()
        factor = f" ({one.baseline_labels / one.labelled:.1f} ×)" if one.bound != "at most" else ""
        assert needed + factor in text
    for note in results.notes:
        assert note in text


def test_the_answer_follows_the_results(page_path, study_path):
    text = read_page(page_path).text
    rows = {(row.recipe, row.labelled, row.arm, row.class_name): row for row in read_results(study_path).rows}
    few = rows["strong", 2, "ours", "mean"].difference
    assert few.interval[0] > 0
    answer = (
        "Recipe strong. Of the 2 other arms, ours has the highest mean DSC over 2 and 8 labelled: with 2 labelled it "
        f"lies {few.mean:.1f} points above scratch (95 % interval {few.interval[0]:+.1f} to {few.interval[1]:+.1f}); "
        "with 8 labelled it cannot be told apart from scratch (+0.0, 95 % interval +0.0 to +0.0)."
    )
    assert answer in text


@pytest.mark.parametrize(
    ("mean", "interval", "expected"),
    [
        (2.0, (0.5, 3.5), "with 3 labelled it lies 2.0 points above scratch (95 % interval +0.5 to +3.5)"),
        (-2.0, (-3.5, -0.5), "with 3 labelled it lies 2.0 points below scratch (95 % interval -3.5 to -0.5)"),
        (
            2.0,
            (-0.5, 4.5),
            "with 3 labelled it cannot be told apart from scratch (+2.0, 95 % interval -0.5 to +4.5)",
        ),
        (2.0, None, "with 3 labelled it differs by +2.0 points from scratch, with no interval to judge by"),
    ],
)
def test_a_difference_is_said_as_its_interval_allows(mean, interval, expected):
    difference = Difference(mean=mean, interval=interval, num_cases=3, num_seeds=2)
    assert _compared(3, difference, "scratch") == expected


def test_the_page_says_what_a_reader_must_know(page_path):
    text = read_page(page_path).text
    for content in (
        "Recipes of fine-tuning: strong, published. Labelled: 2, 8. Seeds: 0, 1. Baseline: A scratch.",
        "Scored on 3 test cases of phantom.",
        "Of 24 cells (an arm, a recipe, a count and a seed), 24 are finished.",
        "Recipe strong, 2 labelled. Worst case of ours",
        "liver spleen Each class has its colour",
        "feature map of stride 4 ",
        "A scratch is not pre-trained here. It starts from scratch.",
        "ilcp_stride – 4",
        "loss dice_ce ce",
        "C ours 58 1 min 30 s 58 1 min 30 s 2",
    ):
        assert content in text
    assert "Cells that are not finished" not in text


def test_settings_that_do_not_differ_are_shown_too_and_those_that_do_are_marked(page_path):
    source = read_page(page_path).source
    for name, marked in ("log_every", False), ("ilcp_stride", True):
        assert (f'<tr class="differs"><th scope="row">{name}</th>' in source) is marked
        assert f'<th scope="row">{name}</th>' in source


def test_the_page_tells_of_weights_made_elsewhere_though_no_setting_differs(tmp_path):
    (tmp_path / "weights.pth").touch()
    declaration = re.sub(r"\[arms\.theirs\](.|\n)*", '[arms.theirs]\ninit = "weights.pth"\n', DECLARATION)
    out = fabricate(tmp_path, declaration=declaration, assignments=["labelled=[2]", "seeds=[0]"])
    text = read_page(write_report([out], tmp_path / "study.html")).text
    assert (
        f"theirs is not pre-trained here. It starts from {tmp_path / 'weights.pth'}, by a budget that" in text
    )
    assert "Budget of pre-training unknown, as it was made elsewhere: theirs." in text
    assert "equal budgets" not in text


def test_arms_of_other_seeds_are_not_ranked(tmp_path):
    """The second seed is harder: who lacks it would win."""
    missing = [CellKey(recipe=recipe, arm="ours", labelled=8, seed=1) for recipe in ("strong", "published")]
    text = read_page(write_report([fabricate(tmp_path, waiting=missing)], tmp_path / "study.html")).text
    assert "highest mean DSC over 2 labelled: with 2 labelled it" in text
    assert "with 8 labelled it" not in text


def test_saved_labels_say_neither_a_factor_of_a_bound_nor_what_is_within_chance(page_path, study_path):
    text = read_page(page_path).text
    results = read_results(study_path)
    assert {"", "at most", "at least"} & {one.bound for one in results.saved}
    for one in results.saved:
        if one.bound == "at most":
            assert f"at most {one.baseline_labels:.3g} (" not in text
    clear = {
        (row.recipe, row.arm, row.labelled): row.difference.is_clear
        for row in results.rows
        if row.class_name == "mean" and row.difference
    }
    assert False in clear.values()
    assert True in clear.values()
    assert text.count(", not told apart") == list(clear.values()).count(False)


def test_pictures_of_a_study_on_validation_cases_do_not_speak_of_test_cases(page_path):
    assert not [alt for alt in read_page(page_path).alts if "test cases" in alt]


def test_cases_are_ranked_by_the_mean_over_seeds(page_path, study_path):
    """Segmentations are off by one more column from case to case."""
    text = read_page(page_path).text
    for rank, case_id in zip(("Best", "Median", "Worst"), CASE_IDS, strict=True):
        paths = [
            CellKey(recipe="strong", arm="ours", labelled=2, seed=seed).path(study_path) for seed in (0, 1)
        ]
        rows = [json.loads((run / "evaluation.json").read_text())["rows"] for run in paths]
        dsc = [row["dsc"] for of_run in rows for row in of_run if row["case"] == case_id]
        assert f"{rank} case of ours ({100 * sum(dsc) / 4:.1f} %): {case_id}" in text


def test_the_same_study_gives_the_same_page_and_each_file_is_read_once(
    tmp_path, page_path, study_path, monkeypatch
):
    opened = []
    read_text, read_json = runs.read_text, runs.read_json
    monkeypatch.setattr(
        runs, "read_text", lambda path, **limit: opened.append(path) or read_text(path, **limit)
    )
    monkeypatch.setattr(
        runs, "read_json", lambda path, **limit: opened.append(path) or read_json(path, **limit)
    )
    assert write_report([study_path], tmp_path / "again.html").read_bytes() == page_path.read_bytes()
    assert len(opened) == len(set(opened)) == 24 * 3 + 4 * 2


def test_an_unfinished_study_is_shown_with_what_it_has(tmp_path):
    study_cells = [
        CellKey(recipe=recipe, arm=arm, labelled=labelled, seed=seed)
        for recipe in ("strong", "published")
        for arm in ("scratch", "theirs", "ours")
        for labelled in (2, 8)
        for seed in (0, 1)
    ]
    kept = CellKey(recipe="strong", arm="scratch", labelled=8, seed=0)
    failed = CellKey(recipe="strong", arm="theirs", labelled=8, seed=1)
    out = fabricate(tmp_path, waiting=[cell for cell in study_cells if cell != kept], failed=failed)
    page = read_page(write_report([out], tmp_path / "study.html"))
    assert "1 is finished, 22 are waiting, 1 is failed." in page.text
    assert "strong 8 B theirs 1 failed The loss is not finite." in page.text
    assert "No labelled count has scores of all arms with the same seeds yet." in page.text
    assert sum("Box plot" in alt for alt in page.alts) == 1
    assert "Segmentations" not in page.text


def test_scores_on_validation_cases_are_shown_as_such(tmp_path):
    out = fabricate(tmp_path, assignments=['scored_on="validation"', "labelled=[2]", "seeds=[0]"])
    page = read_page(write_report([out], tmp_path / "study.html"))
    assert "Scored on 3 validation cases of phantom." in page.text
    assert "DSC of the validation cases" in page.text
    assert "No segmentation to show" not in page.text
    assert len(page.links) == 2 * (1 + 3 + 3 * 3) + 4 + 4 + 12


def test_a_study_without_a_run_is_shown(tmp_path):
    write_cache(tmp_path / "phantom.zarr", with_truth=True)
    (tmp_path / "study.toml").write_text(DECLARATION)
    study, out = read_study(tmp_path / "study.toml"), tmp_path / "out"
    start_study(study, out)
    write_results(collect(study, out), out)
    page = read_page(write_report([out], tmp_path / "study.html"))
    assert "24 are waiting" in page.text
    assert "the cache cannot be shown: no run names one yet" in page.text
    assert not page.links


def test_a_cache_out_of_reach_costs_only_its_pictures(tmp_path, study_path):
    page = read_page(write_report([study_path], tmp_path / "study.html", cache_path=tmp_path / "gone.zarr"))
    assert "There is no cache here" in page.text
    assert len(page.links) == 2 * (1 + 2 * 3) + 4


@pytest.mark.parametrize("content", ["{", "{}", '{"arms": {"scratch": {"init": 1, "pretrain": null}}}'])
def test_a_damaged_declaration_is_named(tmp_path, study_path, content):
    shutil.copytree(study_path, tmp_path / "out")
    (tmp_path / "out" / "study.json").write_text(content)
    with pytest.raises(SuperCLError, match="file of the study is damaged"):
        write_report([tmp_path / "out"], tmp_path / "study.html")


def test_a_study_has_a_page_of_its_own(tmp_path, study_path):
    with pytest.raises(UsageError, match="page of its own"):
        write_report([study_path, study_path], tmp_path / "study.html")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [400, 1400])
def test_no_sideways_scrolling_in_a_browser(tmp_path, page_path, width):
    check_in_a_browser(page_path, tmp_path, width=width)
