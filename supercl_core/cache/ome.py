"""OME-NGFF 0.5 metadata, so that viewers open a case with its label layers, unconverted.

Windows are in stored values, because that is what viewers show. Where the volume lay in the scanner is left out: 0.5
has scales and shifts along the axes but no turned axes, and `geometry` beside it says it in full.
Called by the cache's writer only. Source: the OME-NGFF 0.5 specification (axes, multiscales, omero, labels).
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

from supercl_core.cache.cases import CaseRow
from supercl_core.cache.schema import OME_VERSION, STATISTICS


def case_attributes(row: CaseRow, channel_names: Sequence[str]) -> dict[str, Any]:
    """The `ome` attribute of a case: its image, and how a viewer shows it at first.

    That is the middle slice of the first channel, grey, between its 0.5 and 99.5 percentiles.
    """
    channels = [
        {"label": name, "active": index == 0, "color": "FFFFFF", "window": _window(row, index)}
        for index, name in enumerate(channel_names)
    ]
    rendering = {"defaultT": 0, "defaultZ": row.shape[1] // 2, "model": "greyscale"}
    return {
        **_multiscales(row.id, "image", "czyx", row),
        "omero": {"channels": channels, "rdefs": rendering},
    }


def superpixels_attributes(row: CaseRow) -> dict[str, Any]:
    """The `ome` attribute of a case's superpixels.

    It names no colours: those of every id would be 4 % of a small case. Viewers choose some, and may leave 0 clear.
    """
    return _label_attributes("superpixels", row, {})


def ground_truth_attributes(row: CaseRow, class_names: Sequence[str]) -> dict[str, Any]:
    """The `ome` attribute of a case's ground truth: colour and name of every class; the background is clear."""
    clear = {"label-value": 0, "rgba": [0, 0, 0, 0]}
    colours = [clear, *(_colour(value) for value in range(1, len(class_names)))]
    names = [{"label-value": value, "name": name} for value, name in enumerate(class_names)]
    return _label_attributes("ground_truth", row, {"colors": colours, "properties": names})


def labels_attributes(names: Sequence[str]) -> dict[str, Any]:
    """The `ome` attribute of the group `labels`, which lists its layers."""
    return {"version": OME_VERSION, "labels": list(names)}


def _label_attributes(name: str, row: CaseRow, display: dict[str, Any]) -> dict[str, Any]:
    """A label layer, whose array lies at `0` and whose image is two groups up."""
    image_label = {"version": OME_VERSION, "source": {"image": "../../"}, **display}
    return {**_multiscales(name, "0", "zyx", row), "image-label": image_label}


def _multiscales(name: str, path: str, axes: str, row: CaseRow) -> dict[str, Any]:
    """An image of one level at `path`. Where the spacing is unknown, the scale is 1 and there is no unit."""
    space = {"type": "space"} if row.spacing_mm is None else {"type": "space", "unit": "millimeter"}
    scale = [1.0] * (len(axes) - 3) + list(row.spacing_mm or (1.0, 1.0, 1.0))
    return {
        "version": OME_VERSION,
        "multiscales": [
            {
                "name": name,
                "type": "none",
                "metadata": {"description": "One level at full resolution; nothing is downscaled."},
                "axes": [{"name": axis, **({"type": "channel"} if axis == "c" else space)} for axis in axes],
                "datasets": [
                    {"path": path, "coordinateTransformations": [{"type": "scale", "scale": scale}]}
                ],
            }
        ],
    }


def _window(row: CaseRow, channel: int) -> dict[str, float]:
    """What of a channel is shown, in stored values. It has a width even in a constant image: napari asks for one."""
    statistics = dict(zip(STATISTICS, row.statistics[channel], strict=True))
    low, start, end, high = (
        (statistics[name] - row.image_offset) / row.image_scale
        for name in ("minimum", "percentile_00_5", "percentile_99_5", "maximum")
    )
    if start == end:
        start, end = low, high if low < high else low + 1
    return {"min": low, "start": start, "end": end, "max": max(high, end)}


def _colour(value: int) -> dict[str, Any]:
    """The colour of a label value: close values get distant hues and brightnesses.

    Source: our choice, the additive recurrence with the powers of 1 / 1.3247 (plastic number) for the two.
    """
    hue, brightness = value * 0.7549 % 1, 0.6 + 0.4 * (value * 0.5698 % 1)
    red_green_blue = colorsys.hsv_to_rgb(hue, 0.75, brightness)
    return {"label-value": value, "rgba": [*(round(255 * part) for part in red_green_blue), 255]}
