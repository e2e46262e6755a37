"""The layout of the Medical Segmentation Decathlon.

TASK/
  dataset.json              name, modality, labels, training, test
  imagesTr/case.nii.gz      (imagesTs/ likewise, without labels)
  labelsTr/case.nii.gz

Raw data of nnU-Net v1 have the same dataset.json, and a file for each channel of an entry: case_0000.nii.gz, and so on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from supercl_core.errors import SuperCLError, printable, some_of
from supercl_core.files import read_text, unique_keys
from supercl_core.sources.base import MOST_CLASSES, CaseSource, DataSource
from supercl_core.sources.walk import stem

NAME = "msd"
EXPECTED = "msd: dataset.json, imagesTr/, labelsTr/ (Medical Segmentation Decathlon)"

_MOST_BYTES: Final = 1 << 26
"""Of dataset.json: half a million cases."""


def matches(path: Path, _files: Sequence[Path]) -> bool:
    """Whether `path` has the file and the folder that every MSD task has."""
    return (path / "dataset.json").is_file() and (path / "imagesTr").is_dir()


def read(path: Path) -> DataSource:
    """The cases that dataset.json lists: `training` with labels, `test` without.

    An entry that cannot be used becomes a case with a problem. Raises SuperCLError when dataset.json is unreadable,
    lacks a part, or lists no case.
    """
    file = path / "dataset.json"
    try:
        declared = _json(file)
        classes = [(int(key), printable(str(name))) for key, name in declared["labels"].items()]
        channels = [(int(key), printable(str(name))) for key, name in declared["modality"].items()]
        cases = [
            _case(path, entry, f"{part}-{index}", num_channels=len(channels))
            for part in ("training", "test")
            for index, entry in enumerate(_entries(declared, part))
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SuperCLError(
            "dataset.json is not one of the Medical Segmentation Decathlon.",
            where=file,
            expected="labels, modality and training; or for nnU-Net v2: labels, channel_names and file_ending",
            found=f"{type(error).__name__}: {printable(str(error))}",
            next_step="Mend the file, or remove it to have the folder read as a plain folder of volumes.",
        ) from error
    numbers = sorted(number for number, _ in classes)
    if numbers != list(range(len(classes))) or len(classes) > MOST_CLASSES:
        raise SuperCLError(
            "The classes in dataset.json are not numbered 0, 1, 2, and so on.",
            where=file,
            expected=f"each number once, from 0 to at most {MOST_CLASSES - 1}",
            found=some_of([*map(str, numbers)], 8),
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
        name=printable(str(declared.get("name", path.resolve().name))),
        cases=tuple(cases),
        channel_names=tuple(name for _, name in sorted(channels)),
        class_names=tuple(name for _, name in sorted(classes)),
    )


def _json(file: Path) -> dict[str, Any]:
    # Not `files.read_json`: an odd text in one entry is the problem of that case alone.
    declared = json.loads(read_text(file, limit_bytes=_MOST_BYTES), object_pairs_hook=unique_keys)
    if not isinstance(declared, dict):
        raise TypeError(f"a {type(declared).__name__}")
    return declared


def _entries(declared: dict[str, Any], part: str) -> list[Any]:
    entries = declared["training"] if part == "training" else declared.get("test", [])
    if not isinstance(entries, list):
        raise TypeError(f"{part} is no list")
    return entries


def _case(path: Path, entry: Any, place: str, *, num_channels: int) -> CaseSource:
    """The case of one entry of dataset.json, `place` of which is a name for it where it has none."""
    labelled = place.startswith("training")
    image, label = (
        (entry.get("image"), entry.get("label")) if isinstance(entry, dict) and labelled else (entry, None)
    )
    name = PurePosixPath(image if isinstance(image, str) and image else place)
    case_id, shown = stem(name.name) or place, printable(name.as_posix())
    problem = _problem(image, "image") or (_problem(label, "label") if labelled else "")
    if problem:  # whatever the entry leads to is not looked at
        return CaseSource(id=case_id, name=shown, image_paths=(path / "dataset.json",), problem=problem)
    return CaseSource(
        id=case_id,
        name=shown,
        image_paths=_image_paths(path / name, num_channels),
        label_paths=() if label is None else (path / label,),
    )


def _image_paths(file: Path, num_channels: int) -> tuple[Path, ...]:
    """`file`, or where only files of its channels are there, as in nnU-Net v1, these."""
    bare = stem(file.name)
    of_channels = [file.with_name(f"{bare}_{n:04}{file.name[len(bare) :]}") for n in range(num_channels)]
    if file.is_file() or not any(channel.is_file() for channel in of_channels):
        return (file,)
    return tuple(of_channels)


def _problem(entry: Any, kind: str) -> str:
    """Why an entry of dataset.json cannot name a file of the data set; empty where it can."""
    if not isinstance(entry, str):
        found = "nothing" if entry is None else repr(entry)[:60]
        return f"dataset.json does not name the {kind}; expected a path below its folder, found {found}"
    parts = PurePosixPath(entry).parts
    inside = bool(parts) and not entry.startswith("/") and ".." not in parts
    if inside and entry.isprintable() and max(len(part.encode()) for part in parts) <= 255:
        return ""
    what = "leads outside the data set" if not inside and parts else "is no path of a file"
    return f"The {kind} in dataset.json {what}; expected a path below its folder, found {entry[:120]!r}"
