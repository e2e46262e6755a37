"""The run folder: what it is, where it stands, and its metrics. Checkpoints belong to `train.loop`.

    RUN/run.json              settings, data, model, provenance, status
    RUN/metrics.jsonl         one object a logged step, and one a refresh of the weak labels
    RUN/tensorboard/          the same for TensorBoard
    RUN/checkpoints/          full state, the last ones
    RUN/weights.safetensors   the finished network
    RUN/best.safetensors      the network that was best on the validation cases, where that is kept
    RUN/evaluation.json, .csv metrics per test case (fine-tuned runs); of validation cases: validation.json, .csv
    RUN/predictions/          segmentations of the test cases; of validation cases: validation_predictions/

Called by pre-training, fine-tuning, evaluation and the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from supercl_core import provenance
from supercl_core.cache.reader import Cache
from supercl_core.errors import SuperCLError, UsageError
from supercl_core.files import parse_json, read_json, read_text, write_json, write_text
from train import run_shapes
from train.metrics import MEAN
from train.run_shapes import check

FORMAT_VERSION: Final = 4
"""Version of run.json."""

LARGEST_FILE_BYTES: Final = 1 << 26
"""Of any file read here: a hundred thousand logged steps, or cases, several times over."""


Part = Literal["test", "validation"]

EVALUATION_OF: Final[dict[Part, str]] = {"test": "evaluation.json", "validation": "validation.json"}
"""By the cases that were scored, the file with their metrics."""


def start_run(run_path: Path, description: dict[str, Any]) -> dict[str, Any]:
    """Create the run folder, or find that it holds a part of the same run; return its description.

    Raises UsageError when the folder holds a run with other settings or data, or of another number of processes.
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
        if stored["world_size"] != wanted["world_size"]:
            raise UsageError(
                "The run was begun with another number of processes.",
                where=run_path,
                expected=f"{stored['world_size']}: batch_size is that of each process, so others make another run",
                found=wanted["world_size"],
                next_step="Start as many to go on with it, or name another folder for a new run.",
            )
        before, now = _identity(stored), _identity(wanted)
        changed = [text for part in now for text in _differences(before[part], now[part], part)]
        if changed:
            raise UsageError(
                "The run folder holds a run with other settings or data.",
                where=run_path,
                expected="the settings and the cache of that run, to go on with it",
                found="; ".join(changed[:5]),
                next_step="Name another folder for the new run, or repeat what the old one had.",
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
    """The description of a run.

    Raises SuperCLError when the folder holds none, one of another version, or one that lacks a part.
    """
    file = run_path / "run.json"
    if not file.is_file():
        raise SuperCLError(
            "There is no run here.",
            where=run_path,
            expected="a folder written by `supercl pretrain` or `supercl finetune`",
            found="no run.json",
            next_step="Check the path.",
        )
    with _damaged(file):
        described: dict[str, Any] = read_json(file, limit_bytes=LARGEST_FILE_BYTES)
        check(described, {"format_version": run_shapes.count})
    if described["format_version"] != FORMAT_VERSION:
        raise SuperCLError(
            "The run has another format version.",
            where=run_path,
            expected=FORMAT_VERSION,
            found=described["format_version"],
            next_step="Use the version of supercl that wrote it.",
        )
    with _damaged(file):
        check(described, run_shapes.RUN)
    return described


def read_evaluation(run_path: Path, part: Part = "test") -> dict[str, Any] | None:
    """What `supercl evaluate` left in the folder of a run; None before. Raises SuperCLError where it is damaged."""
    file = run_path / EVALUATION_OF[part]
    if not file.is_file():
        return None
    with _damaged(file):
        evaluation: dict[str, Any] = read_json(file, limit_bytes=LARGEST_FILE_BYTES)
        check(evaluation, run_shapes.EVALUATION)
        scored = [*evaluation["class_names"][1:], MEAN]
        check(evaluation, {"summary": {name: {} for name in scored}})
    return evaluation


def describe_cache(cache: Cache) -> dict[str, Any]:
    """What a run stores of the cache it used."""
    return {
        "path": str(cache.path.resolve()),
        "name": cache.name,
        "config_digest": cache.attributes["config_digest"],
        "num_channels": cache.num_channels,
        "num_slices": cache.num_slices,
        "class_names": list(cache.class_names),
    }


def content_digests(cache: Cache, case_ids: Iterable[str]) -> dict[str, str]:
    """The content digests of those of the cases that are done, by id: what a run stores of what it trains on."""
    wanted = set(case_ids)
    return {row.id: row.content_digest for row in cache.done if row.id in wanted}


def read_metrics(run_path: Path) -> list[dict[str, Any]]:
    """All logged steps, in order; empty before the first. A last line that was cut off is left out.

    Raises SuperCLError where the file is damaged.
    """
    file = run_path / "metrics.jsonl"
    if not file.is_file():
        return []
    with _damaged(file):
        text = read_text(file, limit_bytes=LARGEST_FILE_BYTES)
        entries: list[dict[str, Any]] = [parse_json(line) for line in text.split("\n") if line.endswith("}")]
        check(entries, [run_shapes.METRICS_LINE])
    return entries


def forget_metrics_after(run_path: Path, step: int) -> None:
    """Drop what was logged after `step`: those steps are about to be done again."""
    kept = [json.dumps(entry) + "\n" for entry in read_metrics(run_path) if entry["step"] <= step]
    write_text(run_path / "metrics.jsonl", "".join(kept))


def _identity(run: dict[str, Any]) -> dict[str, Any]:
    """What must stay the same for a run to go on: everything but where it runs and when it writes."""
    parts = ("kind", "model", "inference", "cases", "content_digests", "split", "weak_labels")
    where_and_when = ("device", "log_every", "checkpoint_every", "keep_checkpoints")
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


@contextmanager
def _damaged(file: Path) -> Iterator[None]:
    """Turn what goes wrong in reading and checking `file` into a SuperCLError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise SuperCLError(
            "A file of the run is damaged.",
            where=file,
            expected="JSON as this version of supercl writes it",
            found=error,
            next_step="Repeat the command that wrote it.",
        ) from error
