"""The layout of raw data sets of nnU-Net v2.

Dataset001_NAME/
  dataset.json                      channel_names, labels, file_ending
  imagesTr/case_0000.nii.gz         one file for each channel: _0000, _0001, ...
  labelsTr/case.nii.gz
  imagesTs/case_0000.nii.gz         (optional, without labels)

As described in nnU-Net's documentation/dataset_format.md. Colour images (file_ending .png, .bmp, .tif) have three
channel names and one file, _0000. Regions (a class given as a list of numbers) are taken apart: a number is named by
the smallest region that holds it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from supercl_core.errors import SuperCLError, printable
from supercl_core.files import read_json
from supercl_core.formats.flat_images import image_suffix
from supercl_core.sources.base import MOST_CLASSES, CaseSource, DataSource
from supercl_core.sources.pairs import paired
from supercl_core.sources.walk import data_suffix, unusable

NAME = "nnunet"
EXPECTED = (
    "nnunet: dataset.json with file_ending, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz (nnU-Net v2)"
)

_MOST_BYTES: Final = 1 << 24
_MOST_CHANNELS: Final = 100


def matches(path: Path, _files: Sequence[Path]) -> bool:
    """Whether `path` has a dataset.json as nnU-Net v2 wants it, and a folder of images."""
    if not any((path / name).is_dir() for name in ("imagesTr", "imagesTs")):
        return False
    try:
        declared = read_json(path / "dataset.json", limit_bytes=_MOST_BYTES)
    except (OSError, ValueError):
        return False
    return isinstance(declared, dict) and "file_ending" in declared


def read(path: Path) -> DataSource:
    """The cases of imagesTr, with labels where labelsTr has them, and of imagesTs.

    A case that lacks a channel file, and a file whose name is not that of a channel, are cases with a problem. Raises
    SuperCLError when dataset.json lacks a part, says what cannot be, or declares voxels to be ignored.
    """
    file = path / "dataset.json"
    try:
        declared = read_json(file, limit_bytes=_MOST_BYTES)
        ending = str(declared["file_ending"])
        names = sorted(
            (int(number), printable(str(name))) for number, name in declared["channel_names"].items()
        )
        classes = class_names(declared["labels"])
        if data_suffix(f"x{ending}") != ending.lower():
            raise ValueError(f"the file_ending {ending!r}, which is not supported")
        if [number for number, _ in names] != list(range(len(names))) or not 0 < len(names) <= _MOST_CHANNELS:
            raise ValueError("channel_names that are not numbered 0, 1, 2, and so on")
        if "dataset" in declared:
            raise ValueError("a list `dataset` of files in other places, which is not supported")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SuperCLError(
            "dataset.json is not one of nnU-Net v2.",
            where=file,
            expected="channel_names, labels and file_ending, as nnU-Net documents them",
            found=f"{type(error).__name__}: {printable(str(error))[:200]}",
            next_step="Mend the file, or name another layout with --layout.",
        ) from error
    cases: list[CaseSource] = []
    for folder, label_folder in (("imagesTr", "labelsTr"), ("imagesTs", None)):
        files, others = _by_name(path, folder, rf"(.+)_(\d{{4}}){re.escape(ending)}")
        is_colour = (
            image_suffix(f"x{ending}") and len(names) == 3 and {part for _, part, _ in files} == {"0000"}
        )
        channels = ["0000"] if is_colour else [f"{number:04d}" for number, _ in names]
        maps, other_maps = _by_name(path, label_folder, rf"(.+)(){re.escape(ending)}")
        labels = [(case_id, map_file) for case_id, _, map_file in maps]
        cases += [*paired(path, files, labels, channels=channels), *others, *other_maps]
    return DataSource(
        name=printable(re.sub(r"^Dataset\d+_", "", str(declared.get("name", path.resolve().name)))),
        cases=tuple(cases),
        channel_names=tuple(name for _, name in names),
        class_names=classes,
    )


def class_names(labels: Any) -> tuple[str, ...]:
    """The names of the classes 0, 1, 2, ... of `labels` in a dataset.json: a number, or a list of numbers, by name.

    Raises ValueError where a number has no name, or is none, or is that of voxels to be ignored.
    """
    if not isinstance(labels, dict):
        raise ValueError("labels that are not numbers by name")
    if "ignore" in labels:
        raise ValueError(
            "the label `ignore`, which is not supported: voxels without a class cannot be told apart"
        )
    regions = {
        printable(name): [int(str(number)) for number in (value if isinstance(value, list) else [value])]
        for name, value in labels.items()
    }
    numbers = sorted({number for region in regions.values() for number in region})
    if numbers != list(range(len(numbers))) or not 0 < len(numbers) <= MOST_CLASSES:
        raise ValueError(f"labels that are not numbered 0, 1, 2, and so on to at most {MOST_CLASSES - 1}")
    holders = {number: [name for name in regions if number in regions[name]] for number in numbers}
    return tuple(min(holders[number], key=lambda name: len(regions[name])) for number in numbers)


def _by_name(
    path: Path, folder: str | None, pattern: str
) -> tuple[list[tuple[str, str, Path]], list[CaseSource]]:
    """Case, channel and file of what lies in a folder, and cases with a problem for data whose name does not fit."""
    if folder is None or not (path / folder).is_dir():
        return [], []
    fitting, others = [], []
    for file in sorted((path / folder).iterdir()):
        if file.name.startswith("."):
            continue
        if found := re.fullmatch(pattern, file.name, re.DOTALL):
            fitting.append((found[1], found[2], file))
        elif data_suffix(file.name) is not None:
            problem = "The file's name is not what dataset.json lets expect; " + (
                f"expected CASE_0000 and its file_ending, found {printable(file.name)}"
            )
            others.append(unusable(path, file, problem))
    return fitting, others
