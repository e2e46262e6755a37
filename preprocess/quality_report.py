"""A cache's superpixels against scikit-image's of the same slices: scores, a table and a picture.

Called by `supercl quality`. The metrics and their comparison are in `preprocess.quality`. scikit-image gets the
intensities that the cache holds, with the cache's settings and the same foreground. Threads share the work, since
scikit-image releases the interpreter's lock.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocess.pipeline import PreprocessConfig
from preprocess.quality import METRICS, compare, explained_variance, measure_slice
from preprocess.superpixels import slic_superpixels
from supercl_core.cache.reader import Cache
from supercl_core.files import atomic_file
from supercl_core.intensity import rescale_slice
from supercl_core.progress import progress
from supercl_core.showing.pictures import boundaries

if TYPE_CHECKING:
    from rich.table import Table

KINDS: Final = ("cache", "skimage")
"""The two kinds of superpixels, as the values of `assess` name them."""

COUNTS: Final = {
    "superpixels_per_slice": "superpixels a slice",
    "superpixel_pixels": "pixels a superpixel",
}
"""The parts of the values of `assess` that count, with the names that people read."""

PICTURE_SLICES: Final = 4
PANEL_PIXELS: Final = 480
"""Slices are enlarged by a whole factor up to about this length of their longer side."""
CAPTION_PIXELS: Final = 48
GAP_PIXELS: Final = 8
SUPERPIXEL_RGB: Final = (255, 221, 51)
GROUND_TRUTH_RGB: Final = (51, 204, 255)


@dataclass(frozen=True, kw_only=True)
class SliceSuperpixels:
    """One slice of a cache with both kinds of superpixels."""

    slice_CYX: np.ndarray
    """Intensities in the source's unit, float32 or float64 (c, y, x)."""
    superpixels: dict[str, np.ndarray]
    """By KINDS: integers (y, x)."""
    foreground_YX: np.ndarray | None
    """bool (y, x); None where the whole slice is foreground."""
    ground_truth_YX: np.ndarray | None
    """Classes, uint8 (y, x)."""


def assess(cache: Cache, *, num_slices: int, num_workers: int) -> dict[str, Any]:
    """Score both kinds of superpixels on a sample of a cache's slices, in `num_workers` threads.

    Returns values that JSON can hold. `metrics` has, by the names of METRICS and in percent points, the means
    over cases of both kinds, their difference (cache - skimage) and its 95 % interval, or None where no slice
    defines the metric; the other parts describe number and size (pixels) of the superpixels of a slice.
    """
    sample = sample_slices(cache, num_slices)
    measured = []
    pool = ThreadPoolExecutor(num_workers)
    try:
        with progress("quality", total=len(sample), unit="slices") as advance:
            for result in pool.map(lambda place: _measure(cache, *place), sample):
                measured.append(result)
                advance()
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the slices to come
    cases = np.array([case_id for case_id, _ in sample])
    metrics: dict[str, Any] = {}
    for name in METRICS:
        ours, reference = (np.array([100 * scores[kind][name] for scores, _ in measured]) for kind in KINDS)
        comparison = compare(ours, reference, cases)
        metrics[name] = None if comparison is None else asdict(comparison)
    sizes = {kind: [slice_sizes[kind] for _, slice_sizes in measured] for kind in KINDS}
    return {
        "cache": str(cache.path),
        "config": cache.attributes["config"],
        "num_slices": len(sample),
        "num_slices_in_cache": cache.num_slices,
        "num_cases": len(np.unique(cases)),
        "num_cases_in_cache": len(cache.done),
        "metrics": metrics,
        "superpixels_per_slice": {kind: _spread(np.array([len(s) for s in sizes[kind]])) for kind in KINDS},
        "superpixel_pixels": {kind: _spread(np.concatenate(sizes[kind])) for kind in KINDS},
    }


def sample_slices(cache: Cache, num_slices: int) -> list[tuple[str, int]]:
    """Case id and z of `num_slices` slices of a cache (or all), as evenly over its cases as their slices allow.

    A case's slices are evenly spaced; where there are more cases than slices, a fixed random choice of cases
    gives its middle slice. In case order.
    """
    turn_of_case = np.random.default_rng(0).permutation(len(cache.rows))
    turns = np.lexsort((turn_of_case[cache.slice_case], cache.slice_z))[:num_slices]
    sample = []
    for index, count in enumerate(np.bincount(cache.slice_case[turns], minlength=len(cache.rows))):
        row = cache.rows[index]
        z = (np.arange(count) + 0.5) * row.shape[1] / max(count, 1)
        sample += [(row.id, int(value)) for value in z]
    return sample


