"""The pictures of cases that a report shows, taken from the cache and from saved segmentations.

Chooses cases, slices, pixels and components, and says what is seen; drawing is left to `train.report.figures`.
Called by `train.report.runs` and `train.report.study`.

Axes: z slice, y row, x column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from supercl_core.cache.reader import Cache, CachedCase, open_cache
from supercl_core.errors import SuperCLError
from supercl_core.formats.volumes import read_volume
from supercl_core.showing.pictures import grey_slice, pixel_aspect
from train.comparison import Run
from train.report import figures
from train.report.parts import Entry, Gallery, Picture

DEEPEST_STRIDE: Final = 16
"""Pixels of a slice between two pixels of the encoder's output, along y and x."""

ANCHOR_CENTRES: Final = ((1 / 3, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1 / 3), (2 / 3, 2 / 3))
"""About where anchors are shown, as parts of the slice's height and width."""

NUM_COMPONENTS: Final = 4
NUM_MEMBERS: Final = 6
"""Slices shown of each component."""

CROP_MARGIN: Final = 12
"""Pixels shown around a structure, at least."""


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """A case to show with its segmentations."""

    title: str
    case_id: str
    segmentations: tuple[tuple[Entry, Path, str], ...]
    """Of each a run or an arm, the file, and a caption."""


