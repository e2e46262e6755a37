"""The evaluation of the published code, computed beside ours so that published numbers can be compared.

Called by `train.evaluate` with the label maps that it scores in its own way too. METHOD says what that code does and
why it is not what we report.

Axes: z slice, y row, x column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from train.metrics import MEAN, METRICS, mean_of_known, score_case

DESCRIPTION: Final = (
    "DSC and JC are of the voxels of all slices of all cases pooled, so large structures count more. "
    "HD95 and ASD are in pixels within each slice, and 0 where prediction or truth is empty, which makes them look "
    "better than they are. Slices are cropped or padded around their centre, so what lies outside does not count."
)
"""What the numbers are, and why they are not ours."""


class PaperScores:
    """Collects label maps of cases and scores them as the published code does.

    `class_names`: the background first. `crop`: rows and columns of the published patch.

    Source: the public code of SuperCL (IEEE TIP 2026), as METHOD describes it. Of JC, METHOD says nothing: taking it
    from the pooled voxels too is our choice. Distances are MONAI's.
    """

    def __init__(self, class_names: Sequence[str], *, crop: tuple[int, int]) -> None:
        self._class_names, self._crop = class_names, crop
        self._sizes = np.zeros((3, len(class_names)), np.int64)
        """Voxels of each class in the predictions, in the truths, and in both."""
        self._distances: list[list[tuple[float, float]]] = [[] for _ in class_names[1:]]
        """HD95 and ASD of each class but the background, in each slice."""
        self._num_empty = np.zeros(len(class_names) - 1, np.int64)

    def add(self, prediction_ZYX: np.ndarray, truth_ZYX: np.ndarray) -> None:
        """Add a case: two integer label maps (z, y, x) of one shape, with values below the number of classes.

        Raises SuperCLError as `score_case` does.
        """
        prediction_ZYX, truth_ZYX = (
            centred(label_map, self._crop) for label_map in (prediction_ZYX, truth_ZYX)
        )
        both = prediction_ZYX[prediction_ZYX == truth_ZYX]
        for sizes, classes in zip(self._sizes, (prediction_ZYX, truth_ZYX, both), strict=True):
            sizes += np.bincount(classes.ravel(), minlength=len(sizes))
        for z in range(len(truth_ZYX)):
            part = slice(z, z + 1)
            scores = score_case(
                prediction_ZYX[part], truth_ZYX[part], class_names=self._class_names, spacing_mm=None
            )
            for index, score in enumerate(scores):
                self._distances[index].append((score.hd95 or 0.0, score.asd or 0.0))
                self._num_empty[index] += score.state != "ok"

    def result(self) -> dict[str, Any]:
        """What evaluation.json holds under `paper`, after at least one case.

        Its `summary` has, for each class, DSC and JC (None where no slice has the class on either side), HD95 and ASD
        in pixels, and the number of slices whose distances count 0; "mean" holds the means over the classes.
        """
        summary: dict[str, dict[str, Any]] = {}
        for index, name in enumerate(self._class_names[1:]):
            in_prediction, in_truth, in_both = (int(size) for size in self._sizes[:, index + 1])
            union = in_prediction + in_truth - in_both
            hd95, asd = np.mean(self._distances[index], axis=0)
            summary[name] = {
                "dsc": 2 * in_both / (in_prediction + in_truth) if union else None,
                "jc": in_both / union if union else None,
                "hd95": float(hd95),
                "asd": float(asd),
                "num_empty_slices": int(self._num_empty[index]),
            }
        means = {metric: mean_of_known(values[metric] for values in summary.values()) for metric in METRICS}
        num_empty = int(self._num_empty.sum())
        return {
            "description": DESCRIPTION,
            "crop": list(self._crop),
            "unit": "pixel",
            "num_slices": len(self._distances[0]),
            "summary": {**summary, MEAN: {**means, "num_empty_slices": num_empty}},
        }


def centred(label_map_ZYX: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of every slice, of `size` rows and columns; background around slices that are smaller."""
    height, width = label_map_ZYX.shape[1:]
    result = np.zeros((len(label_map_ZYX), *size), label_map_ZYX.dtype)
    # As `train.data.SliceDataset.place` centres a patch.
    slack = (height - size[0]) // 2, (width - size[1]) // 2
    source = tuple(
        slice(max(first, 0), max(first, 0) + side) for first, side in zip(slack, size, strict=True)
    )
    middle = label_map_ZYX[:, source[0], source[1]]
    top, left = max(-slack[0], 0), max(-slack[1], 0)
    result[:, top : top + middle.shape[1], left : left + middle.shape[2]] = middle
    return result
