"""Where a volume lies in space, and whether two volumes lie at the same place.

Called by what reads files (`volumes`, `flat_images`, `array_files`, `case_files`) and by preprocessing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from supercl_core.errors import SuperCLError

LARGEST_SHIFT: Final = 0.1
"""Between the places of two grids that are to be the same, in units of the smallest spacing: far above rounding, below
what matters."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where a volume lies in space, as SimpleITK gives it: axes in the order x, y, z."""

    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    direction: tuple[float, ...]
    """Row-major 3 x 3 direction cosines."""
    oriented: bool = True
    """Whether the file says how the volume lies in space; where not, origin and direction are its format's default."""
    spacing_problem: str = ""
    """Why the file's spacing cannot be right (1 then stands for what is not); empty where it can."""
    has_spacing: bool = True
    """Whether the file's format knows a spacing; pictures and arrays have none, and `UNPLACED` stands for it."""


UNPLACED: Final = Geometry(
    spacing_mm=(1.0, 1.0, 1.0),
    origin_mm=(0.0, 0.0, 0.0),
    direction=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    oriented=False,
    has_spacing=False,
)
"""The geometry of an array that does not say how large its voxels are."""


def check_place(
    geometry: Geometry, reference: Geometry, shape_ZYX: tuple[int, ...], *, what: str, next_step: str
) -> None:
    """Raise SuperCLError, beginning with `what`, unless the corners of two grids lie at the same places.

    Where one of the files does not say how it lies in space, spacing alone is compared; where one has no spacing,
    nothing is.
    """
    if not (geometry.has_spacing and reference.has_spacing):
        return
    if not (geometry.oriented and reference.oriented):
        geometry, reference = (
            replace(grid, origin_mm=UNPLACED.origin_mm, direction=UNPLACED.direction)
            for grid in (geometry, reference)
        )
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape_ZYX[::-1]) - 1)
    found_mm, expected_mm = (
        corners * grid.spacing_mm @ np.reshape(grid.direction, (3, 3)).T + grid.origin_mm
        for grid in (geometry, reference)
    )
    shift_mm = float(np.linalg.norm(found_mm - expected_mm, axis=1).max())
    largest_mm = LARGEST_SHIFT * min(reference.spacing_mm)
    if shift_mm <= largest_mm:
        return
    raise SuperCLError(
        what,
        expected=f"corners at most {largest_mm:.3g} mm apart",
        found=f"{shift_mm:.3g} mm: "
        + "; ".join(
            f"{part} {_rounded(getattr(geometry, part))} instead of {_rounded(getattr(reference, part))}"
            for part in ("spacing_mm", "origin_mm", "direction")
            if not np.allclose(getattr(geometry, part), getattr(reference, part), atol=1e-4)
        ),
        next_step=next_step,
    )


def _rounded(values: tuple[float, ...]) -> list[float]:
    return (np.round(values, 4) + 0.0).tolist()  # without -0.0
