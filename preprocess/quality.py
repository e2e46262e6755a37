"""How good superpixels are: against ground truth, against the intensities, and paired with other superpixels.

Pure functions on one slice's arrays, and the comparison of two kinds of superpixels over many slices. Called by
`preprocess.quality_report` (`supercl quality`) and by `benchmarks/slic.py`. Axes: C channel, Y row, X column.

The metrics are those that D. Stutz, A. Hermans, B. Leibe, "Superpixels: An Evaluation of the State-of-the-Art",
Computer Vision and Image Understanding 166 (2018), recommend and define. All are fractions, 0..1, and NaN where a
slice says nothing: without ground truth, with a single class in it, or with the same value everywhere. The
segments of the ground truth are its classes, the background among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from supercl_core.intensity import rescale_slice
from supercl_core.showing.pictures import boundaries

METRICS: Final = {
    "asa": "achievable accuracy, ASA",
    "boundary_recall": "boundary recall, 2 px",
    "undersegmentation": "under-segmentation error",
    "explained_variance": "explained variance",
}
"""The keys of `measure_slice`, with the names that people read. Lower is better for under-segmentation only."""

BOUNDARY_TOLERANCE: Final = 2
"""Pixels, in Chebyshev distance, by which a superpixel's border may miss one of the ground truth."""

NUM_RESAMPLES: Final = 10_000
"""Bootstrap resamples of the cases behind an interval."""

INTERVAL_PERCENT: Final = (2.5, 97.5)
"""Percentiles of the resampled means: a 95 % interval."""


def measure_slice(
    superpixels_YX: np.ndarray, slice_CYX: np.ndarray, ground_truth_YX: np.ndarray | None = None
) -> dict[str, float]:
    """Every metric of one slice's superpixels, by the names of METRICS: 0..1, NaN where undefined.

    `superpixels_YX`: integers from 0 (y, x). `slice_CYX`: intensities in any real dtype and unit (c, y, x).
    `ground_truth_YX`: classes, integers from 0 (y, x), or None.
    """
    values = dict.fromkeys(METRICS, np.nan)
    values["explained_variance"] = explained_variance(superpixels_YX, slice_CYX)
    if ground_truth_YX is not None:
        values["asa"] = achievable_accuracy(superpixels_YX, ground_truth_YX)
        values["boundary_recall"] = boundary_recall(superpixels_YX, ground_truth_YX)
        values["undersegmentation"] = undersegmentation_error(superpixels_YX, ground_truth_YX)
    return values


def achievable_accuracy(superpixels_YX: np.ndarray, ground_truth_YX: np.ndarray) -> float:
    """Achievable segmentation accuracy: the share of pixels that are right when every superpixel takes one class.

    That class is its most frequent one. Both maps: integers from 0 (y, x). Returns 0..1, NaN for a ground truth
    of one class. Source: Liu, Tuzel, Ramalingam, Chellappa, "Entropy Rate Superpixel Segmentation", CVPR 2011.
    """
    if _one_class(ground_truth_YX):
        return np.nan
    return float(_contingency(superpixels_YX, ground_truth_YX).max(axis=1).sum() / superpixels_YX.size)


def undersegmentation_error(superpixels_YX: np.ndarray, ground_truth_YX: np.ndarray) -> float:
    """Under-segmentation error: how much superpixels leak over the borders of the ground truth; lower is better.

    For every class and every superpixel that touches it, the smaller of the superpixel's parts inside and outside
    of the class, summed, over the number of pixels: the form of P. Neubert, P. Protzel, "Superpixel Benchmark and
    Comparison", Forum Bildverarbeitung 2012, which does not punish large superpixels for slight overlaps as the
    original one does. Both maps: integers from 0 (y, x). Returns 0..1, NaN for a ground truth of one class.
    """
    if _one_class(ground_truth_YX):
        return np.nan
    inside = _contingency(superpixels_YX, ground_truth_YX)
    outside = inside.sum(axis=1, keepdims=True) - inside
    return float(np.minimum(inside, outside).sum() / superpixels_YX.size)


