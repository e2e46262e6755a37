"""Exact SLIC against scikit-image and its plain twin, on generated and real slices, and at the edges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import references
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from skimage.segmentation import slic

from preprocess.kernels.slic_exact import exact_slic, lightness_slice
from supercl_core.intensity import lightness, rescale_slice

Texture = Callable[[tuple[int, ...], int], np.ndarray]


def skimage_slic(features: np.ndarray, *, n_segments: int, compactness: float) -> np.ndarray:
    return slic(features, n_segments, compactness, channel_axis=0, convert2lab=False, start_label=0)


def published_slic(values: np.ndarray) -> np.ndarray:
    grey = rescale_slice(values[None])[0]
    return slic(np.stack([grey] * 3, -1), n_segments=100, compactness=10, start_label=0)


def exact_published_slic(values: np.ndarray) -> np.ndarray:
    return exact_slic(lightness_slice(values)[None] / 100, n_segments=100, compactness=10 / 100)


def agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Fraction of equal pixels after matching ids one to one."""
    overlaps = np.zeros((ours.max() + 1, theirs.max() + 1))
    np.add.at(overlaps, (ours, theirs), 1)
    return float(overlaps[linear_sum_assignment(overlaps, maximize=True)].sum() / ours.size)


@st.composite
def slices(draw: st.DrawFn, *, largest: int) -> np.ndarray:
    """Noise, a few flat levels (many ties), ramps, discs and constants of one to four channels."""
    sides = st.integers(1, largest)
    channels, height, width = draw(st.integers(1, 4)), draw(sides), draw(sides)
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    y, x = np.mgrid[:height, :width].astype(float)
    kind = draw(st.sampled_from(["noise", "levels", "ramp", "disc", "constant"]))
    if kind == "noise":
        return rng.normal(size=(channels, height, width))
    if kind == "levels":
        return rng.integers(0, 3, (channels, height, width)).astype(float)
    if kind == "ramp":
        return rng.normal(size=(channels, 1, 1)) * y + rng.normal(size=(channels, 1, 1)) * x
    if kind == "disc":
        inside = (y - height / 2) ** 2 + (x - width / 2) ** 2 < rng.uniform(0, (height + width) / 4) ** 2
        return inside * rng.normal(size=(channels, 1, 1))
    return np.full((channels, height, width), rng.normal())


num_segments = st.one_of(st.integers(1, 30), st.integers(1, 2000))
compactnesses = st.floats(-4, 2).map(lambda exponent: 10.0**exponent)


@given(slices(largest=40), num_segments, compactnesses)
@settings(max_examples=400, deadline=None)
def test_labels_are_scikit_images_and_keep_the_caches_promise(
    features: np.ndarray, n_segments: int, compactness: float
) -> None:
    before = features.copy()
    superpixels = exact_slic(features, n_segments=n_segments, compactness=compactness)
    expected = skimage_slic(features, n_segments=n_segments, compactness=compactness)
    np.testing.assert_array_equal(superpixels, expected)
    np.testing.assert_array_equal(superpixels, references.connected_superpixels(superpixels))
    np.testing.assert_array_equal(features, before)
    again = exact_slic(features, n_segments=n_segments, compactness=compactness)
    assert superpixels.dtype == np.int32
    assert superpixels.tobytes() == again.tobytes()


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 14), st.integers(1, 14), st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_labels_are_the_plain_twins(
    seed: int, channels: int, height: int, width: int, n_segments: int
) -> None:
    # Without ties: the twin adds in another order.
    features = np.random.default_rng(seed).normal(size=(channels, height, width))
    for compactness in (0.01, 0.1, 1.0):
        np.testing.assert_array_equal(
            exact_slic(features, n_segments=n_segments, compactness=compactness),
            references.slic(features, n_segments=n_segments, compactness=compactness),
        )


def test_generated_slices_get_the_superpixels_of_the_published_call(texture: Texture) -> None:
    y, x = np.mgrid[:150, :130]
    discs = ((y - 60) ** 2 + (x - 50) ** 2 < 900) * 300 + ((y - 100) ** 2 + (x - 90) ** 2 < 400) * 700
    noise = np.random.default_rng(0).normal(size=(150, 130))
    for values in (
        discs,
        discs + 40 * noise,
        y * 3.0 + x,
        noise,
        texture((150, 130), 1),
        texture((300, 90), 2),
    ):
        assert agreement(exact_published_slic(values), published_slic(values)) >= 0.999


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["ACDC", "Task04_Hippocampus"])
def test_real_slices_get_the_superpixels_of_the_published_call(name: str, real_data: Path) -> None:
    paths = sorted((real_data / name / "imagesTr").glob("[!.]*.nii.gz"))
    agreements = []
    for path in paths[:: len(paths) // 8]:
        volume = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        for values in volume[:: max(1, len(volume) // 4)]:
            agreements.append((values.size, agreement(exact_published_slic(values), published_slic(values))))
    assert len(agreements) >= 32
    sizes, fractions = zip(*agreements, strict=True)
    assert np.average(fractions, weights=sizes) >= 0.999


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_lightness_is_that_of_the_core(dtype: type, texture: Texture) -> None:
    values: np.ndarray = (texture((60, 50), 4) * 250).astype(dtype)
    for view in (values, values[::2, ::-3]):
        ours = lightness_slice(view)
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, lightness(rescale_slice(view[None]))[0], rtol=0, atol=1e-12)


def test_lightness_of_every_grey_value_is_that_of_the_core() -> None:
    values = np.linspace(-1000, 3000, 100_001).reshape(1, -1)
    np.testing.assert_allclose(
        lightness_slice(values), lightness(rescale_slice(values[None]))[0], rtol=0, atol=1e-12
    )


def test_a_constant_slice_has_no_lightness_and_a_regular_grid_of_superpixels() -> None:
    values = np.full((60, 60), 7, np.int16)
    assert (lightness_slice(values) == 0).all()
    superpixels = exact_published_slic(values)
    np.testing.assert_array_equal(superpixels, published_slic(values))
    assert superpixels.max() + 1 == 100


def test_more_segments_than_pixels_give_every_pixel_its_own() -> None:
    features = np.zeros((1, 3, 4))
    np.testing.assert_array_equal(
        exact_slic(features, n_segments=100, compactness=0.1), np.arange(12).reshape(3, 4)
    )


def test_one_segment_is_the_whole_slice_and_one_pixel_is_a_slice() -> None:
    features = np.random.default_rng(0).normal(size=(2, 9, 7))
    assert (exact_slic(features, n_segments=1, compactness=0.1) == 0).all()
    assert exact_slic(features[:, :1, :1], n_segments=100, compactness=0.1).tolist() == [[0]]


def test_values_that_are_no_numbers_end_in_some_label_not_in_a_crash() -> None:
    features = np.full((1, 20, 20), np.nan)
    superpixels = exact_slic(features, n_segments=10, compactness=0.1)
    assert 0 <= superpixels.min() <= superpixels.max() < 400


def test_integers_and_views_give_the_labels_of_their_float64_copy() -> None:
    values = np.random.default_rng(1).integers(-100, 100, (2, 40, 60)).astype(np.int16)
    view = values[:, ::-1, ::2]
    np.testing.assert_array_equal(
        exact_slic(view, n_segments=20, compactness=0.1),
        exact_slic(np.ascontiguousarray(view, np.float64), n_segments=20, compactness=0.1),
    )
