"""Crops against a plain construction from the Zarr arrays; adjacent slices, foreground, padding; what is refused."""

import itertools
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from made_caches import write_cache

from benchmarks.read import many_cases
from supercl_core.cache.reader import open_cache
from supercl_core.errors import CacheError, UsageError
from train.data import (
    SliceDataset,
    automatic_patch_size,
    network_channels,
    normalisation_window,
    normalisation_windows,
    normalise,
    normalise_images,
    repeat_channels,
    stack_adjacent,
)

STORAGE = {  # (rows, columns), dtype, scale, offset
    "case_large": ((70, 54), np.int16, 0.25, -300.0),
    "case_mixed": ((20, 61), np.uint16, 1.0, 1234.0),
    "case_small": ((17, 30), np.float32, 1.0, 0.0),
}
PATCH = (48, 32)


@pytest.fixture(scope="module")
def odd_path(tmp_path_factory):
    """Three cases of noise in two channels, the second constant, larger and smaller than a patch."""
    random = np.random.default_rng(0)
    cases = {}
    for case_id, (size, dtype, _, _) in STORAGE.items():
        shape = (3, *size)
        cases[case_id] = {
            "image": np.stack([random.integers(0, 30_000, shape), np.full(shape, 7)]).astype(dtype),
            "superpixels": random.integers(0, 300, shape).astype(np.uint16),
            "ground_truth": random.integers(0, 3, shape).astype(np.uint8),
        }
    return write_cache(
        tmp_path_factory.mktemp("odd") / "odd.zarr",
        cases,
        name="odd",
        channel_names=("T1", "T2"),
        class_names=("background", "one", "two"),
        scales={case_id: stored[2:] for case_id, stored in STORAGE.items()},
    )


@pytest.fixture
def odd(odd_path):
    return SliceDataset(open_cache(odd_path), patch_size=PATCH, ground_truth=True)


@pytest.fixture
def tiny(cache_path):
    return SliceDataset(open_cache(cache_path), patch_size=(32, 32))


def plain_slice(path, case_id, z):
    """Clipped and normalised image (c, y, x), superpixels and ground truth (y, x), by zarr and the definition."""
    case = zarr.open_group(path, mode="r")[f"cases/{case_id}"]
    row = case.attrs["supercl"]["row"]
    volume = case["image"][:] * row["image_scale"] + row["image_offset"]
    image = np.empty(volume[:, z].shape)
    for channel, values in enumerate(volume):
        low, high = np.percentile(values, (0.5, 99.5))
        clipped = np.clip(values, low, high)
        image[channel] = (clipped[z] - clipped.mean()) / (clipped.std() if clipped.std() > 0 else 1)
    return image, case["labels/superpixels/0"][z].astype(int), case["labels/ground_truth/0"][z]


def plain_crop(array, top, left, fill, patch=PATCH):
    """The patch whose first pixel is at (top, left) of `array`, which goes on as `fill` in all directions."""
    around = ((0, 0),) * (array.ndim - 2) + ((100, 100),) * 2
    padded = np.pad(array, around, constant_values=fill)
    return padded[..., top + 100 : top + 100 + patch[0], left + 100 : left + 100 + patch[1]]


def placements(size, patch):
    """All positions of a patch along an axis: within the slice, or around it."""
    return range(min(0, size - patch), max(0, size - patch) + 1)


# ---------------------------------------------------------------- crops


