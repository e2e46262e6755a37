"""The promises of superpixels, whatever the way they were made, and their quality beside scikit-image's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from skimage.segmentation import slic

from preprocess.phantom import phantom_case
from preprocess.quality import METRICS, Comparison, compare, measure_slice
from preprocess.superpixels import Method, slic_superpixels
from supercl_core.errors import SuperCLError
from supercl_core.intensity import rescale_slice

Texture = Callable[[tuple[int, ...], int], np.ndarray]
METHODS: tuple[Method, ...] = ("fast", "exact", "skimage")


def superpixels_of(values: np.ndarray, mask: np.ndarray | None = None, **settings: object) -> np.ndarray:
    arguments = {"n_segments": 20, "compactness": 10.0} | settings
    return slic_superpixels(values, mask_YX=mask, **arguments)  # type: ignore[arg-type]


def published_slic(values: np.ndarray) -> np.ndarray:
    grey = rescale_slice(values[None])[0]
    return slic(np.stack([grey] * 3, -1), n_segments=100, compactness=10, start_label=0)


def agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Fraction of equal pixels after matching ids one to one."""
    overlaps = np.zeros((int(ours.max()) + 1, int(theirs.max()) + 1))
    np.add.at(overlaps, (ours, theirs), 1)
    return float(overlaps[linear_sum_assignment(overlaps, maximize=True)].sum() / ours.size)


def assert_promises(superpixels: np.ndarray, mask: np.ndarray | None) -> None:
    assert superpixels.dtype == np.uint16
    np.testing.assert_array_equal(np.unique(superpixels), np.arange(int(superpixels.max()) + 1))
    for number, box in enumerate(ndimage.find_objects(superpixels.astype(int) + 1)):
        assert ndimage.label(superpixels[box] == number)[1] == 1
    if mask is not None:
        background, num_pieces = ndimage.label(~mask)
        for piece in range(1, num_pieces + 1):
            np.testing.assert_array_equal(
                superpixels == superpixels[background == piece][0], background == piece
            )


@st.composite
def slices(draw: st.DrawFn, *, largest: int, max_channels: int = 3) -> np.ndarray:
    """Noise, few levels (many ties), ramps, discs, blobs and constants, in every dtype of a volume."""
    sides = st.integers(1, largest)
    channels, height, width = draw(st.integers(1, max_channels)), draw(sides), draw(sides)
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    y, x = np.mgrid[:height, :width]
    kind = draw(st.sampled_from(["noise", "levels", "ramp", "disc", "blobs", "constant"]))
    values = rng.normal(size=(channels, height, width))
    if kind == "levels":
        values = rng.integers(0, 3, values.shape).astype(float)
    elif kind == "ramp":
        values = rng.normal(size=(channels, 1, 1)) * y + rng.normal(size=(channels, 1, 1)) * x
    elif kind == "disc":
        values = ((y - height / 2) ** 2 + (x - width / 2) ** 2 < rng.uniform(0, largest / 2) ** 2) * values[
            :, :1, :1
        ]
    elif kind == "blobs":
        values = ndimage.gaussian_filter(values, (0, 2, 2))
    elif kind == "constant":
        values = np.full(values.shape, rng.normal())
    low, high, dtype = draw(
        st.sampled_from(
            [
                (-32_768, 32_767, np.int16),
                (0, 65_535, np.uint16),
                (0, 255, np.uint8),
                (-5, 5, np.int64),
                (-1e30, 1e38, np.float32),
                (0.25, 0.26, np.float32),
                (1e6, 1e6 + 1, np.float64),
            ]
        )
    )
    return (low + rescale_slice(values) * (high - low)).astype(dtype)


@st.composite
def masks(draw: st.DrawFn, size: tuple[int, ...]) -> np.ndarray | None:
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    mask = np.zeros(size, bool)
    kind = draw(st.sampled_from(["none", "empty", "full", "pixel", "isolated", "chequers", "blobs", "noise"]))
    if kind == "pixel":
        mask[rng.integers(size[0]), rng.integers(size[1])] = True
    elif kind == "isolated":
        mask[::2, ::3] = True
    elif kind == "chequers":
        mask = np.indices(size).sum(axis=0) % 2 == 0
    elif kind == "blobs":
        mask = ndimage.gaussian_filter(rng.normal(size=size), 2) > 0
    elif kind == "noise":
        mask = rng.random(size) < 0.5
    return None if kind == "none" else mask | (kind == "full")


num_segments = st.one_of(st.integers(1, 30), st.integers(1, 2000))
compactnesses = st.floats(-2, 3).map(lambda exponent: 10.0**exponent)


