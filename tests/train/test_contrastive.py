"""The supervised contrastive loss against a loop with a gradient derived by hand, and its properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from train.losses.contrastive import cosine_similarities, supervised_contrastive

TOLERANCE = 1e-6


def random_case(seed: int, groups: int, items: int, width: int = 5, labels: int = 3):
    generator = np.random.default_rng(seed)
    embeddings = generator.normal(size=(groups, items, width)) * generator.uniform(
        0.1, 20, (groups, items, 1)
    )
    ids = generator.integers(0, labels, (groups, items))
    return embeddings, ids[:, :, None] == ids[:, None, :]


def value_and_gradient(embeddings, positives, **options):
    tensor = torch.from_numpy(embeddings).requires_grad_()
    if options.get("valid") is not None:
        options["valid"] = torch.from_numpy(options["valid"])
    with torch.autograd.set_detect_anomaly(True):  # fails on a NaN between loss and gradient too
        value = supervised_contrastive(tensor, torch.from_numpy(positives), **options)
        value.backward()
    return value.item(), tensor.grad.numpy()


def assert_equals_reference(embeddings, positives, **options):
    value, gradient = value_and_gradient(embeddings, positives, **options)
    expected_value, expected_gradient = references.supervised_contrastive(embeddings, positives, **options)
    assert value == pytest.approx(expected_value, abs=TOLERANCE, rel=TOLERANCE)
    np.testing.assert_allclose(gradient, expected_gradient, atol=TOLERANCE, rtol=TOLERANCE)
    return value, gradient


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(2, 9), st.sampled_from([0.01, 0.1, 1.0]))
def test_equals_the_reference_with_padding(seed, groups, items, temperature):
    embeddings, positives = random_case(seed, groups, items)
    valid = np.random.default_rng(seed).random((groups, items)) < 0.8
    assert_equals_reference(embeddings, positives, temperature=temperature, valid=valid)


def test_a_case_worked_by_hand():
    # Two pairs at right angles: each anchor sees one positive at cosine 1 and two negatives at cosine 0.
    embeddings = np.array([[[3.0, 0], [1, 0], [0, 2], [0, 0.5]]])
    positives = np.kron(np.eye(2), np.ones((2, 2)))[None] > 0
    value, _ = value_and_gradient(embeddings, positives, temperature=0.5, base_temperature=0.25)
    assert value == pytest.approx(2 * math.log((math.exp(2) + 2) / math.exp(2)))


@pytest.mark.parametrize("ids", [np.zeros(12, int), np.arange(12) % 6], ids=["one superpixel", "one each"])
def test_degenerate_superpixels_equal_the_reference(ids):
    embeddings, _ = random_case(1, 2, 12)
    positives = np.broadcast_to(ids[:, None] == ids[None, :], (2, 12, 12)).copy()
    assert_equals_reference(embeddings, positives)


def test_anchors_without_a_positive_are_left_out_of_the_mean():
    embeddings, _ = random_case(2, 2, 6)
    positives = np.zeros((2, 6, 6), bool)
    positives[0, 0, 1] = positives[0, 1, 0] = True
    value, gradient = assert_equals_reference(embeddings, positives)
    alone, _ = value_and_gradient(embeddings[:1], positives[:1])
    assert value == pytest.approx(alone)  # the second group has no anchor, so it does not count
    assert not gradient[1].any()


@pytest.mark.parametrize("items", [1, 4])
@pytest.mark.parametrize("nothing", ["no positives", "all padding"])
def test_nothing_to_contrast_gives_zero_with_zero_gradient(nothing, items):
    embeddings, positives = random_case(3, 2, items)
    valid = np.full((2, items), nothing == "no positives")
    if nothing == "no positives":
        positives[:] = np.eye(items, dtype=bool)  # the diagonal is never a positive
    value, gradient = value_and_gradient(embeddings, positives, valid=valid)
    assert value == 0
    assert (gradient == 0).all()


def test_one_valid_item_among_padding_gives_zero():
    embeddings, positives = random_case(4, 1, 3)
    value, gradient = value_and_gradient(embeddings, positives, valid=np.array([[True, False, False]]))
    assert value == 0
    assert (gradient == 0).all()


def test_padding_changes_nothing_whatever_it_holds():
    embeddings, positives = random_case(5, 1, 8)
    valid = np.arange(8)[None] < 5
    kept = value_and_gradient(embeddings[:, :5].copy(), positives[:, :5, :5].copy())
    padded = value_and_gradient(embeddings, positives, valid=valid)
    assert padded[0] == pytest.approx(kept[0], rel=1e-12)
    np.testing.assert_allclose(padded[1][:, :5], kept[1], atol=1e-12)
    assert not padded[1][:, 5:].any()


def test_identical_embeddings_equal_the_reference():
    embeddings = np.ones((1, 6, 4))
    _, positives = random_case(6, 1, 6)
    value, gradient = assert_equals_reference(embeddings, positives)
    assert value == pytest.approx(0.1 / 0.07 * math.log(5))  # every candidate has the same share
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


def test_zero_embeddings_have_no_direction_and_no_gradient():
    embeddings, positives = random_case(7, 1, 6)
    embeddings[0, :2] = 0
    _, gradient = assert_equals_reference(embeddings, positives)
    assert not gradient[0, :2].any()
    value, gradient = value_and_gradient(np.zeros((1, 4, 3)), np.ones((1, 4, 4), bool))
    assert value == pytest.approx(0.1 / 0.07 * math.log(3))
    assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_small_temperature_does_not_overflow(dtype):
    # exp(1 / 0.001) overflows float64 as well. Opposite directions: only the positive has a share.
    embeddings = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]], dtype=dtype).requires_grad_()
    positives = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)) > 0
    good = supervised_contrastive(embeddings, positives, temperature=0.001)
    bad = supervised_contrastive(embeddings, ~positives, temperature=0.001)
    (good + bad).backward()
    assert good.item() == 0
    assert bad.item() == pytest.approx(2 / 0.07, rel=1e-5)
    assert torch.isfinite(embeddings.grad).all()


def test_gradients_agree_with_finite_differences():
    embeddings, positives = random_case(8, 2, 5, width=3)
    tensor = torch.from_numpy(embeddings).requires_grad_()
    torch.autograd.gradcheck(lambda x: supervised_contrastive(x, torch.from_numpy(positives)), tensor)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.permutations(range(7)))
def test_the_order_of_items_changes_nothing(seed, order):
    embeddings, positives = random_case(seed, 1, 7)
    value, gradient = value_and_gradient(embeddings, positives)
    permuted = value_and_gradient(embeddings[:, order].copy(), positives[:, order][:, :, order].copy())
    assert permuted[0] == pytest.approx(value, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(permuted[1], gradient[:, order], atol=1e-9)


def test_a_batch_equals_its_groups_one_by_one():
    embeddings, positives = random_case(9, 6, 7)
    one_by_one = [value_and_gradient(embeddings[g : g + 1], positives[g : g + 1])[0] for g in range(6)]
    assert min(one_by_one) < max(one_by_one)
    assert value_and_gradient(embeddings, positives)[0] == pytest.approx(np.mean(one_by_one))
    nested = (embeddings.reshape(2, 3, 7, 5), positives.reshape(2, 3, 7, 7))
    assert value_and_gradient(*nested)[0] == pytest.approx(np.mean(one_by_one))
    ungrouped = (embeddings[0], positives[0])
    assert value_and_gradient(*ungrouped)[0] == pytest.approx(one_by_one[0])


def test_computes_in_float32_under_autocast_and_keeps_float64():
    embeddings, positives = (torch.from_numpy(array) for array in random_case(10, 2, 6))
    single = embeddings.float()
    expected = supervised_contrastive(single, positives)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert supervised_contrastive(single, positives).equal(expected)
        assert supervised_contrastive(single.bfloat16(), positives).dtype == torch.float32
        assert supervised_contrastive(embeddings, positives).dtype == torch.float64
    assert expected.item() == pytest.approx(supervised_contrastive(embeddings, positives).item(), rel=1e-5)


def test_cosines_are_those_of_numpy():
    embeddings, _ = random_case(11, 2, 4)
    lengths = np.linalg.norm(embeddings, axis=-1)
    expected = np.einsum("gid,gjd->gij", embeddings, embeddings) / lengths[:, :, None] / lengths[:, None, :]
    np.testing.assert_allclose(
        cosine_similarities(torch.from_numpy(embeddings)).numpy(), expected, atol=1e-12
    )


def test_never_reads_a_value_back_from_the_device():
    # Fake tensors have shapes and no values: whatever needs a value raises.
    with FakeTensorMode():
        embeddings = torch.randn(2, 6, 3, requires_grad=True)
        labels = torch.zeros(2, 6)
        positives = labels[:, :, None] == labels[:, None, :]
        supervised_contrastive(embeddings, positives, valid=labels >= 0).backward()
