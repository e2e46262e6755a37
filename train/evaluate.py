"""Evaluation: label maps scored per case against the ground truth of a cache, of a run or of a folder of predictions.

Called by `supercl evaluate`, by studies and from Python. Segmenting is `train.inference`, metrics are `train.metrics`.
This module brings cases, label maps and files together, and decides which cases are looked at.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from supercl_core import provenance
from supercl_core.cache.reader import Cache, CachedCase
from supercl_core.errors import CacheError, StorageError, SuperCLError, UsageError, cases_failed, some_of
from supercl_core.files import write_json, write_text
from supercl_core.formats.volumes import write_label_map
from supercl_core.progress import progress
from train import runs
from train.data import automatic_patch_size, normalisation_window
from train.device import select_device
from train.inference import InferenceSettings, check_finished, load_network, segment
from train.metrics import METRICS, MISSING_RULE, score_case, summarise
from train.paper_protocol import PaperScores
from train.prediction_files import files_by_case, read_prediction

_CSV_COLUMNS: Final = ("case", "class", *METRICS, "state")


def evaluate(
    run_path: Path,
    cache: Cache,
    *,
    device_name: str = "auto",
    part: runs.Part = "test",
    crop: tuple[int, int] | Literal["patch"] | None = None,
    check: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Segment and score the test or validation cases of a fine-tuned run; return what `evaluation.json` holds.

    Writes the label maps `RUN/predictions/<case>.nii.gz` in the geometry of the sources, `RUN/evaluation.json` and the
    same rows in `RUN/evaluation.csv`; for the validation cases these are `validation_predictions`, `validation.json`
    and `validation.csv`. Distances are in mm, or in voxels when one of the cases has no known spacing. `crop` adds the
    scores of the published code (`train.paper_protocol`) within so many rows and columns, or within the patch that the
    run was trained on. `check` is called before every case, and may raise to stop there.

    Raises UsageError for a run that is not fine-tuned, not finished or without such cases, CacheError for a cache
    other than the run's, or without the ground truth of a case; nothing is written then.
    """
    run = runs.read_run(run_path)
    check_finished(run, run_path)
    _check_part(run, run_path, part)
    _check_cache(run, cache)
    settings = InferenceSettings.from_run(run)
    device = select_device(device_name)
    network = load_network(run, run_path).to(device)
    cases = [cache.case(case_id) for case_id in run["cases"][part]]
    unlabelled = [case.row.id for case in cases if not case.row.has_ground_truth]
    if unlabelled:
        raise CacheError(
            f"{part.capitalize()} cases have no ground truth to score against.",
            where=cache.path,
            expected=f"a label map for every {part} case of the split",
            found=", ".join(unlabelled[:5]),
            next_step=f"Take these cases out of the split's {part} list, or preprocess them with their label maps.",
        )
    if crop == "patch":
        patch = run["config"]["patch_size"] or automatic_patch_size(cache, network.encoder.strides[-1])
        crop = (patch[0], patch[1])
    scores = _Scores(cache, cases, crop=crop)
    folder_name = "predictions" if part == "test" else "validation_predictions"
    with progress("evaluate", total=len(cases), unit="cases") as advance:
        for case in cases:
            if check is not None:
                check()
            prediction_ZYX = segment(
                network,
                case.read("image", slice(None)).swapaxes(0, 1),
                normalisation_window(case),
                settings=settings,
                device=device,
            )
            write_label_map(run_path / folder_name / f"{case.row.id}.nii.gz", prediction_ZYX, case.geometry())
            scores.add(case, prediction_ZYX)
            advance(note=case.row.id)
    result = {**scores.result(), "part": part}
    _write(run_path / runs.EVALUATION_OF[part], result)
    return result


