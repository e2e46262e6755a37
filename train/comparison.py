"""Fine-tuned runs side by side: the table of their scores, and how far each lies from the first.

Reads what training and evaluation left in run folders. Called by the commands and by `train.report.page`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from supercl_core.errors import SuperCLError
from train.bootstrap import DIFFERENCE_RULE, INTERVAL_RULE, Difference, paired_difference
from train.metrics import MEAN
from train.runs import read_evaluation, read_metrics, read_run

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder, as far as it is written."""

    path: Path
    name: str
    """Name of the folder, with its parent's where several runs share it."""
    record: dict[str, Any]
    """run.json."""
    metrics: list[dict[str, Any]]
    """metrics.jsonl, one dict a logged step; empty before the first."""
    evaluation: dict[str, Any] | None
    """evaluation.json; None before `supercl evaluate`."""

    @property
    def kind(self) -> str:
        """`pretrain` or `finetune`."""
        return self.record["kind"]

    @property
    def labelled(self) -> int | None:
        """Labelled keys of the split that the run was trained on; None without a split."""
        split = self.record["split"]
        return split["labelled"] if split else None

    @property
    def num_steps(self) -> int:
        """The last step that was logged."""
        return max((line["step"] for line in self.metrics), default=0)

    def case_dsc(self) -> dict[str, dict[str, float]]:
        """DSC (0..1) by class, then by case, where it is defined; under "mean" the mean of a case's classes."""
        by_class: dict[str, dict[str, float]] = {}
        for row in self.evaluation["rows"] if self.evaluation else []:
            if row["dsc"] is not None:
                by_class.setdefault(row["class"], {})[row["case"]] = row["dsc"]
        cases = dict.fromkeys(case for values in by_class.values() for case in values)
        means = {
            case: float(np.mean([values[case] for values in by_class.values() if case in values]))
            for case in cases
        }
        return {**by_class, MEAN: means}


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One run and class, or the mean of its classes; None where nothing is defined."""

    run: str
    class_name: str
    dsc: float | None
    """In %."""
    jc: float | None
    """In %."""
    hd95: float | None
    asd: float | None
    num_cases: int
    """Structures that DSC and JC are means over."""
    num_missing: int
    """Of these, missing on one side: 0 in DSC and JC, left out of HD95 and ASD."""
    difference: Difference | None
    """To the first run; None for the first run itself, and without a common case."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Evaluated runs side by side."""

    unit: str
    """Of HD95 and ASD: `mm` or `voxel`."""
    rows: tuple[ComparisonRow, ...]
    """Run by run in the order given, class by class, the mean of the classes last."""
    notes: tuple[str, ...]
    """What makes the runs less than comparable, one sentence each."""


def compare(run_paths: Sequence[Path]) -> Comparison:
    """Compare the evaluations of fine-tuned runs, the first being the one that others are measured against.

    Raises SuperCLError where a path is no fine-tuned run, where it is not evaluated yet, and where the runs
    were evaluated on other classes or in other units.
    """
    return compare_runs(read_runs(run_paths))


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """`compare` for runs that are read already."""
    evaluations = [_evaluation(run) for run in runs]
    first = evaluations[0]
    for run, evaluation in zip(runs, evaluations, strict=True):
        for key in ("class_names", "unit", "protocol"):
            if evaluation[key] != first[key]:
                raise SuperCLError(
                    "The runs were not evaluated in the same way.",
                    where=f"{key} of {run.path}",
                    expected=f"{first[key]}, as {runs[0].path}",
                    found=evaluation[key],
                    next_step="Compare runs on one data set, evaluated with one protocol.",
                )
    rows = []
    structures = first["class_names"][1:]
    for run, evaluation in zip(runs, evaluations, strict=True):
        for class_name in [*structures, MEAN]:
            values = evaluation["summary"][class_name]
            rows.append(
                ComparisonRow(
                    run=run.name,
                    class_name=class_name,
                    dsc=_percent(values["dsc"]),
                    jc=_percent(values["jc"]),
                    hd95=values["hd95"],
                    asd=values["asd"],
                    num_cases=values["num_cases"],
                    num_missing=values["num_missing_in_prediction"] + values["num_missing_in_truth"],
                    difference=None
                    if run is runs[0]
                    else paired_difference(
                        [first],
                        [evaluation],
                        class_names=structures if class_name == MEAN else [class_name],
                    ),
                )
            )
    return Comparison(unit=first["unit"], rows=tuple(rows), notes=tuple(_notes(runs)))


