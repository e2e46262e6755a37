"""A plain folder of volumes, sub-folders included.

ANY/                                ANY/
  scan_01.nii.gz                      images/scan_01.nii.gz
  site_b/scan_07.mha                  labels/scan_01.nii.gz   (or masks/; _mask, _seg, ... may follow)
                                      dataset.json            (needed where there are labels)

The second of the first becomes the case site_b_scan_07. Classes are declared as in nnU-Net v2:
{"labels": {"background": 0, "liver": 1}}.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from supercl_core.errors import printable
from supercl_core.formats.volume_files import volume_suffix
from supercl_core.sources.base import DataSource
from supercl_core.sources.siblings import declared_classes, read_siblings

NAME = "plain"
EXPECTED = "plain: volumes (.nii.gz, .nii, .nrrd, .mha, .mhd, .hdr), in images/ beside labels/ or anywhere"


def matches(_path: Path, files: Sequence[Path]) -> bool:
    """Whether anything below `path` is a volume by its name."""
    return any(volume_suffix(file.name) is not None for file in files)


def read(path: Path) -> DataSource:
    """Every volume below `path`, or those of `images/` with their label maps.

    Links to folders are not followed. Whatever has the name of a volume is a case, also where it is no file, as is a
    folder that cannot be listed: nothing is left out without a word but what is hidden. Raises SuperCLError where there
    are label maps and a dataset.json that cannot be used.
    """
    cases = read_siblings(path, volume_suffix, None)
    classes = declared_classes(path) if any(case.label_paths for case in cases) else None
    return DataSource(name=printable(path.resolve().name), cases=tuple(cases), class_names=classes)
