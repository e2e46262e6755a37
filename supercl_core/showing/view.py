"""A contact sheet of one slice: what the cache holds of it, and the slices that its weak labels call alike.

Chooses what is shown and lays it out; what single slices look like is left to `supercl_core.showing.pictures`. Called
by `supercl view`. Axes: y row, x column.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from supercl_core.cache.reader import Cache, CachedCase, WeakLabels
from supercl_core.errors import UsageError
from supercl_core.files import atomic_file
from supercl_core.showing.pictures import BORDER_RGB, asp_slice, boundaries, class_name, class_rgb, grey_slice
from supercl_core.showing.sheets import (
    GAP,
    PAGE_RGB,
    ROW_PIXELS,
    SOFT_RGB,
    TEXT_RGB,
    cut,
    drawable,
    fitted,
    grey,
    resized,
    stacked,
    text_strip,
)

MAX_NEIGHBOURS: Final = 6
"""Slices shown below."""

PANEL_PIXELS: Final = 440
NEIGHBOUR_PIXELS: Final = 284
"""Longer side of a picture on the sheet: four of the ones and six of the others make a row."""

TINT: Final = 0.4
"""Share of a class's colour within its outline."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A slice that the weak labels put beside another one."""

    index: int
    """Among all slices of the cache."""
    level: int
    """The finest level of the labels at which both are in one component."""
    similarity: float | None
    """Cosine, -1..1, where one of the two is the nearest of the other."""


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """A picture with a title above and notes below it, each with the colour of its swatch, or None."""

    picture: Image.Image
    title: str
    notes: tuple[tuple[str, tuple[int, int, int] | None], ...] = ()


def write_contact_sheet(path: Path, case: CachedCase, z: int) -> None:
    """Write the contact sheet of slice `z` of a case as a PNG file. Raises UsageError where there is no such slice."""
    check_slice(case, z)
    with atomic_file(path) as wip:
        contact_sheet(case, z).save(wip, format="PNG", optimize=True)


def check_slice(case: CachedCase, z: int) -> None:
    """Raise UsageError where the case has no slice `z`."""
    num_slices = case.row.shape[1]
    if not 0 <= z < num_slices:
        raise UsageError(
            f"The case {case.row.id!r} has no slice {z}.",
            expected=f"0 to {num_slices - 1}",
            found=z,
            next_step=f"Ask for the middle one, {num_slices // 2}, for example.",
        )


def contact_sheet(case: CachedCase, z: int) -> Image.Image:
    """The slice, its superpixels, ASP map and ground truth, and its neighbours below; RGB."""
    cache = case.cache
    labels = cache.weak_labels()
    neighbours = nearest_slices(cache, labels, int(cache.case_slices([case.row.id])[z]))
    title, facts = _heading(case, z)
    return stacked(
        [
            text_strip(title, 34, TEXT_RGB),
            text_strip(facts, 19, SOFT_RGB),
            *_strips(_slice_panels(case, z)),
            text_strip("Neighbours", 26, TEXT_RGB),
            text_strip(
                f"the nearest slice by the weak labels {drawable(labels.name)!r}, then those of its component, "
                "finest level first",
                19,
                SOFT_RGB,
            ),
            *_strips([_neighbour_panel(cache, neighbour) for neighbour in neighbours]),
        ]
    )


def nearest_slices(cache: Cache, labels: WeakLabels, index: int) -> list[Neighbour]:
    """At most MAX_NEIGHBOURS neighbours of slice `index` of a cache, the nearest one first.

    Then those that share a component with it, at finer levels first; within a level those of known similarity, most
    similar first, then slices of other cases, then of its own.
    """
    shared = labels.ccl == labels.ccl[:, [index]]
    others = np.flatnonzero(shared[-1] & (np.arange(cache.num_slices) != index))
    level = shared[:, others].argmax(axis=0)
    is_nearest = others == labels.nearest[0, index]
    known = np.where(labels.nearest[0, others] == index, labels.similarity[0, others], np.nan)
    known = np.where(is_nearest, labels.similarity[0, index], known)
    same_case = cache.slice_case[others] == cache.slice_case[index]
    order = np.lexsort((others, same_case, -known, level, ~is_nearest))[:MAX_NEIGHBOURS]
    return [
        Neighbour(
            index=int(others[place]),
            level=int(level[place]),
            similarity=None if np.isnan(known[place]) else float(known[place]),
        )
        for place in order
    ]


# ---------------------------------------------------------------- what is shown


