"""The report: one self-contained HTML page for one or several runs, finished or not.

Gathers what the page shows into plain values and renders `report.html.jinja` with them. Pictures of cases are
left to `train.report_pictures`, drawing to `train.report_figures`, scores to `train.comparison`. What cannot
be shown yet is left out with a sentence. Called by the command `supercl report`.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np

from supercl_core.files import write_text
from train import report_figures as figures
from train.comparison import Comparison, Run, compare_runs, difference_text, number, read_runs
from train.metrics import MEAN
from train.report_pictures import Entry, Picture, cache_pictures

MAX_UNCOUNTED: Final = 3
"""Items of a list of settings that is shown without its length."""

TERMS: Final = {
    "pretrain": {
        "loss": "Pre-training: total loss",
        "loss_ins": "Pre-training: instance loss (L_ins)",
        "loss_intra": "Pre-training: ILCP loss (L_intra)",
        "loss_inter": "Pre-training: IGCP loss (L_inter)",
    },
    "finetune": {
        "loss": "Fine-tuning: total loss",
        "loss_ce": "Fine-tuning: cross-entropy",
        "loss_dice": "Fine-tuning: Dice loss",
        "validation_dsc": "Fine-tuning: DSC on the validation cases",
    },
}
"""What is plotted over the steps of a kind of run, with the plot's title."""


def write_report(run_paths: Sequence[Path], out_path: Path, *, cache_path: Path | None = None) -> Path:
    """Write the report of at least one run folder to `out_path`, atomically, and return `out_path`.

    Pictures of cases come from the cache at `cache_path`, or else from the one that the first run names; they
    are left out, with a sentence, where it cannot be read. The page asks for nothing outside itself.

    Raises SuperCLError where a path is no run, where a file of a run is damaged, and where evaluated runs
    cannot be compared.
    """
    entries = [
        Entry(key=_key(index), colour=figures.run_colour(index), run=run)
        for index, run in enumerate(read_runs(run_paths))
    ]
    evaluated = [entry for entry in entries if entry.run.kind == "finetune" and entry.run.evaluation]
    comparison = compare_runs([entry.run for entry in evaluated]) if evaluated else None
    page: dict[str, Any] = {
        "entries": entries,
        "truth_colour": figures.TRUTH_COLOUR,
        "facts": [_facts(entry.run) for entry in entries],
        "evaluated": evaluated,
        "comparison": comparison,
        "score_rows": _score_rows(evaluated, comparison) if comparison else [],
        "notes": _notes(entries, comparison),
        "box_plots": _box_plots(evaluated, comparison) if comparison else [],
        "curves": _curves(entries),
        "load_reports": [
            (entry, _flat(entry.run.record["init"])) for entry in entries if entry.run.record["init"]
        ],
        "settings": [
            (title, _side_by_side(chosen, "config"))
            for kind, title in (
                ("pretrain", "Settings of pre-training"),
                ("finetune", "Settings of fine-tuning"),
            )
            if (chosen := [entry for entry in entries if entry.run.kind == kind])
        ],
        "origins": [
            (title, _side_by_side(entries, key))
            for key, title in (
                ("provenance", "Provenance"),
                ("cache", "Cache"),
                ("model", "Model"),
                ("cases", "Cases"),
            )
        ],
        **cache_pictures(entries, evaluated, cache_path),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, difference=difference_text)
    write_text(out_path, environment.get_template("report.html.jinja").render(page))
    return out_path


# ---------------------------------------------------------------- texts and tables


def _key(index: int) -> str:
    return string.ascii_uppercase[index] if index < 26 else str(index + 1)


