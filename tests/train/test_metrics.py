"""Metrics against distance transforms worked out here, hand-worked cubes, and structures that are missing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from supercl_core.errors import SuperCLError
from train.metrics import score_case, summarise

CLASSES = ("background", "organ", "vessel")


def score(prediction, truth, *, spacing_mm=None):
    return score_case(prediction, truth, class_names=CLASSES, spacing_mm=spacing_mm)[0]


def surface(mask):
    """Voxels of `mask` with a 6-neighbour outside it; what lies beyond the array is outside."""
    padded = np.pad(mask, 1)
    inside = np.ones_like(mask)
    for axis in range(mask.ndim):
        for step in (-1, 1):
            neighbour = np.roll(padded, step, axis)
            inside &= neighbour[(slice(1, -1),) * mask.ndim]
    return mask & ~inside


def reference(prediction, truth, spacing):
    """DSC, JC, HD95 and ASD of two masks, from distance transforms of the whole arrays."""
    surfaces = surface(prediction), surface(truth)
    there = distance_transform_edt(~surfaces[1], sampling=spacing)[surfaces[0]]
    back = distance_transform_edt(~surfaces[0], sampling=spacing)[surfaces[1]]
    common = np.count_nonzero(prediction & truth)
    dsc = 2 * common / (np.count_nonzero(prediction) + np.count_nonzero(truth))
    jc = common / np.count_nonzero(prediction | truth)
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return dsc, jc, hd95, np.concatenate([there, back]).mean()


def blobs(seed, shape):
    """Two overlapping random structures, ragged, which may touch the border of the volume."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(size) for size in shape], indexing="ij"), axis=-1)
    masks = []
    for _ in range(2):
        centre = random.uniform(0.2, 0.8, size=3) * (np.array(shape) - 1)
        near = (((grid - centre) / (0.4 * np.array(shape))) ** 2).sum(axis=-1) < 1
        masks.append(near & (random.random(shape) > 0.1))
        masks[-1][tuple(np.rint(centre).astype(int))] = True
    return masks


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.tuples(st.integers(2, 8), st.integers(3, 14), st.integers(3, 14)),
    st.sampled_from([None, (1.0, 1.0, 1.0), (5.0, 0.7, 1.3)]),
)
def test_scores_equal_distance_transforms(seed, shape, spacing_mm):
    prediction, truth = blobs(seed, shape)
    found = score(prediction.astype(np.uint8), truth.astype(np.int64), spacing_mm=spacing_mm)
    expected = reference(prediction, truth, spacing_mm or (1, 1, 1))
    np.testing.assert_allclose((found.dsc, found.jc, found.hd95, found.asd), expected, rtol=1e-5, atol=1e-6)
    assert found.state == "ok"


@pytest.mark.parametrize(("axis", "distance"), [(0, 5.0), (1, 0.5), (2, 2.0)])
def test_a_plane_moved_by_one_voxel_is_one_spacing_away(axis, distance):
    # Planes one voxel thick, each across the whole volume: every surface voxel has its partner one step on.
    volume = np.zeros((2, 6, 6, 6), np.uint8)
    for index in range(2):
        np.moveaxis(volume[index], axis, 0)[2 + index] = 1
    found = score(*volume, spacing_mm=(5.0, 0.5, 2.0))
    assert (found.dsc, found.jc) == (0.0, 0.0)
    assert found.hd95 == pytest.approx(distance)
    assert found.asd == pytest.approx(distance)


def test_a_cube_moved_by_one_slice():
    # 3 x 3 x 3 at z = 1..3 against z = 2..4, slices 4 mm apart, pixels 1 mm. Of the 26 surface voxels of one
    # cube, 9 at its far end lie 4 mm off; the 8 of its middle ring and the 8 rim voxels of its near end are
    # surface of the other cube too; the middle of its near end is 1 mm from the other's middle ring.
    prediction, truth = np.zeros((2, 7, 7, 7), np.uint8)
    prediction[1:4, 2:5, 2:5] = 1
    truth[2:5, 2:5, 2:5] = 1
    found = score(prediction, truth, spacing_mm=(4.0, 1.0, 1.0))
    assert found.dsc == pytest.approx(2 / 3)
    assert found.jc == pytest.approx(1 / 2)
    assert found.hd95 == pytest.approx(4.0)
    assert found.asd == pytest.approx((9 * 4 + 1) / 26)
    in_voxels = score(prediction, truth)
    assert in_voxels.hd95 == pytest.approx(1.0)
    assert in_voxels.asd == pytest.approx(10 / 26)


def test_equal_structures_are_perfect():
    truth = np.zeros((4, 5, 6), np.uint8)
    truth[0, 0, 0] = 1  # one voxel in a corner
    found = score(truth, truth, spacing_mm=(3.0, 1.0, 1.0))
    assert (found.dsc, found.jc, found.hd95, found.asd) == (1.0, 1.0, 0.0, 0.0)


