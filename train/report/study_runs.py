"""The results of a study beside the runs that they come from, each read once. Called by `train.report.study`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from train.comparison import Run, read_runs
from train.metrics import MEAN
from train.report import figures
from train.report.parts import Entry
from train.runs import read_evaluation
from train.study.declaration import Labelled
from train.study.results import Cell, Results


class StudyRuns:
    """The results of a study with the runs of its cells, as far as they are written."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.arms = {arm: Entry(mark=figures.mark(index), name=arm) for index, arm in enumerate(results.arms)}
        self.rows = {(row.recipe, row.labelled, row.arm, row.class_name): row for row in results.rows}
        paths = [cell.run_path for cell in results.cells if cell.status == "finished"]
        paths += [cell.pretrain_path for cell in results.cells if cell.pretrain_path]
        written = [path for path in dict.fromkeys(paths) if (path / "run.json").is_file()]
        self.runs = dict(zip(written, read_runs(written), strict=True))
        if results.scored_on == "validation":
            for path, run in self.runs.items():
                self.runs[path] = replace(run, evaluation=read_evaluation(path, "validation"))

    def cells(self, recipe: str, labelled: Labelled, arm: str) -> list[Cell]:
        """The finished cells, one a seed."""
        wanted = (recipe, labelled, arm, "finished")
        return [
            cell
            for cell in self.results.cells
            if (cell.recipe, cell.labelled, cell.arm, cell.status) == wanted
        ]

    def finetuned(self, recipe: str, labelled: Labelled, arm: str) -> list[Run]:
        """The runs of the finished cells, one a seed."""
        runs = [self.runs.get(cell.run_path) for cell in self.cells(recipe, labelled, arm)]
        return [run for run in runs if run and run.evaluation]

    def pretrained(self, arm: str) -> list[Run]:
        """The finished pre-training runs of an arm, one a seed."""
        paths = dict.fromkeys(cell.pretrain_path for cell in self.results.cells if cell.arm == arm)
        runs = [self.runs[path] for path in paths if path in self.runs]
        return [run for run in runs if run.record["status"] == "finished"]

    def count(self, labelled: Labelled) -> int | None:
        """The number of labelled keys; None for `all` as long as no run says how many that is."""
        if isinstance(labelled, int):
            return labelled
        cells = [cell for cell in self.results.cells if cell.labelled == labelled]
        return next((self.runs[cell.run_path].labelled for cell in cells if cell.run_path in self.runs), None)

    def groups(self) -> Iterable[tuple[str, Labelled]]:
        """Every recipe with every labelled count."""
        return ((recipe, labelled) for recipe in self.results.recipes for labelled in self.results.labelled)

    def dsc(self, recipe: str, labelled: Labelled, arm: str) -> float | None:
        """The mean DSC [%] over classes, cases and seeds."""
        row = self.rows.get((recipe, labelled, arm, MEAN))
        return row.dsc if row else None

    @property
    def rivals(self) -> list[str]:
        """All arms but the baseline."""
        return [arm for arm in self.arms if arm != self.results.baseline]

    @property
    def num_cases(self) -> int:
        """The cases that are scored."""
        return len({case for run in self.runs.values() for case in run.case_dsc()[MEAN]})

    @property
    def cache_path(self) -> Path | None:
        """The cache that the runs name."""
        return next((Path(run.record["cache"]["path"]) for run in self.runs.values()), None)
