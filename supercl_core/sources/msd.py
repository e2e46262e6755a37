"""The layout of the Medical Segmentation Decathlon.

TASK/
  dataset.json              name, modality, labels, training, test
  imagesTr/case.nii.gz      (imagesTs/ likewise, without labels)
  labelsTr/case.nii.gz
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from supercl_core.errors import SuperCLError
from supercl_core.sources.base import CaseSource, DataSource, without_suffix

EXPECTED = "msd: dataset.json, imagesTr/, labelsTr/ (Medical Segmentation Decathlon)"


def matches(path: Path) -> bool:
    """Whether `path` has the file and the folder that every MSD task has."""
    return (path / "dataset.json").is_file() and (path / "imagesTr").is_dir()


def read(path: Path) -> DataSource:
    """The cases that dataset.json lists: `training` with labels, `test` without.

    Raises SuperCLError when dataset.json is unreadable, lacks a part, or lists no case.
    """
    file = path / "dataset.json"
    try:
        declared = json.loads(file.read_text(encoding="utf-8"))
        classes = {int(key): str(name) for key, name in declared["labels"].items()}
        channels = {int(key): str(name) for key, name in declared["modality"].items()}
        cases = [_case(path, entry["image"], entry["label"]) for entry in declared["training"]]
        cases += [_case(path, entry, None) for entry in declared.get("test", [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SuperCLError(
            "dataset.json is not one of the Medical Segmentation Decathlon.",
            where=file,
            expected="labels, modality and training, as in the Decathlon's tasks",
            found=f"{type(error).__name__}: {error}",
            next_step="Mend the file, or remove it to have the folder read as a plain folder of volumes.",
        ) from error
    if sorted(classes) != list(range(len(classes))):
        raise SuperCLError(
            "The classes in dataset.json are not numbered 0, 1, 2, and so on.",
            where=file,
            expected=list(range(len(classes))),
            found=sorted(classes),
            next_step="Renumber the labels in dataset.json and in the label maps.",
        )
    if not cases:
        raise SuperCLError(
            "dataset.json lists no case.",
            where=file,
            expected="at least one entry in training or test",
            found="none",
            next_step="Fill the list, or remove the file to have the folder read as a plain folder of volumes.",
        )
    return DataSource(
        name=str(declared.get("name", path.resolve().name)),
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        channel_names=tuple(channels[key] for key in sorted(channels)),
        class_names=tuple(classes[key] for key in sorted(classes)),
    )


def _case(path: Path, image: Any, label: Any) -> CaseSource:
    image_path = path / str(image)
    return CaseSource(
        id=without_suffix(image_path.name) or image_path.name,
        image_path=image_path,
        label_path=None if label is None else path / str(label),
    )