@pytest.mark.parametrize("case_id", STORAGE)
def test_random_crops_are_windows_of_the_slice_with_their_labels(odd, odd_path, case_id):
    size = STORAGE[case_id][0]
    generator = np.random.default_rng(1)
    index = int(odd.cache.case_slices([case_id])[1])
    image, superpixels, truth = plain_slice(odd_path, case_id, 1)
    tops, lefts = placements(size[0], PATCH[0]), placements(size[1], PATCH[1])
    seen = set()
    for _ in range(25):
        slices = np.array([index])
        batch = normalise(odd.gather(slices, odd.place(slices, generator)))
        # Labels first: their placement is unique, and cheap to search for.
        found = [
            (top, left)
            for top in tops
            for left in lefts
            if np.array_equal(batch.ground_truth_BYX[0], plain_crop(truth, top, left, 0))
        ]
        assert len(found) == 1
        seen.add(found[0])
        torch.testing.assert_close(
            batch.image_BCYX[0].double(),
            torch.from_numpy(plain_crop(image, *found[0], 0.0).copy()),
            rtol=0,
            atol=1e-5,
        )
        centres = plain_crop(superpixels, *found[0], -1)[8::16, 8::16]
        np.testing.assert_array_equal(batch.superpixels_Bhw[0], centres)
    assert len(seen) > 10
    if case_id == "case_small":  # three placements along x, the outermost ones among them
        assert {left for _, left in seen} == set(lefts)


@pytest.mark.parametrize("case_id", STORAGE)
def test_centred_crops_leave_equal_margins(odd, odd_path, case_id):
    size = STORAGE[case_id][0]
    index = int(odd.cache.case_slices([case_id])[2])
    item = odd[list(odd.slices).index(index)]
    _, superpixels, truth = plain_slice(odd_path, case_id, 2)
    top, left = ((side - patch) // 2 for side, patch in zip(size, PATCH, strict=True))
    np.testing.assert_array_equal(item["ground_truth"], plain_crop(truth, top, left, 0))
    np.testing.assert_array_equal(item["superpixels"], plain_crop(superpixels, top, left, -1)[8::16, 8::16])
    assert item["position"] == 1.0
    assert item["slice"] == index


def test_gather_keeps_the_order_asked_for_and_the_stored_intensities(odd, odd_path):
    slices = np.array([7, 0, 7, 4])
    batch = odd.gather(slices)
    assert batch.slices_B.tolist() == [7, 0, 7, 4]
    torch.testing.assert_close(batch.positions_B, torch.tensor([2 / 3, 1 / 3, 2 / 3, 2 / 3]))
    image = normalise(batch).image_BCYX
    assert torch.equal(image[0], image[2])
    stored = zarr.open_group(odd_path, mode="r")["cases/case_large/image"][:, 0]
    np.testing.assert_array_equal(batch.image_BCYX[1], stored[:, 11:59, 11:43])


@pytest.mark.parametrize(("stride", "multiple_of"), [(1, 16), (4, 16), (16, 16), (16, 32), (32, 32)])
def test_superpixels_are_read_at_the_centres_of_cells_of_any_stride(odd_path, stride, multiple_of):
    dataset = SliceDataset(
        open_cache(odd_path), patch_size=(64, 32), multiple_of=multiple_of, superpixel_stride=stride
    )
    for index, (top, left) in itertools.product(dataset.slices, [(-40, -20), (-5, 3), (0, 0), (6, 22)]):
        row = dataset.cache.rows[dataset.cache.slice_case[index]]
        slack = [side - patch for side, patch in zip(row.shape[2:], (64, 32), strict=True)]
        corner = [int(np.clip(at, min(s, 0), max(s, 0))) for at, s in zip((top, left), slack, strict=True)]
        batch = normalise(dataset.gather(np.array([index]), np.array([corner])))
        _, superpixels, _ = plain_slice(odd_path, row.id, dataset.cache.slice_z[index])
        expected = plain_crop(superpixels, *corner, -1, patch=(64, 32))[
            stride // 2 :: stride, stride // 2 :: stride
        ]
        np.testing.assert_array_equal(batch.superpixels_Bhw[0], expected)
        assert batch.superpixels_Bhw.dtype == torch.int16


def test_a_buffer_is_filled_again_and_what_it_held_shows_nowhere(odd):
    places = odd.place(odd.slices, np.random.default_rng(0))
    expected = normalise(odd.gather(odd.slices, places))
    buffer = odd.buffer(len(odd))
    for garbage in (float("nan"), float("inf"), 2e9):
        buffer.image_BCYX.fill_(garbage)
        buffer.superpixels_Bhw.fill_(77)
        buffer.ground_truth_BYX.fill_(99)
        stored = odd.gather(odd.slices, places, out=buffer)
        assert stored.image_BCYX.data_ptr() == buffer.image_BCYX.data_ptr()
        batch = normalise(stored)
        for name, tensor in vars(expected).items():
            assert torch.equal(getattr(batch, name), tensor), name
    sizes = [odd.cache.rows[case].shape[2:] for case in odd.cache.slice_case]
    for item, ((top, left), (height, width)) in enumerate(zip(places, sizes, strict=True)):
        padding = plain_crop(np.zeros((height, width), int), top, left, 1).astype(bool)
        assert (batch.image_BCYX[item][:, padding] == 0).all()
        assert (batch.ground_truth_BYX[item][padding] == 0).all()
        assert (batch.superpixels_Bhw[item][padding[8::16, 8::16]] == -1).all()


@pytest.mark.parametrize(
    ("corner", "is_padded"),
    [((0, 0), False), ((22, 22), False), ((-1, 0), True), ((23, 0), True), ((0, -1), True), ((0, 23), True)],
)
def test_masks_are_left_out_only_where_nothing_is_padded(odd_path, corner, is_padded):
    large = SliceDataset(open_cache(odd_path), ["case_large"], patch_size=PATCH)
    places = np.array([[0, 0], corner])
    assert large.gather(large.slices[:2], places).is_padded == is_padded


def test_a_batch_shares_no_memory_with_what_it_was_made_of(odd):
    stored = odd.gather(odd.slices)
    batch = normalise(stored)
    before = {name: tensor.clone() for name, tensor in vars(batch).items()}
    for tensor in stored.tensors().values():
        tensor.zero_()
    for name, tensor in vars(batch).items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("case_ids", "dtype"),
    [
        (["case_large"], torch.int16),
        (["case_mixed"], torch.uint16),
        (["case_small"], torch.float32),
        (["case_large", "case_mixed"], torch.float32),
    ],
)
def test_batches_hold_the_stored_dtype_where_all_cases_share_one(odd_path, case_ids, dtype):
    cache = open_cache(odd_path)
    dataset = SliceDataset(cache, case_ids, patch_size=PATCH)
    stored = dataset.gather(dataset.slices)
    assert stored.image_BCYX.dtype == dtype
    everything = SliceDataset(cache, patch_size=PATCH)
    one, other = normalise(stored), normalise(everything.gather(dataset.slices))
    assert one.image_BCYX.dtype == torch.float32
    assert torch.equal(one.image_BCYX, other.image_BCYX)


