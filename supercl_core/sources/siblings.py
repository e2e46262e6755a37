"""Images and label maps in two folders beside each other, which `images`, `arrays` and `plain` have in common.

Called by these layouts, and by `discover` for what they would take for images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from supercl_core.errors import SuperCLError, printable
from supercl_core.files import read_json
from supercl_core.sources.base import CaseSource
from supercl_core.sources.nnunet import class_names
from supercl_core.sources.pairs import paired
from supercl_core.sources.walk import id_of, stem, walk

_IMAGE_FOLDER: Final = "images"
_LABEL_FOLDERS: Final = ("masks", "labels")
_LABEL_MARKS: Final = ("_segmentation", "_mask", "_label", "_seg")
"""What may follow the name of an image in that of its label map."""
_LABEL_NAME: Final = re.compile(
    r"(?:.*[_.-])?(?:gt|ground_?truth|(?:label|mask|seg(?:mentation)?)s?(?:t[rs])?)", re.IGNORECASE
)
"""What folders and files of label maps are called."""
_MOST_BYTES: Final = 1 << 24


def read_siblings(
    path: Path, suffix: Callable[[str], str | None], label_classes: Mapping[int, int] | None
) -> list[CaseSource]:
    """The cases of a folder: every file that `suffix` knows; or, of `images/`, with those of `masks/` or `labels/`.

    A case is named by its path, a label map like its image, or so with `_mask`, `_label`, `_seg` or `_segmentation`
    behind it. Files outside these two folders, where there are both, are no cases.
    """
    label_path = next((path / name for name in _LABEL_FOLDERS if (path / name).is_dir()), None)
    if label_path is None or not (path / _IMAGE_FOLDER).is_dir():
        files, unreadable = walk(path, suffix)
        return [*(_alone(path, file) for file in files), *unreadable]
    image_path = path / _IMAGE_FOLDER
    images, unreadable = walk(image_path, suffix)
    maps, unreadable_maps = walk(label_path, suffix)
    ids = {id_of(image_path, file) for file in images}
    labels = []
    for file in maps:
        case_id = id_of(label_path, file)
        bare = (case_id.removesuffix(mark) for mark in _LABEL_MARKS)
        labels.append((case_id if case_id in ids else next((i for i in bare if i in ids), case_id), file))
    cases = paired(
        path, [(id_of(image_path, file), "", file) for file in images], labels, label_classes=label_classes
    )
    return [*cases, *unreadable, *unreadable_maps]


def _alone(path: Path, file: Path) -> CaseSource:
    name = printable(file.relative_to(path).as_posix())
    return CaseSource(id=id_of(path, file), name=name, image_paths=(file,))


def label_maps_among_images(path: Path, cases: Iterable[CaseSource]) -> list[Path]:
    """The images of cases that are called like label maps, below `path`; none where all of them are."""
    images = [case.image_paths[0] for case in cases if not case.problem]
    found = [file for file in images if _is_called_like_label_map(file.relative_to(path))]
    return found if len(found) < len(images) else []


def _is_called_like_label_map(file: Path) -> bool:
    return any(_LABEL_NAME.fullmatch(name) for name in (*file.parts[:-1], stem(file.name)))


def declared_classes(path: Path) -> tuple[str, ...] | None:
    """The classes that a dataset.json in the folder declares in `labels`, as nnU-Net v2 does; None where there is none.

    Raises SuperCLError for a file that cannot be used.
    """
    file = path / "dataset.json"
    if not file.exists():
        return None
    try:
        return class_names(read_json(file, limit_bytes=_MOST_BYTES)["labels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SuperCLError(
            "dataset.json does not say which classes there are.",
            where=file,
            expected='names and numbers, such as {"labels": {"background": 0, "liver": 1}}',
            found=f"{type(error).__name__}: {printable(str(error))[:200]}",
            next_step="Mend or remove the file.",
        ) from error
