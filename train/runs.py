"""The run folder: what it is, where it stands, and its metrics. Checkpoints belong to `train.loop`.

    RUN/run.json              settings, data, model, provenance, status
    RUN/metrics.jsonl         one object a logged step
    RUN/checkpoints/          full state, the last ones
    RUN/weights.safetensors   the finished network
    RUN/evaluation.json       metrics per case (fine-tuned runs)
    RUN/predictions/          segmentations of the test cases

Called by pre-training, fine-tuning, evaluation and the report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from supercl_core import provenance
from supercl_core.cache_reader import Cache
from supercl_core.errors import SuperCLError, UsageError
from supercl_core.files import write_json, write_text

FORMAT_VERSION: Final = 1
"""Version of run.json."""


def start_run(run_path: Path, description: dict[str, Any]) -> dict[str, Any]:
    """Create the run folder, or find that it holds a part of the same run; return its description.

    Raises UsageError when the folder holds a run with other settings or data.
    """
    file = run_path / "run.json"
    wanted = {
        **description,
        "format_version": FORMAT_VERSION,
        "name": run_path.resolve().name,
        "provenance": provenance.record(),
        "status": "running",
    }
    wanted = json.loads(json.dumps(wanted))
    if file.exists():
        stored = read_run(run_path)
        before, now = _identity(stored), _identity(wanted)
        changed = [text for part in now for text in _differences(before[part], now[part], part)]
        if changed:
            raise UsageError(
                "The run folder holds a run with other settings.",
                where=run_path,
                expected="the settings of that run, to go on with it",
                found="; ".join(changed[:5]),
                next_step="Name another folder for the new run, or repeat the settings of the old one.",
            )
        return stored
    if run_path.exists() and any(run_path.iterdir()):
        raise UsageError(
            "The run folder is not empty, and holds no run.",
            where=run_path,
            expected="a new folder, or one of a run to go on with",
            found=", ".join(sorted(entry.name for entry in run_path.iterdir())[:5]),
            next_step="Name another folder.",
        )
    write_json(file, wanted)
    return wanted


def finish_run(run_path: Path) -> None:
    """Mark a run as finished."""
    write_json(run_path / "run.json", {**read_run(run_path), "status": "finished"})


def read_run(run_path: Path) -> dict[str, Any]:
    """The description of a run. Raises SuperCLError when the folder holds none, or one of another version."""
    try:
        described: dict[str, Any] = json.loads((run_path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SuperCLError(
            "There is no run here.",
            where=run_path,
            expected="a folder written by `supercl pretrain` or `supercl finetune`",
            found="no readable run.json",
            next_step="Check the path.",
        ) from error
    if described.get("format_version") != FORMAT_VERSION:
        raise SuperCLError(
            "The run has another format version.",
            where=run_path,
            expected=FORMAT_VERSION,
            found=described.get("format_version"),
            next_step="Use the version of supercl that wrote it.",
        )
    return described


def describe_cache(cache: Cache) -> dict[str, Any]:
    """What a run stores of the cache it used."""
    return {
        "path": str(cache.path.resolve()),
        "name": cache.name,
        "config_digest": cache.attributes["config_digest"],
        "num_slices": cache.num_slices,
        "class_names": list(cache.class_names),
    }


def read_metrics(run_path: Path) -> list[dict[str, Any]]:
    """All logged steps, in order; empty before the first. A last line that was cut off is left out."""
    file = run_path / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def forget_metrics_after(run_path: Path, step: int) -> None:
    """Drop what was logged after `step`: those steps are about to be done again."""
    kept = [json.dumps(entry) + "\n" for entry in read_metrics(run_path) if entry["step"] <= step]
    write_text(run_path / "metrics.jsonl", "".join(kept))


def _identity(run: dict[str, Any]) -> dict[str, Any]:
    """What must stay the same for a run to go on: everything but where it runs and when it writes."""
    parts = ("kind", "model", "cases", "split", "weak_labels")
    where_and_when = ("device", "log_every", "checkpoint_every")
    return {
        **{part: run[part] for part in parts},
        "config": {key: value for key, value in run["config"].items() if key not in where_and_when},
        "init": run["init"] and run["init"]["source"],
        "cache": {key: value for key, value in run["cache"].items() if key != "path"},
    }


def _differences(stored: Any, wanted: Any, name: str) -> list[str]:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return [
            text
            for key in sorted({*stored, *wanted})
            for text in _differences(stored.get(key), wanted.get(key), f"{name}.{key}")
        ]
    if stored == wanted:
        return []
    if isinstance(stored, list) and isinstance(wanted, list) and len(stored) > 5:
        return [f"{name}: {len(stored)} entries there, {len(wanted)} others here"]
    return [f"{name}: {stored!r} there, {wanted!r} here"]
