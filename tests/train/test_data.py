"""Crops against a plain construction from the Zarr arrays; normalisation and padding; what is refused."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from made_caches import write_cache

from benchmarks.read import many_cases
from supercl_core.cache_reader import open_cache
from supercl_core.errors import CacheError, UsageError
from train.data import (
    SliceDataset,
    automatic_patch_size,
    normalisation_window,
    normalisation_windows,
    normalise,
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


def test_torch_dataloader_batches_the_dataset(odd):
    loader = torch.utils.data.DataLoader(odd, batch_size=4, num_workers=0)
    batches = list(loader)
    assert [len(batch["slice"]) for batch in batches] == [4, 4, 1]
    assert batches[0]["image"].shape == (4, 2, *PATCH)
    assert torch.cat([batch["slice"] for batch in batches]).tolist() == odd.slices.tolist()
    assert all(torch.isfinite(batch["image"]).all() for batch in batches)


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
