"""The pictures of cases that a report shows, taken from the cache and from saved segmentations.

Chooses cases, slices, pixels and components, and says what is seen; drawing is left to `train.report_figures`.
Called by `train.report`.

Axes: z slice, y row, x column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from supercl_core.cache_reader import Cache, CachedCase, open_cache
from supercl_core.errors import SuperCLError
from supercl_core.pictures import grey_slice, pixel_aspect
from supercl_core.volumes import read_volume
from train import report_figures as figures
from train.comparison import Run, number
from train.metrics import MEAN

FEATURE_STRIDE: Final = 16
"""Pixels of a slice between two pixels of the encoder's output, along y and x."""

NUM_ANCHORS: Final = 4
NUM_COMPONENTS: Final = 4
NUM_MEMBERS: Final = 6
"""Slices shown of each component."""

CROP_MARGIN: Final = 12
"""Pixels shown around a structure, at least."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run of the page."""

    key: str
    """A, B, ...: what pictures call it."""
    colour: str
    run: Run

    @property
    def name(self) -> str:
        return self.run.name


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture with its texts."""

    uri: str
    """A data: URI; empty where there is nothing to show, which `caption` then explains."""
    alt: str
    caption: str
    entry: Entry | None = None
    """The run it belongs to."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Pictures that stand side by side under one title."""

    title: str
    pictures: tuple[Picture, ...]


