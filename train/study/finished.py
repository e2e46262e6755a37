"""What the folders of finished cells hold, and which of them cannot be compared with the others.

Called by `train.study.collection`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from train import runs
from train.study.declaration import CellKey, Study
from train.study.runner import Task

_OF_EVALUATIONS: Final = ("class_names", "unit", "protocol")
"""What evaluations must have in common."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What the folder of a finished cell holds."""

    run: dict[str, Any]
    """run.json."""
    pretraining: dict[str, Any] | None
    """run.json of the pre-training; None where nothing was pre-trained here."""
    evaluation: dict[str, Any]
    seconds: float | None
    """Of fine-tuning, as logged."""
    pretrain_seconds: float | None

    def facts(self, key: CellKey) -> dict[tuple[Hashable, ...], str]:
        """What has to be alike in all cells that have a fact of this name, as JSON."""
        caches = [_cache(run) for run in (self.run, self.pretraining) if run is not None]
        facts: dict[tuple[Hashable, ...], Any] = {
            ("cache",): caches[0] if caches[0] == caches[-1] else caches,
            **{(f"{name} of the evaluation",): self.evaluation[name] for name in _OF_EVALUATIONS},
            ("cases", key.labelled, key.seed): self.run["cases"],
            ("contents of the cases", key.labelled, key.seed): self.run["content_digests"],
            ("precision", key.recipe, key.labelled): self.run["config"].get("precision"),
        }
        if self.pretraining is not None:
            facts["contents of the cases of pre-training", key.seed] = self.pretraining["content_digests"]
            facts["precision of pre-training",] = self.pretraining["config"].get("precision")
        return {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}


def read_finished(task: Task, study: Study) -> Finished:
    """What the folder of a finished cell holds. Raises SuperCLError where a file is damaged."""
    evaluation = runs.read_evaluation(task.path, study.scored_on)
    assert evaluation is not None, "a finished cell has one"
    return Finished(
        run=runs.read_run(task.path),
        pretraining=None if task.needs is None else runs.read_run(task.needs.path),
        evaluation=evaluation,
        seconds=_seconds(task.path),
        pretrain_seconds=None if task.needs is None else _seconds(task.needs.path),
    )


def _seconds(run_path: Path) -> float | None:
    """What the logged steps of a run took."""
    logged = [entry["seconds"] for entry in runs.read_metrics(run_path) if "seconds" in entry]
    return sum(logged) if logged else None


def _cache(run: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run["cache"].items() if name != "path"}


def unlike(found: Mapping[CellKey, Finished]) -> dict[CellKey, str]:
    """By cell, in what it differs from most cells; without those that do not."""
    facts = {key: of_cell.facts(key) for key, of_cell in found.items()}
    values: dict[tuple[Hashable, ...], Counter[str]] = {}
    for of_cell in facts.values():
        for name, value in of_cell.items():
            values.setdefault(name, Counter())[value] += 1
    most = {name: counter.most_common(1)[0][0] for name, counter in values.items()}
    reasons: dict[CellKey, str] = {}
    for key, of_cell in facts.items():
        for name, value in of_cell.items():
            if value != most[name]:
                text = f"another {name[0]} than other runs have ({value[:150]}, not {most[name][:150]})"
                reasons.setdefault(key, text)
    return reasons


def provenances(found: Iterable[Finished]) -> dict[str, list[str]]:
    """What the runs and their pre-trainings say of where they come from, each value once."""
    values: dict[str, dict[str, None]] = {}
    for of_cell in found:
        for run in (of_cell.run, of_cell.pretraining or of_cell.run):
            record = run["provenance"]
            versions = {f"versions.{name}": value for name, value in record.get("versions", {}).items()}
            for name in ("commit", "host", "platform", "python", *versions):
                if (value := {**record, **versions}.get(name)) is not None:
                    values.setdefault(name, {})[str(value)] = None
    return {name: list(known) for name, known in values.items()}
