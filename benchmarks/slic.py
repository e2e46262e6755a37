"""How fast and how good SLIC is here, beside scikit-image, OpenCV and SimpleITK, on one core in one run.

    python -m benchmarks.slic --data DIR [--quick]        (part of make bench)

DIR is a data set in the layout of the Medical Segmentation Decathlon; of several channels the first is taken.
Everybody is asked for 100 superpixels and 10 iterations. scikit-image runs the published call (the slice stacked
to RGB, compactness 10), which is also what quality is compared with. OpenCV and SimpleITK weigh distance on
scales of their own, so theirs are other superpixels: beside their times stand their scores.

Speed: methods take turns on every slice, at its own size and brought to 256 x 256 and 512 x 512 (cubic). Enlarging
smooths, so one more condition has the noise of the slice as it was acquired added again at 512 x 512.
Quality: slices at their own size; differences are means over cases with a bootstrap interval over cases.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import SimpleITK as sitk
from scipy.ndimage import convolve
from scipy.optimize import linear_sum_assignment
from skimage.segmentation import slic

if not __package__:  # run by its path: beside it lies a script that has the name of a package
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.machine import as_text, conditions
from preprocess.quality import METRICS, Comparison, compare, measure_slice
from preprocess.superpixels import Method, slic_superpixels
from supercl_core.errors import SuperCLError
from supercl_core.formats.case_files import read_image, read_label_map
from supercl_core.progress import progress
from supercl_core.sources import CaseSource, discover

N_SEGMENTS = 100
COMPACTNESS = 10.0
ITERATIONS = 10
PUBLISHED_SLICES = 17_525
"""Slices of the published CT pre-training, 512 x 512."""
PUBLISHED_CPU_HOURS = 153
"""What SLIC in the data loader costs there: both views of every slice, 100 epochs."""


def supercl(slice_YX: np.ndarray, *, method: Method) -> np.ndarray:
    """The superpixels of this project, rescaling included."""
    return slic_superpixels(slice_YX[None], method=method, n_segments=N_SEGMENTS, compactness=COMPACTNESS)


def scikit_image(slice_YX: np.ndarray, *, dtype: type[np.floating] = np.float64) -> np.ndarray:
    """The published call."""
    rgb_YXC = np.stack([slice_YX.astype(dtype)] * 3, axis=-1)
    return slic(rgb_YXC, n_segments=N_SEGMENTS, compactness=COMPACTNESS, max_num_iter=ITERATIONS)


def opencv(slice_YX: np.ndarray) -> np.ndarray:
    """OpenCV's SLIC with its own ruler, on grey values in 0..255 as float32, which it is fastest with."""
    grey_YX = _grey(slice_YX)
    algorithm = cv2.ximgproc.createSuperpixelSLIC(grey_YX, cv2.ximgproc.SLIC, region_size=_step(slice_YX))
    algorithm.iterate(ITERATIONS)
    algorithm.enforceLabelConnectivity()
    return algorithm.getLabels()


def simpleitk(slice_YX: np.ndarray) -> np.ndarray:
    """SimpleITK's SLIC with its own proximity weight, on grey values in 0..255."""
    grey_YX = _grey(slice_YX)
    algorithm = sitk.SLICImageFilter()
    algorithm.SetSuperGridSize([_step(slice_YX)] * 2)
    algorithm.SetMaximumNumberOfIterations(ITERATIONS)
    algorithm.SetNumberOfThreads(1)
    return sitk.GetArrayFromImage(algorithm.Execute(sitk.GetImageFromArray(grey_YX)))


def _grey(slice_YX: np.ndarray) -> np.ndarray:
    """A slice rescaled to 0..255, float32."""
    grey_YX = np.empty(slice_YX.shape, np.float32)
    cv2.normalize(slice_YX, grey_YX, 0, 255, cv2.NORM_MINMAX, cv2.CV_32F)
    return grey_YX


def _step(slice_YX: np.ndarray) -> int:
    """Side of a square superpixel."""
    return max(1, round((slice_YX.size / N_SEGMENTS) ** 0.5))


METHODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "fast": functools.partial(supercl, method="fast"),
    "exact": functools.partial(supercl, method="exact"),
    # For times in float32, where it is faster; for labels in float64, which `exact` promises to agree with.
    "skimage": functools.partial(scikit_image, dtype=np.float32),
    "opencv": opencv,
    "simpleitk": simpleitk,
}


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="A data set in MSD layout.")
@click.option("--quick", is_flag=True, help="Fewer slices: under a minute.")
def main(data: Path, quick: bool) -> None:
    """Print all figures for one data set."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    packages = ("numpy", "numba", "scikit-image", "SimpleITK")
    run_with = {**conditions(data, *packages, quick=quick), "opencv": cv2.__version__}
    print(f"{as_text(run_with)}; one core used")
    try:
        cases = discover(data).cases
        cases = tuple(case for case in cases if case.label_paths) or cases
        speed = measure_speed(_spread(cases, 3 if quick else 12), num_rounds=3 if quick else 7)
        quality = measure_quality(_spread(cases, 12 if quick else 300), slices_per_case=2 if quick else 5)
    except SuperCLError as error:
        sys.exit(f"error: {error.message()}")
    print(json.dumps({**run_with, **speed, **quality}))


def measure_speed(cases: list[CaseSource], *, num_rounds: int) -> dict[str, Any]:
    """Time every method on the middle slice of each case, in turns, and print medians and ratios."""
    native = [_slices(case, 1)[0][0] for case in cases]
    conditions = {
        "native": native,
        "256": [_resized(slice_YX, 256) for slice_YX in native],
        "512": [_resized(slice_YX, 512) for slice_YX in native],
    }
    generator = np.random.default_rng(0)
    conditions["512_noise"] = [
        enlarged + generator.normal(scale=noise_level(slice_YX), size=enlarged.shape).astype(np.float32)
        for enlarged, slice_YX in zip(conditions["512"], native, strict=True)
    ]
    shapes = [slice_YX.shape for slice_YX in native]
    print(
        f"\nspeed: {len(native)} slices of as many cases, {min(shapes)} to {max(shapes)}, {num_rounds} rounds"
    )
    print(f"{'median ms':10}" + "".join(f"{name:>11}" for name in METHODS))
    seconds = {}
    with progress("speed", total=len(conditions) * (num_rounds + 1), unit="rounds") as advance:
        for condition, slices in conditions.items():
            seconds[condition] = _interleaved(slices, num_rounds, advance)
            medians = [np.median(times) for times in seconds[condition].values()]
            print(f"{condition:10}" + "".join(f"{1000 * median:11.2f}" for median in medians))
    values: dict[str, Any] = {"num_slices_timed": len(native), "num_rounds": num_rounds}
    print(f"\n{'ratio of medians (p10 to p90 of the slices)':>44}")
    for method, other, condition in [
        *(("fast", "skimage", condition) for condition in conditions),
        *(("fast", other, "512") for other in ("opencv", "simpleitk")),
        ("exact", "skimage", "512"),
    ]:
        times, other_times = seconds[condition][method], seconds[condition][other]
        ratio = float(np.median(other_times) / np.median(times))
        low, high = np.percentile(np.median(other_times, axis=0) / np.median(times, axis=0), (10, 90))
        values[f"{method}_vs_{other}_{condition}"] = ratio
        print(f"{method} against {other}, {condition}: {ratio:.1f} ({low:.1f} to {high:.1f})")
    hours = PUBLISHED_SLICES * float(np.median(seconds["512"]["fast"])) / 3600
    print(
        f"superpixels of {PUBLISHED_SLICES:,} slices of 512 x 512: {hours:.4f} CPU-hours by fast, "
        f"{PUBLISHED_CPU_HOURS} CPU-hours the published way (both views of every slice, 100 epochs)"
    )
    return {
        **values,
        "median_ms": {
            condition: {method: 1000 * float(np.median(times)) for method, times in by_method.items()}
            for condition, by_method in seconds.items()
        },
        "cpu_hours_17525_slices_512": hours,
        "published_cpu_hours": PUBLISHED_CPU_HOURS,
    }


def measure_quality(cases: list[CaseSource], *, slices_per_case: int) -> dict[str, Any]:
    """Score every method on slices of their own size; print means, and how far `fast` is from scikit-image."""
    methods = {**METHODS, "skimage": scikit_image}
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    case_of_slice, num_equal, num_pixels = [], 0, 0
    with progress("quality", total=len(cases), unit="cases") as advance:
        for case in cases:
            for slice_YX, ground_truth_YX in _slices(case, slices_per_case):
                found = {name: method(slice_YX) for name, method in methods.items()}
                for name, superpixels_YX in found.items():
                    measured = measure_slice(superpixels_YX, slice_YX[None], ground_truth_YX)
                    percent = {metric: 100 * value for metric, value in measured.items()}
                    scores[name].append({**percent, "superpixels": len(np.unique(superpixels_YX))})
                num_equal += matched_pixels(found["exact"], found["skimage"])
                num_pixels += slice_YX.size
                case_of_slice.append(case.id)
            advance()

    def compared(name: str, metric: str) -> Comparison | None:
        ours, reference = (np.array([s[metric] for s in scores[kind]]) for kind in (name, "skimage"))
        return compare(ours, reference, np.array(case_of_slice))

    print(
        f"\nquality: {len(case_of_slice)} slices of {len(cases)} cases at their own size; scores in percent"
    )
    print(f"{'':26}" + "".join(f"{name:>11}" for name in methods) + "   fast - skimage (95 % interval)")
    values: dict[str, Any] = {"num_slices": len(case_of_slice), "num_cases": len(cases)}
    for metric, title in {**METRICS, "superpixels": "superpixels a slice"}.items():
        rows = {name: compared(name, metric) for name in methods}
        fast = rows["fast"]
        values[f"{metric}_difference"] = fast and fast.difference
        values[f"{metric}_difference_ci"] = fast and fast.interval
        means = "".join(f"{row.ours:11.2f}" if row else f"{'-':>11}" for row in rows.values())
        print(f"{title:26}{means}   {_difference(fast)}")
    values["exact_agreement"] = num_equal / num_pixels
    print(f"exact agrees with scikit-image on {num_equal / num_pixels:.4%} of {num_pixels:,} pixels")
    return values


def matched_pixels(labels_YX: np.ndarray, reference_YX: np.ndarray) -> int:
    """Pixels with the same id after the best one-to-one matching of ids between two maps (y, x)."""
    _, rows = np.unique(labels_YX, return_inverse=True)
    _, columns = np.unique(reference_YX, return_inverse=True)
    counts = np.zeros((rows.max() + 1, columns.max() + 1), np.int64)
    np.add.at(counts, (rows.ravel(), columns.ravel()), 1)
    return int(counts[linear_sum_assignment(counts, maximize=True)].sum())


def noise_level(slice_YX: np.ndarray) -> float:
    """Standard deviation of a slice's white noise (Immerkær, Computer Vision and Image Understanding 64, 1996)."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    inner = convolve(slice_YX.astype(np.float64), kernel)[1:-1, 1:-1]
    return float(np.sqrt(np.pi / 2) * np.abs(inner).mean() / 6)


