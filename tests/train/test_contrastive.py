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

from train.losses import contrastive
from train.losses.contrastive import cosine_similarities, supervised_contrastive

TOLERANCE = 1e-6


def random_case(seed: int, groups: int, items: int, width: int = 5, num_labels: int = 3, lowest: int = 0):
    """Embeddings of many lengths, and labels from `lowest` to `num_labels` - 1."""
    generator = np.random.default_rng(seed)
    lengths = generator.uniform(0.1, 20, (groups, items, 1))
    embeddings = generator.normal(size=(groups, items, width)) * lengths
    return embeddings, generator.integers(lowest, num_labels, (groups, items)).astype(np.int16)


def mask_of(labels):
    return labels[:, :, None] == labels[:, None, :]


def value_and_gradient(embeddings, pairs, **options):
    tensor = torch.from_numpy(embeddings).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # fails on a NaN between loss and gradient too
        value = supervised_contrastive(tensor, torch.from_numpy(pairs), **options)
        value.backward()
    return value.item(), tensor.grad.numpy()


def assert_equals_reference(embeddings, pairs, **options):
    """`pairs`: labels, or a mask."""
    value, gradient = value_and_gradient(embeddings, pairs, **options)
    mask, valid = (pairs, None) if pairs.dtype == bool else (mask_of(pairs), pairs >= 0)
    expected_value, expected_gradient = references.supervised_contrastive(
        embeddings, mask, valid=valid, **options
    )
    assert value == pytest.approx(expected_value, abs=TOLERANCE, rel=TOLERANCE)
    np.testing.assert_allclose(gradient, expected_gradient, atol=TOLERANCE, rtol=TOLERANCE)
    return value, gradient


temperatures = st.sampled_from([0.01, 0.1, 1.0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(2, 9), temperatures)
def test_labels_with_padding_equal_the_reference(seed, groups, items, temperature):
    assert_equals_reference(*random_case(seed, groups, items, lowest=-1), temperature=temperature)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(2, 9), temperatures)
def test_a_mask_equals_the_reference_though_neither_symmetric_nor_transitive(
    seed, groups, items, temperature
):
    embeddings, _ = random_case(seed, groups, items)
    mask = np.random.default_rng(seed).random((groups, items, items)) < 0.3
    assert_equals_reference(embeddings, mask, temperature=temperature)


@pytest.mark.parametrize("chunk_bytes", [1, 3 * 8 * 9, 8 * 9 * 9, 2 * 8 * 9 * 9])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_of_rows_and_of_groups_equal_the_reference(monkeypatch, chunk_bytes, masked):
    # Five groups of nine float64 items: one row at a time, three rows, a group, two groups.
    monkeypatch.setattr(contrastive, "CPU_CHUNK_BYTES", chunk_bytes)
    embeddings, labels = random_case(12, 5, 9, lowest=-1)
    assert_equals_reference(embeddings, mask_of(labels) if masked else labels)


def test_the_pairs_are_left_as_they_were():
    embeddings, labels = random_case(13, 2, 6, lowest=-1)
    for pairs in (labels, mask_of(labels)):
        given = pairs.copy()
        value_and_gradient(embeddings, pairs)
        np.testing.assert_array_equal(pairs, given)


def test_a_case_worked_by_hand():
    # Two pairs at right angles: each anchor sees one positive at cosine 1 and two negatives at cosine 0.
    embeddings = np.array([[[3.0, 0], [1, 0], [0, 2], [0, 0.5]]])
    positives = np.kron(np.eye(2), np.ones((2, 2)))[None] > 0
    value, _ = value_and_gradient(embeddings, positives, temperature=0.5, base_temperature=0.25)
    assert value == pytest.approx(2 * math.log((math.exp(2) + 2) / math.exp(2)))