def render(values: dict[str, Any]) -> Table:
    """What `assess` returned as a table for people, 80 columns wide."""
    from rich.table import Table

    table = Table(
        title=f"{values['num_slices']:,} of {values['num_slices_in_cache']:,} slices, "
        f"{values['num_cases']:,} of {values['num_cases_in_cache']:,} cases; scores in percent",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("")
    for column in ("cache", "scikit-image", "difference (95 %)", "cases"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, title in METRICS.items():
        metric = values["metrics"][name]
        if metric is None:
            table.add_row(title, "-", "-", "-", "0")
            continue
        difference = f"{metric['difference']:+.2f}"
        if metric["interval"]:
            difference += " ({:+.2f} to {:+.2f})".format(*metric["interval"])
        table.add_row(
            title,
            f"{metric['ours']:.2f}",
            f"{metric['reference']:.2f}",
            difference,
            f"{metric['num_cases']:,}",
        )
    for part, title in COUNTS.items():
        for name in ("mean", "min", "max"):
            ours, reference = (values[part][kind][name] for kind in KINDS)
            number = ",.1f" if name == "mean" else ","
            texts = (format(ours, number), format(reference, number), format(ours - reference, f"+{number}"))
            table.add_row(f"{title}, {name}", *texts)
    return table


def write_picture(path: Path, cache: Cache) -> None:
    """Write a picture of a few slices, a row each, with the borders of both kinds of superpixels side by side.

    Superpixels are outlined in yellow, the ground truth in blue. The suffix of `path` names the format (PNG).
    """
    rows = []
    for case_id, z in sample_slices(cache, PICTURE_SLICES):
        found = read_slice(cache, case_id, z)
        panels = [_panel(found, kind, caption=f"{case_id}, z = {z}") for kind in KINDS]
        rows.append(np.concatenate(panels, axis=1))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    with atomic_file(path) as wip:
        Image.fromarray(np.concatenate(padded)).save(wip)


def read_slice(cache: Cache, case_id: str, z: int) -> SliceSuperpixels:
    """One slice of a cache, its superpixels there, and those that scikit-image gives it with the same settings."""
    config = PreprocessConfig(**cache.attributes["config"])
    case = cache.case(case_id)
    slice_CYX = case.image_ZCYX[z] * case.row.image_scale + case.row.image_offset
    above = config.foreground_above
    foreground_YX = None if above is None else np.any(slice_CYX > above, axis=0)
    skimage_YX = slic_superpixels(
        slice_CYX,
        method="skimage",
        n_segments=config.n_segments,
        compactness=config.compactness,
        mask_YX=foreground_YX,
    )
    return SliceSuperpixels(
        slice_CYX=slice_CYX,
        superpixels={"cache": case.superpixels_ZYX[z], "skimage": skimage_YX},
        foreground_YX=foreground_YX,
        ground_truth_YX=None if case.ground_truth_ZYX is None else case.ground_truth_ZYX[z],
    )


def _measure(cache: Cache, case_id: str, z: int) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Metrics of one slice, and the sizes of its superpixels (of those in the foreground), by KINDS."""
    found = read_slice(cache, case_id, z)
    scores, sizes = {}, {}
    for kind, superpixels_YX in found.superpixels.items():
        scores[kind] = measure_slice(superpixels_YX, found.slice_CYX, found.ground_truth_YX)
        inside = (
            superpixels_YX.ravel() if found.foreground_YX is None else superpixels_YX[found.foreground_YX]
        )
        counts = np.bincount(inside)
        sizes[kind] = counts[counts > 0]
    return scores, sizes


def _spread(values: np.ndarray) -> dict[str, float]:
    """Mean and range of counts; all 0 where there is none."""
    array = np.asarray(values if len(values) else [0])
    return {"mean": float(array.mean()), "min": int(array.min()), "max": int(array.max())}


def _panel(found: SliceSuperpixels, kind: str, *, caption: str) -> np.ndarray:
    """One slice with the borders of its superpixels and, above it, a caption: uint8 (y, x, 3)."""
    grey_YX = rescale_slice(found.slice_CYX).mean(axis=0)
    factor = max(1, round(PANEL_PIXELS / max(grey_YX.shape)))

    def enlarged(array_YX: np.ndarray) -> np.ndarray:
        return array_YX.repeat(factor, axis=0).repeat(factor, axis=1)

    picture = np.repeat(enlarged((255 * grey_YX).astype(np.uint8))[..., None], 3, axis=2)
    outlines = [(found.superpixels[kind], SUPERPIXEL_RGB)]
    if found.ground_truth_YX is not None:
        outlines.append((found.ground_truth_YX, GROUND_TRUTH_RGB))
    for regions_YX, colour in outlines:
        picture[boundaries(enlarged(regions_YX))] = colour
    superpixels_YX = found.superpixels[kind]
    explained = explained_variance(superpixels_YX, found.slice_CYX)
    text = f"{caption}\n{kind}: {superpixels_YX.max() + 1} superpixels, {explained:.1%} explained"
    height, width = picture.shape[:2]
    canvas = Image.new("RGB", (width + GAP_PIXELS, height + CAPTION_PIXELS))
    canvas.paste(Image.fromarray(picture), (0, CAPTION_PIXELS))
    ImageDraw.Draw(canvas).text((4, GAP_PIXELS), text, font=ImageFont.load_default(13))
    return np.asarray(canvas)
