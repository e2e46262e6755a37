"""2-D images (PNG, JPEG, TIFF, BMP) as volumes of one slice, through Pillow.

Only what an image holds exactly is taken: grey (up to 32 bits), or RGB with 8 bits a colour, as three channels.
Called by `supercl_core.formats.case_files`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from supercl_core.errors import SuperCLError
from supercl_core.formats.geometry import UNPLACED
from supercl_core.formats.volume_files import damaged, ending, foreign, opened, start_of
from supercl_core.formats.volumes import Header, Volume, check_finite

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS: Final = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
"""File name endings of 2-D images, and Pillow's reader for each."""

_GREY: Final = ("1", "L", "I;16", "I;16L", "I;16B", "I", "F")
"""Pillow's names of the modes with one number a pixel."""


def image_suffix(name: str) -> str | None:
    """The ending by which a file name is that of a 2-D image; None where it is not."""
    return ending(name, FORMATS)


def read_image_header(path: Path, *, is_label: bool = False) -> Header:
    """The shape (c, 1, y, x) of a 2-D image and its mode, without its pixels. Raises as `read_image` does."""
    with _image(path, is_label=is_label) as image:
        width, height = image.size
        return Header(shape=(len(image.getbands()), 1, height, width), dtype=image.mode)


def read_image(path: Path, *, is_label: bool = False) -> Volume:
    """Read a 2-D image as (c, 1, y, x) in the type that it is stored in; it has no spacing.

    `is_label`: a label map, of which a palette's numbers are the values. Rows are as stored: what the file says of the
    camera's orientation is left alone, as masks do not say it.

    Raises SuperCLError when the file is missing, damaged, of another kind than its name says, larger than Pillow takes
    for harmless (about 180 million pixels), of a mode that cannot be used, when it holds several images, when a
    label map is a JPEG, and when a value is NaN or infinite.
    """
    with _image(path, is_label=is_label) as image:
        array = np.asarray(image)
    array = np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]
    array = array.astype(np.uint8 if array.dtype == bool else array.dtype.newbyteorder("="), copy=False)
    array_CZYX = np.ascontiguousarray(array)[:, None]
    check_finite(path, array_CZYX)
    return Volume(array_CZYX=array_CZYX, geometry=UNPLACED)


@contextmanager
def _image(path: Path, *, is_label: bool) -> Iterator[Image]:
    """An image whose header is read, of a kind that can be used."""
    from PIL import Image, UnidentifiedImageError

    kind = FORMATS[image_suffix(path.name) or ""]
    if is_label and kind == "JPEG":
        raise _unusable(path, "a label map without loss", "JPEG, which changes the values", "Save it as PNG.")
    with opened(path) as file:
        try:
            with Image.open(file, formats=[kind]) as image:
                _check_kind(path, image, is_label=is_label)
                yield image
        except UnidentifiedImageError:
            raise foreign(path, start_of(path, 24)[0], f"a {kind} file") from None
        except (  # what Pillow raises for broken files
            OSError,
            SyntaxError,
            ValueError,
            TypeError,
            LookupError,
            ArithmeticError,
            EOFError,
            struct.error,
            zlib.error,
            Image.DecompressionBombError,
            Warning,  # in processes that take warnings for errors
        ) as error:
            raise damaged(path, error, expected=f"an undamaged {kind} file") from error


def _check_kind(path: Path, image: Image, *, is_label: bool) -> None:
    if (count := getattr(image, "n_frames", 1)) != 1:
        raise _unusable(
            path, "one image in the file", f"{count} images", "Save it as a volume, such as NIfTI."
        )
    if image.mode not in (*_GREY, "P" if is_label else "RGB"):
        expected = "grey, or numbers of a palette" if is_label else "grey or RGB"
        raise _unusable(path, expected, f"Pillow's mode {image.mode}", "Convert it.")
    if image.mode == "RGB" and any(";16" in str(tile) for tile in getattr(image, "tile", ())):
        raise _unusable(path, "8 bits a colour", "16 bits a colour", "Save it with 8 bits a colour.")


def _unusable(path: Path, expected: str, found: str, next_step: str) -> SuperCLError:
    return SuperCLError(
        "The image cannot be used.", where=path, expected=expected, found=found, next_step=next_step
    )
