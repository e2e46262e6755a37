"""A plain folder of volumes, sub-folders included, without labels.

ANY/
  scan_01.nii.gz
  site_b/scan_07.mha        becomes the case site_b_scan_07
"""

from __future__ import annotations

from pathlib import Path

from supercl_core.sources.base import CaseSource, DataSource, without_suffix

EXPECTED = "plain: volumes (.nii.gz, .nii, .nrrd, .mha, .mhd, .hdr), in sub-folders or not"


def matches(path: Path) -> bool:
    """Whether any file below `path` is a volume by its name."""
    return any(True for _ in _volumes(path))


def read(path: Path) -> DataSource:
    """Every volume below `path`; a case is named by its path within the folder."""
    cases = []
    for file in _volumes(path):
        parts = [*file.relative_to(path).parts[:-1], without_suffix(file.name) or file.name]
        cases.append(CaseSource(id="_".join(parts), image_path=file))
    return DataSource(name=path.resolve().name, cases=tuple(sorted(cases, key=lambda case: case.id)))


def _volumes(path: Path) -> list[Path]:
    return [
        file
        for file in sorted(path.rglob("*"))
        if not file.name.startswith(".") and without_suffix(file.name) is not None and file.is_file()
    ]
