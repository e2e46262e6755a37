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
    ilcp_positives,
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
    positives, valid = ilcp_positives(torch.from_numpy(superpixels))
    np.testing.assert_array_equal(positives.numpy(), references.ilcp_pairs(superpixels))
    padding = superpixels.reshape(len(superpixels), -1) < 0
    np.testing.assert_array_equal(valid.numpy(), ~np.concatenate([padding, padding], axis=1))


@few_examples
@given(superpixel_maps, st.permutations(range(NUM_SUPERPIXELS)))
def test_renaming_superpixels_changes_no_pair_and_no_mean(superpixels, names):
    renamed = np.append(names, -1)[superpixels]  # index -1 is padding, which keeps its name
    original, other = torch.from_numpy(superpixels), torch.from_numpy(renamed)
    for expected, found in zip(ilcp_positives(original), ilcp_positives(other), strict=True):
        assert expected.equal(found)
    features = torch.from_numpy(features_for(superpixels, 0))
    expected, found = (asp(features, ids, num_superpixels=NUM_SUPERPIXELS) for ids in (original, other))
    assert expected.equal(found)


def test_ilcp_of_one_superpixel_pairs_everything():
    positives, _ = ilcp_positives(torch.zeros(1, 2, 3, dtype=torch.int32))
    assert positives[0].equal(~torch.eye(12, dtype=torch.bool))


def test_ilcp_where_every_pixel_is_a_superpixel_pairs_the_views():
    positives, _ = ilcp_positives(torch.arange(6).view(1, 2, 3))
    assert positives[0].nonzero().tolist() == [[i, (i + 6) % 12] for i in range(12)]


def test_ilcp_loss_of_sampled_pixels_equals_the_reference():
    generator = np.random.default_rng(0)
    superpixels = generator.integers(-1, 4, (2, 8, 8))
    views = [generator.normal(size=(2, 5, 8, 8)) for _ in range(2)]
    pixels = sample_pixels(8, 8, mode="spread", count=9)
    positives, valid = ilcp_positives(torch.from_numpy(superpixels).flatten(1)[:, pixels])
    embeddings = torch.cat([torch.from_numpy(v).flatten(2)[..., pixels].mT for v in views], dim=1)
    loss = supervised_contrastive(embeddings, positives, valid=valid)

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


def test_asp_of_half_precision_is_summed_in_float32():
    # 4096 ones: float16 sums stop at 2048.
    features = torch.ones(1, 1, 64, 64, dtype=torch.float16)
    superpixels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    found = asp(features, superpixels, num_superpixels=1, divide_by="image")
    assert found.dtype == torch.float32
    assert found.equal(torch.ones(1, 1, 64, 64))


# ---- components and online IGCP


@few_examples
@given(st.integers(1, 24), st.floats(0, 0.15), st.integers(0, 2**32))
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
        ilcp_positives(superpixels)
        instance_positives(torch.rand(3))
        instance_positives(torch.rand(3), rule="view")
        cached_igcp_positives(torch.zeros(3, dtype=torch.int32))
        online_igcp_positives(features, features, superpixels, num_superpixels=5)
