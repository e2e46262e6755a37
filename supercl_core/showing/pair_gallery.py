"""A picture of what weak labels put together: some components of their levels, and some slices of each.

Called by `supercl inspect --pairs --gallery`; the figures beside it are those of `supercl_core.showing.pair_audit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from supercl_core.cache.reader import Cache, WeakLabels
from supercl_core.cache.weak_labels import auto_level
from supercl_core.files import atomic_file
from supercl_core.showing.pair_audit import audited_slices
from supercl_core.showing.pictures import boundaries, class_name, class_rgb, grey_slice
from supercl_core.showing.sheets import (
    PAGE_RGB,
    ROW_PIXELS,
    SOFT_RGB,
    TEXT_RGB,
    drawable,
    fitted,
    grey,
    resized,
    stacked,
    text_strip,
)

MAX_LEVELS: Final = 6
"""The finest, the coarsest, the one that training takes, and others spread between them."""

NUM_MIDDLE: Final = 3
"""Components of a level beside its largest: those in the middle of all by size."""

MAX_SLICES: Final = 8
"""Of a component."""

SLICE_PIXELS: Final = 109
"""Longer side of a slice."""

NUM_COLUMNS: Final = 6
"""Of the sheet: a component of 2 slices takes one, of MAX_SLICES three."""

_CAPTION_PIXELS: Final = 28
_BLOCK_PIXELS: Final = _CAPTION_PIXELS + SLICE_PIXELS
_INNER_GAP: Final = 4
_BLOCK_GAP: Final = 36


def write_gallery(
    path: Path, cache: Cache, labels: WeakLabels, *, batch_size: int, test_case_ids: Sequence[str] = ()
) -> None:
    """Write the `gallery` as a PNG file. Raises UsageError where no case is left."""
    sheet = gallery(cache, labels, batch_size=batch_size, test_case_ids=test_case_ids)
    with atomic_file(path) as wip:
        sheet.save(wip, format="PNG", optimize=True)


def gallery(
    cache: Cache, labels: WeakLabels, *, batch_size: int, test_case_ids: Sequence[str] = ()
) -> Image.Image:
    """Components of `labels`, level by level: slices in grey, the ground truth outlined; RGB.

    `batch_size` tells which level training takes. `test_case_ids` are left out, as in `pair_audit.audit`. Raises
    UsageError where no case is left.
    """
    slices = audited_slices(cache, test_case_ids)
    patient = cache.slice_patient[slices]
    ccl = labels.ccl[:, slices]
    auto = auto_level(ccl, batch_size)
    strips, shown = [], []
    for level in shown_levels(len(ccl), auto):
        component, sizes = np.unique(ccl[level], return_inverse=True, return_counts=True)[1:]
        blocks = []
        for place, number in enumerate(shown_components(sizes)):
            members = np.flatnonzero(component == number)
            chosen = slices[members[spread(patient[members])]]
            counts = (
                f"{_count(len(members), 'slice')} of {_count(len(np.unique(patient[members])), 'patient')}"
            )
            text = f"the largest: {counts}" if place == 0 and len(sizes) > 1 else counts
            blocks.append(_block(text, [_picture(cache, index) for index in chosen]))
            shown += list(chosen)
        name = f"Level {level}, which training takes" if level == auto else f"Level {level}"
        strips += [text_strip(f"{name}: {_count(len(sizes), 'component')}", 26, TEXT_RGB), *_flowed(blocks)]
    facts = (
        f"{drawable(cache.name)} · {_count(len(slices), 'slice')} · batches of {batch_size:,} · of each level the "
        f"largest component and {NUM_MIDDLE} of middle size · of each component at most {MAX_SLICES} slices"
    )
    return stacked(
        [
            text_strip(f"Components of the weak labels {drawable(labels.name)!r}", 34, TEXT_RGB),
            text_strip(facts, 19, SOFT_RGB),
            *_legend(cache, shown),
            *strips,
        ]
    )


def shown_levels(num_levels: int, auto: int) -> list[int]:
    """At most MAX_LEVELS levels: the finest, the coarsest, `auto`, and others evenly between the first two."""
    even = np.linspace(0, num_levels - 1, MAX_LEVELS - 1).round().astype(int)
    return sorted({auto, *even.tolist()})


def shown_components(sizes: np.ndarray) -> list[int]:
    """Of components of these `sizes` the largest, then NUM_MIDDLE in the middle by size, larger ones first."""
    order = np.argsort(-sizes, kind="stable")
    start = max(1, (len(order) - NUM_MIDDLE) // 2)
    return [int(number) for number in (order[0], *order[start : start + NUM_MIDDLE])]


def spread(patient: np.ndarray) -> np.ndarray:
    """At most MAX_SLICES slices of a component, of as many patients as can be: indices, ascending.

    `patient`: integers (n,), the patient of each slice. The choice is random, and always the same.
    """
    shuffled = np.random.default_rng(0).permutation(len(patient))
    by_patient = np.argsort(patient[shuffled], kind="stable")
    grouped = patient[shuffled[by_patient]]
    turn = np.empty_like(shuffled)
    turn[by_patient] = np.arange(len(grouped)) - np.searchsorted(grouped, grouped)
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:MAX_SLICES]])


def _picture(cache: Cache, index: int) -> Image.Image:
    """Slice `index` of the cache, small, with the classes of its ground truth outlined."""
    case = cache.case(cache.rows[cache.slice_case[index]].id)
    z = int(cache.slice_z[index])
    plain = grey(grey_slice(case, z), fitted(case, SLICE_PIXELS))
    if case.ground_truth_ZYX is None:
        return plain
    picture = np.array(plain)
    truth_YX = resized(case.ground_truth_ZYX[z], plain.size)
    outline_YX = boundaries(truth_YX) & (truth_YX > 0)
    for value in np.unique(truth_YX[outline_YX]):
        picture[outline_YX & (truth_YX == value)] = class_rgb(int(value))
    return Image.fromarray(picture)


def _legend(cache: Cache, shown: Iterable[int]) -> list[Image.Image]:
    """A strip with the colours of the classes that the slices `shown` have; none without ground truth."""
    present: set[int] = set()
    for index in shown:
        truth_ZYX = cache.case(cache.rows[cache.slice_case[index]].id).ground_truth_ZYX
        if truth_ZYX is not None:
            present |= set(np.unique(truth_ZYX[cache.slice_z[index]]).tolist()) - {0}
    if not present:
        return []
    strip = Image.new("RGB", (ROW_PIXELS, 26), PAGE_RGB)
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(19)
    x = 0
    for value in sorted(present):
        text = drawable(class_name(cache.class_names, value))
        draw.rounded_rectangle((x, 5, x + 15, 20), 3, class_rgb(value))
        draw.text((x + 22, 0), text, SOFT_RGB, font)
        x += 22 + round(font.getlength(text)) + 24
    return [strip]


def _block(text: str, pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side below a line of text."""
    font = ImageFont.load_default(18)
    width = sum(picture.width + _INNER_GAP for picture in pictures) - _INNER_GAP
    width = max(width, round(font.getlength(text)) + 1)
    block = Image.new("RGB", (width, _BLOCK_PIXELS), PAGE_RGB)
    ImageDraw.Draw(block).text((0, 0), text, SOFT_RGB, font)
    x = 0
    for picture in pictures:
        block.paste(picture, (x, _CAPTION_PIXELS))
        x += picture.width + _INNER_GAP
    return block


def _flowed(blocks: Sequence[Image.Image]) -> list[Image.Image]:
    """Blocks on strips of NUM_COLUMNS columns, each over as many columns as it needs."""
    pitch = (ROW_PIXELS + _BLOCK_GAP) // NUM_COLUMNS
    strips: list[Image.Image] = []
    column = NUM_COLUMNS
    for block in blocks:
        needed = -(-(block.width + _BLOCK_GAP) // pitch)
        if column + needed > NUM_COLUMNS:
            strips.append(Image.new("RGB", (ROW_PIXELS, _BLOCK_PIXELS), PAGE_RGB))
            column = 0
        strips[-1].paste(block, (column * pitch, 0))
        column += needed
    return strips


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s'[: number != 1]}"
