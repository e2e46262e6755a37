"""Superpixels against scikit-image's published call, their invariants, ASP maps, and what a case refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage
from skimage.segmentation import slic

from preprocess import pipeline
from preprocess.pipeline import PreprocessConfig, asp_on_grid, process_case, slic_superpixels
from supercl_core.errors import SuperCLError, UsageError
from supercl_core.intensity import rescale_slice, statistics
from supercl_core.sources import discover
from supercl_core.volumes import Geometry, Volume, read_volume

CONFIG = PreprocessConfig()
GEOMETRY = Geometry(
    spacing_mm=(0.5, 0.6, 4.0), origin_mm=(1.0, 2.0, 3.0), direction=(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)
)


def superpixels_of(slice_YX: np.ndarray, config: PreprocessConfig = CONFIG) -> np.ndarray:
    return slic_superpixels(rescale_slice(slice_YX[None]), config)


def published_superpixels(slice_YX: np.ndarray) -> np.ndarray:
    """The call of the released code: the grey slice stacked to RGB."""
    return slic(np.stack([slice_YX.astype(np.float64)] * 3, -1), n_segments=100, compactness=10)


def assert_same_partition(first: np.ndarray, second: np.ndarray) -> None:
    """Equal after matching ids."""
    num_pairs = len(set(zip(first.flat, second.flat, strict=True)))
    assert num_pairs == len(np.unique(first)) == len(np.unique(second))


def assert_invariants(superpixels: np.ndarray) -> None:
    """Ids contiguous from 0, each one a 4-connected component."""
    ids = np.unique(superpixels)
    np.testing.assert_array_equal(ids, np.arange(len(ids)))
    for superpixel in ids:
        assert ndimage.label(superpixels == superpixel)[1] == 1


# ---- against scikit-image


@pytest.mark.parametrize(
    ("shape", "low", "high"),
    [((96, 80), 0, 1), ((64, 64), -1000, 3000), ((50, 33), 0.25, 0.5), ((128, 40), 20, 255)],
)
def test_superpixels_equal_the_published_call(
    shape: tuple[int, int], low: float, high: float, texture: Callable[..., np.ndarray]
) -> None:
    slice_YX = (low + texture(shape, 4) * (high - low)).astype(np.float32)
    assert_same_partition(superpixels_of(slice_YX), published_superpixels(slice_YX))


def test_other_settings_reach_scikit_image(texture: Callable[..., np.ndarray]) -> None:
    slice_YX = texture((60, 60), 8).astype(np.float32)
    ours = superpixels_of(slice_YX, PreprocessConfig(n_segments=30, compactness=3.0))
    theirs = slic(np.stack([slice_YX.astype(np.float64)] * 3, -1), n_segments=30, compactness=3.0)
    assert_same_partition(ours, theirs)


@pytest.mark.real_data
@pytest.mark.parametrize(("data_set", "num_cases"), [("Task04_Hippocampus", 5), ("ACDC", 3)])
def test_superpixels_of_real_slices_equal_the_published_call(
    data_set: str, num_cases: int, real_data: Path
) -> None:
    cases = discover(real_data / data_set).cases
    for case in cases[:: len(cases) // num_cases][:num_cases]:
        volume_ZYX = read_volume(case.image_path).array_CZYX[0]
        for slice_YX in volume_ZYX[:: max(1, len(volume_ZYX) // 3)]:
            ours = superpixels_of(slice_YX)
            assert_invariants(ours)
            assert_same_partition(ours, published_superpixels(slice_YX))


# ---- invariants


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 20)),
        elements=st.floats(-4, 4, width=16),
    ),
    st.integers(1, 150),
)
@settings(max_examples=40, deadline=None)
def test_every_superpixel_is_one_component_and_ids_are_contiguous(
    slice_CYX: np.ndarray, n_segments: int
) -> None:
    superpixels = slic_superpixels(rescale_slice(slice_CYX), PreprocessConfig(n_segments=n_segments))
    assert superpixels.dtype == np.int32
    assert superpixels.shape == slice_CYX.shape[1:]
    assert_invariants(superpixels)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 3), (32, 32)])
def test_constant_and_tiny_slices(shape: tuple[int, int]) -> None:
    superpixels = superpixels_of(np.full(shape, 5, np.int16))
    assert_invariants(superpixels)
    assert superpixels.max() < shape[0] * shape[1]


def test_four_channels_keep_the_invariants_and_use_every_channel(texture: Callable[..., np.ndarray]) -> None:
    slice_CYX = texture((4, 40, 40), 11).astype(np.float32)
    superpixels = slic_superpixels(rescale_slice(slice_CYX), CONFIG)
    assert_invariants(superpixels)
    for channel in range(4):
        changed = slice_CYX.copy()
        changed[channel] = 0
        assert not np.array_equal(slic_superpixels(rescale_slice(changed), CONFIG), superpixels)


def test_brightness_and_contrast_of_a_slice_do_not_matter(texture: Callable[..., np.ndarray]) -> None:
    slice_YX = np.rint(texture((40, 40), 12) * 255).astype(np.float32)
    np.testing.assert_array_equal(superpixels_of(slice_YX), superpixels_of(slice_YX * 8 - 1024))


def test_too_many_superpixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MAX_SUPERPIXELS", 3)
    with pytest.raises(SuperCLError, match="too many superpixels"):
        superpixels_of(np.arange(400, dtype=np.float32).reshape(20, 20))


# ---- ASP


def test_asp_is_read_at_the_centres_of_the_grid(texture: Callable[..., np.ndarray]) -> None:
    values = texture((50, 33), 6)
    superpixels = superpixels_of(values)
    means = references.superpixel_means(values, superpixels, superpixels.max() + 1)
    grid = asp_on_grid(values, superpixels)
    assert grid.shape == (32, 32)
    assert grid.dtype == np.float32
    for row, column in [(0, 0), (31, 31), (7, 20), (16, 3)]:
        y, x = int((row + 0.5) * 50 / 32), int((column + 0.5) * 33 / 32)
        assert grid[row, column] == pytest.approx(means[superpixels[y, x]], abs=1e-6)


def test_asp_of_a_slice_of_the_grids_size_keeps_the_total(texture: Callable[..., np.ndarray]) -> None:
    values = texture((32, 32), 7)
    superpixels = superpixels_of(values)
    assert asp_on_grid(values, superpixels).sum() == pytest.approx(values.sum(), rel=1e-5)
    shuffled = np.random.default_rng(0).permutation(superpixels.max() + 1)[superpixels]
    np.testing.assert_array_equal(asp_on_grid(values, shuffled), asp_on_grid(values, superpixels))


# ---- cases


def volume(array_CZYX: np.ndarray) -> Volume:
    return Volume(array_CZYX=array_CZYX, geometry=GEOMETRY)


def process(
    image: np.ndarray, label: np.ndarray | None = None, config: PreprocessConfig = CONFIG, channels: int = 1
):
    return process_case(
        volume(image),
        None if label is None else volume(label),
        config=config,
        num_channels=channels,
        num_classes=3,
    )


def test_a_case_holds_what_its_row_says(texture: Callable[..., np.ndarray]) -> None:
    image = np.rint(texture((2, 3, 24, 20), 0) * 500).astype(np.int16)
    case = process(image, (image[:1] > 250).astype(np.int16), channels=2)
    row, stored = case.row, case.arrays
    assert row["shape"] == stored["image"].shape == (2, 3, 24, 20)
    assert (row["image_dtype"], row["superpixels_dtype"]) == ("int16", "uint8")
    assert row["num_superpixels"] == stored["superpixels"].max() + 1
    assert row["has_ground_truth"]
    assert row["spacing_mm"] == (4.0, 0.6, 0.5)
    assert row["statistics"] == statistics(image)
    assert stored["ground_truth"].dtype == np.uint8
    np.testing.assert_array_equal(stored["ground_truth"], image[0] > 250)
    assert case.attributes["orientation"] == "LPS"
    for z in range(3):
        scaled = rescale_slice(image[:, z])
        superpixels = slic_superpixels(scaled, CONFIG)
        np.testing.assert_array_equal(stored["superpixels"][z], superpixels)
        expected = asp_on_grid(scaled.mean(axis=0), superpixels).astype(np.float16)
        np.testing.assert_array_equal(stored["asp"][z], expected)


def test_a_single_slice_and_a_constant_volume() -> None:
    for image in (np.arange(80, dtype=np.int16).reshape(1, 1, 10, 8), np.zeros((1, 2, 9, 9), np.float32)):
        case = process(image)
        assert case.row["shape"] == image.shape
        assert np.isfinite(case.arrays["asp"]).all()


def test_spacing_can_be_declared_unknown() -> None:
    assert (
        process(np.zeros((1, 1, 4, 4)), config=PreprocessConfig(spacing="unknown")).row["spacing_mm"] is None
    )


def test_int16_images_are_quantised_on_demand(texture: Callable[..., np.ndarray]) -> None:
    image = (texture((1, 2, 20, 20), 3) * [[[[2.0]], [[3.0]]]] + [[[[0.0]], [[-0.5]]]]).astype(np.float32)
    case = process(image, config=PreprocessConfig(image_dtype="int16"))
    assert case.arrays["image"].dtype == np.int16
    restored = case.arrays["image"] * case.row["image_scale"] + case.row["image_offset"]
    assert np.abs(restored - image).max() == pytest.approx(case.attributes["largest_error"])
    assert case.attributes["num_clipped"] > 0


@pytest.mark.parametrize(
    ("label", "message", "found"),
    [
        (np.zeros((1, 2, 9, 8), np.uint8), "another shape", (2, 9, 8)),
        (np.zeros((2, 2, 8, 8), np.uint8), "another shape", (2, 2, 8, 8)),
        (np.full((1, 2, 8, 8), 3, np.uint8), "no declared class", [3]),
        (np.full((1, 2, 8, 8), -1, np.int16), "no declared class", [-1]),
        (np.full((1, 2, 8, 8), 0.5, np.float32), "no declared class", [0.5]),
    ],
)
def test_labels_that_do_not_fit_are_refused(label: np.ndarray, message: str, found: object) -> None:
    with pytest.raises(SuperCLError, match=message) as caught:
        process(np.zeros((1, 2, 8, 8), np.int16), label)
    assert caught.value.found == found


def test_whole_numbers_stored_as_floats_are_labels() -> None:
    label = np.array([0, 1, 2, 0], np.float32).reshape(1, 1, 2, 2)
    case = process(np.zeros((1, 1, 2, 2), np.int16), label)
    np.testing.assert_array_equal(case.arrays["ground_truth"], label[0])


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(SuperCLError, match="number of channels") as caught:
        process(np.zeros((2, 1, 4, 4), np.int16))
    assert caught.value.expected == 1


@pytest.mark.parametrize(
    "settings_", [{"n_segments": 0}, {"n_segments": 20_000}, {"compactness": 0.0}, {"compactness": -1.0}]
)
def test_settings_out_of_range_are_refused(settings_: dict) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(settings_))} is out of range"):
        PreprocessConfig(**settings_)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_compactness_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="compactness is out of range"):
        PreprocessConfig(compactness=value)
