"""A folder of arrays: `.npy`, `.npz` or HDF5 (.h5, .hdf5), each file a case.

ANY/                                ANY/
  case_1.npz                          images/case_1.npy
  site_b/case_2.h5                    labels/case_1.npy       (or masks/; _label, _seg, ... may follow)
  dataset.json                        dataset.json            (both: needed where there are labels)

An array is (y, x), (z, y, x) or (c, z, y, x). In a file of several arrays, `image` is the image, or the only array
beside `label`; `label` is the label map. Nothing is unpickled. Arrays have no spacing: distances are in voxels. The
classes of label maps are declared as in nnU-Net v2: {"labels": {"background": 0, "liver": 1}}. HDF5 needs the extra
`hdf5`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from supercl_core.errors import SuperCLError, printable
from supercl_core.formats.array_files import array_suffix, has_label
from supercl_core.sources.base import CaseSource, DataSource
from supercl_core.sources.siblings import declared_classes, read_siblings

NAME = "arrays"
EXPECTED = "arrays: .npy, .npz, .h5 or .hdf5 files, with `label` in them or labels/ beside images/"


def matches(_path: Path, files: Sequence[Path]) -> bool:
    """Whether anything below `path` is a file of arrays by its name."""
    return any(array_suffix(file.name) is not None for file in files)


def read(path: Path) -> DataSource:
    """Every file of arrays below `path`, or those of `images/` with their label maps.

    Looks into the files for the names of their arrays; one that cannot be opened is a case with a problem. Raises
    SuperCLError for a dataset.json that cannot be used.
    """
    cases = tuple(_with_own_label(case) for case in read_siblings(path, array_suffix, None))
    name = printable(path.resolve().name)
    return DataSource(name=name, cases=cases, class_names=declared_classes(path))


def _with_own_label(case: CaseSource) -> CaseSource:
    """The case, with the label map that lies in the file of its image."""
    if case.problem or case.label_paths:
        return case
    try:
        return dataclasses.replace(
            case, label_paths=case.image_paths if has_label(case.image_paths[0]) else ()
        )
    except SuperCLError as error:
        return dataclasses.replace(case, problem=error.one_line())
