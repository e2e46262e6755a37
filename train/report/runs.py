"""What the report of runs shows, gathered into plain values for `runs.html.jinja`.

Pictures of cases are left to `train.report.pictures`, scores to `train.comparison`. What cannot be shown yet is left
out with a sentence. Called by `train.report.page`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.comparison import Comparison, Run, compare_runs, number, read_runs
from train.metrics import MEAN, MISSING_RULE
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


@dataclass(frozen=True, kw_only=True)
class RunEntry(Entry):
    """A run of the page."""

    run: Run


def runs_page(run_paths: Sequence[Path], *, cache_path: Path | None) -> dict[str, Any]:
    """The values of the page of at least one run folder; `cache_path` as in `report.write_report`.

    Raises SuperCLError where a path is no run, where a file of a run is damaged, and where evaluated runs
    cannot be compared.
    """
    entries = [
        RunEntry(mark=figures.mark(index), name=run.name, run=run)
        for index, run in enumerate(read_runs(run_paths))
    ]
    evaluated = [entry for entry in entries if entry.run.kind == "finetune" and entry.run.evaluation]
    comparison = compare_runs([entry.run for entry in evaluated]) if evaluated else None
    return {
        "entries": entries,
        "facts": [_facts(entry.run) for entry in entries],
        "evaluated": evaluated,
        "comparison": comparison,
        "score_rows": _score_rows(evaluated, comparison) if comparison else [],
        "paper": [
            (entry, entry.run.evaluation["paper"])
            for entry in evaluated
            if entry.run.evaluation and entry.run.evaluation["paper"]
        ],
        "notes": _notes(entries, evaluated, comparison),
        "box_plots": _box_plots(evaluated, comparison) if comparison else [],
        "curves": [
            picture
            for kind in ("pretrain", "finetune")
            for picture in training_curves([(entry, [entry.run]) for entry in entries], kind)
        ],
        "load_reports": [
            (entry, flat(entry.run.record["init"])) for entry in entries if entry.run.record["init"]
        ],
        "settings": [
            (title, side_by_side([(entry, entry.run.record["config"]) for entry in chosen]))
            for kind, title in (
                ("pretrain", "Settings of pre-training"),
                ("finetune", "Settings of fine-tuning"),
            )
            if (chosen := [entry for entry in entries if entry.run.kind == kind])
        ],
        "origins": [
            (title, side_by_side([(entry, entry.run.record[key]) for entry in entries]))
            for key, title in (
                ("provenance", "Provenance"),
                ("cache", "Cache"),
                ("model", "Model"),
                ("cases", "Cases"),
            )
        ],
        **cache_pictures(
            cache_path or Path(entries[0].run.record["cache"]["path"]),
            segmented=_segmented(evaluated),
            pretrained=[entry.run for entry in entries if entry.run.kind == "pretrain"],
        ),
    }


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
        "time": duration(sum(line.get("seconds", 0.0) for line in run.metrics)) if run.metrics else "–",
        "samples/s": f"{logged['samples_per_s']:.0f}" if "samples_per_s" in logged else "–",
        "data wait": f"{logged['data_wait_share']:.0%}" if "data_wait_share" in logged else "–",
    }


def _score_rows(evaluated: list[RunEntry], comparison: Comparison) -> list[dict[str, Any]]:
    """The rows of the comparison, each with its run; the rows of a run follow one another."""
    num_classes = len(comparison.rows) // len(evaluated)
    return [
        {"entry": evaluated[index // num_classes], "scores": row, "is_mean": row.class_name == MEAN}
        for index, row in enumerate(comparison.rows)
    ]


def _notes(entries: list[RunEntry], evaluated: list[RunEntry], comparison: Comparison | None) -> list[str]:
    notes = []
    if comparison:
        means = [row for row in comparison.rows if row.class_name == MEAN]
        counts = ", ".join(
            f"{entry.mark.key} {row.num_missing}" for entry, row in zip(evaluated, means, strict=True)
        )
        notes.append(f"{MISSING_RULE} Structures that only one side has: {counts}.")
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


def _box_plots(evaluated: list[RunEntry], comparison: Comparison) -> list[Picture]:
    class_names = dict.fromkeys(row.class_name for row in comparison.rows)
    if len(class_names) == 2:  # the mean of one class is that class
        del class_names[MEAN]
    pictures = []
    for class_name in class_names:
        groups = [(entry, values) for entry in evaluated if (values := entry.run.case_dsc().get(class_name))]
        if groups:
            pictures.append(
                box_plot(groups, "Mean over the classes of a case" if class_name == MEAN else class_name)
            )
    return pictures


def _segmented(evaluated: list[RunEntry]) -> list[Segmented]:
    """The best, the median and the worst case of the last run with a pre-trained encoder, or the first of all."""
    if not evaluated:
        return []
    leading = next((entry for entry in reversed(evaluated) if entry.run.record["init"]), evaluated[0])
    by_run = [entry.run.case_dsc()[MEAN] for entry in evaluated]
    return [
        Segmented(
            title=f"{rank} case by the mean DSC of run {leading.mark.key} ({100 * dsc:.1f} %)",
            case_id=case_id,
            segmentations=tuple(
                (
                    entry,
                    entry.run.path / "predictions" / f"{case_id}.nii.gz",
                    f"DSC of the case {number(100 * by_case[case_id]) if case_id in by_case else '–'} %",
                )
                for entry, by_case in zip(evaluated, by_run, strict=True)
            ),
        )
        for rank, case_id, dsc in extremes(leading.run.case_dsc()[MEAN])
    ]