def render_table(comparison: Comparison) -> Table:
    """The comparison as a table for a terminal of 80 columns or more; its notes stand below it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    caption = [
        f"DSC and JC in %, HD95 and ASD in {comparison.unit}. Missing: structures that only one of prediction "
        "and truth has; they count 0 in DSC and JC and are left out of HD95 and ASD.",
        *comparison.notes,
    ]
    several = any(row.difference for row in comparison.rows)
    if several:
        num_cases = sorted({row.difference.num_cases for row in comparison.rows if row.difference})
        caption.insert(
            1,
            f"Difference: DSC to the first run in points, paired over n = {_range(num_cases)} cases. {INTERVAL_RULE} "
            f"{DIFFERENCE_RULE}",
        )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=Text("\n".join(caption)))
    table.caption_justify = "left"
    table.add_column("run", overflow="fold", min_width=8)
    table.add_column("class", overflow="fold", min_width=6)
    for title in ("DSC", "JC", "HD95", "ASD", "missing"):
        table.add_column(title, justify="right", no_wrap=True)
    if several:
        table.add_column("difference", justify="right", no_wrap=True)
    shown = None
    for row in comparison.rows:
        is_mean = row.class_name == MEAN
        cells = [
            row.run if row.run != shown else "",
            row.class_name,
            *(number(value) for value in (row.dsc, row.jc, row.hd95, row.asd)),
            f"{row.num_missing}/{row.num_cases}",
            *([difference_text(row.difference)] if several else []),
        ]
        # Text, since a name may hold what rich takes for markup.
        table.add_row(*(Text(cell) for cell in cells), style="bold" if is_mean else None, end_section=is_mean)
        shown = row.run
    return table


def number(value: float | None) -> str:
    """A metric with the digits that tables show; a dash where it is undefined."""
    return "–" if value is None else f"{value:z.2f}"


def difference_text(difference: Difference | None) -> str:
    """A difference with its interval, such as `+4.1 [+1.0, +7.3]`; empty where there is none."""
    if difference is None:
        return ""
    text = f"{difference.mean:+z.1f}"
    if difference.interval:
        text += f" [{difference.interval[0]:+z.1f}, {difference.interval[1]:+z.1f}]"
    return text


def read_runs(run_paths: Sequence[Path]) -> list[Run]:
    """Read run folders, finished or not.

    Raises SuperCLError where a path is no run, and where a file of it is damaged.
    """
    names = [path.resolve().name for path in run_paths]
    runs = []
    for path, name in zip(run_paths, names, strict=True):
        runs.append(
            Run(
                path=path,
                name=f"{path.resolve().parent.name}/{name}" if names.count(name) > 1 else name,
                record=read_run(path),
                metrics=read_metrics(path),
                evaluation=read_evaluation(path),
            )
        )
    return runs


def _evaluation(run: Run) -> dict[str, Any]:
    if run.kind != "finetune":
        raise SuperCLError(
            "Only fine-tuned runs have scores.",
            where=run.path,
            expected="a run of `supercl finetune`",
            found=f"a run of `supercl {run.kind}`",
            next_step="Leave it out, or fine-tune from it: `supercl finetune CACHE RUN --init RUN`.",
        )
    if run.evaluation is None:
        raise SuperCLError(
            "The run is not evaluated yet.",
            where=run.path,
            expected="evaluation.json",
            found="none",
            next_step=f"`supercl evaluate {run.path} CACHE`",
        )
    return run.evaluation


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    cases = [{row["case"] for row in _evaluation(run)["rows"]} for run in runs]
    if any(some != cases[0] for some in cases):
        counts = _each(runs, [f"{len(some)} cases" for some in cases])
        common = len(set.intersection(*cases))
        notes.append(
            f"The runs have different test cases ({counts}; {common} in all): only differences are paired."
        )
    for title, values in (
        ("labelled counts", [run.labelled for run in runs]),
        ("budgets", [f"{run.record['config'].get('steps')} steps" for run in runs]),
    ):
        if len(set(values)) > 1:
            notes.append(f"The runs have different {title}: {_each(runs, values)}.")
    return notes


def _each(runs: Sequence[Run], values: Sequence[object]) -> str:
    return ", ".join(f"{run.name} {value}" for run, value in zip(runs, values, strict=True))


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
