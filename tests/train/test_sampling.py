"""The order of slices: what an epoch holds, at random and in groups, with a share of foreground, from any step on."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supercl_core.errors import UsageError
from train.sampling import SliceOrder


def order_of(slices, *, batch_size, seed=5, **more):
    return SliceOrder(slices=np.asarray(slices), batch_size=batch_size, seed=seed, **more)


def take(order, count, first=None):
    step = order.first_step if first is None else first
    return [batch.tolist() for batch in itertools.islice(order.batches(step), count)]


def epoch_of(order, number=0):
    return take(order, order.steps_per_epoch, order.first_step + number * order.steps_per_epoch)


def flat(batches):
    return list(itertools.chain(*batches))


def pairs_of(batches):
    return [tuple(pair) for batch in batches for pair in zip(batch[::2], batch[1::2], strict=True)]


# ---------------------------------------------------------------- at random


def test_every_slice_is_drawn_once_an_epoch():
    order = order_of(range(100, 112), batch_size=4)
    epochs = [flat(epoch_of(order, number)) for number in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(100, 112))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_an_epoch_leaves_its_incomplete_batch_out():
    order = order_of(range(11), batch_size=4)
    assert order.steps_per_epoch == 2
    assert len(set(flat(epoch_of(order)))) == 8


def test_a_data_set_smaller_than_a_batch_fills_it_by_repetition():
    [drawn] = take(order_of(range(5), batch_size=13), 1, first=3)
    assert set(np.bincount(drawn, minlength=5).tolist()) == {2, 3}


# ---------------------------------------------------------------- in groups

groups = st.lists(st.integers(0, 6), min_size=1, max_size=40)


@given(groups, st.integers(0, 1000))
def test_an_epoch_in_groups_is_all_slices_in_pairs_of_one_label(labels, seed):
    slices, labels = 3 * np.arange(len(labels)) + 7, np.array(labels)
    order = order_of(slices, batch_size=2, seed=seed, labels=labels)
    label_of = dict(zip(slices.tolist(), labels.tolist(), strict=True))
    pairs = pairs_of(epoch_of(order))
    times = Counter(flat(pairs))
    for component in set(labels.tolist()):
        members = [index for index, label in label_of.items() if label == component]
        counts = sorted(times.pop(member) for member in members)
        assert counts == [1] * (len(members) - 1) + [1 + len(members) % 2]
        inside = [pair for pair in pairs if label_of[pair[0]] == component]
        assert len(inside) == (len(members) + 1) // 2
        assert all(label_of[other] == component for _, other in inside)
        assert len(members) == 1 or all(one != other for one, other in inside)
    assert not times


@given(groups, st.integers(1, 8))
def test_a_batch_in_groups_gives_every_anchor_a_positive_in_another_slice(labels, half):
    labels = np.array(labels)
    order = order_of(np.arange(len(labels)), batch_size=2 * half, labels=labels)
    sizes = np.bincount(labels)
    for batch in take(order, 2 * order.steps_per_epoch + 1):
        assert len(batch) == 2 * half
        for anchor in batch:
            alike = {other for other in batch if labels[other] == labels[anchor]} - {anchor}
            assert alike or sizes[labels[anchor]] == 1


def test_all_pairs_of_a_component_and_all_neighbourhoods_of_pairs_occur():
    labels = np.array([4, 4, 4, 9, 9])
    order = order_of(range(5), batch_size=2, labels=labels)
    pairs = pairs_of(take(order, 90))
    assert {frozenset(pair) for pair in pairs} == {frozenset(p) for p in [(0, 1), (0, 2), (1, 2), (3, 4)]}
    of_nine = [place % 3 for place, pair in enumerate(pairs) if 3 in pair]
    assert set(of_nine) == {0, 1, 2}  # the component comes first, second and last in an epoch
    doubled = {Counter(flat(pairs[i : i + 3])).most_common(1)[0][0] for i in range(0, 90, 3)}
    assert doubled == {0, 1, 2}  # no slice is always the one that is drawn twice


def test_an_epoch_in_groups_has_the_steps_that_its_pairs_fill():
    labels = np.array([0, 0, 0, 1, 1, 2])  # 2 + 1 + 1 pairs
    assert [order_of(range(6), batch_size=b, labels=labels).steps_per_epoch for b in (2, 4, 6, 8, 30)] == [
        *(4, 2, 1, 1, 1)
    ]
    assert order_of(range(6), batch_size=2).steps_per_epoch == 3


def test_groups_need_an_even_batch():
    with pytest.raises(UsageError, match="even size") as refused:
        order_of(range(6), batch_size=3, labels=np.zeros(6, int))
    assert refused.value.found == 3
    assert "batches = 'random'" in refused.value.next_step
    order_of(range(6), batch_size=3)


# ---------------------------------------------------------------- with a share of foreground

CLASSES = (np.arange(100, 103), np.array([], np.int64), np.array([7]), np.arange(60, 70))
"""Slices of four classes, of which the second is nowhere."""


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_share_of_the_places_is_given_to_classes_equally_and_to_their_slices_equally(share):
    slices = np.arange(1000, 1040)
    plain, shared = (
        order_of(slices, batch_size=8, foreground=CLASSES, foreground_share=given) for given in (0.0, share)
    )
    num_steps = 1500
    drawn = np.array(take(shared, num_steps))
    given = drawn < 1000
    np.testing.assert_array_equal(drawn[~given], np.array(take(plain, num_steps))[~given])
    assert abs(given.mean() - share) < 0.015
    assert (abs(given.mean(axis=0) - share) < 0.05).all()  # at every place of the batch
    times = Counter(drawn[given].tolist())
    assert {*times} == {*itertools.chain(*CLASSES)}
    shown = [members for members in CLASSES if len(members)]
    for members in shown:
        expected = given.sum() / len(shown) / len(members)
        assert all(abs(times[index] - expected) < 5 * expected**0.5 for index in members)


def test_without_a_share_classes_change_nothing():
    plain = take(order_of(range(20), batch_size=4), 12)
    assert take(order_of(range(20), batch_size=4, foreground=CLASSES), 12) == plain


def test_foreground_is_drawn_from_the_seed_and_the_step():
    slices, settings = np.arange(1000, 1007), {"foreground": CLASSES, "foreground_share": 1.0}
    whole = take(order_of(slices, batch_size=16, **settings), 30)
    assert len({tuple(batch) for batch in whole}) == 30
    assert take(order_of(slices, batch_size=16, **settings), 30) == whole
    assert take(order_of(slices, batch_size=16, seed=6, **settings), 30) != whole


@pytest.mark.parametrize("foreground", [(), (np.array([], np.int64),) * 2])
def test_a_share_of_foreground_where_no_slice_shows_a_class_is_refused(foreground):
    with pytest.raises(UsageError, match="No slice shows a class"):
        order_of(range(6), batch_size=2, foreground=foreground, foreground_share=0.3)
    order_of(range(6), batch_size=2, foreground=foreground)


# ---------------------------------------------------------------- from any step on


@pytest.mark.parametrize(
    "settings",
    [{}, {"labels": np.arange(11) // 3}, {"foreground": CLASSES, "foreground_share": 0.4}],
)
@pytest.mark.parametrize("first_step", [0, 7])
def test_any_step_can_be_the_first(settings, first_step):
    order = order_of(range(11), batch_size=4, first_step=first_step, **settings)
    whole = take(order, 12)
    for done in range(1, 12):
        assert take(order, 12 - done, first_step + done) == whole[done:]
    assert whole != take(order_of(range(11), batch_size=4, seed=6, first_step=first_step, **settings), 12)


def test_an_order_that_begins_later_does_not_repeat_an_earlier_one():
    first, later = (
        order_of(range(24), batch_size=4, labels=np.arange(24) // 4, first_step=step) for step in (0, 12)
    )
    assert epoch_of(later) != epoch_of(first)
    # At the beginning of an epoch, nothing changes where the labels do not.
    assert epoch_of(later) == epoch_of(first, 2)


def test_an_epoch_is_ordered_once(monkeypatch):
    made = []
    generator = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or generator(seed))
    order = order_of(range(40), batch_size=4, labels=np.arange(40) // 5)
    assert order.steps_per_epoch == 12
    take(order, 25, first=6)
    assert made == [[5, 0], [5, 12], [5, 24]]