def cache_pictures(entries: list[Entry], evaluated: list[Entry], cache_path: Path | None) -> dict[str, Any]:
    """What the page shows of the cache: `segmentations`, `superpixels`, `igcp`, and `without_cache`, a reason."""
    path = cache_path or Path(entries[0].run.record["cache"]["path"])
    try:
        cache = open_cache(path)
        ranked = _ranked_cases(evaluated)
        example_case = cache.case(ranked[len(ranked) // 2][0] if ranked else cache.done[0].id)
        return {
            "segmentations": _segmentations(cache, evaluated, ranked),
            "superpixels": _superpixels(example_case),
            "igcp": _igcp(cache, entries),
            "without_cache": "",
        }
    except SuperCLError as error:
        reason = f"{error.one_line()} ({error.where})"
        return {"segmentations": [], "superpixels": None, "igcp": None, "without_cache": reason}


def _ranked_cases(evaluated: list[Entry]) -> list[tuple[str, float]]:
    """Cases and their mean DSC (0..1), best first, of the run that `_leading` names."""
    if not evaluated:
        return []
    return sorted(_leading(evaluated).run.case_dsc()[MEAN].items(), key=lambda item: (-item[1], item[0]))


def _leading(evaluated: list[Entry]) -> Entry:
    """The run whose cases are ranked: the last one with a pre-trained encoder, or the first of all."""
    return next((entry for entry in reversed(evaluated) if entry.run.record["init"]), evaluated[0])


def _segmentations(cache: Cache, evaluated: list[Entry], ranked: list[tuple[str, float]]) -> list[Gallery]:
    """The best, the median and the worst case, with the outlines of every run."""
    if not ranked:
        return []
    chosen = {0: "Best", len(ranked) // 2: "Median", len(ranked) - 1: "Worst"}
    key = _leading(evaluated).key
    galleries = []
    for index, rank in sorted(chosen.items()):
        case_id, dsc = ranked[index]
        case = cache.case(case_id)
        z = _middle_slice(case)
        galleries.append(
            Gallery(
                title=f"{rank} case by the mean DSC of run {key} ({100 * dsc:.1f} %): {case_id}, slice {z}",
                pictures=tuple(_outlined(case, z, evaluated)),
            )
        )
    return galleries


def _outlined(case: CachedCase, z: int, evaluated: list[Entry]) -> list[Picture]:
    truth_ZYX = case.ground_truth_ZYX
    if truth_ZYX is None:
        return [Picture(uri="", alt="", caption="The cache has no ground truth of this case.")]
    predictions: dict[str, np.ndarray | str] = {}
    for entry in evaluated:
        try:
            volume = read_volume(entry.run.path / "predictions" / f"{case.row.id}.nii.gz")
        except SuperCLError as error:
            predictions[entry.key] = f"No segmentation to show: {error.one_line()}."
            continue
        found_ZYX = volume.array_CZYX[0]
        same = found_ZYX.shape == truth_ZYX.shape
        predictions[entry.key] = found_ZYX[z] if same else "The segmentation has another shape than the case."
    label_maps = [truth_ZYX[z], *(found for found in predictions.values() if not isinstance(found, str))]
    box = _crop(np.any([label_map > 0 for label_map in label_maps], axis=0))
    pictures = []
    for entry in evaluated:
        found = predictions[entry.key]
        if isinstance(found, str):
            pictures.append(Picture(uri="", alt="", caption=found, entry=entry))
            continue
        dsc = entry.run.case_dsc()[MEAN].get(case.row.id)
        text = f"DSC of the case {number(dsc and 100 * dsc)} %"
        # The wide truth shows on both sides of the narrow segmentation where the two agree.
        truth = figures.Outline(
            label_map_YX=truth_ZYX[z][box], colour=figures.TRUTH_COLOUR, width=2.8, rim=1.0
        )
        segmentation = figures.Outline(label_map_YX=found[box], colour=entry.colour, width=1.2)
        uri = _slice_picture(case, z, box=box, outlines=[truth, segmentation])
        alt = f"Slice {z} of case {case.row.id}: ground truth and segmentation of run {entry.key}, {text}."
        pictures.append(Picture(uri=uri, alt=alt, caption=text, entry=entry))
    return pictures


def _superpixels(case: CachedCase) -> dict[str, Any]:
    """One slice with its superpixels and ASP map, and the ILCP pairs on it."""
    z = _middle_slice(case)
    superpixels_YX = np.asarray(case.superpixels_ZYX[z])
    num_superpixels = int(superpixels_YX.max()) + 1
    height, width = superpixels_YX.shape
    centres = slice(FEATURE_STRIDE // 2, None, FEATURE_STRIDE)
    ids = superpixels_YX[centres, centres]
    sizes = np.bincount(ids.ravel())
    shared = np.flatnonzero(sizes > 1)
    candidates = shared if len(shared) else np.flatnonzero(sizes)
    num_anchors = min(NUM_ANCHORS, len(candidates))
    anchors = []
    for label in candidates[np.arange(1, 2 * num_anchors, 2) * len(candidates) // (2 * num_anchors)]:
        members = np.argwhere(ids == label)
        row, column = members[len(members) // 2]
        anchors.append((int(row), int(column)))
    asp_uri = figures.slice_picture(
        case.asp_ZGG[z].astype(np.float32), window=(0, 1), aspect=pixel_aspect(case.row) * height / width
    )
    borders = figures.Outline(label_map_YX=superpixels_YX, colour=figures.BORDER_COLOUR, width=0.7)
    pairs_uri = figures.pixel_pairs_picture(
        grey_slice(case, z),
        superpixels_YX=superpixels_YX,
        stride=FEATURE_STRIDE,
        anchors=anchors,
        window=(0, 255),
        aspect=pixel_aspect(case.row),
    )
    return {
        "overlay": Gallery(
            title=f"Case {case.row.id}, slice {z}",
            pictures=(
                Picture(
                    uri=_slice_picture(case, z), alt=f"Slice {z} of case {case.row.id}.", caption="Slice"
                ),
                Picture(
                    uri=_slice_picture(case, z, outlines=[borders]),
                    alt=f"The slice with the borders of {num_superpixels} superpixels.",
                    caption=f"{num_superpixels} superpixels",
                ),
                Picture(
                    uri=asp_uri,
                    alt="The average-superpixel map of the slice, coarse and without texture.",
                    caption=f"ASP map, {case.asp_ZGG.shape[1]} × {case.asp_ZGG.shape[2]}",
                ),
                Picture(
                    uri=pairs_uri,
                    alt=f"Pixels of the stride-{FEATURE_STRIDE} map with {len(anchors)} anchors and their positives.",
                    caption=f"ILCP: {len(anchors)} anchors (stars), their superpixels, and their positives (discs)",
                ),
            ),
        ),
        "num_pixels": ids.size,
        "num_shared": int(sizes[shared].sum()),
    }


def _igcp(cache: Cache, entries: list[Entry]) -> dict[str, Any]:
    """Some components of the weak labels, from the largest to the smallest, with some of their slices."""
    used = next((labels for entry in reversed(entries) if (labels := entry.run.record["weak_labels"])), None)
    labels = cache.weak_labels(used["name"] if used else None)
    level = used["level"] if used else 0
    ccl = labels.ccl[level]
    sizes = np.bincount(ccl)
    by_size = np.argsort(-sizes, kind="stable")
    galleries = []
    for component in _spread(by_size[sizes[by_size] > 1], NUM_COMPONENTS):
        members = np.flatnonzero(ccl == component)
        num_cases = len(np.unique(cache.slice_case[members]))
        pictures = []
        for index in _spread(members, NUM_MEMBERS):
            case_id, z = cache.rows[cache.slice_case[index]].id, int(cache.slice_z[index])
            name = f"{case_id}, slice {z}"
            uri = _slice_picture(cache.case(case_id), z, inches=1.2)
            pictures.append(Picture(uri=uri, alt=f"A slice of the component: {name}.", caption=name))
        title = f"Component {component}: {len(members)} slices of {_count(num_cases, 'case')}"
        galleries.append(Gallery(title=title, pictures=tuple(pictures)))
    spanning = [len(np.unique(cache.slice_case[ccl == component])) > 1 for component in range(len(sizes))]
    return {
        "galleries": galleries,
        "name": labels.name,
        "level": level % len(labels.ccl),
        "num_levels": len(labels.ccl),
        "used": used is not None,
        "num_components": len(sizes),
        "num_slices": len(ccl),
        "share_across": float(sizes[spanning].sum() / len(ccl)),
    }


def _spread(values: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the values, evenly spread, the first and the last among them."""
    return values[np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).astype(int))]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _middle_slice(case: CachedCase) -> int:
    """The middle one of the slices that hold a structure, or of all slices."""
    truth_ZYX = case.ground_truth_ZYX
    used = np.flatnonzero(truth_ZYX.any(axis=(1, 2))) if truth_ZYX is not None else np.zeros(0, int)
    return int(used[len(used) // 2]) if len(used) else case.row.shape[1] // 2


def _crop(mask_YX: np.ndarray) -> tuple[slice, slice]:
    """A window around a mask, with a margin of half its size; the whole slice around an empty one."""
    if not mask_YX.any():
        return slice(None), slice(None)
    window = []
    for axis, size in enumerate(mask_YX.shape):
        used = np.flatnonzero(mask_YX.any(axis=1 - axis))
        margin = max(CROP_MARGIN, (used[-1] - used[0]) // 2)
        window.append(slice(max(0, int(used[0] - margin)), min(size, int(used[-1] + margin + 1))))
    return window[0], window[1]


def _slice_picture(
    case: CachedCase,
    z: int,
    *,
    box: tuple[slice, slice] = (slice(None), slice(None)),
    outlines: Sequence[figures.Outline] = (),
    inches: float = 2.6,
) -> str:
    return figures.slice_picture(
        grey_slice(case, z)[box],
        window=(0, 255),
        aspect=pixel_aspect(case.row),
        outlines=outlines,
        inches=inches,
    )
