"""A folder of 2-D images (PNG, JPEG, TIFF, BMP; grey or RGB): each is a case of one slice, RGB has three channels.

ANY/                                ANY/
  photo_1.jpg                         images/photo_1.jpg
  site_b/photo_2.jpg                  masks/photo_1.png       (or labels/; _mask, _seg, ... may follow)
                                      dataset.json            (optional)

Masks are PNG, TIFF or BMP. Without dataset.json they hold 0 (background), and 255 or 1 (foreground). With one, its
`labels` name the classes, as in nnU-Net v2: {"labels": {"background": 0, "lesion": 1, "hair": 2}}, and a mask holds
these numbers as grey values, or as numbers of a palette.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from supercl_core.errors import printable
from supercl_core.formats.flat_images import image_suffix
from supercl_core.sources.base import DataSource
from supercl_core.sources.siblings import declared_classes, read_siblings

NAME = "images"
EXPECTED = "images: 2-D images (.png, .jpg, .tif, .bmp), in images/ beside masks/ or anywhere"

_BINARY: Final = {0: 0, 1: 1, 255: 1}


def matches(_path: Path, files: Sequence[Path]) -> bool:
    """Whether anything below `path` is a 2-D image by its name."""
    return any(image_suffix(file.name) is not None for file in files)


def read(path: Path) -> DataSource:
    """Every image below `path`, or those of `images/` with their masks. Images may differ in size.

    A mask without an image is a case with a problem. Raises SuperCLError for a dataset.json that cannot be used.
    """
    classes = declared_classes(path)
    cases = read_siblings(path, image_suffix, None if classes else _BINARY)
    if classes is None and any(case.label_paths for case in cases):
        classes = ("background", "foreground")
    return DataSource(name=printable(path.resolve().name), cases=tuple(cases), class_names=classes)
