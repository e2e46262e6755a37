"""Segmentation metrics of one case and their means over cases: DSC, JC, HD95 and ASD.

Distances are MONAI's. What becomes of structures that are missing on either side is decided here, before
MONAI is called, and counted. Called by `train.evaluate`; `train.comparison` and `train.report.page` read the rows.

Axes: z slice, y row, x column.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from supercl_core.errors import SuperCLError

METRICS: Final = ("dsc", "jc", "hd95", "asd")
"""Keys of the metrics in rows and summaries."""

MEAN: Final = "mean"
"""Key of the mean over classes in a summary."""

MISSING_RULE: Final = (
    "A structure that only one of prediction and truth has counts 0 in DSC and JC, and is left out of HD95 and ASD. "
    "One that neither has is left out of all means."
)
"""What `score_case` and `summarise` do with missing structures, for whoever reads their numbers."""

State = Literal["ok", "missing in prediction", "missing in truth", "absent in both"]


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """Metrics of one structure in one case; None where a metric is undefined."""

    class_name: str
    dsc: float | None
    """Dice similarity coefficient, 0..1."""
    jc: float | None
    """Jaccard coefficient, 0..1."""
    hd95: float | None
    """95th percentile of the Hausdorff distance, the larger of both directions; mm or voxels."""
    asd: float | None
    """Average symmetric surface distance; mm or voxels."""
    state: State

    def as_dict(self) -> dict[str, Any]:
        """A row of evaluation.json, without its case."""
        values = dataclasses.asdict(self)
        return {"class": values.pop("class_name"), **values}


def score_case(
    prediction_ZYX: np.ndarray,
    truth_ZYX: np.ndarray,
    *,
    class_names: Sequence[str],
    spacing_mm: tuple[float, float, float] | None,
) -> list[ClassScore]:
    """Score a segmentation against its ground truth, one ClassScore for each class but the background.

    `prediction_ZYX` and `truth_ZYX` are integer (z, y, x) with values below `len(class_names)`, 0 being
    background. `spacing_mm` is (z, y, x); without it, distances are in voxels. A case of one slice is an
    image: its contours are compared in the plane.

    A structure that is absent in both has no value at all, and is left out of every mean. One that is
    missing on one side has DSC and JC 0; its distances are undefined (None), left out of the means of HD95
    and ASD, and counted: such a mean says nothing of the worst cases, so read it beside the count.

    Raises SuperCLError where the shapes differ, or where a value is no class. Source: MONAI's definitions;
    a surface voxel has a 6-neighbour (4-neighbour in an image) outside its structure.
    """
    if prediction_ZYX.shape != truth_ZYX.shape or truth_ZYX.ndim != 3:
        raise SuperCLError(
            "Prediction and ground truth differ in shape.",
            expected=f"(z, y, x) = {truth_ZYX.shape}, as the ground truth",
            found=prediction_ZYX.shape,
            next_step="Compare the prediction with the ground truth of the same case, in the same geometry.",
        )
    for name, label_map in (("prediction", prediction_ZYX), ("ground truth", truth_ZYX)):
        _check_classes(name, label_map, class_names)
    return [
        _score(prediction_ZYX == index, truth_ZYX == index, name=class_names[index], spacing_mm=spacing_mm)
        for index in range(1, len(class_names))
    ]


def dice(prediction_ZYX: np.ndarray, truth_ZYX: np.ndarray, *, num_classes: int) -> np.ndarray:
    """DSC (0..1) of every class, the background included: float64 (num_classes,), NaN for a class absent in both.

    Both label maps are integer (z, y, x), with values below `num_classes`. What validation during training needs,
    without distances.
    """
    pairs = np.bincount(
        (num_classes * truth_ZYX.astype(np.int64) + prediction_ZYX).ravel(), minlength=num_classes**2
    ).reshape(num_classes, num_classes)
    sizes = pairs.sum(axis=0) + pairs.sum(axis=1)
    return np.divide(2 * np.diag(pairs), sizes, out=np.full(num_classes, np.nan), where=sizes > 0)


def summarise(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The summary of evaluation.json from its rows, in the order in which classes first appear.

    For each class: the means of METRICS over the cases that have a value (None where none has), `num_cases`
    with the structure on at least one side, over which DSC and JC are means, `num_distances` of these with
    the structure on both sides, over which HD95 and ASD are means, `num_missing_in_prediction` and
    `num_missing_in_truth`, whose distances are left out, and `num_absent` in both. "mean" holds the means
    over the classes and the sums of their counts.
    """
    by_class: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_class.setdefault(row["class"], []).append(row)
    summary: dict[str, dict[str, Any]] = {}
    for name, class_rows in by_class.items():
        states = [row["state"] for row in class_rows]
        num_absent = states.count("absent in both")
        summary[name] = {
            **{metric: mean_of_known(row[metric] for row in class_rows) for metric in METRICS},
            "num_cases": len(states) - num_absent,
            "num_distances": states.count("ok"),
            "num_missing_in_prediction": states.count("missing in prediction"),
            "num_missing_in_truth": states.count("missing in truth"),
            "num_absent": num_absent,
        }
    classes = list(summary.values())
    counts = [key for key in next(iter(classes), {}) if key.startswith("num_")]
    return {
        **summary,
        MEAN: {
            **{metric: mean_of_known(values[metric] for values in classes) for metric in METRICS},
            **{count: sum(values[count] for values in classes) for count in counts},
        },
    }


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of those values that are not None; None where all are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _check_classes(name: str, label_map: np.ndarray, class_names: Sequence[str]) -> None:
    if label_map.size and not 0 <= int(label_map.min()) <= int(label_map.max()) < len(class_names):
        raise SuperCLError(
            f"The {name} holds values that are no class.",
            expected=f"0 to {len(class_names) - 1} ({', '.join(class_names)})",
            found=f"{label_map.min()} to {label_map.max()}",
            next_step="Use labels and a model of the same classes.",
        )


