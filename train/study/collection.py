"""Gathers what the run folders of a study hold into its results, finished or not.

Means, spread over seeds, intervals (`train.bootstrap`), differences to the baseline, and how many labels an arm saves.
A run that cannot be compared with the others is left out, with its reason. Called by `supercl study` and
`supercl report`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from supercl_core import provenance
from supercl_core.config import as_dict
from supercl_core.errors import SuperCLError
from supercl_core.files import read_json
from supercl_core.locks import hold_in_turn
from train import runs
from train.bootstrap import (
    DIFFERENCE_RULE,
    INTERVAL_RULE,
    LEAST_PATIENTS,
    mean_interval,
    mean_score,
    paired_difference,
    score_same_cases,
    scores,
)
from train.finetuning import SCRATCH
from train.metrics import MEAN, MISSING_RULE
from train.study.declaration import CellKey, Labelled, Status, Study
from train.study.finished import Finished, provenances, read_finished, unlike
from train.study.results import Bound, Cell, Results, Row, Saved, damaged, made_by, write_results
from train.study.runner import Task, tasks_of

_BUDGET_SHOWN: Final = (
    "steps",
    "epochs",
    "batch_size",
    "patch_size",
    "backbone",
    "filters",
    "adjacent_slices",
)


def stored_study(out_path: Path) -> Study:
    """The study that a folder holds, with what was added last. Raises SuperCLError where study.json is damaged."""
    file = out_path / "study.json"
    with damaged(file, "Delete this file and run the study again; finished runs are not repeated."):
        return Study.from_dict(read_json(file, limit_bytes=runs.LARGEST_FILE_BYTES))


def update_results(out_path: Path) -> Results:
    """Gather and write the results of the study that a folder holds, after any other process that does.

    What counts is the declaration in the folder, to which others may have added since this process read its own.
    """
    with hold_in_turn(out_path / "results.json"):
        results = collect(stored_study(out_path), out_path)
        write_results(results, out_path)
    return results


def collect(study: Study, out_path: Path) -> Results:
    """Gather what the run folders of a study hold by now.

    A finished cell counts as failed where a file of it is damaged, and where its cache, cases, precision or evaluation
    are not those of most cells.
    """
    tasks = {task.cell: task for task in tasks_of(study, out_path) if task.cell is not None}
    states = {key: task.status() for key, task in tasks.items()}
    found: dict[CellKey, Finished] = {}
    left_out: dict[CellKey, str] = {}
    for key, task in tasks.items():
        if states[key][0] == "finished":
            try:
                found[key] = read_finished(task, study)
            except SuperCLError as damage:
                left_out[key] = f"{damage.one_line()} ({damage.where})"
    left_out |= unlike(found)
    for key, reason in left_out.items():
        found.pop(key, None)
        states[key] = "failed", f"Left out: {reason}"
    cells = [_cell(task, *states[key], found.get(key)) for key, task in tasks.items()]
    evaluations = {key: of_cell.evaluation for key, of_cell in found.items()}
    first: dict[str, Any] = next(iter(evaluations.values()), {"class_names": [], "unit": ""})
    class_names = tuple(first["class_names"][1:])
    rows = [
        row
        for recipe in study.recipes
        for labelled in study.labelled
        for arm in study.arms
        for row in _rows(study, evaluations, recipe, labelled, arm, class_names)
    ]
    counts = {key.labelled: of_cell.run["split"]["labelled"] for key, of_cell in found.items()}
    return Results(
        name=study.name,
        data_set=next((of_cell.run["cache"]["name"] for of_cell in found.values()), ""),
        split=study.split,
        scored_on=study.scored_on,
        folds=study.folds,
        arms=tuple(study.arms),
        baseline=study.baseline,
        recipes=tuple(study.recipes),
        labelled=study.labelled,
        seeds=study.seeds,
        class_names=class_names,
        unit=first["unit"],
        cells=tuple(cells),
        rows=tuple(rows),
        saved=tuple(_saved(study, rows, counts)),
        budget=_budget(study),
        provenance={"runs": provenances(found.values()), "results": provenance.record()},
        notes=tuple(_notes(study, rows, found, cells, left_out)),
    )


def _cell(task: Task, status: Status, error: str | None, found: Finished | None) -> Cell:
    assert task.cell is not None
    return Cell(
        **vars(task.cell),
        run_path=task.path,
        pretrain_path=None if task.needs is None else task.needs.path,
        status=status,
        error=error,
        seconds=found.seconds if found else None,
        pretrain_seconds=found.pretrain_seconds if found else None,
    )


def _rows(
    study: Study,
    evaluations: Mapping[CellKey, dict[str, Any]],
    recipe: str,
    labelled: Labelled,
    arm: str,
    class_names: Sequence[str],
) -> list[Row]:
    """The rows of one arm: of each class, then of their mean; none without an evaluation."""
    of_arm, of_baseline = (
        {
            seed: evaluations[key]
            for seed in study.seeds
            if (key := CellKey(recipe=recipe, arm=name, labelled=labelled, seed=seed)) in evaluations
        }
        for name in (arm, study.baseline)
    )
    if not of_arm:
        return []
    case_ids = sorted({row["case"] for evaluation in of_arm.values() for row in evaluation["rows"]})
    same_cases = score_same_cases(list(of_arm.values()))
    common = [seed for seed in of_arm if seed in of_baseline]
    rows = []
    for name in [*class_names, MEAN]:
        chosen = list(class_names) if name == MEAN else [name]
        values = scores(list(of_arm.values()), case_ids=case_ids, class_names=chosen)
        by_seed = [mean_score(seed_values[None]) for seed_values in values]
        known = [value for value in by_seed if not math.isnan(value)]
        summaries = [_summary(list(of_arm.values()), class_name) for class_name in chosen]
        rows.append(
            Row(
                recipe=recipe,
                labelled=labelled,
                arm=arm,
                class_name=name,
                dsc=mean_score(values) if known else None,
                sd=float(np.std(known, ddof=1)) if len(known) > 1 else None,
                interval=mean_interval(values, case_ids, same_cases=same_cases) if known else None,
                **{
                    metric: _mean([summary[metric] for summary in summaries])
                    for metric in ("jc", "hd95", "asd")
                },
                num_cases=sum(summary["num_cases"] for summary in summaries),
                num_seeds=len(of_arm),
                num_missing=sum(summary["num_missing"] for summary in summaries),
                difference=None
                if arm == study.baseline
                else paired_difference(
                    [of_baseline[seed] for seed in common],
                    [of_arm[seed] for seed in common],
                    class_names=chosen,
                ),
            )
        )
    return rows


def _summary(evaluations: Sequence[dict[str, Any]], class_name: str) -> dict[str, Any]:
    """JC in %, distances and counts of a class over all cases and seeds."""
    rows = [row for evaluation in evaluations for row in evaluation["rows"] if row["class"] == class_name]
    jc = _mean([row["jc"] for row in rows])
    return {
        "jc": None if jc is None else 100 * jc,
        "hd95": _mean([row["hd95"] for row in rows]),
        "asd": _mean([row["asd"] for row in rows]),
        "num_cases": sum(row["dsc"] is not None for row in rows),
        "num_missing": sum(row["dsc"] is not None and row["hd95"] is None for row in rows),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# ---------------------------------------------------------------- labels saved, budget, notes


def labels_needed(dsc: float, curve: Sequence[tuple[int, float]]) -> tuple[float | None, Bound]:
    """The labelled count at which a curve of (count, DSC) first reaches `dsc`, and whether that is but a bound.

    Linear in the logarithm of the count between measured counts. Above all of the curve, its largest count is what is
    needed at least; at or below its first point, the smallest count at most. Where a curve falls again, the first
    crossing counts, which claims the fewest saved labels. None without a curve.
    """
    points = sorted(curve)
    if not points:
        return None, ""
    if dsc <= points[0][1]:
        return float(points[0][0]), "" if dsc == points[0][1] else "at most"
    for (low, below), (high, above) in itertools.pairwise(points):
        if below < dsc <= above:
            share = (dsc - below) / (above - below)
            return float(np.exp(np.log(low) + share * (np.log(high) - np.log(low)))), ""
    return float(points[-1][0]), "at least"


def _saved(study: Study, rows: Sequence[Row], counts: Mapping[Labelled, int]) -> list[Saved]:
    """For every recipe, arm but the baseline, and count; nothing where one count is all there is: it makes no curve."""
    if len(study.labelled) == 1:
        return []
    means = {(row.recipe, row.arm, row.labelled): row.dsc for row in rows if row.class_name == MEAN}
    saved = []
    for recipe in study.recipes:
        curve = [
            (counts[labelled], dsc)
            for labelled in study.labelled
            if (dsc := means.get((recipe, study.baseline, labelled))) is not None
        ]
        for arm in study.arms:
            for labelled in study.labelled if arm != study.baseline else ():
                dsc = means.get((recipe, arm, labelled))
                needed, bound = (None, "") if dsc is None else labels_needed(dsc, curve)
                saved.append(
                    Saved(recipe=recipe, arm=arm, labelled=labelled, baseline_labels=needed, bound=bound)
                )
    return saved


def _budget(study: Study) -> dict[str, Any]:
    pretrain = as_dict(study.pretrain)
    is_pretrained = any(arm.pretrain is not None for arm in study.arms.values())
    return {
        "pretrain": {name: pretrain[name] for name in _BUDGET_SHOWN} if is_pretrained else None,
        "finetune": {
            recipe: {
                str(labelled): {name: as_dict(config)[name] for name in _BUDGET_SHOWN}
                for labelled, config in by_count.items()
            }
            for recipe, by_count in study.recipes.items()
        },
        "unknown": [name for name, arm in study.arms.items() if arm.init not in (None, SCRATCH)],
    }


def _notes(
    study: Study,
    rows: Sequence[Row],
    found: Mapping[CellKey, Finished],
    cells: Sequence[Cell],
    left_out: Mapping[CellKey, str],
) -> list[str]:
    notes = [INTERVAL_RULE, DIFFERENCE_RULE, MISSING_RULE]
    if len(found) < len(cells):
        failed = sum(cell.status == "failed" for cell in cells)
        notes.append(
            f"Not all cells have results: {len(found)} of {len(cells)}"
            + (f", {failed} failed." if failed else ".")
            + " Means are over the seeds that there are, differences over those of both arms."
        )
        notes += [f"Left out: {key.title()}: {reason}" for key, reason in left_out.items()]
        if left_out:
            notes.append("The study repeats what is left out once its folder is deleted.")
    if study.folds is not None:
        empty = sorted(set(range(study.folds)) - {seed % study.folds for seed in study.seeds})
        notes.append(
            f"Scored on labelled cases: seed s holds out fold s % {study.folds}. Where seeds hold out different folds, "
            "intervals resample patients alone. No label of a test case was read."
            + (
                f" Folds without a seed, whose cases have no score: {', '.join(map(str, empty))}."
                if empty
                else ""
            )
        )
    elif any(row.num_seeds == 1 for row in rows):
        notes.append(
            "Where there is one seed, intervals resample patients alone and know nothing of other seeds."
        )
    if any(row.interval is None for row in rows):
        notes.append(f"Below {LEAST_PATIENTS} patients there is no interval.")
    if unknown := _budget(study)["unknown"]:
        notes.append(f"Budget of pre-training unknown, as it was made elsewhere: {', '.join(unknown)}.")
    if seen := sorted(
        {key.arm for key, of_cell in found.items() if of_cell.run["unlabelled_test_cases_seen"]}
    ):
        notes.append(f"Pre-training saw images of test cases, without labels, in: {', '.join(seen)}.")
    notes += _not_nested(found)
    return [*notes, made_by(provenances(found.values()))] if found else notes


def _not_nested(found: Mapping[CellKey, Finished]) -> list[str]:
    """A note where more labelled cases are not the fewer ones and others."""
    cases = {
        (of_cell.run["split"]["labelled"], key.labelled): {
            *of_cell.run["cases"]["train"],
            *of_cell.run["cases"]["validation"],
        }
        for key, of_cell in found.items()
    }
    apart = [
        f"{fewer[1]} in {more[1]}"
        for fewer, more in itertools.pairwise(sorted(cases, key=lambda counts: counts[0]))
        if not cases[fewer] <= cases[more]
    ]
    text = "Not all labelled cases of a count are among those of the next, so curves over the count compare other cases"
    return [f"{text}: {', '.join(apart)}."] if apart else []