@pytest.mark.parametrize("ids", [np.zeros(12, int), np.arange(12) % 6], ids=["one superpixel", "one each"])
def test_degenerate_superpixels_equal_the_reference(ids):
    embeddings, _ = random_case(1, 2, 12)
    assert_equals_reference(embeddings, np.tile(ids, (2, 1)))


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
    embeddings, _ = random_case(3, 2, items)
    labels = np.full((2, items), -1)
    if nothing == "no positives":
        labels[:] = np.arange(items)
        masked = value_and_gradient(embeddings, mask_of(labels))  # the diagonal is never a positive
        assert masked[0] == 0
        assert not masked[1].any()
    value, gradient = value_and_gradient(embeddings, labels)
    assert value == 0
    assert (gradient == 0).all()


def test_one_valid_item_among_padding_gives_zero():
    embeddings, _ = random_case(4, 1, 3)
    value, gradient = value_and_gradient(embeddings, np.array([[0, -1, -1]]))
    assert value == 0
    assert (gradient == 0).all()


def test_padding_changes_nothing_whatever_it_holds():
    embeddings, labels = random_case(5, 1, 8)
    kept = value_and_gradient(embeddings[:, :5].copy(), labels[:, :5].copy())
    labels[:, 5:] = [-1, -1, -2]
    padded = value_and_gradient(embeddings, labels)
    assert padded[0] == pytest.approx(kept[0], rel=1e-12)
    np.testing.assert_allclose(padded[1][:, :5], kept[1], atol=1e-12)
    assert not padded[1][:, 5:].any()


def test_identical_embeddings_equal_the_reference():
    embeddings = np.ones((1, 6, 4))
    _, labels = random_case(6, 1, 6)
    value, gradient = assert_equals_reference(embeddings, labels)
    assert value == pytest.approx(0.1 / 0.07 * math.log(5))  # every candidate has the same share
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


def test_zero_embeddings_have_no_direction_and_no_gradient():
    embeddings, labels = random_case(7, 1, 6)
    embeddings[0, :2] = 0
    _, gradient = assert_equals_reference(embeddings, labels)
    assert not gradient[0, :2].any()
    value, gradient = value_and_gradient(np.zeros((1, 4, 3)), np.zeros((1, 4), int))
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
    embeddings, labels = random_case(8, 2, 5, width=3, lowest=-1)
    tensor = torch.from_numpy(embeddings).requires_grad_()
    for pairs in (labels, mask_of(labels)):
        assert torch.autograd.gradcheck(
            lambda x, pairs=pairs: supervised_contrastive(x, torch.from_numpy(pairs)), tensor
        )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.permutations(range(7)))
