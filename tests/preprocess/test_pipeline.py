"""Cases against plain twins: what is stored, ASP maps and statistics, memory, and what is refused."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from preprocess import pipeline
from preprocess.pipeline import PreprocessConfig, asp_on_grid, process_case, slic_superpixels
from supercl_core.errors import SuperCLError, UsageError
from supercl_core.formats.geometry import UNPLACED, Geometry
from supercl_core.formats.volumes import Volume

CONFIG = PreprocessConfig()
GEOMETRY = Geometry(
    spacing_mm=(0.5, 0.6, 4.0), origin_mm=(1.0, 2.0, 3.0), direction=(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)
)


def superpixels_of(slice_CYX: np.ndarray, config: PreprocessConfig = CONFIG, **more: Any) -> np.ndarray:
    return slic_superpixels(
        slice_CYX, method=config.slic, n_segments=config.n_segments, compactness=config.compactness, **more
    )


# ---- ASP


images = st.sampled_from([np.int16, np.uint16, np.float32]).flatmap(
    lambda dtype: arrays.arrays(
        dtype,
        st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),
        elements=st.floats(-1e4, 1e4, width=32) if dtype is np.float32 else None,
    )
)


@given(images, st.integers(1, 9), st.sampled_from([np.uint8, np.uint16]))
@settings(max_examples=40, deadline=None)
def test_asp_is_the_mean_of_the_rescaled_channels_at_the_centres_of_the_grid(
    image: np.ndarray, num_superpixels: int, dtype: type
) -> None:
    y, x = np.indices(image.shape[1:])
    superpixels = ((y // 2 * 5 + x // 3) % num_superpixels).astype(dtype)
    grid = asp_on_grid(image, superpixels)
    np.testing.assert_allclose(grid, references.asp_on_grid(image, superpixels), rtol=1e-9, atol=1e-9)
    assert grid.shape == (32, 32)


def test_asp_of_a_slice_of_the_grids_size_keeps_the_total(texture: Callable[..., np.ndarray]) -> None:
    values = texture((32, 32), 7)[None]
    superpixels = superpixels_of(values.astype(np.float32))
    assert asp_on_grid(values, superpixels).sum() == pytest.approx(values.sum(), rel=1e-12)
    shuffled = np.random.default_rng(0).permutation(superpixels.max() + 1).astype(np.uint8)[superpixels]
    np.testing.assert_allclose(asp_on_grid(values, shuffled), asp_on_grid(values, superpixels), rtol=1e-12)


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


@pytest.mark.parametrize(
    ("low", "high", "dtype", "stored_dtype"),
    [
        (0, 500, np.int16, "int16"),
        (-3e4, -2e4, np.float64, "int16"),
        (-100, 60_000, np.int32, "uint16"),
        (1e6, 1.06e6, np.float32, "uint16"),
        (0, 1e6, np.int32, "float32"),
    ],
)
def test_a_case_holds_what_its_row_says(
    low: float, high: float, dtype: type, stored_dtype: str, texture: Callable[..., np.ndarray]
) -> None:
    image = np.rint(low + texture((2, 3, 24, 20), 0) * (high - low)).astype(dtype)
    case = process(image, (image[:1] > (low + high) / 2).astype(np.int16), channels=2)
    row, stored = case.row, case.arrays
    assert row["shape"] == stored["image"].shape == (2, 3, 24, 20)
    assert (row["image_dtype"], row["superpixels_dtype"]) == (stored_dtype, "uint8")
    np.testing.assert_array_equal(stored["image"] * row["image_scale"] + row["image_offset"], image)
    assert row["num_superpixels"] == stored["superpixels"].max() + 1
    assert row["has_ground_truth"]
    assert row["spacing_mm"] == (4.0, 0.6, 0.5)
    np.testing.assert_allclose(row["statistics"], references.statistics(image), rtol=1e-12)
    assert stored["ground_truth"].dtype == np.uint8
    np.testing.assert_array_equal(stored["ground_truth"], image[0] > (low + high) / 2)
    assert case.attributes["orientation"] == "LPS"
    for z in range(3):
        superpixels = superpixels_of(stored["image"][:, z])
        np.testing.assert_array_equal(stored["superpixels"][z], superpixels)
        expected = references.asp_on_grid(image[:, z], superpixels)
        np.testing.assert_allclose(stored["asp"][z], expected, atol=1e-3)
    assert stored["asp"].dtype == np.float16


def test_what_is_stored_as_it_was_read_is_not_copied(texture: Callable[..., np.ndarray]) -> None:
    """Memory of a worker: one copy of the image and of the labels, however large the case."""
    for image in (
        texture((1, 2, 9, 9), 0).astype(np.float32),
        np.arange(162, dtype=np.int16).reshape(1, 2, 9, 9),
    ):
        label = np.zeros((1, 2, 9, 9), np.uint8)
        case = process(image, label)
        assert np.shares_memory(case.arrays["image"], image)
        assert np.shares_memory(case.arrays["ground_truth"], label)


def test_memory_of_a_case_is_that_of_its_arrays() -> None:
    """The largest allocations at a time, beside the volumes themselves, are the arrays that are returned."""
    image = np.zeros((1, 40, 128, 128), np.int16)
    image[:, :, 32:64, 20:90] = 700
    label = (image > 0).astype(np.uint8)
    process(image[:, :1], label[:, :1])  # compiles kernels
    tracemalloc.start()
    case = process(image, label)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    new = case.arrays["superpixels"].nbytes + case.arrays["asp"].nbytes
    fixed_bytes = 8 * 65_536 * 8  # the counts that statistics are read from
    slices_bytes = 100 * image[0, 0].nbytes
    assert peak < new + fixed_bytes + slices_bytes


def test_more_superpixels_than_a_byte_holds_widen_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first slice has few superpixels, the second many, the third few again."""
    ids = np.arange(400, dtype=np.uint16).reshape(20, 20)
    maps = iter([ids // 20, ids, ids // 20])
    monkeypatch.setattr(pipeline, "slic_superpixels", lambda *_, **__: next(maps))
    case = process(np.arange(1200, dtype=np.int16).reshape(1, 3, 20, 20))
    assert (case.row["superpixels_dtype"], case.row["num_superpixels"]) == ("uint16", 400)
    np.testing.assert_array_equal(case.arrays["superpixels"], np.stack([ids // 20, ids, ids // 20]))
    for z, superpixels in enumerate(case.arrays["superpixels"]):
        image = np.arange(z * 400, (z + 1) * 400).reshape(1, 20, 20)
        expected = references.asp_on_grid(image, superpixels)
        np.testing.assert_allclose(case.arrays["asp"][z], expected, atol=1e-3)


def test_a_single_voxel_a_single_slice_and_a_constant_volume() -> None:
    for image in (
        np.array(7, np.int16).reshape(1, 1, 1, 1),
        np.arange(80, dtype=np.int16).reshape(1, 1, 10, 8),
        np.zeros((1, 2, 9, 9), np.float32),
        np.full((1, 2, 9, 9), 0.5, np.float32),
    ):
        case = process(image)
        assert case.row["shape"] == image.shape
        assert np.isfinite(case.arrays["asp"]).all()
        assert ((case.arrays["asp"] >= 0) & (case.arrays["asp"] <= 1)).all()
    quantised = process(np.full((1, 2, 9, 9), 0.5), config=PreprocessConfig(image_dtype="int16"))
    assert (
        quantised.arrays["image"][0, 0, 0, 0] * quantised.row["image_scale"] + quantised.row["image_offset"]
        == 0.5
    )


def test_background_gets_no_superpixels_of_its_own(texture: Callable[..., np.ndarray]) -> None:
    """The threshold is in the unit of the source, also where the cache stores the values less an offset."""
    config = PreprocessConfig(foreground_above=1_000_500.0)
    image = 1_000_000 + np.rint(texture((2, 2, 40, 40), 1) * 60_000).astype(np.int32)
    image[:, :, :, :20] = 1_000_500
    image[1, :, 4, 4] = 1_000_501
    image[:, :, 0, 0] = 1_000_000
    case = process(image, config=config, channels=2)
    assert case.row["image_offset"] == 1_000_000
    for superpixels_YX in case.arrays["superpixels"]:
        background = superpixels_YX[:, :20].copy()
        assert background[4, 4] != background[0, 0]  # above the threshold in one channel
        background[4, 4] = background[0, 0]
        assert len(np.unique(background)) == 1
        assert len(np.unique(superpixels_YX[:, 20:])) > 20
        assert background[0, 0] not in superpixels_YX[:, 20:]


def test_a_volume_without_foreground_is_refused() -> None:
    with pytest.raises(SuperCLError, match="no foreground") as caught:
        process(np.full((1, 2, 8, 8), 40_000, np.int32), config=PreprocessConfig(foreground_above=40_000))
    assert caught.value.found == "40000 at most"


def test_spacing_can_be_declared_unknown() -> None:
    assert (
        process(np.zeros((1, 1, 4, 4)), config=PreprocessConfig(spacing="unknown")).row["spacing_mm"] is None
    )


def test_an_image_or_label_without_spacing_is_compared_by_shape_alone() -> None:
    image = Volume(array_CZYX=np.zeros((1, 2, 8, 8), np.int16), geometry=UNPLACED)
    label = Volume(array_CZYX=np.zeros((1, 2, 8, 8), np.uint8), geometry=UNPLACED)
    placed = dataclasses.replace(image, geometry=place())
    sizes: dict[str, Any] = {"num_channels": 1, "num_classes": 1, "config": PreprocessConfig()}
    assert process_case(image, label, **sizes).row["spacing_mm"] is None
    assert (
        process_case(image, dataclasses.replace(label, geometry=place()), **sizes).row["spacing_mm"] is None
    )
    assert process_case(placed, label, **sizes).row["spacing_mm"] == (4.0, 0.6, 0.5)


def test_int16_images_are_quantised_on_demand(texture: Callable[..., np.ndarray]) -> None:
    image = (texture((1, 2, 20, 20), 3) * [[[[2.0]], [[3.0]]]] + [[[[0.0]], [[-0.5]]]]).astype(np.float32)
    case = process(image, config=PreprocessConfig(image_dtype="int16"))
    assert case.arrays["image"].dtype == np.int16
    restored = case.arrays["image"] * case.row["image_scale"] + case.row["image_offset"]
    assert np.abs(restored - image).max() == pytest.approx(case.attributes["largest_error"])
    low, high = np.percentile(image.astype(np.float64), (0.01, 99.99))
    assert case.attributes["num_clipped"] == ((image < low) | (image > high)).sum() > 0
    np.testing.assert_allclose(case.row["statistics"], references.statistics(image), rtol=1e-12)


def test_a_single_spike_survives_quantising() -> None:
    spike = np.zeros((1, 1, 200, 200), np.float32)
    spike[0, 0, 0, 0] = 0.5
    case = process(spike, config=PreprocessConfig(image_dtype="int16"))
    restored = case.arrays["image"] * case.row["image_scale"] + case.row["image_offset"]
    np.testing.assert_allclose(restored, spike, atol=1e-5)


def test_quantising_leaves_integers_exact() -> None:
    case = process(np.int32([[[[1, 2]]]]), config=PreprocessConfig(image_dtype="int16"))
    assert (case.row["image_scale"], case.row["image_offset"]) == (1, 0)
    np.testing.assert_array_equal(case.arrays["image"], [[[[1, 2]]]])


@pytest.mark.parametrize(
    ("label", "message", "found"),
    [
        (np.zeros((1, 2, 9, 8), np.uint8), "another shape", (2, 9, 8)),
        (np.zeros((2, 2, 8, 8), np.uint8), "another shape", (2, 2, 8, 8)),
        (np.full((1, 2, 8, 8), 3, np.uint8), "no declared class", [3]),
        (np.full((1, 2, 8, 8), -1, np.int16), "no declared class", [-1]),
        (np.full((1, 2, 8, 8), 0.5, np.float32), "no declared class", [0.5]),
        (np.full((1, 2, 8, 8), 256, np.int16), "no declared class", [256]),
    ],
)
def test_labels_that_do_not_fit_are_refused(label: np.ndarray, message: str, found: object) -> None:
    with pytest.raises(SuperCLError, match=message) as caught:
        process(np.zeros((1, 2, 8, 8), np.int16), label)
    assert caught.value.found == found


@pytest.mark.parametrize("value", [0.9999, 1.0005, -1e-7, 1.9999999])
def test_a_label_near_a_class_is_not_rounded(value: float) -> None:
    """It was interpolated or rescaled, so that its borders are a guess; nothing of ours makes one silently."""
    label = np.full((1, 1, 2, 2), value)
    with pytest.raises(SuperCLError, match="no declared class") as caught:
        process(np.zeros((1, 1, 2, 2), np.int16), label)
    assert caught.value.found == [value]


def place(**changed: Any) -> Geometry:
    return dataclasses.replace(GEOMETRY, **changed)


@pytest.mark.parametrize(
    ("geometry", "found"),
    [
        (place(origin_mm=(1.0, 2.06, 3.0)), "0.06 mm: origin_mm [1.0, 2.06, 3.0] instead of [1.0, 2.0, 3.0]"),
        (place(spacing_mm=(0.5, 0.6, 2.0)), "2 mm: spacing_mm [0.5, 0.6, 2.0] instead of [0.5, 0.6, 4.0]"),
        (place(direction=(-1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)), "7 mm: direction [-1.0, 0.0, 0.0,"),
        (place(spacing_mm=(0.5, 0.6, 2.0), oriented=False), "2 mm: spacing_mm"),
    ],
)
def test_a_label_that_lies_elsewhere_is_refused_where_places_count(geometry: Geometry, found: str) -> None:
    image = volume(np.zeros((1, 2, 8, 8), np.int16))
    label = Volume(array_CZYX=np.zeros((1, 2, 8, 8), np.uint8), geometry=geometry)
    sizes = {"num_channels": 1, "num_classes": 3}
    with pytest.raises(SuperCLError, match="lies elsewhere than its image") as caught:
        process_case(image, label, config=CONFIG, **sizes)
    assert caught.value.found.startswith(found)
    assert process_case(image, label, config=PreprocessConfig(spacing="unknown"), **sizes).row[
        "has_ground_truth"
    ]


@pytest.mark.parametrize(
    "geometry",
    [place(origin_mm=(1.0, 2.04, 3.0)), place(origin_mm=(99.0, 2.0, 3.0), oriented=False)],
)
def test_a_label_beside_its_image_by_rounding_or_without_orientation_is_taken(geometry: Geometry) -> None:
    label = Volume(array_CZYX=np.zeros((1, 2, 8, 8), np.uint8), geometry=geometry)
    case = process_case(
        volume(np.zeros((1, 2, 8, 8), np.int16)), label, config=CONFIG, num_channels=1, num_classes=3
    )
    assert case.row["has_ground_truth"]


def test_spacing_that_cannot_be_is_refused_unless_it_is_unknown() -> None:
    image = Volume(
        array_CZYX=np.zeros((1, 2, 8, 8), np.int16), geometry=place(spacing_problem="a spacing of 0")
    )
    sizes = {"num_channels": 1, "num_classes": 0}
    with pytest.raises(SuperCLError, match="spacing cannot be right") as caught:
        process_case(image, None, config=CONFIG, **sizes)
    assert caught.value.found == "a spacing of 0"
    assert (
        process_case(image, None, config=PreprocessConfig(spacing="unknown"), **sizes).row["spacing_mm"]
        is None
    )


def test_outliers_that_leave_nothing_to_be_seen_are_refused(texture: Callable[..., np.ndarray]) -> None:
    """In the window of its slice, everything else would be one grey; what is large and not alone is no outlier."""
    image = texture((1, 4, 20, 20), 3).astype(np.float32)
    image[0, 1, 2, 3] = 1e7
    with pytest.raises(SuperCLError, match="A few values are so large") as caught:
        process(image)
    assert caught.value.found.startswith("0 to 1e+07, and 99 % of the voxels in 0.")
    image[0, 1, 2, 3] = 1e5
    assert process(image).row["image_dtype"] == "float32"
    background = np.zeros((1, 1, 40, 40), np.float32)
    background[0, 0, 3, 3] = 1e30
    case = process(background)
    assert case.row["statistics"][0][3] == np.float32(1e30)
    assert np.isfinite(case.arrays["asp"]).all()


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


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_foreground_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="foreground_above is out of range"):
        PreprocessConfig(foreground_above=value)


def test_exact_superpixels_take_no_foreground() -> None:
    with pytest.raises(UsageError, match="exact takes no foreground"):
        PreprocessConfig(slic="exact", foreground_above=0.0)
