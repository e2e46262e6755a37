"""DICOM series: which there are below a folder, what is wrong with them, and the volume that one makes.

The files of a series are found by its UID, wherever they lie, and its slices are sorted by their position along the
normal of their plane: neither names nor numbers of images are believed. Nothing that names a patient is read.
Called by `supercl_core.sources.dicom`, and by what reads the images of cases.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from supercl_core.errors import SuperCLError
from supercl_core.formats.dicom_headers import DicomHeader, read_dicom_header, read_image_header
from supercl_core.formats.dicom_pixels import read_pixels
from supercl_core.formats.dicom_stack import shape_of, stacked, unusable_files
from supercl_core.formats.volume_files import start_of
from supercl_core.formats.volumes import Header, Volume

_ENDINGS: Final = (".dcm", ".dicom", ".ima")
"""File name endings, in small letters, that promise DICOM."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """The files of one DICOM series."""

    uid: str
    """Empty for what cannot be read so far: such files of one folder are listed together."""
    number: str
    """As a viewer shows it; empty where there is none."""
    paths: tuple[Path, ...]
    """At least one; in the order of the slices where there is no problem."""
    description: str
    """Modality, number of images and their size (columns x rows), such as `CT, 120 images of 512 x 512`."""
    problem: str = ""
    """Why the files do not make a volume; empty where they do."""
    left_out: str = ""
    """What the series is where nobody would want it as a volume, such as a report; empty where one may."""


def holds_dicom(folder: Path) -> bool:
    """Whether any file below `folder` is DICOM by its content, or promises so by its name; stops at the first."""
    return any(_promises(path) or _begins_like_dicom(path) for path in _candidates(folder))


def find_series(folder: Path) -> tuple[Series, ...]:
    """Every DICOM series below `folder`, in order of their first files; reads headers only, no pixels.

    Looked at are files whose names end in .dcm, .dicom, .ima or a number, or have no ending. What turns out to be no
    DICOM file is passed over unless its name promises one; so is a list of others (DICOMDIR). Hidden files and folders
    are left out, and links to folders are not followed. Raises OSError where `folder` cannot be listed.
    """
    by_uid: dict[str, list[DicomHeader]] = {}
    unreadable: dict[Path, list[tuple[Path, str]]] = {}
    refused: list[OSError] = []
    for path in _candidates(folder, refused.append):
        reason = ""
        try:
            header = read_dicom_header(path)
        except SuperCLError as error:
            reason = error.one_line()
        else:
            if header is None:
                reason = "no DICOM file (without DICM at byte 128)" if _promises(path) else ""
            elif header.series_uid:
                by_uid.setdefault(header.series_uid, []).append(header)
            elif header.is_image:
                reason = header.problem or "no UID of a series"
        if reason:
            unreadable.setdefault(path.parent, []).append((path, reason))
    for refusal in refused:
        path = Path(refusal.filename)
        if path == folder:
            raise refusal
        unreadable[path] = [(path, f"a folder that cannot be listed: {refusal.strerror}")]
    series = [_series(uid, headers) for uid, headers in by_uid.items()]
    series += [_of_unreadable(sorted(reasons)) for reasons in unreadable.values()]
    return tuple(sorted(series, key=lambda one: min(one.paths)))


def read_series_header(paths: Sequence[Path]) -> Header:
    """The shape of the volume that the files of a series make, and the type of the stored values; reads no values.

    Raises as `read_series` does, but for what shows only in the values.
    """
    slices, _ = stacked([read_image_header(path) for path in paths])
    return Header(shape=shape_of(slices), dtype=f"{slices[0].header.bits}-bit integer")


def read_series(paths: Sequence[Path]) -> Volume:
    """Read the files of a DICOM series, in any order, as one volume (c, z, y, x), each rescaled as it declares.

    z grows along the normal of the slices; each frame of a file is a slice. Values are integers where all of them are
    after rescaling, else float32. The spacing along z comes from the positions; of a single slice it is 1.

    Raises SuperCLError when a file is missing, damaged or no DICOM image, or compressed in a way that SimpleITK cannot
    read, and when the slices do not make a volume: see `Series.problem`.
    """
    slices, geometry = stacked([read_image_header(path) for path in paths])
    by_path: dict[Path, list[int]] = {}
    for z, one in enumerate(slices):
        by_path.setdefault(one.header.path, []).append(z)
    headers = [slices[of_file[0]].header for of_file in by_path.values()]
    array_CZYX: np.ndarray | None = None
    for of_file, values_CZYX in zip(by_path.values(), read_pixels(headers), strict=True):
        if array_CZYX is None:
            array_CZYX = np.empty(shape_of(slices), values_CZYX.dtype)
        array_CZYX = array_CZYX.astype(_common_type(array_CZYX.dtype, values_CZYX.dtype), copy=False)
        array_CZYX[:, of_file] = values_CZYX[:, [slices[z].frame_index for z in of_file]]
    assert array_CZYX is not None, "a series has slices"
    return Volume(array_CZYX=array_CZYX, geometry=geometry)


# ---- the files below a folder


def _candidates(folder: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """The files below `folder` that may be DICOM by their names, in no order."""
    for parent, folders, names in os.walk(folder, onerror=onerror):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if _promises(path) or not path.suffix or path.suffix[1:].isdecimal():
                yield path


def _promises(path: Path) -> bool:
    return path.name.lower().endswith(_ENDINGS)


def _begins_like_dicom(path: Path) -> bool:
    try:
        return start_of(path, 132)[0][128:] == b"DICM"
    except SuperCLError:
        return False


def _series(uid: str, headers: Sequence[DicomHeader]) -> Series:
    images = [header for header in headers if header.is_image]
    headers = sorted(images or headers, key=lambda header: (int(header.instance_number or 0), header.path))
    first = headers[0]
    paths, problem, left_out = [header.path for header in headers], "", ""
    if not images:
        left_out = f"no measured image ({first.modality or 'of no known kind'})"
    elif all(header.is_localiser for header in headers):
        left_out = "a localiser, which shows where other series lie"
    else:
        try:
            slices, _ = stacked(headers)
            paths = list(dict.fromkeys(one.header.path for one in slices))
        except SuperCLError as error:
            problem = error.one_line()
    num_images = sum(max(1, len(header.frames)) for header in headers)
    size = f", {num_images} images of {first.columns} x {first.rows}" if images else ""
    return Series(
        uid=uid,
        number=first.series_number,
        paths=tuple(paths),
        description=(first.modality or "unknown modality") + size,
        problem=problem,
        left_out=left_out,
    )


def _of_unreadable(reasons: Sequence[tuple[Path, str]]) -> Series:
    """The files of one folder that cannot be read so far that their series is known."""
    return Series(
        uid="",
        number="",
        paths=tuple(path for path, _ in reasons),
        description=f"{len(reasons)} unreadable files",
        problem=unusable_files(reasons).one_line(),
    )


def _common_type(first: np.dtype, second: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if "f" in (first.kind, second.kind) else np.promote_types(first, second)