def test_a_single_slice_is_compared_in_the_plane():
    # A ring around a hole of one pixel, and the filled square: as slabs of a volume every pixel would be
    # surface; in the plane the middle of the filled square is not.
    truth = np.zeros((1, 7, 7), np.uint8)
    truth[0, 1:6, 1:6] = 1
    prediction = truth.copy()
    prediction[0, 3, 3] = 0
    found = score(prediction, truth, spacing_mm=(9.0, 1.0, 1.0))
    expected = reference(prediction[0] == 1, truth[0] == 1, (1.0, 1.0))
    np.testing.assert_allclose((found.dsc, found.jc, found.hd95, found.asd), expected, rtol=1e-6)
    # 20 surface pixels: the outer 16, and the 4 around the hole, which lie 1 mm from the outline.
    assert found.asd == pytest.approx(4 / 36)


def test_a_slice_of_a_volume_is_not_taken_for_an_image():
    # Both structures fill one slice of three: their bounding box has one slice, the case has not.
    prediction, truth = np.zeros((2, 3, 6, 6), np.uint8)
    truth[1, 1:5, 1:5] = 1
    prediction[1, 1:5, 2:5] = 1
    found = score(prediction, truth)
    assert found.asd == pytest.approx(reference(prediction == 1, truth == 1, (1, 1, 1))[3])


@pytest.mark.parametrize(
    ("in_prediction", "in_truth", "state", "overlap"),
    [
        (False, False, "absent in both", None),
        (True, False, "missing in truth", 0.0),
        (False, True, "missing in prediction", 0.0),
    ],
)
def test_a_missing_structure_has_no_distance(in_prediction, in_truth, state, overlap):
    prediction, truth = np.zeros((2, 3, 4, 4), np.uint8)
    prediction[1, 1, 1] = in_prediction
    truth[1, 2, 2] = in_truth
    assert score(prediction, truth).as_dict() == {
        "class": "organ",
        "dsc": overlap,
        "jc": overlap,
        "hd95": None,
        "asd": None,
        "state": state,
    }


def test_every_class_but_the_background_is_scored():
    truth = np.zeros((2, 4, 4), np.uint8)
    truth[:, :2], truth[:, 2:] = 1, 2
    scores = score_case(truth, truth, class_names=CLASSES, spacing_mm=None)
    assert [(found.class_name, found.dsc) for found in scores] == [("organ", 1.0), ("vessel", 1.0)]


def test_wrong_shapes_and_classes_are_refused():
    volume = np.zeros((2, 4, 4), np.uint8)
    with pytest.raises(SuperCLError, match="differ in shape"):
        score(volume, volume[:1])
    with pytest.raises(SuperCLError, match="differ in shape"):
        score(volume[0], volume[0])
    with pytest.raises(SuperCLError, match=r"The prediction holds values that are no class(.|\n)*0 to 3"):
        score(np.where(np.arange(4) == 0, 3, volume), volume)
    with pytest.raises(SuperCLError, match="The ground truth holds values"):
        score(volume, volume.astype(np.int16) - 1)


def row(class_name, state, dsc=None, hd95=None):
    return {
        "case": "c",
        "class": class_name,
        "state": state,
        "dsc": dsc,
        "jc": dsc,
        "hd95": hd95,
        "asd": hd95,
    }


def test_means_leave_out_what_is_undefined_and_count_it():
    summary = summarise(
        [
            row("organ", "ok", 0.9, 2.0),
            row("vessel", "absent in both"),
            row("organ", "missing in prediction", 0.0),
            row("vessel", "absent in both"),
            row("organ", "absent in both"),
            row("organ", "missing in truth", 0.0),
        ]
    )
    assert list(summary) == ["organ", "vessel", "mean"]
    assert summary["organ"] == {
        "dsc": pytest.approx(0.3),
        "jc": pytest.approx(0.3),
        "hd95": 2.0,
        "asd": 2.0,
        "num_cases": 3,
        "num_distances": 1,
        "num_missing_in_prediction": 1,
        "num_missing_in_truth": 1,
        "num_absent": 1,
    }
    assert summary["vessel"]["dsc"] is None
    assert (summary["vessel"]["num_cases"], summary["vessel"]["num_absent"]) == (0, 2)
    assert summary["mean"]["dsc"] == pytest.approx(0.3)
    assert (summary["mean"]["num_cases"], summary["mean"]["num_absent"]) == (3, 3)
    assert (summary["vessel"]["num_distances"], summary["mean"]["num_distances"]) == (0, 1)


def test_the_mean_weighs_classes_equally():
    summary = summarise([row("organ", "ok", 0.5, 1.0)] * 3 + [row("vessel", "ok", 1.0, 3.0)])
    assert summary["mean"]["dsc"] == pytest.approx(0.75)
    assert summary["mean"]["hd95"] == pytest.approx(2.0)