@pytest.mark.parametrize("num_channels", [1, 3, 4])
@pytest.mark.parametrize("superpixels", [("uint8", "uint8"), ("uint8", "uint16"), ("uint16", "uint16")])
def test_channels_and_mixed_superpixels(tmp_path, num_channels, superpixels):
    random = np.random.default_rng(0)
    cases = {
        f"case_{index}": {
            "image": random.integers(-900, 900, (num_channels, 2, 20, 24)).astype(np.int16),
            "superpixels": random.integers(0, 250, (2, 20, 24)).astype(dtype),
        }
        for index, dtype in enumerate(superpixels)
    }
    names = [str(channel) for channel in range(num_channels)]
    path = write_cache(tmp_path / "c.zarr", cases, name="c", channel_names=names, class_names=())
    dataset = SliceDataset(open_cache(path), patch_size=(16, 16), superpixel_stride=4)
    stored = dataset.gather(dataset.slices)
    assert stored.superpixels_Bhw.dtype == getattr(torch, max(superpixels, key=len))
    for item, (case, z) in enumerate(itertools.product(cases.values(), range(2))):
        np.testing.assert_array_equal(stored.image_BCYX[item], case["image"][:, z, 2:18, 4:20])
        np.testing.assert_array_equal(stored.superpixels_Bhw[item], case["superpixels"][z, 4:18:4, 6:20:4])


