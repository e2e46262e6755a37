"""Anatomical images of the Brain Imaging Data Structure (BIDS), without labels.

ANY/
  dataset_description.json
  sub-01/[ses-01/]anat/sub-01_[ses-01_]T1w.nii.gz

Each file of an `anat` folder is a case of its own, named like the file: a subject with T1w and FLAIR is two cases.
Masks (`_mask`, `_roi`), segmentations (`_dseg`, `_probseg`), other folders (func, dwi) and derivatives are left
out. To have several contrasts as channels of one case, arrange them as nnU-Net does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from supercl_core.errors import printable
from supercl_core.formats.volume_files import volume_suffix
from supercl_core.sources.base import CaseSource, DataSource
from supercl_core.sources.walk import stem, walk

NAME = "bids"
EXPECTED = "bids: sub-*/[ses-*/]anat/*.nii.gz (Brain Imaging Data Structure)"

_ANATOMICAL: Final = re.compile(r"sub-[^/]+/(?:ses-[^/]+/)?anat/[^/]+\.nii(?:\.gz)?")
_DERIVED: Final = re.compile(r"_(?:\w*mask|\w*seg|roi)$")


def matches(path: Path, _files: Sequence[Path]) -> bool:
    """Whether `path` has a folder `anat` where BIDS has it."""
    return any(True for pattern in ("sub-*/anat", "sub-*/ses-*/anat") for _ in path.glob(pattern))


def read(path: Path) -> DataSource:
    """Every anatomical image; a folder of a subject that cannot be listed is a case with a problem."""
    files, unreadable = walk(path, volume_suffix)
    cases = [case for case in unreadable if case.name.startswith("sub-")]
    left_out = {}
    for file in files:
        name, case_id = file.relative_to(path).as_posix(), stem(file.name)
        if _ANATOMICAL.fullmatch(name) and not _DERIVED.search(case_id):
            cases.append(CaseSource(id=case_id, name=printable(name), image_paths=(file,)))
        else:
            left_out[file] = "no anatomical image of a subject"
    return DataSource(name=printable(path.resolve().name), cases=tuple(cases), left_out=left_out)