def _score(
    prediction_ZYX: np.ndarray,
    truth_ZYX: np.ndarray,
    *,
    name: str,
    spacing_mm: tuple[float, float, float] | None,
) -> ClassScore:
    """Score one structure, given as two bool (z, y, x)."""
    in_prediction, in_truth = bool(prediction_ZYX.any()), bool(truth_ZYX.any())
    if not in_prediction and not in_truth:
        return ClassScore(class_name=name, dsc=None, jc=None, hd95=None, asd=None, state="absent in both")
    if not (in_prediction and in_truth):
        state: State = "missing in truth" if in_prediction else "missing in prediction"
        return ClassScore(class_name=name, dsc=0.0, jc=0.0, hd95=None, asd=None, state=state)
    union = prediction_ZYX | truth_ZYX
    num_common = int((prediction_ZYX & truth_ZYX).sum())
    num_union = int(union.sum())
    box = _bounding_box(union)
    hd95, asd = _surface_distances(prediction_ZYX[box], truth_ZYX[box], union.shape[0] == 1, spacing_mm)
    return ClassScore(
        class_name=name,
        dsc=2 * num_common / (num_union + num_common),
        jc=num_common / num_union,
        hd95=hd95,
        asd=asd,
        state="ok",
    )


def _bounding_box(mask_ZYX: np.ndarray) -> tuple[slice, ...]:
    # No margin: outside the array counts as background when MONAI looks for surfaces.
    box = []
    for axis in range(3):
        used = np.flatnonzero(mask_ZYX.any(axis=tuple({0, 1, 2} - {axis})))
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)


def _surface_distances(
    prediction_ZYX: np.ndarray,
    truth_ZYX: np.ndarray,
    one_slice: bool,
    spacing_mm: tuple[float, float, float] | None,
) -> tuple[float, float]:
    """HD95 and ASD of two non-empty masks."""
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_distance import compute_average_surface_distance

    spacing: tuple[float, ...] = spacing_mm or (1.0, 1.0, 1.0)
    if one_slice:  # in three dimensions every voxel of a single slice would be surface
        prediction_ZYX, truth_ZYX, spacing = prediction_ZYX[0], truth_ZYX[0], spacing[1:]
    masks = [torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (prediction_ZYX, truth_ZYX)]
    with warnings.catch_warnings():
        # MONAI 1.6 calls its own function with an argument that it deprecates.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        hd95 = compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=spacing)
        asd = compute_average_surface_distance(
            *masks, include_background=True, symmetric=True, spacing=spacing
        )
    return float(hd95), float(asd)
