"""The slices of a DICOM series in order, and where they lie; or why they make no volume.

Source: DICOM PS3.3 C.7.6.2 (image plane); the tolerances are our choice. Called by `supercl_core.formats.dicom_files`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from supercl_core.errors import SuperCLError
from supercl_core.formats.dicom_headers import DicomHeader, Frame
from supercl_core.formats.geometry import UNPLACED, Geometry
from supercl_core.formats.volume_files import check_shape, damaged
from supercl_core.formats.volume_headers import MOST_INFLATED, SPACINGS_MM, check_axes

_SAME_MM: Final = 1e-4
"""Positions this close are one."""
_UNEVEN: Final = 0.1
"""Largest difference between a step from slice to slice and the usual step, as a fraction of that."""
_TURNED: Final = 1e-3
"""Largest difference between cosines of one orientation, and shift of a slice for each mm along the normal."""
_SHIFTED: Final = 0.1
"""Shift of a slice in its plane that is always allowed, as a fraction of a pixel: the rounding of positions."""
_FARTHEST_MM: Final = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """One image of a series: a frame of a file."""

    header: DicomHeader
    frame: Frame
    frame_index: int

    def __str__(self) -> str:
        """How a message names it: by the number that a viewer shows, since a file's name may be the patient's."""
        image = f"image {self.header.instance_number or 'without number'}"
        return image if len(self.header.frames) == 1 else f"frame {self.frame_index + 1} of {image}"


def stacked(headers: Sequence[DicomHeader]) -> tuple[list[Slice], Geometry]:
    """The slices of the files of one series, sorted along their normal, and the geometry of their volume.

    Raises SuperCLError where a file is damaged, where the slices do not make a volume (different sizes, orientations or
    spacings, no positions, positions that are missing or there twice, a tilted stack), or where the files cannot hold
    what they declare. A single image without a position is a slice without orientation and spacing.
    """
    if bad := [(header.path, header.problem) for header in headers if header.problem]:
        raise unusable_files(bad)
    slices = [
        Slice(header=header, frame=frame, frame_index=index)
        for header in headers
        for index, frame in enumerate(header.frames)
    ]
    _check_alike(slices)
    first = slices[0]
    check_shape(
        first.header.path,
        shape_of(slices),
        math.ceil(first.header.bits / 8),
        sum(header.size_bytes * (MOST_INFLATED if header.is_compressed else 1) for header in headers),
    )
    unplaced = [one for one in slices if one.frame.position_mm is None or one.frame.orientation is None]
    if len(slices) == 1 and unplaced:
        return slices, UNPLACED
    if unplaced:
        raise _no_volume(
            slices,
            "Images of a series do not say where they lie.",
            expected="position and orientation of each",
            found=f"{len(unplaced)} of {len(slices)} images without, such as {unplaced[0]}",
            next_step="Convert the series to a volume with a tool of its scanner, or remove it.",
        )
    return _sorted(slices)


def shape_of(slices: Sequence[Slice]) -> tuple[int, int, int, int]:
    """Channels, slices, rows and columns of the volume that the slices make."""
    first = slices[0].header
    return first.samples, len(slices), first.rows, first.columns


def unusable_files(reasons: Sequence[tuple[Path, str]]) -> SuperCLError:
    """The error for files, each with its reason; it gives their names, as they are to be found and copied again."""
    path, reason = reasons[0]
    more = f", and {len(reasons) - 1} more files" if len(reasons) > 1 else ""
    return SuperCLError(
        "DICOM files cannot be used.",
        where=path.parent,
        expected="whole files of images",
        found=f"{path.name}: {reason}{more}",
        next_step="Copy, rename or export these files again, or remove them.",
    )


def _sorted(slices: list[Slice]) -> tuple[list[Slice], Geometry]:
    first = slices[0]
    axes = np.reshape(first.frame.orientation or (), (2, 3))
    with np.errstate(over="ignore", invalid="ignore"):  # such numbers are refused as axes
        direction = np.column_stack([*axes, np.cross(*axes)])
    check_axes(first.header.path, direction)
    positions_mm = np.array([one.frame.position_mm for one in slices])
    if not np.abs(positions_mm).max() <= _FARTHEST_MM:
        raise damaged(first.header.path, f"a position more than {_FARTHEST_MM:,.0f} mm away")
    order = np.argsort(positions_mm @ direction[:, 2], kind="stable")
    slices = [slices[index] for index in order]
    offsets_mm = (positions_mm[order] - positions_mm[order[0]]) @ direction
    _check_steps(slices, np.diff(offsets_mm[:, 2]))
    between_rows, between_columns = first.frame.spacing_mm or (math.nan, math.nan)
    step_mm = offsets_mm[-1, 2] / (len(slices) - 1) if len(slices) > 1 else 1.0
    declared = np.array([between_columns, between_rows, step_mm])
    usable = (declared >= SPACINGS_MM[0]) & (declared <= SPACINGS_MM[1])
    spacing_mm = np.where(usable, declared, 1.0)
    shifts_mm = np.abs(offsets_mm[:, :2]).max(axis=1)
    if (shifts_mm > _SHIFTED * spacing_mm[:2].min() + _TURNED * offsets_mm[:, 2]).any():
        raise _no_volume(
            slices,
            "The slices of a series are shifted against each other.",
            expected="each straight above the other, without gantry tilt",
            found=f"a shift of {shifts_mm.max():.4g} mm at {slices[int(shifts_mm.argmax())]}",
            next_step="Resample the series to a grid without shear.",
        )
    return slices, Geometry(
        spacing_mm=tuple(spacing_mm.tolist()),
        origin_mm=tuple(positions_mm[order[0]].tolist()),
        direction=tuple(direction.ravel().tolist()),
        spacing_problem="" if usable.all() else f"a spacing (x, y, z) of {tuple(declared.tolist())}",
    )


def _check_steps(slices: Sequence[Slice], steps_mm: np.ndarray) -> None:
    """Raise SuperCLError unless slices in order lie `steps_mm`, float64 (number - 1,), evenly apart."""
    if len(steps_mm) == 0:
        return
    if (same := np.flatnonzero(steps_mm <= _SAME_MM)).size:
        raise _no_volume(
            slices,
            "Several images of a series lie at the same position.",
            expected="one at each, of one echo and one time, without copies",
            found=f"{len(slices)} images at {len(slices) - same.size} positions,"
            f" such as {slices[same[0]]} and {slices[same[0] + 1]}",
            next_step="Split the series by echo, time or the like, or remove the copies.",
        )
    usual_mm = float(np.median(steps_mm))
    uneven = np.flatnonzero(np.abs(steps_mm - usual_mm) > _UNEVEN * usual_mm)
    if uneven.size:
        step_mm, before, behind = steps_mm[uneven[0]], slices[uneven[0]], slices[uneven[0] + 1]
        num_missing = round(float(step_mm / usual_mm)) - 1
        raise _no_volume(
            slices,
            "Slices of a series are missing or unevenly spaced.",
            expected=f"a slice every {usual_mm:.4g} mm",
            found=f"{step_mm:.4g} mm between {before} and {behind}"
            + (f" ({num_missing} missing)" if num_missing > 0 else "")
            + (f", and {uneven.size - 1} more such steps" if uneven.size > 1 else ""),
            next_step="Export the series again, with all of its images.",
        )


def _check_alike(slices: Sequence[Slice]) -> None:
    """Raise SuperCLError unless all slices have one size, kind of pixel, orientation and spacing of pixels."""
    sizes = Counter(
        f"{one.header.columns} x {one.header.rows} ({one.header.samples} values a pixel)" for one in slices
    )
    if len(sizes) > 1:
        raise _no_volume(
            slices,
            "The images of a series have different sizes.",
            expected="one size",
            found=", ".join(f"{count} of {size}" for size, count in sizes.most_common(4)),
            next_step="Export the images of each size as a series, or remove those that do not belong.",
        )
    for what, expected, values in (
        (
            "orientations",
            "parallel images, as a localiser has not",
            [one.frame.orientation for one in slices],
        ),
        ("spacings of pixels", "one spacing", [one.frame.spacing_mm for one in slices]),
    ):
        unlike = [one for one, value in zip(slices, values, strict=True) if not _alike(value, values[0])]
        if unlike:
            raise _no_volume(
                slices,
                f"The images of a series have different {what}.",
                expected=expected,
                found=f"{len(unlike)} of {len(slices)} unlike {slices[0]}, such as {unlike[0]}",
                next_step="Export each part as a series, or remove the images that do not belong.",
            )


def _alike(values: Sequence[float] | None, others: Sequence[float] | None) -> bool:
    if values is None or others is None:
        return values is others
    return np.allclose(values, others, rtol=_TURNED, atol=_TURNED)


def _no_volume(
    slices: Sequence[Slice], what: str, *, expected: str, found: str, next_step: str
) -> SuperCLError:
    """The error for whole files; says no more of where they are than their folder."""
    return SuperCLError(
        what, where=slices[0].header.path.parent, expected=expected, found=found, next_step=next_step
    )
