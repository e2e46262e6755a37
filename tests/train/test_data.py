"""Batches against a plain construction from the Zarr arrays; what a step draws; threads; normalisation."""

import itertools
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from made_caches import write_cache

from supercl_core.cache_reader import open_cache
from supercl_core.errors import CacheError, UsageError
from train.data import NUM_THREADS, BatchLoader, SliceDataset, automatic_patch_size, normalise
from train.sampling import SliceOrder

CPU = torch.device("cpu")
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


def plain_crop(array, top, left, fill):
    """The patch whose first pixel is at (top, left) of `array`, which goes on as `fill` in all directions."""
    around = ((0, 0),) * (array.ndim - 2) + ((100, 100),) * 2
    padded = np.pad(array, around, constant_values=fill)
    return padded[..., top + 100 : top + 100 + PATCH[0], left + 100 : left + 100 + PATCH[1]]


def placements(size, patch):
    """All positions of a patch along an axis: within the slice, or around it."""
    return range(min(0, size - patch), max(0, size - patch) + 1)


# ---------------------------------------------------------------- crops


@pytest.mark.parametrize("case_id", STORAGE)
def test_random_crops_are_windows_of_the_slice_with_their_labels(odd, odd_path, case_id):
    size, _, _, offset = STORAGE[case_id]
    generator = np.random.default_rng(1)
    index = int(odd.cache.case_slices([case_id])[1])
    image, superpixels, truth = plain_slice(odd_path, case_id, 1)
    tops, lefts = placements(size[0], PATCH[0]), placements(size[1], PATCH[1])
    seen = set()
    for _ in range(25):
        batch = normalise(odd.gather(np.array([index]), generator))
        # Labels first: their placement is unique, and cheap to search for.
        found = [
            (top, left)
            for top in tops
            for left in lefts
            if np.array_equal(batch.ground_truth_BYX[0], plain_crop(truth, top, left, 0))
        ]
        assert len(found) == 1
        seen.add(found[0])
        # Statistics are stored as float32, so the offset costs digits.
        tolerance = 1e-5 * max(1, abs(offset) / 100)
        torch.testing.assert_close(
            batch.image_BCYX[0].double(),
            torch.from_numpy(plain_crop(image, *found[0], 0.0).copy()),
            rtol=0,
            atol=tolerance,
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
    batch = odd.gather(slices, None)
    assert batch.slices_B.tolist() == [7, 0, 7, 4]
    torch.testing.assert_close(batch.positions_B, torch.tensor([2 / 3, 1 / 3, 2 / 3, 2 / 3]))
    assert torch.equal(batch.image_BCYX[0], batch.image_BCYX[2])
    stored = zarr.open_group(odd_path, mode="r")["cases/case_large/image"][:, 0]
    np.testing.assert_array_equal(batch.image_BCYX[1], stored[:, 11:59, 11:43])


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
    stored = tiny.gather(slices, None)
    image = normalise(stored).image_BCYX
    height, width = tiny.cache.case(case_id).row.shape[2:]
    top, left = -((height - 32) // 2), -((width - 32) // 2)
    inside = image[:, :, top : top + height, left : left + width]
    assert inside.mean() == pytest.approx(0, abs=1e-4)
    assert inside.std(correction=0) == pytest.approx(1, abs=1e-4)
    outside = torch.ones_like(image, dtype=torch.bool)
    outside[:, :, top : top + height, left : left + width] = False
    assert not image[outside].any()


def test_a_constant_channel_becomes_zero(odd):
    image = normalise(odd.gather(odd.slices, None)).image_BCYX
    assert torch.equal(image[:, 1], torch.zeros_like(image[:, 1]))


# ---------------------------------------------------------------- what a step draws


def load(dataset, count, *, batch_size, seed=3, labels=None, **settings):
    """The first `count` batches of a loader; `batch_size` is that of all ranks together."""
    order = SliceOrder(slices=dataset.slices, batch_size=batch_size, seed=seed, labels=labels)
    with closing(iter(BatchLoader(dataset, order, device=CPU, **settings))) as batches:
        return [next(batches) for _ in range(count)]


def test_equal_seeds_give_equal_batches_from_any_first_step(tiny):
    whole, resumed = load(tiny, 6, batch_size=6), load(tiny, 2, batch_size=6, first_step=4)
    for one, other in zip(whole[4:], resumed, strict=True):
        for name in ("image_BCYX", "superpixels_Bhw", "slices_B", "positions_B", "windows_BC4"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert not torch.equal(whole[0].slices_B, load(tiny, 1, batch_size=6, seed=4)[0].slices_B)


@pytest.mark.parametrize("labels", [None, np.arange(23) // 3])
def test_two_ranks_partition_the_global_batch(tiny, labels):
    order = SliceOrder(slices=tiny.slices, batch_size=8, seed=3, labels=labels)
    parts = [load(tiny, 4, batch_size=8, labels=labels, rank=rank, world_size=2) for rank in (0, 1)]
    for whole, one, other in zip(order.batches(0), *parts, strict=False):
        assert one.slices_B.tolist() == whole[::2].tolist()
        assert other.slices_B.tolist() == whole[1::2].tolist()


def test_a_restart_goes_on_with_another_order_and_drops_what_was_gathered_ahead(tiny):
    first, second = (SliceOrder(slices=tiny.slices, batch_size=6, seed=seed) for seed in (3, 4))
    loader = BatchLoader(tiny, first, device=CPU)
    with closing(iter(loader)) as batches:
        found = [next(batches) for _ in range(2)]
        loader.restart(second, 7)
        found += [next(batches) for _ in range(6)]
        assert len(gathering_threads()) <= NUM_THREADS
    wanted = load(tiny, 2, batch_size=6) + load(tiny, 6, batch_size=6, seed=4, first_step=7)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.slices_B, other.slices_B)
        assert torch.equal(one.image_BCYX, other.image_BCYX)


# ---------------------------------------------------------------- threads


def gathering_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gather")]


def test_batches_come_in_order_however_long_each_takes(tiny, monkeypatch):
    gather = tiny.gather

    def slow(slices, generator):
        time.sleep(0.03 * (slices[0] % 4))
        return gather(slices, generator)

    monkeypatch.setattr(tiny, "gather", slow)
    drawn = [batch.slices_B.tolist() for batch in load(tiny, 10, batch_size=3)]
    order = SliceOrder(slices=tiny.slices, batch_size=3, seed=3)
    assert drawn == [slices.tolist() for slices in itertools.islice(order.batches(0), 10)]


def test_the_loader_stops_its_threads_when_closed(tiny):
    loader = BatchLoader(tiny, SliceOrder(slices=tiny.slices, batch_size=2, seed=0), device=CPU)
    batches = iter(loader)
    next(batches)
    assert gathering_threads()
    batches.close()
    assert not gathering_threads()
    assert loader.wait_s > 0


def test_an_error_while_gathering_reaches_the_consumer(tiny, monkeypatch):
    def broken(slices, generator):
        raise CacheError("An array of the cache is damaged.", next_step="Mend it.")

    monkeypatch.setattr(tiny, "gather", broken)
    with pytest.raises(CacheError, match="damaged"):
        load(tiny, 1, batch_size=2)
    assert not gathering_threads()


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