def cache_pictures(
    cache_path: Path | None, *, segmented: Sequence[Segmented], pretrained: Sequence[Run]
) -> dict[str, Any]:
    """What a page shows of the cache: `segmentations`, `superpixels`, `igcp`, and `without_cache`, a reason.

    Pairs are those of the last of the pre-training runs `pretrained` that uses them; without any, those that the
    cache offers. Also gives the `class_colours` of the segmentations, by name. Where the cache cannot be read, or is
    not known (None), the reason says so and nothing is shown.
    """
    nothing: dict[str, Any] = {"segmentations": [], "class_colours": {}, "superpixels": None, "igcp": None}
    if cache_path is None:
        return {**nothing, "without_cache": "no run names one yet"}
    try:
        cache = open_cache(cache_path)
        example = cache.case(segmented[len(segmented) // 2].case_id if segmented else cache.done[0].id)
        return {
            "segmentations": [_segmentations(cache.case(shown.case_id), shown) for shown in segmented],
            "class_colours": {
                name: figures.class_colour(value) for value, name in enumerate(cache.class_names) if value
            },
            "superpixels": _superpixels(example, pretrained),
            "igcp": _igcp(cache, pretrained),
            "without_cache": "",
        }
    except SuperCLError as error:
        reason = f"{error.one_line()} ({error.where})"
        return {**nothing, "without_cache": reason}


def extremes(dsc_by_case: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """The best, the median and the worst case: of each its rank, its id and its DSC; fewer where they coincide."""
    ranked = sorted(dsc_by_case.items(), key=lambda item: (-item[1], item[0]))
    if not ranked:
        return []
    chosen = {0: "Best", len(ranked) // 2: "Median", len(ranked) - 1: "Worst"}
    return [(rank, *ranked[index]) for index, rank in sorted(chosen.items())]


def _segmentations(case: CachedCase, shown: Segmented) -> Gallery:
    """The ground truth of a slice, filled, and each segmentation as lines over it."""
    truth_ZYX, z = case.ground_truth_ZYX, _middle_slice(case)
    title = f"{shown.title}: {case.row.id}, slice {z}"
    if truth_ZYX is None:
        nothing = Picture(uri="", alt="", caption="The cache has no ground truth of this case.")
        return Gallery(title=title, pictures=(nothing,))
    found = [_read_segmentation(path, truth_ZYX.shape) for _, path, _ in shown.segmentations]
    label_maps = [truth_ZYX[z], *(volume[z] for volume in found if not isinstance(volume, str))]
    box = _crop(np.any([label_map > 0 for label_map in label_maps], axis=0))
    truth_YX = truth_ZYX[z][box]
    pictures = [
        Picture(
            uri=_slice_picture(case, z, box=box, filled_YX=truth_YX),
            alt=f"Slice {z} of case {case.row.id} with its ground truth.",
            caption="Ground truth",
        )
    ]
    for (entry, _, caption), volume in zip(shown.segmentations, found, strict=True):
        if isinstance(volume, str):
            pictures.append(Picture(uri="", alt="", caption=volume, entry=entry))
            continue
        segmentation_YX = volume[z][box]
        outlines = [
            figures.Outline(
                label_map_YX=segmentation_YX == value, colour=figures.class_colour(int(value)), width=1.3
            )
            for value in np.unique(segmentation_YX[segmentation_YX > 0])
        ]
        pictures.append(
            Picture(
                uri=_slice_picture(case, z, box=box, filled_YX=truth_YX, outlines=outlines),
                alt=f"The slice with ground truth and segmentation of {entry.mark.key}, {caption}.",
                caption=caption,
                entry=entry,
            )
        )
    return Gallery(title=title, pictures=tuple(pictures))


def _read_segmentation(path: Path, shape: tuple[int, ...]) -> np.ndarray | str:
    """The segmentation (z, y, x), or why there is none to show."""
    try:
        segmentation_ZYX = read_volume(path).array_CZYX[0]
    except SuperCLError as error:
        return f"No segmentation to show: {error.one_line()}."
    if segmentation_ZYX.shape != shape:
        return "The segmentation has another shape than the case."
    return segmentation_ZYX


def _superpixels(case: CachedCase, pretrained: Sequence[Run]) -> dict[str, Any]:
    """One slice with its superpixels and ASP map, and the ILCP pairs on it."""
    strides = [run.record["config"].get("ilcp_stride") for run in pretrained if _uses_ilcp(run)]
    stride = (strides[-1] if strides else None) or DEEPEST_STRIDE
    z = _middle_slice(case)
    superpixels_YX = np.asarray(case.superpixels_ZYX[z])
    num_superpixels = int(superpixels_YX.max()) + 1
    height, width = superpixels_YX.shape
    centres = slice(stride // 2, None, stride)
    ids = superpixels_YX[centres, centres]
    sizes = np.bincount(ids.ravel())
    shared = np.flatnonzero(sizes > 1)
    candidates = shared if len(shared) else np.flatnonzero(sizes)
    positions = np.argwhere(np.isin(ids, candidates))
    anchors: list[tuple[int, int]] = []
    for centre in ANCHOR_CENTRES:
        free = positions[~np.isin(ids[tuple(positions.T)], [ids[anchor] for anchor in anchors])]
        if len(free):
            distances = np.linalg.norm((free + 0.5) / ids.shape - centre, axis=1)
            row, column = free[np.argmin(distances)]
            anchors.append((int(row), int(column)))
    asp_uri = figures.slice_picture(
        case.asp_ZGG[z].astype(np.float32), window=(0, 1), aspect=pixel_aspect(case.row) * height / width
    )
    borders = figures.Outline(label_map_YX=superpixels_YX, colour=figures.BORDER_COLOUR, width=0.7)
    pairs_uri = figures.pixel_pairs_picture(
        grey_slice(case, z),
        superpixels_YX=superpixels_YX,
        stride=stride,
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
                    alt=f"Pixels of the stride-{stride} map with {len(anchors)} anchors and their positives.",
                    caption=f"ILCP: {len(anchors)} anchors (stars), their superpixels, and their positives (discs)",
                ),
            ),
        ),
        "stride": stride,
        "num_pixels": ids.size,
        "num_shared": int(sizes[shared].sum()),
    }


def _uses_ilcp(run: Run) -> bool:
    """Whether a pre-training run has a weight for L_intra, the second of its `weights`."""
    weights = run.record["config"].get("weights")
    return isinstance(weights, list) and len(weights) > 1 and weights[1] != 0


def _igcp(cache: Cache, pretrained: Sequence[Run]) -> dict[str, Any]:
    """Some components of the weak labels, from the largest to the smallest, with some of their slices."""
    used = next((labels for run in reversed(pretrained) if (labels := run.record["weak_labels"])), None)
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
    """The middle one of the slices that show as many classes as any, or of all slices."""
    truth_ZYX = case.ground_truth_ZYX
    shown = [len(np.unique(truth_YX)) for truth_YX in truth_ZYX] if truth_ZYX is not None else [1]
    used = np.flatnonzero(np.array(shown) == max(shown))
    return int(used[len(used) // 2]) if max(shown) > 1 else case.row.shape[1] // 2


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
    filled_YX: np.ndarray | None = None,
    outlines: Sequence[figures.Outline] = (),
    inches: float = 2.6,
) -> str:
    return figures.slice_picture(
        grey_slice(case, z)[box],
        window=(0, 255),
        aspect=pixel_aspect(case.row),
        filled_YX=filled_YX,
        outlines=outlines,
        inches=inches,
    )
