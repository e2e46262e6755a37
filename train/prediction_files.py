"""Label maps that were made elsewhere: which case a file belongs to, and whether it lies over the case's source.

Called by `train.evaluate`. What the label maps score is left to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from supercl_core.cache.reader import CachedCase
from supercl_core.errors import SuperCLError, UsageError
from supercl_core.formats.geometry import LARGEST_SHIFT, Geometry
from supercl_core.formats.volumes import read_volume
from supercl_core.sources import folder
from supercl_core.sources.base import CaseSource, with_usable_ids

LARGEST_TURN: Final = 1e-3
"""Of a direction cosine, and of a spacing as a part of it: far above rounding, below what matters."""


def files_by_case(predictions_path: Path, case_ids: Sequence[str]) -> tuple[dict[str, CaseSource], list[str]]:
    """The file of each case that has one, and the names of all other volumes of the folder.

    A file is named like its case, with or without the `_0000` of nnU-Net. Raises UsageError where there is no volume.
    """
    sources = folder.read(predictions_path).cases if predictions_path.is_dir() else ()
    if not sources:
        raise UsageError(
            "There are no predictions here.",
            where=predictions_path,
            expected="a folder of label maps, named like the cases of the cache, or a fine-tuned run",
            found="a folder without a volume" if predictions_path.is_dir() else "no folder",
            next_step="Check the path.",
        )
    files = {file.id: file for file in with_usable_ids(sources)}
    found: dict[str, CaseSource] = {}
    for case_id in case_ids:
        file = files.get(case_id) or files.get(f"{case_id}_0000")
        if file is not None:
            found[case_id] = file
    used = {file.id for file in found.values()}
    return found, [file.name for file in files.values() if file.id not in used]


def read_prediction(file: CaseSource | None, case: CachedCase, class_names: Sequence[str]) -> np.ndarray:
    """The label map in a file, uint8 (z, y, x), for a case of the same geometry.

    Raises SuperCLError where the case has no ground truth, where there is no file or it cannot be read, where shape,
    spacing, origin or direction are not those of the case's source, and where a value is no class.
    """
    next_step = "Write the predictions again, as integers in the geometry of their sources."
    if not case.row.has_ground_truth:
        raise SuperCLError("The case has no ground truth.", next_step="Take it out of the split's test list.")
    if file is None:
        raise SuperCLError("There is no prediction.", next_step="Name the file like the case.")
    if file.problem:
        raise SuperCLError(file.problem, next_step="Mend this entry of the folder.")
    volume = read_volume(file.image_paths[0])
    expected, found = (1, *case.row.shape[1:]), volume.array_CZYX.shape
    if found != expected:
        raise SuperCLError(
            "The prediction has another shape than its source",
            expected=f"(z, y, x) = {expected[1:]}",
            found=found[1:] if found[0] == 1 else f"(c, z, y, x) = {found}",
            next_step=next_step,
        )
    if differences := _differences(case, volume.geometry):
        raise SuperCLError(
            "The prediction lies elsewhere than its source",
            expected="; ".join(f"{name} {wanted}" for name, wanted, _ in differences),
            found="; ".join(f"{name} {there}" for name, _, there in differences) + ", along x, y, z",
            next_step=next_step,
        )
    label_map_ZYX = volume.array_CZYX[0]
    with np.errstate(invalid="ignore"):  # of floats beyond 0 to 255, found as wrong below
        classes_ZYX = label_map_ZYX.astype(np.uint8)
    wrong = (classes_ZYX != label_map_ZYX) | (classes_ZYX >= len(class_names))
    if wrong.any():
        values = [value.item() for value in np.unique(label_map_ZYX[wrong])[:5]]
        raise SuperCLError(
            "The prediction has values that are no class",
            expected=f"integers from 0 to {len(class_names) - 1} ({', '.join(class_names)})",
            found=f"{', '.join(f'{value:g}' for value in values)} in {int(wrong.sum())} voxels",
            next_step=next_step,
        )
    return classes_ZYX


def _differences(case: CachedCase, found: Geometry) -> list[tuple[str, list[float], list[float]]]:
    """Where the geometry of a prediction is not that of the case's source: names, values wanted and values found.

    A source that does not say where it lies is compared by its spacing, one whose spacing means nothing by neither.
    """
    if case.row.spacing_mm is None:
        return []
    source = case.geometry()
    parts: list[tuple[str, tuple[float, ...], tuple[float, ...], Any]]
    parts = [("spacing", source.spacing_mm, found.spacing_mm, LARGEST_TURN * np.array(source.spacing_mm))]
    if found.oriented and case.attributes["orientation"] != "unknown":
        shift_mm = LARGEST_SHIFT * min(source.spacing_mm)
        parts.append(("origin", source.origin_mm, found.origin_mm, shift_mm))
        parts.append(("direction", source.direction, found.direction, LARGEST_TURN))
    return [
        (name, (np.round(wanted, 4) + 0.0).tolist(), (np.round(there, 4) + 0.0).tolist())
        for name, wanted, there, tolerance in parts
        if (np.abs(np.subtract(there, wanted)) > tolerance).any()
    ]