@given(st.data(), st.one_of(slices(largest=20), slices(largest=64)), num_segments, compactnesses)
@settings(max_examples=150, deadline=None)
def test_fast_superpixels_keep_every_promise(
    data: st.DataObject, values: np.ndarray, n_segments: int, compactness: float
) -> None:
    mask = data.draw(masks(values.shape[1:]))
    arguments = {"n_segments": n_segments, "compactness": compactness}
    before, mask_before = values.copy(), None if mask is None else mask.copy()
    superpixels = superpixels_of(values, mask, **arguments)
    assert_promises(superpixels, mask)
    np.testing.assert_array_equal(values, before)
    np.testing.assert_array_equal(mask, mask_before)
    assert superpixels.tobytes() == superpixels_of(values, mask, **arguments).tobytes()
    # Neither the layout in memory nor a mask of everything matters.
    padded = np.zeros((*values.shape[:2], 2 * values.shape[2]), values.dtype)[:, ::-1, ::-2]
    padded[...] = values
    for layout in (np.asfortranarray(values), padded):
        np.testing.assert_array_equal(superpixels_of(layout, mask, **arguments), superpixels)
    if mask is None:
        full = np.ones(values.shape[1:], bool)
        np.testing.assert_array_equal(superpixels_of(values, full, **arguments), superpixels)
    else:
        np.testing.assert_array_equal(
            superpixels_of(values, np.asfortranarray(mask), **arguments), superpixels
        )


@given(st.data(), slices(largest=24), st.integers(1, 60), compactnesses)
@settings(max_examples=40, deadline=None)
def test_scikit_images_superpixels_keep_the_promises(
    data: st.DataObject, values: np.ndarray, n_segments: int, compactness: float
) -> None:
    mask = data.draw(masks(values.shape[1:]))
    assert_promises(
        superpixels_of(values, mask, method="skimage", n_segments=n_segments, compactness=compactness), mask
    )


@given(slices(largest=30), num_segments, compactnesses)
@settings(max_examples=60, deadline=None)
def test_exact_superpixels_keep_the_promises(values: np.ndarray, n_segments: int, compactness: float) -> None:
    superpixels = superpixels_of(values, method="exact", n_segments=n_segments, compactness=compactness)
    assert_promises(superpixels, None)


@pytest.mark.parametrize("method", ["exact", "skimage"])
def test_exact_and_skimage_are_the_published_call(method: Method, texture: Texture) -> None:
    values = (texture((140, 120), 0) * 800 - 100).astype(np.int16)
    ours = superpixels_of(values[None], method=method, n_segments=100)
    assert agreement(ours, published_slic(values)) >= 0.999


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@given(seed=st.integers(0, 2**31), n_segments=st.integers(1, 200))
@settings(max_examples=15, deadline=None)
def test_the_same_values_give_the_same_superpixels_in_every_dtype_and_after_every_exact_change(
    channels: int, masked: bool, seed: int, n_segments: int
) -> None:
    rng = np.random.default_rng(seed)
    values = np.rint(ndimage.gaussian_filter(rng.normal(size=(channels, 50, 60)), (0, 1, 1)) * 300).astype(
        np.int16
    )
    mask = ndimage.gaussian_filter(rng.normal(size=(50, 60)), 3) > 0 if masked else None
    expected = superpixels_of(values, mask, n_segments=n_segments)
    same: list[np.ndarray] = [values.astype(dtype) for dtype in (np.int32, np.int64, np.float32, np.float64)]
    same += [(values + 2000).astype(np.uint16), values - np.int16(20_000), values * np.int16(16)]
    same += [values + 1e9, values.astype(np.int64) + 2**40, values.astype(np.float32) * np.float32(2.0**-60)]
    for others in same:
        np.testing.assert_array_equal(superpixels_of(others, mask, n_segments=n_segments), expected)


def test_other_offsets_and_factors_change_hardly_a_pixel(texture: Texture) -> None:
    agreements = []
    for seed in range(6):
        values = texture((1, 100, 90), seed).astype(np.float32)
        expected = superpixels_of(values)
        for others in (values * np.float32(3.7), values + np.float32(1.3), values * np.float32(1e37)):
            agreements.append(agreement(superpixels_of(others), expected))
    assert np.mean(agreements) >= 0.999


def test_units_and_order_of_channels_do_not_matter(texture: Texture) -> None:
    values = texture((2, 60, 60), 3)
    scaled = values * np.array([1000.0, 0.001])[:, None, None] + np.array([-5.0, 7.0])[:, None, None]
    assert agreement(superpixels_of(scaled), superpixels_of(values)) >= 0.999
    swapped = superpixels_of(values[::-1])
    assert agreement(swapped, superpixels_of(values)) >= 0.999


