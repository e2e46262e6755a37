"""What the report of a study shows, gathered into plain values for `study.html.jinja`.

Scores, intervals and saved labels come from `train.study.results`; cases and curves from the runs of the study
(`train.report.study_runs`), settings from its declaration. Pictures of cases are left to `train.report.pictures`.
Called by `train.report.page`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np

from train.bootstrap import Difference
from train.comparison import Run
from train.metrics import MEAN
from train.report import figures
from train.report.parts import (
    Entry,
    Picture,
    box_plot,
    duration,
    flat,
    side_by_side,
    training_curves,
)
from train.report.pictures import Segmented, cache_pictures, extremes
from train.report.study_runs import StudyRuns
from train.study.collection import stored_study
from train.study.declaration import Labelled
from train.study.results import read_results, spread

STATUSES: Final = ("finished", "running", "waiting", "failed")

FINETUNE_TERMS: Final = ("loss", "validation_dsc")
"""What is plotted of fine-tuning."""


def study_page(study_path: Path, *, cache_path: Path | None) -> dict[str, Any]:
    """The values of the page of a study, finished or not; `cache_path` as in `report.write_report`.

    Raises SuperCLError where the declaration or the results of the study, or a file of one of its runs, cannot be read.
    """
    study = StudyRuns(results := read_results(study_path))
    declared = stored_study(study_path).as_dict()
    pretrained = [(entry, runs) for arm, entry in study.arms.items() if (runs := study.pretrained(arm))]
    return {
        "results": results,
        "spread": spread(results),
        "arms": list(study.arms.values()),
        "baseline": study.arms[results.baseline],
        "num_cases": study.num_cases,
        "num_cells": {status: sum(cell.status == status for cell in results.cells) for status in STATUSES},
        "open_cells": [(study.arms[cell.arm], cell) for cell in results.cells if cell.status != "finished"],
        "answers": [(recipe, _answer(study, recipe)) for recipe in results.recipes],
        "dsc_curves": [picture for recipe in results.recipes if (picture := _dsc_curve(study, recipe))],
        "scores": _scores(study),
        "saved": _saved(study),
        "box_plots": _box_plots(study),
        "pretrain_curves": training_curves(pretrained, "pretrain"),
        "finetune_curves": _finetune_curves(study),
        "inits": [
            (study.arms[arm], init)
            for arm, values in declared["arms"].items()
            if arm in study.arms and (init := values["init"])
        ],
        "arm_settings": side_by_side(
            [
                (study.arms[arm], settings)
                for arm, values in declared["arms"].items()
                if arm in study.arms and (settings := values["pretrain"])
            ]
        ),
        "recipe_settings": side_by_side(_recipe_columns(declared["recipes"])),
        "budget": side_by_side(
            [
                *([("pre-training", results.budget["pretrain"])] if results.budget["pretrain"] else []),
                *_recipe_columns(results.budget["finetune"]),
            ]
        ),
        "costs": _costs(study),
        "provenance": flat(results.provenance),
        **cache_pictures(
            cache_path or study.cache_path,
            segmented=[shown for recipe in results.recipes for shown in _segmented(study, recipe)],
            pretrained=[run for _, runs in pretrained for run in runs],
        ),
    }


# ---------------------------------------------------------------- the answer and the scores


def _answer(study: StudyRuns, recipe: str) -> str:
    """How the best arm compares to the baseline at every count: one sentence, of the results alone."""
    arms, counts = study.arms, study.results.labelled
    complete = [
        n
        for n in counts
        if all(study.dsc(recipe, n, arm) is not None for arm in arms)
        and len({tuple(cell.seed for cell in study.cells(recipe, n, arm)) for arm in arms}) == 1
    ]
    if not complete or not study.rivals:
        return "No labelled count has scores of all arms with the same seeds yet."
    means = {arm: fmean(study.dsc(recipe, n, arm) or 0.0 for n in complete) for arm in study.rivals}
    best = max(means, key=means.__getitem__)
    phrases = [
        _compared(n, study.rows[recipe, n, best, MEAN].difference, study.results.baseline) for n in complete
    ]
    over = f" over {' and '.join(map(str, complete))} labelled" if len(counts) > 1 else ""
    return f"Of the {len(arms) - 1} other arms, {best} has the highest mean DSC{over}: {'; '.join(phrases)}."


def _compared(labelled: Labelled, difference: Difference | None, baseline: str) -> str:
    text = f"with {labelled} labelled"
    if difference is None:
        return f"{text} it has no seed in common with {baseline}"
    if difference.interval is None:
        return f"{text} it differs by {difference.mean:+.1f} points from {baseline}, with no interval to judge by"
    low, high = difference.interval
    interval = f"95 % interval {low:+.1f} to {high:+.1f}"
    if not difference.is_clear:
        return f"{text} it cannot be told apart from {baseline} ({difference.mean:+.1f}, {interval})"
    side = "above" if low > 0 else "below"
    return f"{text} it lies {abs(difference.mean):.1f} points {side} {baseline} ({interval})"


def _dsc_curve(study: StudyRuns, recipe: str) -> Picture | None:
    """DSC over the labelled count, a line an arm."""
    series, texts = [], []
    for arm, entry in study.arms.items():
        points = [
            (count, row.dsc, *(row.interval or (np.nan, np.nan)))
            for labelled in study.results.labelled
            if (row := study.rows.get((recipe, labelled, arm, MEAN))) and row.dsc is not None
            if (count := study.count(labelled)) is not None
        ]
        if points:
            counts, dsc, *interval = np.array(sorted(points), float).T
            series.append(figures.Series(mark=entry.mark, x=counts, y=dsc, interval=np.array(interval)))
            texts.append(f"{entry.mark.key} " + ", ".join(f"{value:.1f}" for value in dsc))
    if not series:
        return None
    return Picture(
        uri=figures.intervals(series, x_label="labelled", y_label="DSC [%]"),
        alt=f"DSC in % over the labelled count with 95 % intervals, recipe {recipe}: {'; '.join(texts)}.",
        caption=f"Recipe {recipe}",
    )


def _scores(study: StudyRuns) -> list[dict[str, Any]]:
    """The scores of each recipe and count: by arm the row of the mean and those of the classes."""
    scores = []
    for recipe, labelled in study.groups():
        arms = [
            {
                "entry": entry,
                "mean": mean,
                "classes": [study.rows[recipe, labelled, arm, name] for name in study.results.class_names],
            }
            for arm, entry in study.arms.items()
            if (mean := study.rows.get((recipe, labelled, arm, MEAN)))
        ]
        if arms:
            best = max(study.dsc(recipe, labelled, arm) or 0.0 for arm in study.arms)
            scores.append({"recipe": recipe, "labelled": labelled, "arms": arms, "best": best})
    return scores


def _saved(study: StudyRuns) -> list[tuple[str, Entry, list[str]]]:
    """By recipe and arm, the labels that the baseline needs for the same DSC, a text for each count.

    There is no factor where the count is but an upper bound, since it may be any below.
    """
    found = {(one.recipe, one.arm, one.labelled): one for one in study.results.saved}
    rows = []
    for recipe in study.results.recipes:
        for arm in study.rivals:
            cells = []
            for labelled in study.results.labelled:
                one, count = found.get((recipe, arm, labelled)), study.count(labelled)
                if one is None or one.baseline_labels is None or not count:
                    cells.append("–")
                else:
                    text = f"{one.bound} {one.baseline_labels:.3g}".strip()
                    if one.bound != "at most":
                        text += f" ({one.baseline_labels / count:.1f} ×)"
                    difference = study.rows[recipe, labelled, arm, MEAN].difference
                    cells.append(text if difference and difference.is_clear else f"{text}, not told apart")
            if any(cell != "–" for cell in cells):
                rows.append((recipe, study.arms[arm], cells))
    return rows


# ---------------------------------------------------------------- cases and curves


def _box_plots(study: StudyRuns) -> list[Picture]:
    """For each recipe and count, the scored cases by arm."""
    pictures = []
    for recipe, labelled in study.groups():
        groups = [
            (entry, values)
            for arm, entry in study.arms.items()
            if (values := _dsc_by_case(study.finetuned(recipe, labelled, arm)))
        ]
        if groups:
            pictures.append(box_plot(groups, f"Recipe {recipe}, {labelled} labelled"))
    return pictures


def _dsc_by_case(runs: Sequence[Run]) -> dict[str, float]:
    """The mean over classes, then seeds (0..1) of every scored case."""
    values = [run.case_dsc()[MEAN] for run in runs]
    cases = dict.fromkeys(case for by_case in values for case in by_case)
    return {case: fmean(by_case[case] for by_case in values if case in by_case) for case in cases}


def _segmented(study: StudyRuns, recipe: str) -> list[Segmented]:
    """The best, median and worst case of the best arm, at the lowest count that this and the baseline have."""
    baseline = study.results.baseline
    folder = "predictions" if study.results.scored_on == "test" else "validation_predictions"
    for labelled in sorted(study.results.labelled, key=lambda labelled: study.count(labelled) or np.inf):
        runs = {arm: study.finetuned(recipe, labelled, arm) for arm in study.arms}
        rivals = [arm for arm in study.rivals if runs[arm]]
        if rivals and runs[baseline]:
            best = max(rivals, key=lambda arm: study.dsc(recipe, labelled, arm) or 0.0)
            return [
                Segmented(
                    title=f"Recipe {recipe}, {labelled} labelled. {rank} case of {best} ({100 * dsc:.1f} %)",
                    case_id=case_id,
                    segmentations=tuple(
                        _first_seed(study.arms[arm], runs[arm], case_id, folder) for arm in (baseline, best)
                    ),
                )
                for rank, case_id, dsc in extremes(_dsc_by_case(runs[best]))
            ]
    return []


def _first_seed(entry: Entry, runs: Sequence[Run], case_id: str, folder: str) -> tuple[Entry, Path, str]:
    """The segmentation of a case by the first run that has scored it."""
    for run in runs:
        dsc = run.case_dsc()[MEAN].get(case_id)
        if dsc is not None:
            return entry, run.path / folder / f"{case_id}.nii.gz", f"DSC of the case {100 * dsc:.1f} %"
    return entry, runs[0].path / folder / f"{case_id}.nii.gz", "without a score of the case"


def _finetune_curves(study: StudyRuns) -> list[list[Picture]]:
    """For each term, its curves of every recipe and count."""
    by_term = []
    for term in FINETUNE_TERMS:
        pictures = []
        for recipe, labelled in study.groups():
            groups = [(entry, study.finetuned(recipe, labelled, arm)) for arm, entry in study.arms.items()]
            where = f", {recipe}, {labelled} labelled"
            pictures += training_curves(groups, "finetune", terms=[term], where=where)
        by_term.append(pictures)
    return by_term


# ---------------------------------------------------------------- settings and costs


def _recipe_columns(recipes: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """The settings of each recipe: one column, or several where they depend on the labelled count."""
    columns = []
    for recipe, by_count in recipes.items():
        alike: list[tuple[list[str], Mapping[str, Any]]] = []
        for count, config in by_count.items():
            counts = next((counts for counts, known in alike if known == config), None)
            if counts is None:
                alike.append(([count], config))
            else:
                counts.append(count)
        columns += [
            (recipe if len(alike) == 1 else f"{recipe}, {', '.join(counts)} labelled", config)
            for counts, config in alike
        ]
    return columns


def _costs(study: StudyRuns) -> list[dict[str, Any]]:
    """Steps and mean time of every recipe, count and arm."""
    costs = []
    for recipe, labelled in study.groups():
        arms = []
        for arm, entry in study.arms.items():
            cells, pretrained = study.cells(recipe, labelled, arm), study.pretrained(arm)
            if cells:
                arms.append(
                    {
                        "entry": entry,
                        "num_seeds": len(cells),
                        "pretrain_steps": _steps(pretrained),
                        "pretrain_time": _mean_time(cell.pretrain_seconds for cell in cells),
                        "finetune_steps": _steps(study.finetuned(recipe, labelled, arm)),
                        "finetune_time": _mean_time(cell.seconds for cell in cells),
                    }
                )
        if arms:
            costs.append({"recipe": recipe, "labelled": labelled, "arms": arms})
    return costs


def _mean_time(seconds: Iterable[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    return duration(fmean(known)) if known else "–"


def _steps(runs: Sequence[Run]) -> str:
    counts = sorted({run.num_steps for run in runs})
    return " / ".join(f"{count:,}" for count in counts) or "–"