def _facts(run: Run) -> dict[str, str]:
    """What the table of runs says of one run, by column."""
    record = run.record
    logged = {key: value for line in run.metrics for key, value in line.items()}
    cases = record["cases"]
    init = record["init"]
    return {
        "kind": {"pretrain": "pre-training", "finetune": "fine-tuning"}[run.kind],
        "status": record["status"],
        "encoder from": Path(str(init["source"])).name if init else "scratch",
        "labelled": "–" if run.labelled is None else str(run.labelled),
        "cases (train / val. / test)": " / ".join(str(len(cases[part])) for part in cases),
        "steps": f"{run.num_steps:,}",
        "time": _duration(sum(line.get("seconds", 0.0) for line in run.metrics)) if run.metrics else "–",
        "samples/s": f"{logged['samples_per_s']:.0f}" if "samples_per_s" in logged else "–",
        "data wait": f"{logged['data_wait_share']:.0%}" if "data_wait_share" in logged else "–",
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _score_rows(evaluated: list[Entry], comparison: Comparison) -> list[dict[str, Any]]:
    """The rows of the comparison, each with its run; the rows of a run follow one another."""
    num_classes = len(comparison.rows) // len(evaluated)
    return [
        {"entry": evaluated[index // num_classes], "scores": row, "is_mean": row.class_name == MEAN}
        for index, row in enumerate(comparison.rows)
    ]


def _notes(entries: list[Entry], comparison: Comparison | None) -> list[str]:
    notes = []
    if comparison:
        num_missing = {row.run: row.num_missing for row in comparison.rows if row.class_name == MEAN}
        counts = ", ".join(f"{name} {count}" for name, count in num_missing.items())
        notes.append(
            "Structures that only one of prediction and ground truth has count 0 in DSC and JC, and are left out "
            f"of HD95 and ASD, where no distance is defined: {counts}. Structures absent in both count nowhere."
        )
        if comparison.unit == "voxel":
            notes.append("The data set has no voxel spacing: HD95 and ASD are in voxels.")
        notes += comparison.notes
    for entry in entries:
        if seen := entry.run.record["unlabelled_test_cases_seen"]:
            notes.append(f"{entry.name}: unlabelled test images seen in pre-training: {seen}.")
        if entry.run.record["status"] != "finished":
            notes.append(
                f"{entry.name} is not finished; what is shown is its state at step {entry.run.num_steps:,}."
            )
        if entry.run.kind == "finetune" and not entry.run.evaluation:
            notes.append(f"{entry.name} is not evaluated yet: `supercl evaluate {entry.run.path} CACHE`.")
    return notes


def _side_by_side(entries: list[Entry], key: str) -> dict[str, Any]:
    """One entry of run.json for several runs: a row a setting, marked where the runs differ."""
    columns = [_flat(entry.run.record[key]) for entry in entries]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name, "–") for column in columns]) for name in names]
    return {"entries": entries, "rows": [(name, values, len(set(values)) > 1) for name, values in rows]}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as texts, by dotted names."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        elif isinstance(value, list):
            count = f"{len(value)}: " if len(value) > MAX_UNCOUNTED else ""
            flat[prefix + name] = count + ", ".join(map(str, value)) if value else "none"
        else:
            flat[prefix + name] = "–" if value is None else str(value)
    return flat


# ---------------------------------------------------------------- plots


def _box_plots(evaluated: list[Entry], comparison: Comparison) -> list[Picture]:
    class_names = dict.fromkeys(row.class_name for row in comparison.rows)
    if len(class_names) == 2:  # the mean of one class is that class
        del class_names[MEAN]
    pictures = []
    for class_name in class_names:
        series = [
            figures.Series(key=entry.key, colour=entry.colour, y=100 * np.array(list(values.values())))
            for entry in evaluated
            if (values := entry.run.case_dsc().get(class_name))
        ]
        if series:
            medians = ", ".join(f"{one.key} {np.median(one.y):.1f} % (n = {len(one.y)})" for one in series)
            title = "Mean over the classes of a case" if class_name == MEAN else class_name
            pictures.append(
                Picture(
                    uri=figures.boxes(series, y_label="DSC [%]"),
                    alt=f"Box plot of the DSC of all test cases, {title}. Medians: {medians}.",
                    caption=f"{title}. Medians: {medians}.",
                )
            )
    return pictures


def _curves(entries: list[Entry]) -> list[Picture]:
    pictures = []
    for kind, terms in TERMS.items():
        for term, title in terms.items():
            series = []
            for entry in entries:
                points = [
                    (line["step"], line[term]) for line in entry.run.metrics if line.get(term) is not None
                ]
                if entry.run.kind == kind and points:
                    x, y = np.array(points, dtype=np.float64).T
                    series.append(figures.Series(key=entry.key, colour=entry.colour, x=x, y=y))
            if series:
                last = ", ".join(f"{one.key} {one.y[-1]:.3f}" for one in series)
                pictures.append(
                    Picture(
                        uri=figures.curves(series, y_label="DSC" if term == "validation_dsc" else "loss"),
                        alt=f"{title} over the steps of training. Last values: {last}.",
                        caption=f"{title}. Last: {last}.",
                    )
                )
    return pictures
