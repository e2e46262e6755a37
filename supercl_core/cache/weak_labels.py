"""What both halves must agree on about weak labels: names, the grid of descriptors, and which level training takes.

Labels are computed offline by `preprocess.ccl`, and in training by `train.refresh`; how good they are is told by
`supercl_core.showing.pair_audit`.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import numpy as np

from supercl_core.cache.schema import ASP_GRID

Linked = Literal["any", "other-cases"]
"""Which slices may be linked at the finest level: any two, or only slices of different patients (`cases.patients`)."""

LINKED: Final[tuple[str, ...]] = get_args(Linked)

LinkRule = Literal["auto", "any", "other-cases"]
"""What may be asked for; `auto` is `other-cases` where there are two patients, else `any`."""

INTENSITY: Final = "intensity"
"""Name of the descriptors from intensities, which every cache has in its arrays `asp`."""

MIN_COMPONENTS: Final = 5
"""The hierarchy stops before a level with fewer components (DESIGN)."""


def linked(neighbours: LinkRule, patient_of_slice: np.ndarray) -> Linked:
    """The rule of the links that was asked for. `patient_of_slice`: integers (n,)."""
    if neighbours == "auto":
        return "other-cases" if (patient_of_slice != patient_of_slice[0]).any() else "any"
    return neighbours


def labels_name(descriptors: str, neighbours: LinkRule) -> str:
    """The name of the labels made of some descriptors: that of these, and the rule of the links unless it is `auto`."""
    return descriptors if neighbours == "auto" else f"{descriptors}-{neighbours}"


def grid_positions(size: int) -> np.ndarray:
    """The rows, or columns, of a slice of `size` where its descriptor is read, int64 (g,): centres of equal parts."""
    return (2 * np.arange(ASP_GRID) + 1) * size // (2 * ASP_GRID)


def expected_positives(labels: np.ndarray, batch_size: int) -> float:
    """Other slices with the label of an anchor that a random batch holds, on average over anchors.

    `labels`: integers (n,), the label of every slice that batches are drawn from.
    """
    counts = np.unique(labels, return_counts=True)[1]
    return float((batch_size - 1) * (counts * (counts - 1)).sum() / (len(labels) * max(1, len(labels) - 1)))


def auto_level(ccl: np.ndarray, batch_size: int) -> int:
    """The level that training takes by itself: the finest with a positive per anchor, else the coarsest.

    `ccl`: integers (levels, n), finest level first, of the slices that batches are drawn from.
    """
    enough = [expected_positives(labels, batch_size) >= 1 for labels in ccl]
    return enough.index(True) if any(enough) else len(ccl) - 1
