"""A folder of DICOM files as scanners and archives export them: each series of images is a case, without labels.

ANY/
  DICOMDIR                          not needed
  patient_01/ct/IM0001 ...          becomes the case patient_01_ct_series_5 (5: the series' number in any viewer)
  patient_01/mr/export.dcm ...      several series in one folder become a case each
  series.txt                        optional: the cases to take, one a line, such as *_series_5

A series is known by its UID: its files may have any names, with .dcm, .dicom, .ima, a number or nothing at the end, and
lie in several folders. It is named by the folder that holds all of them; where two series of one folder have the same
number, six digits of a hash of the UID follow. Left out are localisers, and what is no measured image: reports,
contours, segmentations, doses.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from supercl_core.errors import SuperCLError, UsageError, printable
from supercl_core.files import read_text
from supercl_core.formats.dicom_files import Series, find_series, holds_dicom
from supercl_core.sources.base import CaseSource, DataSource

NAME = "dicom"
EXPECTED = "dicom: DICOM files (.dcm, .dicom, .ima, a number or no ending) anywhere; each series is a case"

_CHOICE: Final = "series.txt"
_MOST_BYTES: Final = 1 << 20
"""Of the file that chooses series."""
_MOST_SHOWN: Final = 20


def matches(path: Path, _files: Sequence[Path]) -> bool:
    """Whether any file below `path` is DICOM by its content, or says so by its name."""
    return holds_dicom(path)


def read(path: Path) -> DataSource:
    """Every series of images below `path`, or those that series.txt chooses; names and ids come from folders.

    A series that makes no volume (missing slices, several orientations, ...) is a case with a problem, and so are the
    files of a folder that cannot be read. Raises SuperCLError where there are only files without images, or series.txt
    cannot be read; UsageError where a line of it fits no series.
    """
    series = find_series(path)
    images = [one for one in series if not one.left_out]
    if not images:
        raise SuperCLError(
            "The DICOM files hold no image to learn from.",
            where=path,
            expected="at least one series of images",
            found=_listed([f"{_parts(path, one)[-1]}: {one.left_out}" for one in series])
            or "only a list of other files (DICOMDIR)",
            next_step="Export the images of the study too, or point to the folder that holds them.",
        )
    named = [(_parts(path, one), one) for one in images]
    counts = Counter(parts for parts, _ in named)
    cases = [_case(parts, one, is_only=counts[parts] == 1) for parts, one in named]
    chosen = _chosen(path, {case.id: one.description for case, one in zip(cases, images, strict=True)})
    cases = [case for case in cases if case.id in chosen]
    used = {file for case in cases for file in case.image_paths}
    return DataSource(
        name=printable(path.resolve().name),
        cases=tuple(cases),
        left_out={
            file: one.left_out or f"not chosen in {_CHOICE}"
            for one in series
            for file in one.paths
            if file not in used
        },
    )


def _parts(path: Path, one: Series) -> tuple[str, ...]:
    """What names a series: the folder that holds all of it, and its number."""
    folder = Path(os.path.commonpath({file.parent for file in one.paths}))
    last = f"series_{one.number or 'unnumbered'}" if one.uid else "unreadable"
    return (*folder.relative_to(path).parts, last)


def _case(parts: tuple[str, ...], one: Series, *, is_only: bool) -> CaseSource:
    if not is_only:
        parts = (*parts, hashlib.sha256(one.uid.encode()).hexdigest()[:6])
    return CaseSource(
        id="_".join(parts),
        name=printable("/".join(parts)),
        image_paths=one.paths,
        reading="series",
        problem=one.problem,
    )


def _chosen(path: Path, descriptions: Mapping[str, str]) -> set[str]:
    """The ids that series.txt chooses, of those of `descriptions`; all where there is no such file."""
    file = path / _CHOICE
    if not file.exists():
        return set(descriptions)
    try:
        lines = [line.strip() for line in read_text(file, limit_bytes=_MOST_BYTES).splitlines()]
    except ValueError as error:
        raise SuperCLError(
            f"{_CHOICE} cannot be read.",
            where=file,
            expected="ids of cases, one a line",
            found=error,
            next_step="Write it again, or remove it to take every series.",
        ) from None
    patterns = [line for line in lines if line and not line.startswith("#")]
    fitting = {
        pattern: {case_id for case_id in descriptions if fnmatchcase(case_id, pattern)}
        for pattern in patterns
    }
    unused = [pattern for pattern in patterns if not fitting[pattern]]
    if unused or not patterns:
        raise UsageError(
            f"{_CHOICE} chooses a series that is not there.",
            where=file,
            expected=_listed([f"{case_id} ({what})" for case_id, what in sorted(descriptions.items())]),
            found=_listed(unused) if unused else "no line",
            next_step="Correct the lines (* stands for any text), or remove the file to take every series.",
        )
    return set().union(*fitting.values())


def _listed(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
    return "".join(f"\n    {line}" for line in [*lines[:_MOST_SHOWN], *more])
