"""Sheets of pictures: lines of text and pictures one below the other, on a dark page.

Knows nothing of what is shown, which `supercl_core.showing.view` and `supercl_core.showing.pair_gallery` choose.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from supercl_core.cache.reader import CachedCase
from supercl_core.errors import printable
from supercl_core.showing.pictures import pixel_aspect

ROW_PIXELS: Final = 1844
"""Width of a sheet without its margins."""

PAGE_RGB: Final = (18, 21, 26)
TEXT_RGB: Final = (236, 239, 243)
SOFT_RGB: Final = (154, 164, 176)
GAP: Final = 28


def drawable(text: str) -> str:
    """A name from a file in the characters that Pillow's own font has; others as escapes."""
    return printable(text).encode("ascii", "backslashreplace").decode()


def fitted(case: CachedCase, longest: int) -> tuple[int, int]:
    """Width and height of a slice of a case, `longest` pixels on its longer side, its pixels in their true aspect."""
    width, height = case.row.shape[3], case.row.shape[2] * pixel_aspect(case.row)
    scale = longest / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def grey(slice_YX: np.ndarray, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(slice_YX).resize(size, Image.Resampling.BICUBIC).convert("RGB")


def resized(regions_YX: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The nearest values at `size` (width, height)."""
    width, height = size
    rows = (np.arange(height) + 0.5) * regions_YX.shape[0] / height
    columns = (np.arange(width) + 0.5) * regions_YX.shape[1] / width
    return regions_YX[rows.astype(int)[:, None], columns.astype(int)]


def text_strip(text: str, size: int, colour: tuple[int, int, int]) -> Image.Image:
    font = ImageFont.load_default(size)
    shown = cut(text, font, ROW_PIXELS)
    strip = Image.new("RGB", (math.ceil(font.getlength(shown)), round(1.3 * size)), PAGE_RGB)
    ImageDraw.Draw(strip).text((0, 0), shown, colour, font)
    return strip


def stacked(strips: list[Image.Image]) -> Image.Image:
    """Strips one below the other, with a margin around them."""
    height = sum(strip.height + GAP // 2 for strip in strips)
    width = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width + 2 * GAP, height + 2 * GAP), PAGE_RGB)
    y = GAP
    for strip in strips:
        sheet.paste(strip, (GAP, y))
        y += strip.height + GAP // 2
    return sheet


def cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, its end replaced by dots where it is longer than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
