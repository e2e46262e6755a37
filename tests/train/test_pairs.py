"""Masks of positive pairs, ASP maps and components against loops and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.sparse.csgraph import connected_components as scipy_components
from torch._subclasses.fake_tensor import FakeTensorMode

from train.losses.contrastive import supervised_contrastive
from train.pairs import (
    asp,
    cached_igcp_positives,
    connected_components,
    ilcp_labels,
    instance_positives,
    online_igcp_positives,
    sample_pixels,
)

NUM_SUPERPIXELS = 6
superpixel_maps = arrays.arrays(
    np.int16, st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), elements=st.integers(-1, 5)
)
few_examples = settings(max_examples=25, deadline=None)


def features_for(superpixels, seed, channels=3):
    batch, height, width = superpixels.shape
    return np.random.default_rng(seed).normal(size=(batch, channels, height, width))


# ---- ILCP


@few_examples
@given(superpixel_maps)
def test_ilcp_equals_the_reference(superpixels):
    labels = ilcp_labels(torch.from_numpy(superpixels)).numpy()
    pairs = (labels[:, :, None] == labels[:, None, :]) & (labels >= 0)[:, :, None]
    pairs &= ~np.eye(labels.shape[1], dtype=bool)
    np.testing.assert_array_equal(pairs, references.ilcp_pairs(superpixels))
    padding = superpixels.reshape(len(superpixels), -1) < 0
    np.testing.assert_array_equal(labels < 0, np.concatenate([padding, padding], axis=1))


@few_examples
@given(superpixel_maps, st.permutations(range(NUM_SUPERPIXELS)))
def test_renaming_superpixels_changes_no_loss_and_no_mean(superpixels, names):
    renamed = np.append(names, -1)[superpixels]  # index -1 is padding, which keeps its name
    original, other = torch.from_numpy(superpixels), torch.from_numpy(renamed)
    features = torch.from_numpy(features_for(superpixels, 0))
    embeddings = features.flatten(2).mT.repeat(1, 2, 1)
    expected, found = (supervised_contrastive(embeddings, ilcp_labels(ids)) for ids in (original, other))
    assert expected.equal(found)
    expected, found = (asp(features, ids, num_superpixels=NUM_SUPERPIXELS) for ids in (original, other))
    assert expected.equal(found)


def test_ilcp_loss_of_sampled_pixels_equals_the_reference():
    generator = np.random.default_rng(0)
    superpixels = generator.integers(-1, 4, (2, 8, 8))
    views = [generator.normal(size=(2, 5, 8, 8)) for _ in range(2)]
    pixels = sample_pixels(8, 8, mode="spread", count=9)
    labels = ilcp_labels(torch.from_numpy(superpixels).flatten(1)[:, pixels])
    embeddings = torch.cat([torch.from_numpy(v).flatten(2)[..., pixels].mT for v in views], dim=1)
    loss = supervised_contrastive(embeddings, labels)

    ids = np.tile(superpixels.reshape(2, 64)[:, pixels.numpy()], 2)
    expected, _ = references.supervised_contrastive(
        embeddings.numpy(), ids[:, :, None] == ids[:, None, :], valid=ids >= 0
    )
    assert loss.item() == pytest.approx(expected, abs=1e-9)


# ---- sampling


def test_all_pixels_are_the_default():
    assert sample_pixels(3, 5).tolist() == list(range(15))


def test_published_sampling_takes_two_columns_of_a_512_image_and_all_of_a_small_map():
    pixels = sample_pixels(32, 32, mode="published")
    assert pixels.tolist() == list(range(0, 1024, 16))
    assert set((pixels % 32).tolist()) == {0, 16}
    assert sample_pixels(12, 12, mode="published").tolist() == list(range(144))


@few_examples
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 300))
def test_spread_pixels_are_different_ascending_and_at_most_as_many_as_asked(height, width, count):
    pixels = sample_pixels(height, width, mode="spread", count=count)
    assert 1 <= len(pixels) <= count
    assert (pixels.diff() > 0).all()
    assert pixels[0] >= 0
    assert pixels[-1] < height * width
    if height * width <= count:
        assert len(pixels) == height * width


def test_spread_pixels_form_an_even_grid():
    pixels = sample_pixels(128, 64, mode="spread", count=128)
    assert sorted(set((pixels // 64).tolist())) == list(range(4, 128, 8))
    assert sorted(set((pixels % 64).tolist())) == list(range(4, 64, 8))
    assert len(pixels) == 128


def test_1024_spread_pixels_are_all_of_a_512_image_and_a_grid_of_a_finer_map():
    assert sample_pixels(32, 32, mode="spread").equal(torch.arange(1024))
    pixels = sample_pixels(128, 128, mode="spread")
    middles = torch.arange(2, 128, 4)
    assert pixels.equal((middles[:, None] * 128 + middles).flatten())


def test_pixels_are_made_on_the_device():
    for mode in ("all", "published", "spread"):
        pixels = sample_pixels(64, 64, mode=mode, device=torch.device("meta"))
        assert pixels.device.type == "meta"


# ---- slices


@few_examples
@given(arrays.arrays(np.float32, st.integers(1, 8), elements=st.floats(0, 1, width=32)))
def test_instance_pairs_equal_the_reference(positions):
    near = np.abs(positions[:, None] - positions[None, :]) < np.float32(0.1)
    expected = references.slice_pairs(len(positions), near)
    np.testing.assert_array_equal(instance_positives(torch.from_numpy(positions)).numpy(), expected)


def test_instance_pairs_by_view_ignore_the_position():
    positives = instance_positives(torch.tensor([0.5, 0.5, 0.5]), rule="view")
    assert positives.nonzero().tolist() == [[i, (i + 3) % 6] for i in range(6)]


def test_the_threshold_is_exclusive():
    positives = instance_positives(torch.tensor([0.25, 0.5, 1.0]), threshold=0.25)
    assert not positives[0, 1]
    assert instance_positives(torch.tensor([0.25, 0.5, 1.0]), threshold=0.26)[0, 1]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(1, 2000), min_size=1, max_size=6), st.data())
def test_partitions_are_equal_parts_of_each_volume(num_partitions, depths, data):
    z = np.array([data.draw(st.integers(0, depth - 1)) for depth in depths])
    # In integers: slices that end at most at the part's end.
    parts = -(-(z + 1) * num_partitions // np.array(depths))
    positions = torch.from_numpy((z + 1) / np.array(depths)).float()
    found = instance_positives(positions, rule="partition", num_partitions=num_partitions)
    expected = references.slice_pairs(len(z), parts[:, None] == parts[None, :])
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("num_partitions", [3, 4, 7, 49])
def test_the_last_slice_of_a_part_belongs_to_it(num_partitions):
    # Seven slices a part, of which the last is at a border that rounding may miss.
    positions = torch.arange(1, 7 * num_partitions + 1) / (7 * num_partitions)
    positives = instance_positives(positions, rule="partition", num_partitions=num_partitions)
    part = torch.ones(7, 7)
    expected = torch.block_diag(*[part] * num_partitions).repeat(2, 2) > 0
    assert positives.equal(expected.fill_diagonal_(False))


@few_examples
@given(arrays.arrays(np.int32, st.integers(1, 8), elements=st.integers(-1, 3)))
def test_cached_pairs_equal_the_reference(ccl):
    alike = (ccl[:, None] == ccl[None, :]) & (ccl[:, None] >= 0)
    expected = references.slice_pairs(len(ccl), alike)
    np.testing.assert_array_equal(cached_igcp_positives(torch.from_numpy(ccl)).numpy(), expected)


# ---- ASP


@few_examples
@given(superpixel_maps, st.integers(0, 2**32), st.sampled_from(["superpixel", "image"]))
def test_asp_equals_the_reference(superpixels, seed, divide_by):
    features = features_for(superpixels, seed)
    found = asp(
        torch.from_numpy(features),
        torch.from_numpy(superpixels),
        num_superpixels=NUM_SUPERPIXELS,
        divide_by=divide_by,
    )
    expected = references.asp(features, superpixels, divide_by=divide_by)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_asp_gradients_agree_with_finite_differences():
    superpixels = torch.tensor([[[0, 0, 1], [2, -1, 1]]])
    features = torch.from_numpy(features_for(superpixels, 1, channels=2)).requires_grad_()
    torch.autograd.gradcheck(lambda x: asp(x, superpixels, num_superpixels=3), features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_asp_of_half_precision_is_summed_in_float32(dtype):
    # 4096 ones: float16 sums stop at 2048, and bfloat16 sums at 256.
    features = torch.ones(1, 1, 64, 64, dtype=dtype)
    superpixels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    found = asp(features, superpixels, num_superpixels=1, divide_by="image")
    assert found.dtype == torch.float32
    assert found.equal(torch.ones(1, 1, 64, 64))


# ---- components and online IGCP


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70), st.floats(0, 0.15), st.integers(0, 2**32))
def test_components_are_those_of_scipy_named_by_their_smallest_node(num_nodes, density, seed):
    adjacency = np.random.default_rng(seed).random((num_nodes, num_nodes)) < density
    labels = connected_components(torch.from_numpy(adjacency)).numpy()
    _, partition = scipy_components(adjacency, directed=False)
    smallest = [int(np.flatnonzero(partition == name)[0]) for name in partition]
    assert labels.tolist() == smallest


@pytest.mark.parametrize("length", [2, 3, 4, 5, 16, 17, 33])
def test_a_long_path_is_one_component(length):
    adjacency = torch.diag(torch.ones(length - 1), 1) > 0
    assert connected_components(adjacency).tolist() == [0] * length


@few_examples
@given(
    st.integers(1, 5),
    st.integers(0, 2**32),
    st.sampled_from(["superpixel", "image"]),
    st.sampled_from(["edge", "afterwards"]),
)
def test_online_pairs_equal_the_reference(batch, seed, divide_by, view_pairs):
    generator = np.random.default_rng(seed)
    superpixels = generator.integers(-1, NUM_SUPERPIXELS, (batch, 3, 4))
    views = [generator.normal(size=(batch, 2, 3, 4)) for _ in range(2)]
    found = online_igcp_positives(
        *map(torch.from_numpy, views),
        torch.from_numpy(superpixels),
        num_superpixels=NUM_SUPERPIXELS,
        divide_by=divide_by,
        view_pairs=view_pairs,
    )
    expected = references.online_igcp_pairs(*views, superpixels, divide_by=divide_by, view_pairs=view_pairs)
    np.testing.assert_array_equal(found.numpy(), expected)


def online_case():
    # Cosines: x1 of slice 0 and x1 of slice 1 are nearest to each other, and so are both x2.
    superpixels = torch.tensor([[[0, 1]], [[0, 1]]])
    features_x1 = torch.tensor([[[[1.0, 0.0]]], [[[1.0, 0.1]]]])
    features_x2 = torch.tensor([[[[0.0, 1.0]]], [[[0.1, 1.0]]]])
    return features_x1, features_x2, superpixels


def test_view_pairs_as_edges_make_the_pairs_transitive():
    positives = online_igcp_positives(*online_case(), num_superpixels=2)
    assert positives.equal(~torch.eye(4, dtype=torch.bool))


def test_view_pairs_added_afterwards_are_not_transitive_as_published():
    positives = online_igcp_positives(*online_case(), num_superpixels=2, view_pairs="afterwards")
    assert positives.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]


def test_of_equally_near_neighbours_the_first_is_linked():
    # Six maps at right angles or zero: every cosine is 0, so all link to map 0 and map 0 to map 1.
    features = torch.eye(3).view(3, 1, 1, 3)
    superpixels = torch.arange(3).repeat(3, 1, 1)
    positives = online_igcp_positives(
        features, 0 * features, superpixels, num_superpixels=3, view_pairs="afterwards"
    )
    assert positives.equal(~torch.eye(6, dtype=torch.bool))


def test_online_pairs_take_the_channel_mean_beforehand_or_not():
    generator = torch.Generator().manual_seed(0)
    superpixels = torch.randint(0, 4, (6, 4, 4), generator=generator)
    views = [torch.randn(6, 8, 4, 4, generator=generator, requires_grad=True) for _ in range(2)]
    expected = online_igcp_positives(*views, superpixels, num_superpixels=4)
    means = [view.mean(dim=1, keepdim=True) for view in views]
    assert online_igcp_positives(*means, superpixels, num_superpixels=4).equal(expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert online_igcp_positives(*views, superpixels, num_superpixels=4).equal(expected)
    assert not expected.all()


def test_online_pairs_of_half_precision_features_are_those_of_the_same_values_in_float32():
    # Near 1, bfloat16 steps are 0.008: channel means in it could not tell these slices apart.
    generator = torch.Generator().manual_seed(0)
    superpixels = torch.randint(0, 4, (12, 4, 4), generator=generator)
    views = [(1 + 0.05 * torch.randn(12, 64, 4, 4, generator=generator)).bfloat16() for _ in range(2)]
    expected = online_igcp_positives(*(view.float() for view in views), superpixels, num_superpixels=4)
    assert online_igcp_positives(*views, superpixels, num_superpixels=4).equal(expected)


def test_no_mask_reads_a_value_back_from_the_device():
    # Fake tensors have shapes and no values: whatever needs a value raises.
    with FakeTensorMode():
        superpixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
        features = torch.randn(3, 2, 4, 4)
        labels = ilcp_labels(superpixels)
        for mode in ("all", "published", "spread"):
            labels[:, sample_pixels(4, 8, mode=mode, count=6)]
        for rule in ("position", "partition", "view"):
            instance_positives(torch.rand(3), rule=rule)
        cached_igcp_positives(torch.zeros(3, dtype=torch.int32))
        for view_pairs in ("edge", "afterwards"):
            for divide_by in ("superpixel", "image"):
                online_igcp_positives(
                    features,
                    features,
                    superpixels,
                    num_superpixels=5,
                    view_pairs=view_pairs,
                    divide_by=divide_by,
                )


@pytest.mark.parametrize("num_slices", [10, 20, 30])
def test_slices_as_far_apart_as_the_threshold_are_no_pair(num_slices: int) -> None:
    positions = torch.arange(1, num_slices + 1, dtype=torch.float32) / num_slices
    pairs = instance_positives(positions, threshold=0.1)[:num_slices, :num_slices]
    distance = (torch.arange(num_slices)[:, None] - torch.arange(num_slices)).abs()
    expected = (10 * distance < num_slices) & (distance > 0)
    assert torch.equal(pairs, expected)
