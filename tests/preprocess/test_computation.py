"""The version of the computation belongs to the bytes it gives: caches of two versions must not be mixed unnoticed."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from preprocess.pipeline import COMPUTATION, PreprocessConfig, process_case
from supercl_core.formats.geometry import Geometry
from supercl_core.formats.volumes import Volume

RECORDED = {
    ("1", "fast"): "94eaf6900c32241cfc598e994a44fc31984d8ce50b38849883dfb4698aa7078d",
    ("1", "exact"): "2ea41972cc04b525ab57f7c72babe1a863099ac9bcfd3ccbf733b65bb45d2994",
    ("1", "fast, foreground"): "2c2a94a11aba987c6d1ead5df3889708855c5ba505b8046bfa84cecb058944fa",
}
"""SHA-256 of what each way computes. Other bytes are a new version: raise COMPUTATION, and record its digests here."""

SETTINGS: dict[str, dict[str, Any]] = {
    "fast": {"slic": "fast"},
    "exact": {"slic": "exact"},
    "fast, foreground": {"slic": "fast", "foreground_above": 150},
}


def volume() -> Volume:
    """Blocks, ramps and a fine pattern, of whole numbers only: the same on every machine."""
    z, y, x = np.indices((3, 150, 130))
    blocks = (y // 37 * 5 + x // 29 * 3 + z) % 7 * 120
    pattern = (y * y + 3 * x * x + 11 * x * y) % 97
    image = blocks + (y + 2 * x) // 8 + pattern // (1 + z)
    geometry = Geometry(
        spacing_mm=(1.0, 1.0, 1.0), origin_mm=(0.0, 0.0, 0.0), direction=tuple(np.eye(3).ravel().tolist())
    )
    return Volume(array_CZYX=np.stack([image, 999 - image[:, ::-1]]).astype(np.int16), geometry=geometry)


@pytest.mark.parametrize("way", SETTINGS)
def test_the_bytes_of_a_case_are_those_of_the_version(way: str) -> None:
    channels = volume()
    if way != "fast":
        channels = Volume(array_CZYX=channels.array_CZYX[:1], geometry=channels.geometry)
    case = process_case(
        channels,
        None,
        config=PreprocessConfig(**SETTINGS[way]),
        num_channels=len(channels.array_CZYX),
        num_classes=0,
    )
    total = hashlib.sha256(repr((case.row, case.attributes)).encode())
    for name in ("image", "superpixels", "asp"):
        total.update(case.arrays[name].tobytes())
    assert total.hexdigest() == RECORDED[COMPUTATION, way]
