"""What the pages of runs and of studies share: marked names, pictures, tables of settings, curves and box plots.

Drawing is left to `train.report.figures`. Called by `train.report.runs`, `train.report.study` and
`train.report.pictures`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from train.comparison import Run
from train.report import figures

MAX_UNCOUNTED: Final = 3
"""Items of a list of settings that is shown without its length."""

TERMS: Final = {
    "pretrain": {
        "loss": "total loss",
        "loss_ins": "instance loss (L_ins)",
        "loss_intra": "ILCP loss (L_intra)",
        "loss_inter": "IGCP loss (L_inter)",
    },
    "finetune": {
        "loss": "total loss",
        "loss_ce": "cross-entropy",
        "loss_dice": "Dice loss",
        "validation_dsc": "DSC on the validation cases",
    },
}
"""What is plotted over the steps of a kind of run, with the plot's title."""

KINDS: Final = {"pretrain": "Pre-training", "finetune": "Fine-tuning"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One of what a page sets side by side: a run, or an arm of a study."""

    mark: figures.Mark
    name: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture with its texts."""

    uri: str
    """A data: URI; empty where there is nothing to show, which `caption` then explains."""
    alt: str
    caption: str
    entry: Entry | None = None
    """What it belongs to."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Pictures that stand side by side under one title."""

    title: str
    pictures: tuple[Picture, ...]


class Setting(NamedTuple):
    """A row of a table of settings."""

    name: str
    texts: tuple[str, ...]
    """One a column."""
    differs: bool


@dataclass(frozen=True, kw_only=True)
class Table:
    """Settings side by side."""

    columns: tuple[Entry | str, ...]
    rows: tuple[Setting, ...]


def side_by_side(columns: Sequence[tuple[Entry | str, Mapping[str, Any]]]) -> Table:
    """Nested values of several columns: a row for each dotted name that any of them has."""
    flats = [flat(values) for _, values in columns]
    rows = []
    for name in dict.fromkeys(name for texts in flats for name in texts):
        texts = tuple(texts.get(name, "–") for texts in flats)
        rows.append(Setting(name, texts, len(set(texts)) > 1))
    return Table(columns=tuple(column for column, _ in columns), rows=tuple(rows))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as texts, by dotted names."""
    texts = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            texts.update(flat(value, f"{prefix}{name}."))
        elif isinstance(value, list | tuple):
            count = f"{len(value)}: " if len(value) > MAX_UNCOUNTED else ""
            texts[prefix + name] = count + ", ".join(map(str, value)) if value else "none"
        else:
            texts[prefix + name] = "–" if value is None else str(value)
    return texts


def duration(seconds: float) -> str:
    """Seconds as a reader says them, such as `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def training_curves(
    groups: Sequence[tuple[Entry, Sequence[Run]]],
    kind: str,
    *,
    terms: Iterable[str] | None = None,
    where: str = "",
) -> list[Picture]:
    """A plot of each term of the runs of a kind, a line a group: the mean over the runs that log it.

    `terms`: which of the kind's TERMS; None takes all. `where` says in the title what the runs have in common.
    """
    pictures = []
    for term in terms or TERMS[kind]:
        curves = [
            (entry.mark, curve)
            for entry, runs in groups
            if (curve := _mean_curve([run for run in runs if run.kind == kind], term)) is not None
        ]
        if curves:
            scale, unit = (100, "DSC [%]") if term == "validation_dsc" else (1, "loss")
            series = [
                figures.Series(mark=mark, x=steps, y=scale * values) for mark, (steps, values) in curves
            ]
            title = f"{KINDS[kind]}{where}: {TERMS[kind][term]}"
            last = ", ".join(f"{one.mark.key} {one.y[-1]:.3g}" for one in series)
            pictures.append(
                Picture(
                    uri=figures.curves(series, y_label=unit),
                    alt=f"{title} over the steps of training. Last values: {last}.",
                    caption=f"{title}. Last: {last}.",
                )
            )
    return pictures


def _mean_curve(runs: Sequence[Run], term: str) -> np.ndarray | None:
    """(2, n): steps and the mean of a term over the runs that log it, at the steps that all of these have."""
    logged = [
        {line["step"]: line[term] for line in run.metrics if line.get(term) is not None} for run in runs
    ]
    logged = [values for values in logged if values]
    steps = sorted(set.intersection(*map(set, logged))) if logged else []
    if not steps:
        return None
    return np.array([steps, np.mean([[values[step] for step in steps] for values in logged], axis=0)], float)


def box_plot(groups: Sequence[tuple[Entry, Mapping[str, float]]], title: str) -> Picture:
    """A box plot of DSC (0..1) by case, one box a group."""
    series = [
        figures.Series(mark=entry.mark, y=100 * np.array(list(values.values()))) for entry, values in groups
    ]
    medians = ", ".join(f"{one.mark.key} {np.median(one.y):.1f}" for one in series)
    num_cases = sorted({len(one.y) for one in series})
    caption = f"{title}. Medians over {' or '.join(map(str, num_cases))} cases: {medians} %."
    uri = figures.boxes(series, y_label="DSC [%]")
    return Picture(uri=uri, alt=f"Box plot of DSC by case. {caption}", caption=caption)
