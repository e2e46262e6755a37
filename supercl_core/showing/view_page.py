"""A page to scroll through a case: one self-contained HTML file, its pictures embedded, its script known by its hash.

What slices look like is left to `supercl_core.showing.pictures`, the facts of the case to
`supercl_core.showing.inspection`, what the page does to `view_page.js`. Called by `supercl view --html`. Axes: y row, x
column.
"""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
from PIL import Image

from supercl_core.cache.reader import CachedCase
from supercl_core.files import write_text
from supercl_core.showing.inspection import case_rows, case_summary
from supercl_core.showing.pictures import (
    BORDER_RGB,
    asp_slice,
    boundaries,
    class_name,
    class_rgb,
    grey_slice,
    pixel_aspect,
)
from supercl_core.showing.view import check_slice

BORDER_PIXELS: Final = 1000
"""Superpixel borders are drawn on slices enlarged by a whole factor to about this length, so that they stay thin."""

LOSSLESS_PIXELS: Final = 2**23
"""Slices are embedded as PNG up to this many pixels in all channels of a case, as JPEG beyond."""

JPEG_QUALITY: Final = 80


def write_page(path: Path, case: CachedCase, z: int | None = None) -> None:
    """Write the page of a case, opened at slice `z` or at the middle one.

    Raises UsageError where the case has no slice `z`.
    """
    _, num_slices, height, width = case.row.shape
    z = num_slices // 2 if z is None else z
    check_slice(case, z)
    cache = case.cache
    truth_ZYX = case.ground_truth_ZYX
    classes = [] if truth_ZYX is None else [int(value) for value in np.unique(truth_ZYX) if value]
    script = _beside("view_page.js")
    page: dict[str, Any] = {
        "case_id": case.row.id,
        "data_set": cache.name,
        "channel_names": cache.attributes["channel_names"],
        "num_slices": num_slices,
        "first_z": z,
        "layers": _layers(has_truth=truth_ZYX is not None),
        "classes": [
            (class_name(cache.class_names, value), "#{:02x}{:02x}{:02x}".format(*class_rgb(value)))
            for value in classes
        ],
        "facts": case_rows(case_summary(cache, case.row.id)),
        "ratio": width / (height * pixel_aspect(case.row)),
        "slices": _slices(case),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    write_text(path, environment.from_string(_beside("view_page.html.jinja")).render(page))


def _layers(*, has_truth: bool) -> list[dict[str, Any]]:
    """What can be laid over a slice: the key that toggles it, whether it shows at first, and its opacity in percent."""
    layers = [
        {"name": "asp", "title": "ASP map", "key": "a", "shown": False, "opacity": 100},
        {"name": "truth", "title": "Ground truth", "key": "g", "shown": True, "opacity": 50},
        {"name": "borders", "title": "Superpixel borders", "key": "b", "shown": True, "opacity": 80},
    ]
    return [layer for layer in layers if has_truth or layer["name"] != "truth"]


def _slices(case: CachedCase) -> list[dict[str, Any]]:
    """The pictures of every slice as data URIs: `grey` (one a channel) and the layers by their names."""
    channels, num_slices, height, width = case.row.shape
    lossless = channels * num_slices * height * width <= LOSSLESS_PIXELS
    factor = max(1, round(BORDER_PIXELS / max(height, width)))
    borders_colours = np.array([0, 0, 0, 0, *BORDER_RGB, 255], np.uint8).reshape(-1, 4)
    truth_colours = np.array([(0, 0, 0, 0), *((*class_rgb(value), 255) for value in range(1, 256))], np.uint8)
    slices = []
    for z in range(num_slices):
        enlarged_YX = case.superpixels_ZYX[z].repeat(factor, axis=0).repeat(factor, axis=1)
        pictures: dict[str, Any] = {
            "grey": [
                _png(Image.fromarray(grey_YX)) if lossless else _jpeg(Image.fromarray(grey_YX))
                for grey_YX in (grey_slice(case, z, channel) for channel in range(channels))
            ],
            "asp": _png(Image.fromarray(asp_slice(case, z))),
            "borders": _png(_paletted(boundaries(enlarged_YX), borders_colours), bits=1),
        }
        if case.ground_truth_ZYX is not None:
            pictures["truth"] = _png(_paletted(case.ground_truth_ZYX[z], truth_colours))
        slices.append(pictures)
    return slices


def _paletted(indices_YX: np.ndarray, colours: np.ndarray) -> Image.Image:
    """A picture of palette indices (y, x); `colours`: uint8 (n, 4), red, green, blue, alpha."""
    picture = Image.fromarray(indices_YX.astype(np.uint8))
    picture.putpalette(colours.tobytes(), "RGBA")
    return picture


def _png(picture: Image.Image, *, bits: int = 8) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", bits=bits)
    return _data_uri(buffer, "png")


def _jpeg(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return _data_uri(buffer, "jpeg")


def _data_uri(buffer: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _beside(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
