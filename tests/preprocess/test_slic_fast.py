"""Fast SLIC against its plain twin, on constructed pictures and at the edges of what it is compiled for."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable

import numpy as np
import pytest
import references
from numba import njit
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from preprocess.kernels import slic_fast
from preprocess.kernels.slic_fast import fast_slic
from supercl_core.intensity import lightness

Texture = Callable[[tuple[int, ...], int], np.ndarray]
WHOLE_SLICE = np.zeros((0, 0), bool)


def superpixels_of(
    slice_CYX: np.ndarray, mask: np.ndarray | None = None, *, n_segments: int, compactness: float = 10.0
) -> np.ndarray:
    superpixels, count = fast_slic(slice_CYX, WHOLE_SLICE if mask is None else mask, n_segments, compactness)
    assert superpixels.dtype == np.uint16
    np.testing.assert_array_equal(np.unique(superpixels), np.arange(count))
    return superpixels


def twin(slice_CYX: np.ndarray, mask: np.ndarray | None = None, *, n_segments: int) -> np.ndarray:
    return references.fast_slic(
        slice_CYX,
        mask,
        n_segments=n_segments,
        compactness=10.0,
    )


def agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Fraction of equal pixels after matching ids one to one."""
    overlaps = np.zeros((ours.max() + 1, theirs.max() + 1))
    np.add.at(overlaps, (ours, theirs), 1)
    return float(overlaps[linear_sum_assignment(overlaps, maximize=True)].sum() / ours.size)


# One superpixel is 4 to 50 pixels wide, blocks 1 to 8. The last slice is wider than a chunk.
SIZES = [((24, 31), 60), ((40, 37), 20), ((70, 61), 14), ((100, 98), 4), ((18, 540), 60)]


@pytest.mark.parametrize(("size", "n_segments"), SIZES)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("channels", [1, 3])
def test_superpixels_are_the_plain_twins(
    size: tuple[int, int], n_segments: int, masked: bool, channels: int, texture: Texture
) -> None:
    values = (texture((channels, *size), 1) * 1000).astype(np.float32)
    mask = texture(size, 2) > 0.4 if masked else None
    ours = superpixels_of(values, mask, n_segments=n_segments)
    theirs = twin(values, mask, n_segments=n_segments)
    # The polynomials are 0.03 of 100 away from lightness, which some pixels halfway between two superpixels feel.
    assert agreement(ours, theirs) >= (0.99 if channels == 1 else 0.999)


@pytest.mark.parametrize("n_segments", [10, 40])
def test_superpixels_that_still_move_after_ten_iterations_are_the_plain_twins(n_segments: int) -> None:
    for seed in range(3):
        values = np.random.default_rng(seed).normal(size=(2, 28, 30)).astype(np.float32)
        ours = superpixels_of(values, n_segments=n_segments)
        assert agreement(ours, twin(values, n_segments=n_segments)) >= 0.999


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_flat_patches_are_exactly_the_plain_twins(factor: int) -> None:
    # Patches as large as cells, each unlike its neighbours: nothing is near a tie.
    levels = np.array([[0, 700, 200, 900], [1000, 300, 800, 100], [400, 600, 50, 750]], np.int16)
    patch = np.ones((5 * factor, 5 * factor), np.int16)
    values = np.kron(levels, patch)[None]
    ours = superpixels_of(values, n_segments=12)
    np.testing.assert_array_equal(ours, twin(values, n_segments=12))
    # Where pixels are smoothed, those between two patches may be like a third one.
    assert (ours != np.kron(np.arange(12).reshape(3, 4), patch)).mean() <= (0.02 if factor > 2 else 0)


def test_the_grey_polynomials_are_lightness() -> None:
    grey = np.arange(65_536, dtype=np.uint16).reshape(1, 256, 256)
    features = np.empty(grey.shape, np.float32)
    slic_fast._features(grey, 1.0, features)
    np.testing.assert_allclose(features, lightness(grey / 65_535), rtol=0, atol=0.03)


def test_every_channel_is_rescaled_from_its_own_minimum_and_maximum() -> None:
    channels = [[[1e6, 1e6 + 8], [1e6 + 2, 1e6 + 4]], [[-3, -3], [-3, -3]], [[0, 1e-6], [0, 5e-7]]]
    values = np.array(channels, np.float32)
    features = np.empty(values.shape, np.float32)
    slic_fast._features(values, 0.5, features)
    expected = np.array([[[0, 50], [12.5, 25]], [[0, 0], [0, 0]], [[0, 50], [0, 25]]])
    np.testing.assert_allclose(features, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("low", "high"), [(-3.4e38, 3.4e38), (1e38, 3e38), (-1e30, -1e-30), (0, 1e-37), (16_777_216, 16_777_220)]
)
def test_any_range_of_single_precision_is_rescaled(low: float, high: float) -> None:
    values = np.array([[[low, high, low, high]], [[low, low / 2 + high / 2, high, high]]], np.float32)
    features = np.empty(values.shape, np.float32)
    slic_fast._features(values, 1.0, features)
    np.testing.assert_allclose(features, [[[0, 100, 0, 100]], [[0, 50, 100, 100]]], rtol=1e-5)


