"""Which cases a folder holds: one small module per layout, recognised by itself.

A layout has `NAME` (what --layout takes), `EXPECTED` (what its folder looks like, one line), `matches(path, files)`,
where `files` is all data below the folder, and `read(path)`. Called by preprocessing and prediction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from supercl_core.errors import SuperCLError, UsageError, some_of, storage_error
from supercl_core.formats.array_files import array_suffix
from supercl_core.formats.flat_images import image_suffix
from supercl_core.formats.volume_files import volume_suffix
from supercl_core.sources import arrays, bids, chaos, dicom, folder, images, msd, named, nnunet
from supercl_core.sources.base import CaseSource, DataSource, count_of, with_usable_ids
from supercl_core.sources.siblings import label_maps_among_images
from supercl_core.sources.walk import walk

__all__ = ["CaseSource", "DataSource", "discover", "layout_names"]


class Layout(Protocol):
    """A way in which data sets are arranged."""

    @property
    def NAME(self) -> str: ...
    @property
    def EXPECTED(self) -> str: ...
    def matches(self, path: Path, files: Sequence[Path], /) -> bool: ...
    def read(self, path: Path, /) -> DataSource: ...


_DECLARED: Final[tuple[Layout, ...]] = (nnunet, msd, bids)
"""Those that say by a file or folder of their own what a folder is. The first that matches is taken."""
_NAMED: Final[tuple[Layout, ...]] = (*named.LAYOUTS, chaos)
"""Public data sets as they are distributed, known by the names of their files."""
_GENERAL: Final[tuple[Layout, ...]] = (dicom, images, arrays, folder)
"""Those that take every file of a kind."""
_LAYOUTS: Final = (*_DECLARED, *_NAMED, *_GENERAL)

_SUFFIXES: Final = {"images": image_suffix, "arrays": array_suffix, "plain": volume_suffix}
"""By what names the layouts that take every file of a kind know it."""

_SIGNS: Final = {
    "nnunet": ("dataset.json", "imagesTr", "imagesTs", "labelsTr"),
    "msd": ("dataset.json", "imagesTr", "imagesTs", "labelsTr"),
    "bids": ("sub-*", "dataset_description.json", "participants.tsv"),
    "dicom": ("DICOMDIR", "*.dcm", "*/*.dcm", "*/*/*.dcm"),
    "images": ("images", "masks"),
    "arrays": ("images", "labels"),
}
"""What lies in a folder that resembles a layout, also where something else is missing in it."""


def layout_names() -> tuple[str, ...]:
    """What `--layout` takes."""
    return tuple(layout.NAME for layout in _LAYOUTS)


def discover(path: Path, layout: str | None = None) -> DataSource:
    """List the cases of the folder `path`, without reading any volume.

    `layout`: the name of the layout, instead of the one that the folder is recognised by. What is wrong with one case
    (two files of one name, a name that cannot be an id, an entry of a list that leads outside the folder, a file that
    is missing) is said in its `problem`.

    Raises SuperCLError when the folder is missing, cannot be listed or holds no case, when no layout fits, or files of
    several do, or where label maps would be taken for images; UsageError for a layout that there is not.
    """
    try:
        source = _discovered(path, layout)
        return dataclasses.replace(source, cases=with_usable_ids(source.cases))
    except OSError as error:
        raise storage_error(error, where=path) from None


def _discovered(path: Path, name: str | None) -> DataSource:
    if not path.is_dir():
        raise SuperCLError(
            "The input folder does not exist.",
            where=path,
            expected="a folder of volumes",
            found="a file" if path.exists() else "nothing",
            next_step="Check the path; `supercl phantom OUT` writes a data set to try things with.",
        )
    files = walk(path)[0]
    layout = _recognised(path, files) if name is None else _asked_for(path, files, name)
    source = layout.read(path)
    if name is None and layout.NAME in _SUFFIXES:
        _check_images(path, layout, source)
    used = {file for case in source.cases for file in case.paths}
    others = [file for file in files if file not in used and file not in source.left_out]
    if others and name is None and layout not in _DECLARED:
        found = f"{len(source.cases)} cases of {layout.NAME}; {count_of(others, path)} in none of them"
        raise _mixed(path, [layout], found)
    left_out = {**source.left_out, **dict.fromkeys(others, f"no part of the layout {layout.NAME}")}
    source = dataclasses.replace(source, left_out=left_out)
    if not source.cases:
        raise SuperCLError(
            f"The input folder has the layout {layout.NAME}, but no case.",
            where=path,
            expected=layout.EXPECTED,
            found="; ".join(source.notes(path)) or _listing(path),
            next_step="Check that the files lie where the layout has them, or name another layout with --layout.",
        )
    return source


def _recognised(path: Path, files: Sequence[Path]) -> Layout:
    """The layout that fits the folder; `files`: all data below it."""
    if declared := next((layout for layout in _DECLARED if layout.matches(path, files)), None):
        return declared
    fitting = [layout for layout in _NAMED if layout.matches(path, files)]
    fitting = fitting or [layout for layout in _GENERAL if layout.matches(path, files)]
    if not fitting:
        raise _nothing_fits(path)
    if len(fitting) > 1:
        raise _mixed(path, fitting, "; ".join(_summary(layout, path) for layout in fitting))
    return fitting[0]


def _asked_for(path: Path, files: Sequence[Path], name: str) -> Layout:
    layout = next((layout for layout in _LAYOUTS if name == layout.NAME), None)
    if layout is None:
        raise UsageError(
            "There is no such layout.",
            expected=", ".join(layout_names()),
            found=name,
            next_step="Choose one of these, or leave --layout out.",
        )
    if not layout.matches(path, files):
        raise SuperCLError(
            f"The input folder does not hold the layout {name}.",
            where=path,
            expected=layout.EXPECTED,
            found=_listing(path),
            next_step="Check the path, or leave --layout out.",
        )
    return layout


def _nothing_fits(path: Path) -> SuperCLError:
    similar = {
        layout.NAME: [sign for sign in _SIGNS.get(layout.NAME, ()) if any(path.glob(sign))]
        for layout in _LAYOUTS
    }
    lines = [layout.EXPECTED for layout in _LAYOUTS if similar[layout.NAME]] or [
        layout.EXPECTED for layout in _LAYOUTS
    ]
    resembled = "; ".join(f"{name} (by {', '.join(signs)})" for name, signs in similar.items() if signs)
    return SuperCLError(
        "The input folder holds no volume in a known layout.",
        where=path,
        expected="\n            ".join(lines),
        found=_listing(path) + (f"\n            It resembles {resembled}." if resembled else ""),
        next_step="Arrange the files in one of these layouts, or point to the folder that holds them.",
    )


def _mixed(path: Path, fitting: Sequence[Layout], found: str) -> SuperCLError:
    return SuperCLError(
        "The input folder holds data of several layouts.",
        where=path,
        expected="files of one layout",
        found=found,
        next_step="Move them to folders of their own, or take those of one: --layout "
        + " or --layout ".join(layout.NAME for layout in fitting),
    )


def _check_images(path: Path, layout: Layout, source: DataSource) -> None:
    """Raise SuperCLError where label maps would become images, from which pre-training learns."""
    if not (label_maps := label_maps_among_images(path, source.cases)):
        return
    raise SuperCLError(
        "Files that are called like label maps would be taken for images.",
        where=path,
        expected=f"images alone, or a layout with labels, such as {layout.EXPECTED}",
        found=count_of(label_maps, path),
        next_step="Arrange the files in a layout with labels, point to the folder of the images, or take all of them "
        f"for images with --layout {layout.NAME}.",
    )


def _summary(layout: Layout, path: Path) -> str:
    """How much of a layout there is, and the first of it."""
    if layout.NAME in _SUFFIXES:
        return f"{layout.NAME}: {count_of(walk(path, _SUFFIXES[layout.NAME])[0], path)}"
    cases = layout.read(path).cases
    return f"{layout.NAME}: {len(cases)} cases, such as {cases[0].name}"


def _listing(path: Path) -> str:
    names = sorted(
        entry.name + (" (a link, not followed)" if entry.is_symlink() else "/" if entry.is_dir() else "")
        for entry in path.iterdir()
    )
    return some_of(names, 8) or "an empty folder"
