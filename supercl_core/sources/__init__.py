"""Which cases a folder holds: one small module per layout, recognised by itself.

A layout module has `EXPECTED` (what its folder looks like, one line), `matches(path)` and `read(path)`.
Called by preprocessing and prediction.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from supercl_core.errors import SuperCLError, storage_error
from supercl_core.sources import folder, msd
from supercl_core.sources.base import CaseSource, DataSource, with_usable_ids

__all__ = ["CaseSource", "DataSource", "discover"]

# The first that matches is taken: from the most specific to the most general.
_LAYOUTS = (msd, folder)


def discover(path: Path) -> DataSource:
    """List the cases of the folder `path`, without reading any volume.

    What is wrong with one case (two files of one name, a name that cannot be an id, an entry of a list that leads
    outside the folder) is said in its `problem`. Raises SuperCLError when the folder is missing, cannot be listed or is
    empty, and when no layout fits.
    """
    try:
        return _discovered(path)
    except OSError as error:
        raise storage_error(error, where=path) from None


def _discovered(path: Path) -> DataSource:
    if not path.is_dir():
        raise SuperCLError(
            "The input folder does not exist.",
            where=path,
            expected="a folder of volumes",
            found="a file" if path.exists() else "nothing",
            next_step="Check the path; `supercl phantom OUT` writes a data set to try things with.",
        )
    for layout in _LAYOUTS:
        if layout.matches(path):
            source = layout.read(path)
            return dataclasses.replace(source, cases=with_usable_ids(source.cases))
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise SuperCLError(
        "The input folder holds no volume in a known layout.",
        where=path,
        expected="\n            ".join(layout.EXPECTED for layout in _LAYOUTS),
        found=shown or "an empty folder",
        next_step="Arrange the files in one of these layouts, or point to the folder that holds them.",
    )