@pytest.mark.parametrize("size", [(60, 60), (200, 200), (512, 512), (100, 300)])
def test_a_constant_slice_is_cut_into_a_regular_grid(size: tuple[int, int]) -> None:
    superpixels = superpixels_of(np.full((1, *size), 7, np.int16), n_segments=48)
    assert 40 <= superpixels.max() + 1 <= 60
    for box in ndimage.find_objects(superpixels + 1):
        height, width = (side.stop - side.start for side in box)
        assert 0.6 < height / width < 1.6
    sizes = np.bincount(superpixels.ravel())
    assert sizes.max() < 1.6 * sizes.min()


def test_superpixels_do_not_cross_the_borders_of_discs() -> None:
    y, x = np.mgrid[:160, :180]
    for channels in (1, 2):
        classes = np.zeros((160, 180), int)
        for label, (centre_y, centre_x, radius) in enumerate(
            [(45, 50, 30), (100, 120, 40), (120, 40, 18)], 1
        ):
            classes[(y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2] = label
        values = np.stack([np.array([0, 100, 40, 70])[classes]] * channels).astype(np.int16)
        superpixels = superpixels_of(values, n_segments=100)
        overlaps = np.zeros((superpixels.max() + 1, 4))
        np.add.at(overlaps, (superpixels, classes), 1)
        assert overlaps.max(axis=1).sum() / classes.size >= 0.999
        assert 60 <= superpixels.max() + 1 <= 140


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_pixels_of_wide_slices_go_to_clusters_around_them(factor: int) -> None:
    # Clusters that are squares of 4 x 4 blocks, without features: the nearest centre is that of the own square.
    squares_YX = np.arange(2 * 320 // factor, dtype=np.uint16).reshape(2, -1)
    blocks_YX, expected_YX = (np.kron(squares_YX, np.ones((n, n), np.uint16)) for n in (4, 4 * factor))
    y, x = (np.indices(squares_YX.shape) + 0.5) * 4 * factor - 0.5
    centres = np.stack([y.ravel(), x.ravel(), np.zeros(y.size)])
    found_YX = np.empty(expected_YX.shape, np.uint16)
    slic_fast._assign_pixels(np.zeros((1, *found_YX.shape), np.float32), factor, blocks_YX, centres, found_YX)
    np.testing.assert_array_equal(found_YX, expected_YX)


def test_superpixels_larger_than_a_chunk_stay_inside_their_arrays() -> None:
    assert (superpixels_of(np.zeros((1, 2100, 2100), np.int16), n_segments=1) == 0).all()


@pytest.mark.parametrize("size", [(1, 3000), (3, 1000), (3000, 1)])
def test_slices_narrower_than_a_superpixel_have_about_as_many_as_asked_for(
    size: tuple[int, int], texture: Texture
) -> None:
    for values in (np.zeros((1, *size), np.int16), (texture((1, *size), 0) * 1000).astype(np.int16)):
        assert 15 <= superpixels_of(values, n_segments=30).max() + 1 <= 60


@pytest.mark.parametrize("size", [(256, 256), (268, 268), (60, 1200)])
def test_a_foreground_of_one_pixel_in_a_large_slice_is_kept(size: tuple[int, int]) -> None:
    # Were there a cell for every pixel, this one's would have the number that stands for the background.
    mask = np.zeros(size, bool)
    mask.flat[65_535] = True
    values = np.random.default_rng(0).normal(size=(1, *size)).astype(np.float32)
    superpixels = superpixels_of(values, mask, n_segments=100)
    assert superpixels.max() + 1 == 2
    np.testing.assert_array_equal(superpixels == superpixels[mask], mask)


def test_weights_far_from_the_usual_end_in_superpixels_all_the_same(texture: Texture) -> None:
    values = texture((1, 60, 70), 3).astype(np.float32)
    grid = superpixels_of(np.zeros_like(values), n_segments=20)
    np.testing.assert_array_equal(superpixels_of(values, n_segments=20, compactness=1e9), grid)
    for compactness in (1e-9, 1e-3, 0.1):
        superpixels = superpixels_of(values, n_segments=20, compactness=compactness)
        assert all(ndimage.label(superpixels == k)[1] == 1 for k in range(superpixels.max() + 1))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 assembly")
@pytest.mark.parametrize("name", ["_nearest_cell", "_nearest_slot"])
def test_inner_loops_are_vectorised_without_gathers(name: str) -> None:
    row = np.zeros((2, 600), np.float32)[0, :512]  # contiguous, as the callers slice it
    ids = np.zeros(512, np.uint16)
    table = np.zeros(4 * 4096, np.float32)
    arguments = {
        "_nearest_cell": (row, row, row, table, table, ids[:9].copy(), ids),
        "_nearest_slot": (row, np.float32(0), table, ids),
    }[name]
    compiled = njit(nogil=True)(
        getattr(slic_fast, name).py_func
    )  # one read from Numba's cache has no assembly
    compiled(*arguments)
    (assembly,) = compiled.inspect_asm().values()
    assert len(re.findall(r"\bv?mulps\b|\bvf\w*madd\w*ps\b", assembly)) >= 4
    assert "gather" not in assembly
