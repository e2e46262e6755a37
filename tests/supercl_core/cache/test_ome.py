"""What viewers are told of a case, against the text of OME-NGFF 0.5 and by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest

from supercl_core.cache import ome
from supercl_core.cache.cases import CaseRow

ROW = CaseRow(
    id="two_channels",
    shape=(2, 9, 24, 20),
    image_dtype="int16",
    superpixels_dtype="uint8",
    num_superpixels=120,
    has_ground_truth=True,
    spacing_mm=(3.0, 0.9, 0.8),
    image_scale=0.5,
    image_offset=10.0,
    statistics=((0.0, 5.0, 60.0, 110.0, 30.0, 9.0), (10.0, 12.0, 14.0, 15.0, 13.0, 1.0)),
)
CHANNELS = ("T1", "T2")
CLASSES = ("background", "left", "right")

EVERY_IMAGE = {
    "case": ome.case_attributes(ROW, CHANNELS),
    "superpixels": ome.superpixels_attributes(ROW),
    "ground truth": ome.ground_truth_attributes(ROW, CLASSES),
}


def windows(row: CaseRow) -> list[dict[str, float]]:
    attributes = ome.case_attributes(row, CHANNELS)
    return [channel["window"] for channel in attributes["omero"]["channels"]]


@pytest.mark.parametrize("attributes", EVERY_IMAGE.values(), ids=EVERY_IMAGE)
def test_every_image_says_what_the_specification_asks_for(attributes: dict[str, Any]) -> None:
    """Source: the keys under `multiscales` that 0.5 requires or recommends, and its order of axes."""
    [multiscale] = attributes["multiscales"]
    assert attributes["version"] == "0.5"
    assert multiscale.keys() == {"name", "type", "metadata", "axes", "datasets"}
    names = [axis["name"] for axis in multiscale["axes"]]
    assert names in (["c", "z", "y", "x"], ["z", "y", "x"])
    [dataset] = multiscale["datasets"]
    [transformation] = dataset["coordinateTransformations"]
    assert transformation == {"type": "scale", "scale": [1.0, 3.0, 0.9, 0.8][-len(names) :]}
    for axis in multiscale["axes"]:
        if axis["name"] == "c":
            assert axis == {"name": "c", "type": "channel"}
        else:
            assert (axis["type"], axis["unit"]) == ("space", "millimeter")
    json.dumps(attributes, allow_nan=False)


def test_unknown_spacing_has_neither_unit_nor_scale() -> None:
    row = dataclasses.replace(ROW, spacing_mm=None)
    [multiscale] = ome.case_attributes(row, CHANNELS)["multiscales"]
    assert not any("unit" in axis for axis in multiscale["axes"])
    assert multiscale["datasets"][0]["coordinateTransformations"][0]["scale"] == [1.0] * 4


def test_only_the_first_channel_is_shown_at_first_and_the_middle_slice() -> None:
    omero = EVERY_IMAGE["case"]["omero"]
    assert [(channel["label"], channel["active"]) for channel in omero["channels"]] == [
        ("T1", True),
        ("T2", False),
    ]
    assert omero["rdefs"]["defaultZ"] == 4


def test_windows_are_percentiles_in_stored_values() -> None:
    """stored = (value - 10) / 0.5, by hand."""
    assert windows(ROW) == [
        {"min": -20.0, "start": -10.0, "end": 100.0, "max": 200.0},
        {"min": 0.0, "start": 4.0, "end": 8.0, "max": 10.0},
    ]


def test_windows_have_a_width_where_percentiles_or_all_values_are_equal() -> None:
    few_voxels = (0.0, 5.0, 5.0, 110.0, 30.0, 9.0)
    constant = (10.0, 10.0, 10.0, 10.0, 10.0, 0.0)
    assert windows(dataclasses.replace(ROW, statistics=(few_voxels, constant))) == [
        {"min": -20.0, "start": -20.0, "end": 200.0, "max": 200.0},
        {"min": 0.0, "start": 0.0, "end": 1.0, "max": 1.0},
    ]


def test_colours_of_classes_are_unlike_those_near_them() -> None:
    names = ["background", *map(str, range(1, 120))]
    label = ome.ground_truth_attributes(ROW, names)["image-label"]
    rgba = np.array([colour["rgba"] for colour in label["colors"]])
    assert rgba.dtype.kind == "i"
    assert (rgba[1:, 3] == 255).all()
    assert rgba.min() >= 0
    assert rgba.max() <= 255
    for first, second in itertools.pairwise(rgba[1:]):
        assert np.abs(first - second).sum() > 60


def test_classes_have_their_names_and_the_background_is_clear() -> None:
    label = EVERY_IMAGE["ground truth"]["image-label"]
    assert label["properties"] == [
        {"label-value": 0, "name": "background"},
        {"label-value": 1, "name": "left"},
        {"label-value": 2, "name": "right"},
    ]
    assert [colour["label-value"] for colour in label["colors"]] == [0, 1, 2]
    assert [colour["rgba"][3] for colour in label["colors"]] == [0, 255, 255]


def test_label_layers_name_their_image_and_are_listed() -> None:
    for layer in ("superpixels", "ground truth"):
        label = EVERY_IMAGE[layer]["image-label"]
        assert label["source"] == {"image": "../../"}
        assert label["version"] == "0.5"
    assert ome.labels_attributes(["superpixels"]) == {"version": "0.5", "labels": ["superpixels"]}