def test_places_of_a_batch_are_drawn_together_and_reach_every_margin(odd):
    slices = np.repeat(odd.slices, 300)
    places = odd.place(slices, np.random.default_rng(5))
    np.testing.assert_array_equal(places, odd.place(slices, np.random.default_rng(5)))
    for case_id, (size, *_) in STORAGE.items():
        of_case = places[np.isin(slices, odd.cache.case_slices([case_id]))]
        for axis in (0, 1):
            assert set(of_case[:, axis]) == set(placements(size[axis], PATCH[axis]))


def test_dataset_takes_only_the_cases_asked_for(odd_path):
    dataset = SliceDataset(open_cache(odd_path), ["case_small", "case_large"], patch_size=PATCH)
    assert len(dataset) == 6
    cases = {dataset.cache.rows[dataset.cache.slice_case[item["slice"]]].id for item in dataset}
    assert cases == {"case_small", "case_large"}
    assert "ground_truth" not in dataset[0]


def test_negative_index_counts_from_the_end(odd):
    assert odd[-1]["slice"] == odd[len(odd) - 1]["slice"]
    with pytest.raises(IndexError):
        odd[len(odd)]


def test_a_copy_for_another_process_gives_the_same(odd):
    copied = pickle.loads(pickle.dumps(odd))
    assert len(copied) == len(odd)
    for index in (0, len(odd) - 1):
        torch.manual_seed(0)
        expected = odd[index]
        torch.manual_seed(0)
        for name, value in copied[index].items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_torch_dataloader_batches_the_dataset(odd):
    loader = torch.utils.data.DataLoader(odd, batch_size=4, num_workers=0)
    batches = list(loader)
    assert [len(batch["slice"]) for batch in batches] == [4, 4, 1]
    assert batches[0]["image"].shape == (4, 2, *PATCH)
    assert torch.cat([batch["slice"] for batch in batches]).tolist() == odd.slices.tolist()
    assert all(torch.isfinite(batch["image"]).all() for batch in batches)


# ---------------------------------------------------------------- adjacent slices


def plain_stack(slices_ZCYX, z, n):
    """All channels of slice z - n, then those of the next one, and so on, by a loop."""
    channels = []
    for other in range(z - n, z + n + 1):
        channels.extend(slices_ZCYX[min(max(other, 0), len(slices_ZCYX) - 1)])
    return np.stack(channels)


@pytest.mark.parametrize("n", [0, 1, 2, 7])
@pytest.mark.parametrize(("num_slices", "num_channels"), [(1, 1), (1, 3), (2, 2), (5, 1), (5, 4)])
def test_stacks_of_a_volume_equal_the_plain_ones(num_slices, num_channels, n):
    volume = np.random.default_rng(0).integers(-9, 9, (num_slices, num_channels, 3, 5)).astype(np.int16)
    tensor = torch.from_numpy(volume)
    stacked = stack_adjacent(tensor, n)
    assert stacked.dtype == torch.int16
    np.testing.assert_array_equal(stacked, np.stack([plain_stack(volume, z, n) for z in range(num_slices)]))
    tensor.zero_()
    assert stacked.any()