def boundary_recall(superpixels_YX: np.ndarray, ground_truth_YX: np.ndarray) -> float:
    """The share of the ground truth's boundary pixels that have a superpixel's boundary pixel within 2 pixels.

    A boundary pixel has one of its four neighbours in another region; distance is Chebyshev's, that is within a
    window of 5 x 5. Both maps: integers from 0 (y, x). Returns 0..1, NaN for a ground truth of one class. Source:
    Martin, Fowlkes, Malik, IEEE TPAMI 26 (2004), with the square window of Stutz, Hermans, Leibe.
    """
    wanted_YX = boundaries(ground_truth_YX)
    if not wanted_YX.any():
        return np.nan
    near_YX = _dilate(boundaries(superpixels_YX), BOUNDARY_TOLERANCE)
    return float(near_YX[wanted_YX].mean())


def explained_variance(superpixels_YX: np.ndarray, slice_CYX: np.ndarray) -> float:
    """The share of a slice's intensity variance that is left when every superpixel takes its mean.

    `superpixels_YX`: integers from 0 (y, x). `slice_CYX`: intensities, any real dtype (c, y, x); each channel is
    rescaled from its own minimum and maximum, and the variances of the channels are summed. Returns 0..1, NaN
    for a constant slice. Source: Moore, Prince, Warrell, Mohammed, Jones, "Superpixel Lattices", CVPR 2008.
    """
    values = rescale_slice(slice_CYX)
    values -= values.mean(axis=(1, 2), keepdims=True)
    total = np.square(values).sum()
    if total == 0:
        return np.nan
    ids = superpixels_YX.ravel()
    sizes = np.maximum(np.bincount(ids), 1)
    explained = sum((np.bincount(ids, channel.ravel()) ** 2 / sizes).sum() for channel in values)
    return float(explained / total)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of two kinds of superpixels of the same slices: means over cases of the cases' means."""

    ours: float
    reference: float
    difference: float
    """Ours minus the reference."""
    interval: tuple[float, float] | None
    """95 % interval of the difference, by a paired bootstrap over cases; None below two cases."""
    num_cases: int
    num_slices: int


def compare(
    ours: np.ndarray, reference: np.ndarray, cases: np.ndarray, *, seed: int = 0
) -> Comparison | None:
    """Compare one metric, paired by slice and resampled by case: slices of one case are not independent.

    `ours`, `reference`: float (n,), one value a slice, in the unit of the result. `cases`: (n,), the case of each
    slice, in any comparable dtype. Slices where either value is NaN are left out; None where none is left.
    """
    defined = np.isfinite(ours) & np.isfinite(reference)
    if not defined.any():
        return None
    _, case_of_slice = np.unique(cases[defined], return_inverse=True)
    num_slices = np.bincount(case_of_slice)
    case_ours = np.bincount(case_of_slice, ours[defined]) / num_slices
    case_reference = np.bincount(case_of_slice, reference[defined]) / num_slices
    return Comparison(
        ours=float(case_ours.mean()),
        reference=float(case_reference.mean()),
        difference=float((case_ours - case_reference).mean()),
        interval=_interval(case_ours - case_reference, np.random.default_rng(seed)),
        num_cases=len(num_slices),
        num_slices=int(num_slices.sum()),
    )


def _interval(values: np.ndarray, generator: np.random.Generator) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.percentile(means, INTERVAL_PERCENT)
    return float(low), float(high)


def _one_class(ground_truth_YX: np.ndarray) -> bool:
    return bool(ground_truth_YX.min() == ground_truth_YX.max())


def _contingency(superpixels_YX: np.ndarray, ground_truth_YX: np.ndarray) -> np.ndarray:
    """How many pixels each superpixel has in each class: int64 (superpixels, classes)."""
    num_classes = int(ground_truth_YX.max()) + 1
    pairs = superpixels_YX.astype(np.int64) * num_classes + ground_truth_YX
    size = (int(superpixels_YX.max()) + 1) * num_classes
    return np.bincount(pairs.ravel(), minlength=size).reshape(-1, num_classes)


def _dilate(mask_YX: np.ndarray, radius: int) -> np.ndarray:
    """Pixels within `radius` of a set one, in Chebyshev distance: one axis after the other."""
    for _ in range(2):
        near_YX = mask_YX.copy()
        for shift in range(1, radius + 1):
            near_YX[shift:] |= mask_YX[:-shift]
            near_YX[:-shift] |= mask_YX[shift:]
        mask_YX = near_YX.T
    return mask_YX
