"""The card beside exported weights: what they are, what they expect, where they come from, and how to load them.

Called by the command `supercl export`. It names no path and no machine, since exports are passed on.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

from supercl_core import provenance
from supercl_core.files import write_json
from supercl_core.intensity import PERCENTILES
from train.export.model import Model, Written

CARD_NAME: Final = "card.json"

NORMALISATION: Final = {
    "over": "each channel of each volume by itself",
    "clip_percentiles": list(PERCENTILES),
    "then": "subtract the mean and divide by the standard deviation of the clipped volume (by 1 where that is 0)",
    "padding": 0.0,
}
"""What `train.data.normalise_images` does, in words and numbers."""


def write_card(model: Model, folder: Path, *, target: str, written: Written) -> None:
    """Write the card of the files in `folder`, which the module of the `target` has `written`."""
    encoder = model.network.encoder
    beside = model.adjacent_slices
    neighbours = f", of {beside} slices before it, itself and {beside} behind it" if beside else ""
    card = {
        "format": target,
        "holds": written.holds,
        "load": written.load,
        "files": {file.name: {"sha256": _sha256(file)} for file in sorted(folder.iterdir())},
        "architecture": {
            "backbone": model.backbone,
            "filters": model.filters,
            "in_channels": model.in_channels,
            "feature_strides": list(encoder.strides),
            "feature_channels": list(encoder.channels),
            "class_names": model.class_names,
        },
        "input": {
            "axes": "(batch, channel, row, column), float32: axial slices at the resolution of their volume",
            "channels": f"all channels of a slice{neighbours}; one channel is repeated where more are expected",
            "rows_and_columns": f"multiples of {encoder.strides[-1]}",
            "normalisation": NORMALISATION,
        },
        "prediction": model.run["inference"] if model.run and model.is_whole else None,
        "learned_from": model.lineage or None,
        "training": _training(model.run),
        "exported": _versions(provenance.record()),
    }
    write_json(folder / CARD_NAME, card)


def _training(run: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the run was, without its paths; None for a file of weights, which does not say."""
    if run is None:
        return None
    return {
        "run": run["name"],
        "kind": run["kind"],
        "num_cases": len(run["cases"]["train"]),
        "started_from": Path(run["init"]["source"]).name if run["init"] else None,
        "settings": run["config"],
        **_versions(run["provenance"]),
    }


def _versions(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record.get(key) for key in ("time", "versions", "commit")}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