@pytest.fixture(scope="module")
def thin_path(tmp_path_factory):
    """Volumes of 1, 2 and 6 slices of two channels, larger and smaller than a patch of 32 x 16; two dtypes."""
    cases = {}
    for depth, size, dtype in [(1, (40, 21), np.int16), (2, (19, 35), np.uint16), (6, (50, 11), np.uint16)]:
        random = np.random.default_rng(depth)
        image = random.integers(0, 30_000, (2, depth, *size)).astype(dtype)
        image[1] //= 100
        cases[f"depth_{depth}"] = {
            "image": image,
            "superpixels": random.integers(0, 300, (depth, *size)).astype(np.uint16),
            "ground_truth": random.integers(0, 2, (depth, *size)).astype(np.uint8),
        }
    return write_cache(
        tmp_path_factory.mktemp("thin") / "thin.zarr",
        cases,
        name="thin",
        channel_names=("T1", "T2"),
        class_names=("background", "one"),
        scales={"depth_2": (0.5, -100.0)},
    )


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("case_ids", [None, ["depth_6", "depth_2"]])
def test_crops_with_adjacent_slices_equal_the_plain_ones(thin_path, case_ids, n):
    dataset = SliceDataset(
        open_cache(thin_path), case_ids, patch_size=(32, 16), ground_truth=True, adjacent_slices=n
    )
    assert (dataset.num_channels, dataset.adjacent_slices) == (2 * (2 * n + 1), n)
    cache, slices = dataset.cache, np.random.default_rng(0).permutation(dataset.slices)
    places = dataset.place(slices, np.random.default_rng(n))
    batch = normalise(dataset.gather(slices, places))
    assert batch.image_BCYX.shape == (len(slices), dataset.num_channels, 32, 16)
    for item, (index, place) in enumerate(zip(slices, places, strict=True)):
        case_id, z = cache.rows[cache.slice_case[index]].id, cache.slice_z[index]
        depth = int(case_id.removeprefix("depth_"))
        images = [plain_slice(thin_path, case_id, z)[0] for z in range(depth)]
        expected = plain_crop(plain_stack(images, z, n), *place, 0.0, patch=(32, 16))
        np.testing.assert_allclose(batch.image_BCYX[item], expected, rtol=0, atol=1e-5)
        _, superpixels, truth = plain_slice(thin_path, case_id, z)
        np.testing.assert_array_equal(
            batch.superpixels_Bhw[item],
            plain_crop(superpixels, *place, -1, patch=(32, 16))[8::16, 8::16],
        )
        np.testing.assert_array_equal(
            batch.ground_truth_BYX[item], plain_crop(truth, *place, 0, patch=(32, 16))
        )


@pytest.mark.parametrize("n", [0, 1, 4])
def test_training_sees_the_channels_that_whole_volumes_get(odd_path, n):
    cache = open_cache(odd_path)
    case = cache.case("case_large")
    window = torch.from_numpy(normalisation_window(case))[None]
    volume = normalise_images(torch.from_numpy(case.image_ZCYX.copy()), window)
    dataset = SliceDataset(cache, ["case_large"], patch_size=PATCH, adjacent_slices=n)
    crops = torch.stack([item["image"] for item in dataset])
    assert torch.equal(crops, stack_adjacent(volume, n)[:, :, 11:59, 11:43])


# ---------------------------------------------------------------- foreground


def spots_cache(path, truths_ZYX):
    """Cases of one channel with these ground truths, of classes 1 to 3."""
    cases = {
        f"case_{index}": {
            "image": np.random.default_rng(index).integers(0, 99, (1, *truth.shape)).astype(np.int16),
            "superpixels": np.zeros(truth.shape, np.uint8),
            "ground_truth": truth,
        }
        for index, truth in enumerate(truths_ZYX)
    }
    names = ("background", "one", "two", "three")
    return write_cache(path, cases, name="spots", channel_names=("MRI",), class_names=names)


def spots(shape, *pixels):
    """Ground truth (1, y, x) of background but for pixels (row, column, class)."""
    truth = np.zeros((1, *shape), np.uint8)
    for row, column, value in pixels:
        truth[0, row, column] = value
    return truth


def places_of(tmp_path, truth, *, num, share=1.0, patch=(32, 16)):
    cache = open_cache(spots_cache(tmp_path / "spots.zarr", [truth]))
    dataset = SliceDataset(cache, patch_size=patch, ground_truth=True, foreground_share=share)
    return dataset.place(np.zeros(num, np.int64), np.random.default_rng(3))


