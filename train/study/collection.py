"""Gathers what the run folders of a study hold into its results, finished or not.

Means, spread over seeds, intervals (`train.bootstrap`), differences to the baseline, and how many labels an arm saves.
Called by `supercl study`.
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
from train import runs
from train.bootstrap import (
    INTERVAL_RULE,
    LEAST_PATIENTS,
    mean_interval,
    mean_score,
    paired_difference,
    scores,
)
from train.metrics import MEAN, MISSING_RULE
from train.study.declaration import CellKey, Labelled, Study
from train.study.results import Bound, Cell, Results, Row, Saved
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


def collect(study: Study, out_path: Path) -> Results:
    """Gather what the run folders of a study hold by now.

    Raises SuperCLError where a file of a run is damaged, and where runs were not evaluated in the same way.
    """
    tasks = [task for task in tasks_of(study, out_path) if task.cell is not None]
    cells = {task.cell: _cell(task) for task in tasks if task.cell is not None}
    evaluations = {
        key: evaluation
        for key, cell in cells.items()
        if cell.status == "finished"
        and (evaluation := runs.read_evaluation(cell.run_path, study.scored_on)) is not None
    }
    _check_alike({cells[key].run_path: evaluation for key, evaluation in evaluations.items()})
    first: dict[str, Any] = next(iter(evaluations.values()), {"class_names": [], "unit": ""})
    class_names = tuple(first["class_names"][1:])
    rows = [
        row
        for recipe in study.recipes
        for labelled in study.labelled
        for arm in study.arms
        for row in _rows(study, evaluations, recipe, labelled, arm, class_names)
    ]
    described = [runs.read_run(cells[key].run_path) for key in evaluations]
    counts = {key.labelled: run["split"]["labelled"] for key, run in zip(evaluations, described, strict=True)}
    return Results(
        name=study.name,
        data_set=next((run["cache"]["name"] for run in described), ""),
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
        cells=tuple(cells.values()),
        rows=tuple(rows),
        saved=tuple(_saved(study, rows, counts)),
        budget=_budget(study, list(cells.values())),
        provenance=provenance.record(),
        notes=tuple(_notes(study, list(cells.values()), rows)),
    )


def _cell(task: Task) -> Cell:
    assert task.cell is not None
    status, error = task.status()
    return Cell(
        **vars(task.cell),
        run_path=task.path,
        pretrain_path=None if task.needs is None else task.needs.path,
        status=status,
        error=error,
        seconds=_seconds(task.path),
        pretrain_seconds=None if task.needs is None else _seconds(task.needs.path),
    )


def _seconds(run_path: Path) -> float | None:
    """What the logged steps of a run took."""
    logged = [entry["seconds"] for entry in runs.read_metrics(run_path) if "seconds" in entry]
    return sum(logged) if logged else None


def _check_alike(evaluations: Mapping[Path, dict[str, Any]]) -> None:
    for path, evaluation in evaluations.items():
        first_path, first = next(iter(evaluations.items()))
        for key in ("class_names", "unit", "protocol"):
            if evaluation[key] != first[key]:
                raise SuperCLError(
                    "The runs were not evaluated in the same way.",
                    where=f"{key} of {path}",
                    expected=f"{first[key]}, as {first_path}",
                    found=evaluation[key],
                    next_step="Delete the file of the evaluation that is wrong, and run the study again.",
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
                interval=mean_interval(values, case_ids) if known else None,
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


def _budget(study: Study, cells: Sequence[Cell]) -> dict[str, Any]:
    pretrain = as_dict(study.pretrain)
    seconds = {
        arm: _mean([cell.pretrain_seconds for cell in cells if cell.arm == arm])
        for arm, declared in study.arms.items()
        if declared.pretrain is not None
    }
    return {
        "pretrain": {name: pretrain[name] for name in _BUDGET_SHOWN} if seconds else None,
        "finetune": {
            recipe: {
                str(labelled): {name: as_dict(config)[name] for name in _BUDGET_SHOWN}
                for labelled, config in by_count.items()
            }
            for recipe, by_count in study.recipes.items()
        },
        "mean_seconds": {
            "pretrain": seconds,
            "finetune": {
                recipe: {
                    arm: _mean([cell.seconds for cell in cells if (cell.recipe, cell.arm) == (recipe, arm)])
                    for arm in study.arms
                }
                for recipe in study.recipes
            },
        },
    }


def _notes(study: Study, cells: Sequence[Cell], rows: Sequence[Row]) -> list[str]:
    notes = [INTERVAL_RULE, MISSING_RULE]
    finished = [cell for cell in cells if cell.status == "finished"]
    if len(finished) < len(cells):
        failed = sum(cell.status == "failed" for cell in cells)
        notes.append(
            f"Not all cells have results: {len(finished)} of {len(cells)}"
            + (f", {failed} failed." if failed else ".")
            + " Means are over the seeds that there are, differences over those of both arms."
        )
    if study.folds is not None:
        notes.append(
            f"Scored on labelled cases: seed s holds out fold s % {study.folds}, so each case has the score of one "
            "model a round, and intervals resample patients alone. No label of a test case was read."
        )
    elif any(row.num_seeds == 1 for row in rows):
        notes.append(
            "Where there is one seed, intervals resample patients alone and know nothing of other seeds."
        )
    if any(row.interval is None for row in rows):
        notes.append(f"Below {LEAST_PATIENTS} patients there is no interval.")
    return notes
