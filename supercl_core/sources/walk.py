"""Which files lie below a folder: the one way in which layouts look for them.

Hidden files and folders are left out, and links to folders are not followed. Nothing else goes without a word.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from supercl_core.errors import printable
from supercl_core.formats.array_files import array_suffix
from supercl_core.formats.flat_images import image_suffix
from supercl_core.formats.volume_files import volume_suffix
from supercl_core.sources.base import CaseSource


def data_suffix(name: str) -> str | None:
    """The ending by which a file name is that of a volume, a 2-D image or an array; None for any other name."""
    return volume_suffix(name) or image_suffix(name) or array_suffix(name)


def stem(name: str) -> str:
    """A file name without the ending that `data_suffix` finds."""
    return name[: len(name) - len(data_suffix(name) or "")]


def id_of(path: Path, file: Path) -> str:
    """The case id of a file below the folder `path`: its way from there, without ending and with `_` for slashes."""
    name = file.relative_to(path)
    return "_".join((*name.parts[:-1], stem(name.name)))


def walk(
    path: Path, suffix: Callable[[str], str | None] = data_suffix
) -> tuple[list[Path], list[CaseSource]]:
    """What has, by `suffix`, the name of data below `path`, in order; and a case with a problem for each unread folder.

    A folder counts too where no such file lies in it: some tools unpack `scan.nii` into a folder of that name.
    Raises OSError where `path` itself cannot be listed.
    """
    found: list[Path] = []
    unreadable: list[OSError] = []
    for folder, folders, files in os.walk(path, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [*folders, *(name for name in files if not name.startswith("."))]
        found += [Path(folder, name) for name in names if suffix(name) is not None]
    if any(Path(error.filename) == path for error in unreadable):
        raise unreadable[0]
    inner = {parent for file in found for parent in file.parents}
    problems = {
        Path(error.filename): f"The folder cannot be listed: {error.strerror}" for error in unreadable
    }
    files_found = sorted(file for file in found if file not in inner and file not in problems)
    return files_found, [unusable(path, file, problems[file]) for file in sorted(problems)]


def unusable(path: Path, file: Path, problem: str) -> CaseSource:
    """A case that stands for a file or folder below `path` which cannot be used."""
    return CaseSource(
        id=id_of(path, file),
        name=printable(file.relative_to(path).as_posix()),
        image_paths=(file,),
        problem=problem,
    )