def _slice_panels(case: CachedCase, z: int) -> list[_Panel]:
    names = case.cache.attributes["channel_names"]
    size = fitted(case, PANEL_PIXELS)
    panels = [
        _Panel(picture=grey(grey_slice(case, z, channel), size), title=f"Slice: {drawable(name)}")
        for channel, name in enumerate(names)
    ]
    superpixels_YX = case.superpixels_ZYX[z]
    outlined = np.array(panels[0].picture)
    outlined[boundaries(resized(superpixels_YX, size))] = BORDER_RGB
    count = len(np.unique(superpixels_YX))
    panels.append(_Panel(picture=Image.fromarray(outlined), title=f"{count} superpixels"))
    asp = Image.fromarray(resized(asp_slice(case, z), size)).convert("RGB")
    panels.append(_Panel(picture=asp, title="ASP: mean of each superpixel"))
    if case.ground_truth_ZYX is not None:
        panels.append(_truth_panel(case, case.ground_truth_ZYX[z], panels[0].picture))
    return panels


def _truth_panel(case: CachedCase, truth_YX: np.ndarray, slice_picture: Image.Image) -> _Panel:
    picture = np.array(slice_picture)
    shown_YX = resized(truth_YX, slice_picture.size)
    borders_YX = boundaries(shown_YX)
    present = [int(value) for value in np.unique(truth_YX) if value]
    for value in present:
        inside_YX = shown_YX == value
        colour = np.array(class_rgb(value))
        picture[inside_YX] = np.rint((1 - TINT) * picture[inside_YX] + TINT * colour)
        picture[inside_YX & borders_YX] = colour
    notes = tuple(
        (drawable(class_name(case.cache.class_names, value)), class_rgb(value)) for value in present
    )
    title = "Ground truth" if present else "Ground truth: background only"
    return _Panel(picture=Image.fromarray(picture), title=title, notes=notes)


def _neighbour_panel(cache: Cache, neighbour: Neighbour) -> _Panel:
    case = cache.case(cache.rows[cache.slice_case[neighbour.index]].id)
    z = int(cache.slice_z[neighbour.index])
    text = f"level {neighbour.level}"
    if neighbour.similarity is not None:
        text += f" · similarity {neighbour.similarity:.3f}"
    return _Panel(
        picture=grey(grey_slice(case, z), fitted(case, NEIGHBOUR_PIXELS)),
        title=f"{drawable(case.row.id)}, z {z}",
        notes=((text, None),),
    )


def _heading(case: CachedCase, z: int) -> tuple[str, str]:
    """A title and a line below it."""
    row = case.row
    channels, num_slices, height, width = row.shape
    spacing = "spacing unknown"
    if row.spacing_mm:
        spacing = "spacing {:.4g} x {:.4g} x {:.4g} mm (z, y, x)".format(*row.spacing_mm)
    parts = [f"z {z} of 0 to {num_slices - 1}", f"{height} x {width} pixels", spacing]
    if channels > 1:
        parts.insert(2, f"{channels} channels")
    return f"{drawable(row.id)}, slice {z}", " · ".join([drawable(case.cache.name), *parts])


# ---------------------------------------------------------------- layout


def _strips(panels: list[_Panel]) -> list[Image.Image]:
    """The panels side by side, in as many strips as their widths ask for."""
    rows: list[list[_Panel]] = []
    left = ROW_PIXELS
    for panel in panels:
        if left + _panel_width(panel) > ROW_PIXELS:
            rows.append([])
            left = 0
        rows[-1].append(panel)
        left += _panel_width(panel) + GAP
    return [_strip(row) for row in rows]


def _strip(panels: list[_Panel]) -> Image.Image:
    """Panels side by side on a strip that is cut to its content."""
    strip = Image.new("RGB", (ROW_PIXELS, 2 * ROW_PIXELS), PAGE_RGB)
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(18)
    left = bottom = 0
    for panel in panels:
        width = _panel_width(panel)
        draw.text((left, 0), cut(panel.title, font, width), TEXT_RGB, font)
        strip.paste(panel.picture, (left, 30))
        x, y = left, 30 + panel.picture.height + 8
        for text, colour in panel.notes:
            swatch = 22 if colour else 0
            shown = cut(text, font, width - swatch)
            length = swatch + round(font.getlength(shown))
            if x > left and x + length > left + width:
                x, y = left, y + 26
            if colour:
                draw.rounded_rectangle((x, y + 3, x + 15, y + 18), 3, colour)
            draw.text((x + swatch, y), shown, SOFT_RGB, font)
            x += length + 20
        left += width + GAP
        bottom = max(bottom, y + 26)
    return strip.crop((0, 0, left - GAP, bottom))


def _panel_width(panel: _Panel) -> int:
    """Narrow pictures leave room for the title."""
    return max(panel.picture.width, 200)