@pytest.mark.parametrize(
    ("shape", "pixel", "rows", "columns"),
    [
        ((70, 40), (35, 20), range(4, 36), range(5, 21)),  # in the middle
        ((70, 40), (0, 39), range(1), range(24, 25)),  # in a corner
        ((70, 40), (40, 3), range(9, 39), range(4)),  # near margins
        ((20, 40), (19, 20), range(-12, 1), range(5, 21)),  # the slice is smaller along y
        ((20, 9), (0, 8), range(-12, 1), range(-7, 1)),  # along both
        ((32, 16), (31, 0), range(1), range(1)),  # as large as the patch
    ],
)
def test_a_patch_is_placed_anywhere_where_it_holds_the_pixel(tmp_path, shape, pixel, rows, columns):
    places = places_of(tmp_path, spots(shape, (*pixel, 2)), num=3000)
    assert {*places[:, 0]} == {*rows}
    assert {*places[:, 1]} == {*columns}
    for axis, allowed in enumerate((rows, columns)):
        counts = Counter(places[:, axis].tolist())
        assert min(counts.values()) > 0.5 * 3000 / len(allowed)


def test_classes_of_a_slice_are_held_equally_often_and_pixels_of_a_class_too(tmp_path):
    truth = spots((96, 96), (0, 0, 3), (0, 95, 3))
    truth[0, 80:, 40:56] = 1  # 256 pixels
    places = places_of(tmp_path, truth, num=4000, patch=(16, 16))
    held = Counter(
        (bool((left <= 0) & (top <= 0)), bool((left >= 80) & (top <= 0)), bool(top >= 65))
        for top, left in places
    )
    assert held.total() == sum(held.values()) == 4000
    assert abs(held[False, False, True] / 4000 - 1 / 2) < 0.03
    assert abs(held[True, False, False] / 4000 - 1 / 4) < 0.03
    assert abs(held[False, True, False] / 4000 - 1 / 4) < 0.03


def test_the_share_of_patches_placed_by_foreground_is_the_one_asked_for(tmp_path):
    places = places_of(tmp_path, spots((90, 90), (0, 0, 1)), num=5000, share=0.25, patch=(16, 16))
    held = (places == 0).all(axis=1).mean()  # by chance alone in 1 of 75 x 75
    assert abs(held - 0.25) < 0.03
    others = places[(places != 0).any(axis=1)]
    assert {*others[:, 0]} == {*others[:, 1]} == set(range(75))


def test_slices_without_foreground_are_cropped_anywhere(tmp_path):
    places = places_of(tmp_path, spots((40, 10)), num=500)
    assert {*places[:, 0]} == set(range(9))
    assert {*places[:, 1]} == set(range(-6, 1))


def test_without_a_share_places_are_the_one_draw_that_they_were(odd):
    slices = np.repeat(odd.slices, 5)
    sizes = np.array([STORAGE[odd.cache.rows[case].id][0] for case in odd.cache.slice_case[slices]])
    slack = sizes - PATCH
    expected = np.random.default_rng(8).integers(np.minimum(slack, 0), np.maximum(slack, 0), endpoint=True)
    np.testing.assert_array_equal(odd.place(slices, np.random.default_rng(8)), expected)