def evaluate_folder(
    predictions_path: Path,
    cache: Cache,
    *,
    case_ids: Sequence[str] | None = None,
    crop: tuple[int, int] | None = None,
    output_path: Path | None = None,
) -> dict[str, Any]:
    """Score label maps that were made elsewhere; return what is written to `PREDICTIONS/evaluation.json` and `.csv`.

    A file belongs to the case that it is named like (without its ending, and without the `_0000` of nnU-Net), in any
    format that `supercl_core.formats.volumes` reads, in the geometry of the case's source. `case_ids`: the cases to
    score, None takes all with ground truth; no other label is read. `crop` adds the scores of the published code within
    so many rows and columns. `output_path`: the JSON file to write instead.

    Beside what `evaluate` gives, `failed` lists the cases without a score (case and reason), and `unused` the files
    that belong to none of the cases. Raises CasesFailedError, and writes nothing, where no case could be scored.
    """
    if case_ids is None:
        case_ids = [row.id for row in cache.done if row.has_ground_truth]
    known = {row.id for row in cache.done if row.has_ground_truth}
    scores = _Scores(cache, [cache.case(case_id) for case_id in case_ids if case_id in known], crop=crop)
    files, unused = files_by_case(predictions_path, case_ids)
    failed: list[dict[str, str]] = []
    with progress("evaluate", total=len(case_ids), unit="cases") as advance:
        for case_id in case_ids:
            try:
                case = cache.case(case_id)
                scores.add(case, read_prediction(files.get(case_id), case, cache.class_names))
            except StorageError:
                raise
            except SuperCLError as error:
                failed.append({"case": case_id, "reason": error.one_line()})
            advance(note=case_id)
    if len(failed) == len(case_ids):
        raise cases_failed(
            failed,
            "No prediction could be scored.",
            where=predictions_path,
            next_step="Name the files like the cases, and write them in the geometry of their sources.",
        )
    result = {**scores.result(), "part": "folder", "failed": failed, "unused": unused}
    _write(output_path or predictions_path / "evaluation.json", result)
    return result


class _Scores:
    """Collects the scores of cases, in one unit for all."""

    def __init__(self, cache: Cache, cases: Sequence[CachedCase], *, crop: tuple[int, int] | None) -> None:
        self._class_names = cache.class_names
        self._in_mm = all(case.row.spacing_mm is not None for case in cases)
        self._paper = None if crop is None else PaperScores(cache.class_names, crop=crop)
        self._rows: list[dict[str, Any]] = []

    def add(self, case: CachedCase, prediction_ZYX: np.ndarray) -> None:
        """Score the segmentation of a case, which has ground truth."""
        truth_ZYX = case.read("ground_truth", slice(None))
        spacing_mm = case.row.spacing_mm if self._in_mm else None
        scores = score_case(prediction_ZYX, truth_ZYX, class_names=self._class_names, spacing_mm=spacing_mm)
        self._rows += [{"case": case.row.id, **score.as_dict()} for score in scores]
        if self._paper is not None:
            self._paper.add(prediction_ZYX, truth_ZYX)

    def result(self) -> dict[str, Any]:
        """What all evaluations hold."""
        return {
            "protocol": "per case, 3-D, in the source's geometry",
            "unit": "mm" if self._in_mm else "voxel",
            "missing_rule": MISSING_RULE,
            "class_names": list(self._class_names),
            "rows": self._rows,
            "summary": summarise(self._rows),
            "paper": None if self._paper is None else self._paper.result(),
            "provenance": provenance.record(),
        }


def _write(json_path: Path, result: dict[str, Any]) -> None:
    """The result as JSON, and its rows as CSV beside it; what is undefined is an empty cell."""
    write_json(json_path, result)
    table = io.StringIO()
    writer = csv.DictWriter(table, [*_CSV_COLUMNS, "unit"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "unit": result["unit"]} for row in result["rows"])
    write_text(json_path.with_suffix(".csv"), table.getvalue())


def _check_part(run: dict[str, Any], run_path: Path, part: runs.Part) -> None:
    """Raise UsageError for a run without cases of the part."""
    if not run["cases"][part]:
        test = part == "test"
        raise UsageError(
            f"The run has no {part} case.",
            where=run_path,
            next_step="Fine-tune with a split that has a test list."
            if test
            else "Fine-tune with a part of the labelled cases left out: --set validation_folds=5",
        )


def _check_cache(run: dict[str, Any], cache: Cache) -> None:
    """Raise CacheError for a cache other than the run's: of other classes, or of another content of labelled cases.

    By its content an image is known to have the same size, and its case the same number. Superpixels are content too.
    """
    next_step = (
        f"Use the run's own cache ({run['cache']['path']}), or evaluate a folder that `supercl predict` made of other "
        "volumes."
    )
    if list(cache.class_names) != run["cache"]["class_names"]:
        raise CacheError(
            "The cache has other classes than the run learned.",
            where=cache.path,
            expected=", ".join(run["cache"]["class_names"]),
            found=", ".join(cache.class_names) or "none",
            next_step=next_step,
        )
    learned = run["content_digests"]
    here = runs.content_digests(cache, learned)
    if differing := [case_id for case_id, digest in learned.items() if here.get(case_id) != digest]:
        same_settings = cache.attributes["config_digest"] == run["cache"]["config_digest"]
        raise CacheError(
            "The cache is not the one that the run was made with.",
            where=cache.path,
            expected="the labelled cases of the run, with the same images and superpixels",
            found=f"{len(differing)} of {len(learned)} missing or different: {some_of(differing)}"
            + ("" if same_settings else " (made with other settings of preprocessing)"),
            next_step=next_step,
        )
