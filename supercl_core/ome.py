"""OME-NGFF 0.5 metadata, so that viewers open a case with its label layers, unconverted.

Called by the cache's writer only. Source: the OME-NGFF 0.5 specification (axes, multiscales, labels).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from supercl_core.schema import OME_VERSION


def image_attributes(
    name: str, path: str, axes: str, spacing_mm: tuple[float, float, float] | None
) -> dict[str, Any]:
    """The `ome` attribute of a group whose image lies at `path`.

    `axes` is `czyx` or `zyx`; `spacing_mm` is along z, y, x, None where unknown (the unit is then left out).
    """
    spatial: dict[str, str] = {"type": "space"}
    if spacing_mm is not None:
        spatial["unit"] = "millimeter"
    scale = [1.0] * (len(axes) - 3) + list(spacing_mm or (1.0, 1.0, 1.0))
    return {
        "version": OME_VERSION,
        "multiscales": [
            {
                "name": name,
                "axes": [
                    {"name": axis, **({"type": "channel"} if axis == "c" else spatial)} for axis in axes
                ],
                "datasets": [
                    {"path": path, "coordinateTransformations": [{"type": "scale", "scale": scale}]}
                ],
            }
        ],
    }


def label_attributes(name: str, spacing_mm: tuple[float, float, float] | None) -> dict[str, Any]:
    """The `ome` attribute of one label layer, whose array lies at `0` and whose image is two groups up."""
    return {
        **image_attributes(name, "0", "zyx", spacing_mm),
        "image-label": {"source": {"image": "../../"}},
    }


def labels_attributes(names: Sequence[str]) -> dict[str, Any]:
    """The `ome` attribute of the group `labels`, which lists its layers."""
    return {"version": OME_VERSION, "labels": list(names)}