def test_places_by_foreground_are_a_function_of_the_generator(odd_path):
    dataset = SliceDataset(open_cache(odd_path), patch_size=PATCH, ground_truth=True, foreground_share=0.5)
    one, same, other = (dataset.place(dataset.slices, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    centred = SliceDataset(dataset.cache, patch_size=PATCH).place(dataset.slices, None)
    np.testing.assert_array_equal(dataset.place(dataset.slices, None), centred)


def test_the_slices_of_every_class_are_those_that_show_it_and_may_be_none(tmp_path):
    random = np.random.default_rng(0)
    truths = [
        random.choice(np.array([0, 1, 3], np.uint8), (9, 12, 13), p=(0.985, 0.01, 0.005)) for _ in range(4)
    ]
    truths[1][:] = 0
    cache = open_cache(spots_cache(tmp_path / "c.zarr", truths))
    found = SliceDataset(cache, ["case_3", "case_0", "case_1"], ground_truth=True).class_slices()
    assert [slices.dtype for slices in found] == [np.int64] * 3
    expected = [
        [9 * case + z for case in (0, 1, 3) for z in range(9) if value in np.unique(truths[case][z])]
        for value in (1, 2, 3)
    ]
    assert [slices.tolist() for slices in found] == expected
    assert 0 < len(found[2]) < len(found[0]) < 18


def test_classes_are_found_in_the_memory_of_a_few_slices(tmp_path):
    truths = [np.full((40, 96, 96), index, np.uint8) for index in (1, 2)]
    dataset = SliceDataset(open_cache(spots_cache(tmp_path / "c.zarr", truths)), ground_truth=True)
    tracemalloc.start()
    try:
        found = dataset.class_slices()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [len(slices) for slices in found] == [40, 40, 0]
    assert peak < 8 * 96 * 96


# ---------------------------------------------------------------- files that are cut short

PROGRAM = """
import os, sys
import numpy as np
from supercl_core.cache.reader import open_cache
from supercl_core.errors import StorageError
from train.data import SliceDataset

def dataset(**settings):
    return SliceDataset(open_cache(sys.argv[1]), patch_size=(128, 128), ground_truth=True, **settings)

alone, together, foreground = dataset(), dataset(adjacent_slices=1), dataset(foreground_share=1.0)
first, second = np.array([0]), np.array([1])
random = np.random.default_rng(0)

def attempt(function, *arguments):
    try:
        function(*arguments)
        print("read")
    except StorageError as error:
        print(error.where)

for data in (alone, together):
    attempt(data.gather, first)
attempt(foreground.place, second, random)
attempt(foreground.class_slices)
# Slices are whole pages: what is left is the first one.
os.truncate(sys.argv[2], 128 * 128 * 2)
os.truncate(sys.argv[3], 128 * 128)
for data in (alone, together):
    attempt(data.gather, first)
attempt(foreground.place, first, random)
attempt(foreground.place, second, random)
attempt(foreground.class_slices)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the process dies")
def test_adjacent_slices_and_ground_truth_that_cannot_be_read_are_errors_and_not_death(tmp_path):
    path = spots_cache(
        tmp_path / "c.zarr", [np.random.default_rng(0).integers(0, 4, (3, 128, 128)).astype(np.uint8)]
    )
    files = [
        next(file for file in (path / "cases" / "case_0" / array / "c").rglob("*") if file.is_file())
        for array in ("image", "labels/ground_truth/0")
    ]
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), *map(str, files)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished
    image, truth = (f"{file}, slice 1" for file in files)
    assert finished.stdout.splitlines() == ["read"] * 4 + ["read", image, "read", truth, truth]


# ---------------------------------------------------------------- normalisation


@pytest.mark.parametrize("case_id", ["case_a", "case_b", "case_c", "case_d"])
def test_a_normalised_case_has_zero_mean_and_unit_variance(tiny, case_id):
    slices = tiny.cache.case_slices([case_id])
    image = normalise(tiny.gather(slices)).image_BCYX
    height, width = tiny.cache.case(case_id).row.shape[2:]
    top, left = -((height - 32) // 2), -((width - 32) // 2)
    inside = image[:, :, top : top + height, left : left + width]
    assert inside.mean() == pytest.approx(0, abs=1e-4)
    assert inside.std(correction=0) == pytest.approx(1, abs=1e-4)
    outside = torch.ones_like(image, dtype=torch.bool)
    outside[:, :, top : top + height, left : left + width] = False
    assert not image[outside].any()


def test_a_constant_channel_becomes_zero(odd):
    image = normalise(odd.gather(odd.slices)).image_BCYX
    assert torch.equal(image[:, 1], torch.zeros_like(image[:, 1]))


def test_windows_of_all_cases_are_those_of_each_case_in_stored_units(odd):
    rows = odd.cache.done
    windows = normalisation_windows(rows)
    assert (windows.shape, windows.dtype) == ((3, 2, 4), np.float32)
    for row, window in zip(rows, windows, strict=True):
        np.testing.assert_array_equal(normalisation_window(odd.cache.case(row.id)), window)
        _, low, high, _, mean, std = np.array(row.statistics).T
        stored = (np.stack([low, high, mean]) - row.image_offset) / row.image_scale
        expected = np.array([*stored, [std[0] / row.image_scale, 1]]).T  # the second channel is constant
        np.testing.assert_allclose(window, expected, rtol=1e-6)


def test_network_channels_repeat_only_single_channel_images():
    assert [network_channels(wanted, 1) for wanted in (None, 1, 4)] == [1, 1, 4]
    assert [network_channels(wanted, 4) for wanted in (None, 4)] == [4, 4]
    with pytest.raises(UsageError, match="found:    1"):
        network_channels(1, 4)
    image = torch.randn(2, 1, 3, 3)
    assert torch.equal(repeat_channels(image, 4), torch.cat([image] * 4, dim=1))
    assert repeat_channels(torch.ones(2, 4, 3, 3), 4).shape == (2, 4, 3, 3)


# ---------------------------------------------------------------- patch sizes and refusals


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(24, 20)], (32, 16)),
        ([(3, 2)], (16, 16)),
        ([(700, 512)], (512, 512)),
        ([(100, 100), (200, 150), (210, 900)], (192, 144)),
    ],
)
def test_automatic_patch_size_is_the_median_in_steps_of_16(sizes, expected):
    cache = SimpleNamespace(done=[SimpleNamespace(shape=(1, 1, *size)) for size in sizes])
    assert automatic_patch_size(cache) == expected


@pytest.mark.parametrize(
    ("multiple_of", "expected"), [(8, (192, 152)), (32, (192, 160)), (96, (192, 192)), (600, (600, 600))]
)
def test_automatic_patch_size_is_a_multiple_of_what_the_network_asks(multiple_of, expected):
    cache = SimpleNamespace(done=[SimpleNamespace(shape=(1, 1, 194, 150))])
    assert automatic_patch_size(cache, multiple_of) == expected


def test_a_dataset_chooses_and_checks_its_patch_by_multiple_of(cache_path):
    assert SliceDataset(open_cache(cache_path), multiple_of=32).patch_size == (32, 32)
    with pytest.raises(UsageError, match="multiples of 32"):
        SliceDataset(open_cache(cache_path), patch_size=(48, 32), multiple_of=32)


def test_a_cache_of_very_many_cases_is_opened_in_seconds_without_a_file_of_a_case(tmp_path):
    path = many_cases(tmp_path / "many.zarr")
    start = time.process_time()
    dataset = SliceDataset(open_cache(path))
    assert time.process_time() - start < 2
    assert len(dataset.case_ids) == 10_000
    assert not any((path / "cases").glob("case_*"))


@pytest.mark.parametrize("patch_size", [(24, 32), (32, 0), (8, 16)])
def test_a_patch_size_that_the_network_cannot_take_is_refused(cache_path, patch_size):
    with pytest.raises(UsageError, match=f"{patch_size[0]} x {patch_size[1]}"):
        SliceDataset(open_cache(cache_path), patch_size=patch_size)


def test_an_unlabelled_case_is_refused_where_ground_truth_is_asked_for(cache_path):
    with pytest.raises(CacheError, match="case_d") as refused:
        SliceDataset(open_cache(cache_path), ["case_a", "case_d"], ground_truth=True)
    assert "case_a" not in refused.value.found


def test_an_empty_list_of_cases_is_refused_instead_of_drawing_slice_0(cache_path):
    with pytest.raises(UsageError, match="no slices"):
        SliceDataset(open_cache(cache_path), [])


def test_an_unknown_case_is_refused(cache_path):
    with pytest.raises(CacheError, match="case_z"):
        SliceDataset(open_cache(cache_path), ["case_z"])
