"""What every layout module returns: a data source and its cases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

VOLUME_SUFFIXES: Final = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".hdr")
"""File name endings of volumes; SimpleITK reads all of them."""


@dataclass(frozen=True, kw_only=True)
class CaseSource:
    """The files of one case."""

    id: str
    image_path: Path
    label_path: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every source file of the case, image first."""
        return (self.image_path,) if self.label_path is None else (self.image_path, self.label_path)


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A folder of cases."""

    name: str
    cases: tuple[CaseSource, ...]
    """In order of their ids."""
    channel_names: tuple[str, ...] | None = None
    """None where the layout does not say: the volumes then tell how many channels there are."""
    class_names: tuple[str, ...] | None = None
    """Class 0 (background) first; None where the layout declares no classes."""


def without_suffix(name: str) -> str | None:
    """The file name without its volume suffix; None for a file that is no volume by its name."""
    for suffix in VOLUME_SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return None