def test_the_order_of_items_changes_nothing(seed, order):
    embeddings, labels = random_case(seed, 1, 7)
    value, gradient = value_and_gradient(embeddings, labels)
    permuted = value_and_gradient(embeddings[:, order].copy(), labels[:, order].copy())
    assert permuted[0] == pytest.approx(value, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(permuted[1], gradient[:, order], atol=1e-9)


def test_a_batch_equals_its_groups_one_by_one():
    embeddings, labels = random_case(9, 6, 7)
    one_by_one = [value_and_gradient(embeddings[g : g + 1], labels[g : g + 1])[0] for g in range(6)]
    assert min(one_by_one) < max(one_by_one)
    for pairs in (labels, mask_of(labels)):
        assert value_and_gradient(embeddings, pairs)[0] == pytest.approx(np.mean(one_by_one))
        nested = (embeddings.reshape(2, 3, 7, 5), pairs.reshape(2, 3, *pairs.shape[1:]))
        assert value_and_gradient(*nested)[0] == pytest.approx(np.mean(one_by_one))
        assert value_and_gradient(embeddings[0], pairs[0])[0] == pytest.approx(one_by_one[0])


def test_computes_in_float32_under_autocast_and_keeps_float64():
    embeddings, labels = (torch.from_numpy(array) for array in random_case(10, 2, 6))
    single = embeddings.float().requires_grad_()
    expected = supervised_contrastive(single, labels)
    (expected_gradient,) = torch.autograd.grad(expected, single)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = supervised_contrastive(single, labels)
        assert supervised_contrastive(single.bfloat16(), labels).dtype == torch.float32
        assert supervised_contrastive(embeddings, labels).dtype == torch.float64
    assert found.equal(expected)
    assert torch.autograd.grad(found, single)[0].equal(expected_gradient)
    assert expected.item() == pytest.approx(supervised_contrastive(embeddings, labels).item(), rel=1e-5)


def plain_contrast(embeddings, labels):
    """The loss by whole matrices, differentiated by autograd; no padding."""
    num_items = embeddings.shape[1]
    diagonal = torch.eye(num_items, dtype=torch.bool)
    positives = (labels[:, :, None] == labels[:, None, :]) & ~diagonal
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    log_share = (unit @ unit.mT / 0.1).masked_fill(diagonal, -1e9).log_softmax(dim=-1)
    return -((log_share * positives).sum(dim=-1) / positives.sum(dim=-1)).mean() * 0.1 / 0.07


def image_sized_case(groups):
    """ILCP of 512 x 512: 1,024 pixels in two views, 100 superpixels, projection width 128."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(groups, 2048, 128, generator=generator)
    return embeddings, torch.randint(0, 100, (groups, 1024), generator=generator).short().repeat(1, 2)


def test_at_the_size_of_an_image_float32_is_as_good_as_whole_matrices():
    embeddings, labels = image_sized_case(groups=2)
    values, gradients = {}, {}
    for name, loss, dtype in (
        ("exact", plain_contrast, torch.float64),
        ("plain", plain_contrast, torch.float32),
        ("ours", supervised_contrastive, torch.float32),
    ):
        leaf = embeddings.to(dtype).requires_grad_()
        value = loss(leaf, labels)
        (gradient,) = torch.autograd.grad(value, leaf)
        values[name], gradients[name] = value.item(), gradient.double()
    assert values["ours"] == pytest.approx(values["exact"], rel=1e-6)
    largest = gradients["exact"].abs().max()
    errors = {name: (gradients[name] - gradients["exact"]).abs().max() / largest for name in gradients}
    assert errors["ours"] < max(1e-6, 2 * errors["plain"])


def test_two_calls_give_equal_bytes():
    embeddings, labels = image_sized_case(groups=1)
    leaf = embeddings.requires_grad_()
    values = [supervised_contrastive(leaf, labels) for _ in range(2)]
    gradients = [torch.autograd.grad(value, leaf)[0] for value in values]
    assert values[0].equal(values[1])
    assert gradients[0].equal(gradients[1])


def test_memory_does_not_grow_with_the_pairs():
    # One matrix over the pairs of four groups takes 64 MiB, and with all kept for autograd it is 340 MiB.
    embeddings, labels = image_sized_case(groups=4)
    leaf = embeddings.requires_grad_()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        supervised_contrastive(leaf, labels).backward()
    live = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 4 * contrastive.CPU_CHUNK_BYTES < peak < 5 * contrastive.CPU_CHUNK_BYTES + 3 * embeddings.nbytes


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own doing
def test_compiled_equals_eager():
    embeddings, labels = (torch.from_numpy(array) for array in random_case(14, 3, 8, lowest=-1))
    compiled = torch.compile(supervised_contrastive, fullgraph=True, backend="aot_eager")
    for pairs in (labels, labels[:, :, None] == labels[:, None, :]):
        results = []
        for loss in (supervised_contrastive, compiled):
            leaf = embeddings.clone().requires_grad_()
            value = loss(leaf, pairs)
            results.append((value, *torch.autograd.grad(value, leaf)))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)


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
        for pairs in (labels, labels[:, :, None] == labels[:, None, :]):
            supervised_contrastive(embeddings, pairs).backward()
