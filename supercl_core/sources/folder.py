"""A plain folder of volumes, sub-folders included, without labels.

ANY/
  scan_01.nii.gz
  site_b/scan_07.mha        becomes the case site_b_scan_07
"""

from __future__ import annotations

import os
from pathlib import Path

from supercl_core.errors import printable
from supercl_core.sources.base import CaseSource, DataSource, without_suffix

EXPECTED = "plain: volumes (.nii.gz, .nii, .nrrd, .mha, .mhd, .hdr), in sub-folders or not"


def matches(path: Path) -> bool:
    """Whether anything below `path` is a volume by its name."""
    return bool(_volumes(path)[0])


def read(path: Path) -> DataSource:
    """Every volume below `path`; a case is named by its path within the folder.

    Links to folders are not followed. Whatever has the name of a volume is a case, also where it is no file, as is a
    folder that cannot be listed: nothing is left out without a word but what is hidden.
    """
    files, unreadable = _volumes(path)
    problems = {
        Path(error.filename): f"The folder cannot be listed: {error.strerror}" for error in unreadable
    }
    cases = []
    for file in (*files, *problems):
        name = file.relative_to(path)
        parts = [*name.parts[:-1], without_suffix(file.name) or file.name]
        cases.append(
            CaseSource(
                id="_".join(parts),
                name=printable(name.as_posix()),
                image_path=file,
                problem=problems.get(file, ""),
            )
        )
    return DataSource(name=printable(path.resolve().name), cases=tuple(cases))


def _volumes(path: Path) -> tuple[list[Path], list[OSError]]:
    """What has the name of a volume, in order, and the folders that cannot be listed.

    A folder counts where no volume lies in it: some tools unpack `scan.nii` into a folder of that name.
    """
    found: list[Path] = []
    unreadable: list[OSError] = []
    for folder, folders, files in os.walk(path, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [*folders, *(name for name in files if not name.startswith("."))]
        found += [Path(folder, name) for name in names if without_suffix(name) is not None]
    if any(Path(error.filename) == path for error in unreadable):
        raise unreadable[0]
    inner = {parent for file in found for parent in file.parents}
    return sorted(file for file in found if file not in inner), unreadable