@pytest.mark.parametrize("method", METHODS)
def test_slices_of_one_pixel_or_one_row(method: Method) -> None:
    for size in ((1, 1), (1, 7), (7, 1), (2, 3)):
        values = np.arange(size[0] * size[1], dtype=np.int16).reshape(1, *size)
        for n_segments in (1, 3, 100):
            superpixels = superpixels_of(values, method=method, n_segments=n_segments)
            assert_promises(superpixels, None)
            assert superpixels.max() + 1 <= max(2 * n_segments, 4)
    assert superpixels_of(np.zeros((1, 1, 1)), method=method).tolist() == [[0]]


@pytest.mark.parametrize("method", METHODS)
def test_more_segments_than_pixels_give_every_pixel_its_own(method: Method) -> None:
    superpixels = superpixels_of(np.zeros((1, 5, 6), np.int16), method=method, n_segments=100)
    assert sorted(superpixels.ravel().tolist()) == list(range(30))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [1, 2])
def test_one_segment_is_the_whole_slice(method: Method, channels: int, texture: Texture) -> None:
    assert (superpixels_of(texture((channels, 40, 50), 0), method=method, n_segments=1) == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_slice_is_a_regular_grid(method: Method) -> None:
    for value in (0, -3.5, 1e30):
        superpixels = superpixels_of(np.full((1, 60, 60), value), method=method, n_segments=100)
        # The tie between two seeds goes to either one: scikit-image's own grid is off by a pixel here and there.
        grid = np.kron(np.arange(100).reshape(10, 10), np.ones((6, 6), int))
        assert agreement(superpixels, grid) >= (1.0 if method == "fast" else 0.6)


@pytest.mark.parametrize("n_segments", [10, 50, 100, 400])
def test_the_number_of_superpixels_is_about_the_one_asked_for(n_segments: int) -> None:
    case = phantom_case(0, seed=0)
    for values in case.image[:: len(case.image) // 4]:
        count = int(superpixels_of(values[None], n_segments=n_segments).max()) + 1
        assert n_segments / 2 <= count <= 1.5 * n_segments


def test_an_empty_foreground_is_one_superpixel_and_a_full_one_none(texture: Texture) -> None:
    values = texture((1, 30, 40), 0)
    for method in ("fast", "skimage"):
        nothing = superpixels_of(values, np.zeros((30, 40), bool), method=method)
        assert nothing.dtype == np.uint16
        assert (nothing == 0).all()
        everything = superpixels_of(values, np.ones((30, 40), bool), method=method)
        np.testing.assert_array_equal(everything, superpixels_of(values, method=method))


def test_the_number_of_superpixels_counts_for_the_foreground_alone() -> None:
    values = phantom_case(1, seed=0).image[8:9]
    mask = np.zeros(values.shape[1:], bool)
    mask[20:80, 30:90] = True
    superpixels = superpixels_of(values, mask, n_segments=60)
    assert_promises(superpixels, mask)
    assert 40 <= len(np.unique(superpixels[mask])) <= 90


def test_pieces_of_the_foreground_smaller_than_a_superpixel_stay_themselves() -> None:
    mask = np.zeros((60, 60), bool)
    mask[5:45, 5:45] = mask[50, 50] = mask[52:54, 10:13] = True
    superpixels = superpixels_of(np.zeros((1, 60, 60), np.int16), mask, n_segments=10)
    assert_promises(superpixels, mask)
    assert (superpixels == superpixels[50, 50]).sum() == 1
    assert (superpixels == superpixels[52, 10]).sum() == 6


def test_what_is_outside_of_the_foreground_does_not_move_superpixels(texture: Texture) -> None:
    values, others = texture((2, 1, 80, 90), 4)
    mask = texture((80, 90), 5) > 0.3
    y, x = np.argwhere(mask)[0]
    values[0, y, x], values[0, *np.argwhere(mask)[-1]] = 0, 1  # the same minimum and maximum
    others = np.where(mask, values, others)
    for n_segments in (10, 100):
        np.testing.assert_array_equal(
            superpixels_of(values, mask, n_segments=n_segments),
            superpixels_of(others, mask, n_segments=n_segments),
        )


@pytest.mark.parametrize("method", METHODS)
def test_too_many_superpixels_are_an_error_that_says_what_to_do(method: Method) -> None:
    with pytest.raises(SuperCLError, match="too many superpixels") as caught:
        superpixels_of(np.zeros((1, 200, 200), np.int16), method=method, n_segments=40_000)
    assert caught.value.expected == "at most 32767"
    assert caught.value.found == 40_000
    assert "n_segments" in caught.value.next_step


@pytest.mark.parametrize("size", [182, 257, 364])
def test_too_many_pieces_of_the_foreground_are_an_error_even_beyond_the_ids(size: int) -> None:
    chequers = np.indices((size, size)).sum(axis=0) % 2 == 0
    with pytest.raises(SuperCLError, match="too many superpixels") as caught:
        superpixels_of(np.zeros((1, size, size), np.int16), chequers)
    assert caught.value.found == size**2


def test_superpixels_do_not_cross_borders_of_high_contrast() -> None:
    y, x = np.mgrid[:200, :220]
    classes = np.zeros(y.shape, int)
    for label, (centre_y, centre_x, radius) in enumerate([(60, 60, 40), (130, 150, 50), (150, 50, 20)], 1):
        classes[(y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2] = label
    noise = np.random.default_rng(0).normal(size=y.shape)
    values = np.array([0, 100, 40, 70])[classes] + noise
    for n_segments in (50, 100, 800):
        scores = measure_slice(superpixels_of(values[None], n_segments=n_segments), values[None], classes)
        assert scores["asa"] >= 0.998
        assert scores["boundary_recall"] >= 0.998
        assert scores["explained_variance"] >= 0.99


# ---------------------------------------------------------------- quality beside scikit-image


def gains(cases: Iterator[tuple[np.ndarray, np.ndarray]]) -> dict[str, Comparison]:
    """Every metric, in points, ours against scikit-image's, paired by slice; more is better for each of them."""
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    case_of_slice = []
    for case, (volume, truth) in enumerate(cases):
        for values, classes in zip(volume, truth, strict=True):
            superpixels = superpixels_of(values[None], n_segments=100)
            ours.append(measure_slice(superpixels, values[None], classes))
            theirs.append(measure_slice(published_slic(values), values[None], classes))
            case_of_slice.append(case)
    comparisons = {}
    for metric in METRICS:
        points = -100 if metric == "undersegmentation" else 100
        first, second = (points * np.array([scores[metric] for scores in run]) for run in (ours, theirs))
        comparison = compare(first, second, np.array(case_of_slice))
        assert comparison is not None
        comparisons[metric] = comparison
    return comparisons


def assert_as_good_as_scikit_image(comparisons: dict[str, Comparison], num_cases: int) -> None:
    for metric, comparison in comparisons.items():
        assert comparison.num_cases == num_cases
        assert comparison.interval is not None
        assert comparison.interval[0] >= (0 if metric == "explained_variance" else -0.2), (metric, comparison)


def test_superpixels_of_a_few_phantoms_are_not_shown_to_be_worse_than_scikit_images() -> None:
    cases = (phantom_case(index, seed=3) for index in range(8))
    comparisons = gains((case.image[4::6], case.label[4::6]) for case in cases)
    assert all(comparison.interval[1] >= 0 for comparison in comparisons.values())  # type: ignore[index]
    assert comparisons["explained_variance"].interval[0] >= 0  # type: ignore[index]


@pytest.mark.slow
def test_superpixels_of_phantoms_are_as_good_as_scikit_images() -> None:
    cases = (phantom_case(index, seed=5) for index in range(96))
    assert_as_good_as_scikit_image(gains((case.image[2::4], case.label[2::4]) for case in cases), 96)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "key", "every"), [("ACDC", "ACDC", 3), ("Task04_Hippocampus", "MSD-Hippocampus", 5)]
)
def test_superpixels_of_real_slices_are_as_good_as_scikit_images(
    name: str, key: str, every: int, real_data: Path
) -> None:
    test_keys = set(json.loads((real_data / "paper_splits.json").read_text())[key]["test"])
    paths = sorted((real_data / name / "imagesTr").glob("[!.]*.nii.gz"))
    numbers = [int(path.name[7:10]) if name == "ACDC" else index for index, path in enumerate(paths)]
    chosen = [path for path, number in zip(paths, numbers, strict=True) if number not in test_keys][::5]

    def volumes() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for path in chosen:
            image, label = (
                sitk.GetArrayFromImage(sitk.ReadImage(str(real_data / name / folder / path.name)))
                for folder in ("imagesTr", "labelsTr")
            )
            yield image[1::every], label[1::every]

    assert_as_good_as_scikit_image(gains(volumes()), len(chosen))
