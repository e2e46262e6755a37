"""The MRI of CHAOS (Combined Healthy Abdominal Organ Segmentation) as it is distributed.

ANY/MR/1/T2SPIR/DICOM_anon/IMG-0002-00001.dcm             T2SPIR/Ground/IMG-0002-00001.png
ANY/MR/1/T1DUAL/DICOM_anon/InPhase/IMG-0004-00002.dcm     T1DUAL/Ground/IMG-0004-00002.png

A case is one sequence of a patient: patient1_t2spir, patient1_t1dual (in phase). A ground truth is an 8-bit image for
each slice, called like the file of the slice. Folders of the test set have none. Out-of-phase images, of the same
patients, and the CT, with a ground truth of the liver alone, are left out.

Folders and grey values (63 liver, 126 right kidney, 189 left kidney, 252 spleen) are those of chaos.grand-challenge.org
and of public code. Which sequences the publication used, we could not find out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from supercl_core.errors import SuperCLError, printable
from supercl_core.formats.dicom_headers import read_image_header
from supercl_core.formats.dicom_stack import stacked
from supercl_core.sources.base import CaseSource, DataSource
from supercl_core.sources.walk import walk

NAME = "chaos"
EXPECTED = "chaos: MR/1/T2SPIR/DICOM_anon/*.dcm, MR/1/T2SPIR/Ground/*.png, and T1DUAL likewise (CHAOS, MRI)"

_SEQUENCES: Final = {"t2spir": ("T2SPIR", "DICOM_anon"), "t1dual": ("T1DUAL", "DICOM_anon/InPhase")}
"""Folder of each sequence, and of its images in it."""
_CLASSES: Final = {0: 0, 63: 1, 126: 2, 189: 3, 252: 4}


def matches(path: Path, _files: Sequence[Path]) -> bool:
    """Whether there are folders `MR/*/T2SPIR/DICOM_anon` or `MR/*/T1DUAL/DICOM_anon` below `path`."""
    return any(True for _ in _image_folders(path))


def read(path: Path) -> DataSource:
    """Both sequences of every patient; one whose files make no volume, or whose labels do not fit, has a problem."""
    cases = [_case(path, *place) for place in _image_folders(path)]
    used = {file for case in cases for file in case.paths}
    others = {*walk(path)[0], *path.rglob("*.dcm")} - used
    reasons = {file: _reason({*file.relative_to(path).parts}) for file in others}
    return DataSource(
        name="CHAOS",
        cases=tuple(cases),
        channel_names=("MRI",),
        class_names=("background", "liver", "right kidney", "left kidney", "spleen"),
        left_out={file: reason for file, reason in reasons.items() if reason},
    )


def _reason(parts: set[str]) -> str:
    """Why a file with these parts in its path is in no case; empty where it is not known to be of CHAOS."""
    known = {
        "CT": "CT, with a ground truth of the liver alone",
        "OutPhase": "out of phase, of a patient whose images in phase are a case",
        "Ground": "label images that do not fit their slices",
    }
    return next((reason for part, reason in known.items() if part in parts), "")


def _image_folders(path: Path) -> list[tuple[str, Path, Path]]:
    """Case id, folder of images and folder of labels of every sequence."""
    found = []
    for sequence, (folder, images) in _SEQUENCES.items():
        for depth in ("MR", "*/MR", "*/*/MR", "."):
            for place in sorted(path.glob(f"{depth}/[0-9]*/{folder}")):
                if (place / images).is_dir():
                    case_id = f"patient{place.parent.name}_{sequence}"
                    found.append((case_id, place / images, place / "Ground"))
    return found


def _case(path: Path, case_id: str, image_path: Path, label_path: Path) -> CaseSource:
    images, problem = _in_order(image_path)
    labels = {file.stem: file for file in sorted(label_path.glob("*.png"))}
    problem = problem or _label_problem({file.stem for file in images}, labels)
    return CaseSource(
        id=case_id,
        name=printable(image_path.relative_to(path).as_posix()),
        image_paths=tuple(images) or (image_path,),
        reading="series",
        label_paths=() if problem or not labels else tuple(labels[file.stem] for file in images),
        label_classes=_CLASSES,
        problem=problem,
    )


def _in_order(image_path: Path) -> tuple[list[Path], str]:
    """The files of a sequence in the order of their slices, or why they are none.

    The folder says which files belong together: public code finds that UIDs differ from file to file.
    """
    files = sorted(image_path.glob("*.dcm"))
    if not files:
        return [], "The folder holds no DICOM file (.dcm)"
    try:
        slices, _ = stacked([read_image_header(file) for file in files])
    except SuperCLError as error:
        return files, f"{error.one_line()} ({error.where})"
    return list(dict.fromkeys(one.header.path for one in slices)), ""


def _label_problem(stems: set[str], labels: dict[str, Path]) -> str:
    """Why the label images do not belong to the slices; empty where they do, and where there are none at all."""
    unmatched = sorted(stems ^ labels.keys())
    if not labels or not unmatched:
        return ""
    return (
        f"Slices and label images do not belong to each other; expected {len(stems)} images called like the slices, "
        f"found {len(labels)}, {printable(unmatched[0])} being without its counterpart"
    )