def _interleaved(
    slices: list[np.ndarray], num_rounds: int, advance: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Seconds of each method: (rounds, slices). A first round, in which kernels are compiled, does not count."""
    seconds = {name: np.empty((num_rounds + 1, len(slices))) for name in METHODS}
    for turn in range(num_rounds + 1):
        for index, slice_YX in enumerate(slices):
            for name, method in METHODS.items():
                start = time.perf_counter()
                method(slice_YX)
                seconds[name][turn, index] = time.perf_counter() - start
        advance()
    return {name: times[1:] for name, times in seconds.items()}


def _slices(case: CaseSource, count: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Slices (y, x) of a case's first channel, evenly spaced, each with its ground truth (y, x) if there is one."""
    image_ZYX, label = read_image(case).array_CZYX[0], read_label_map(case)
    truth_ZYX = None if label is None else label.array_CZYX[0].astype(np.uint8)
    count = min(count, len(image_ZYX))
    places = ((np.arange(count) + 0.5) * len(image_ZYX) / count).astype(int)
    return [(image_ZYX[z], None if truth_ZYX is None else truth_ZYX[z]) for z in places]


def _resized(slice_YX: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(slice_YX.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)


def _spread(cases: tuple[CaseSource, ...], count: int) -> list[CaseSource]:
    """`count` cases (or all), evenly spaced."""
    count = min(count, len(cases))
    return [cases[index] for index in ((np.arange(count) + 0.5) * len(cases) / count).astype(int)]


def _difference(comparison: Comparison | None) -> str:
    if comparison is None:
        return "no ground truth"
    interval = comparison.interval
    return f"{comparison.difference:+.2f}" + (
        f" ({interval[0]:+.2f} to {interval[1]:+.2f})" if interval else ""
    )


if __name__ == "__main__":
    main()
