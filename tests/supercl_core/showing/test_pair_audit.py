"""`supercl inspect --pairs`: the figures against cases worked by hand and plain counting, the table, the command."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import made_caches
import numpy as np
import pytest
from rich.console import Console

from supercl_core.cache import writer as cache_writer
from supercl_core.cache.reader import Cache, open_cache
from supercl_core.cache.weak_labels import auto_level
from supercl_core.errors import CacheError, UsageError
from supercl_core.showing import pair_audit
from supercl_core.showing.pair_gallery import write_gallery

LEFT = np.zeros((8, 8), np.uint8)
LEFT[:, :4] = 1
TOP = LEFT.T.copy()
EMPTY = np.zeros_like(LEFT)


def write(
    path: Path, truths: dict[str, Sequence[np.ndarray] | int], levels: Sequence[Sequence[int]]
) -> Cache:
    """A cache of cases with these slices of ground truth, or with a number of slices of 8 x 8 without any."""
    cases = {}
    for seed, (case_id, slices) in enumerate(truths.items()):
        truth = {} if isinstance(slices, int) else {"ground_truth": np.stack(slices)}
        shape = (slices, 8, 8) if isinstance(slices, int) else truth["ground_truth"].shape
        image = np.random.default_rng(seed).integers(0, 1000, (1, *shape)).astype(np.int16)
        cases[case_id] = {"image": image, "superpixels": np.zeros(shape, np.uint8), **truth}
    names = ("background", "one", "two")
    return open_cache(
        made_caches.write_cache(
            path, cases, name="hand", channel_names=("MRI",), class_names=names, levels=levels
        )
    )


def audited(cache: Cache, **options: Any) -> pair_audit.PairAudit:
    """The audit of the default labels, which JSON must be able to hold and a terminal to show."""
    found = pair_audit.audit(cache, cache.weak_labels(), **{"batch_size": 3, **options})
    assert json.dumps(dataclasses.asdict(found), allow_nan=False)
    assert max(map(len, shown(found).splitlines())) <= pair_audit.TABLE_COLUMNS
    return found


def shown(*audits: pair_audit.PairAudit) -> str:
    text = io.StringIO()
    Console(file=text, width=pair_audit.TABLE_COLUMNS).print(pair_audit.render(audits))
    return text.getvalue()


# ---------------------------------------------------------------- figures


def test_every_figure_of_a_case_worked_by_hand(tmp_path: Path) -> None:
    cache = write(
        tmp_path / "c.zarr",
        {"a": [LEFT, EMPTY], "b": [TOP, EMPTY], "c": [LEFT]},
        [[0, 1, 0, 1, 2], [0, 0, 0, 0, 0]],
    )
    found = audited(cache)
    fine, coarse = found.levels
    assert (found.num_slices, found.num_with_ground_truth, found.num_left_out) == (5, 5, 0)
    assert (fine.num_components, fine.smallest, fine.median, fine.largest) == (3, 1, 2, 2)
    assert fine.share_alone == pytest.approx(1 / 5)
    assert fine.expected_positives == pytest.approx(2 * 4 / (5 * 4))
    assert (fine.is_auto, coarse.is_auto) == (False, True)
    assert (fine.share_one_patient, fine.position_distance) == (0, 0)
    assert fine.reach == pytest.approx(4 / 5)
    # a0 with b0: half of each mask is shared. a1 with b1: no foreground.
    assert fine.across_patients is not None
    assert fine.across_patients == fine.all_pairs
    assert fine.across_patients.areas.mean == 1
    assert fine.across_patients.masks.mean == pytest.approx((0.5 + 1) / 2, abs=0.01)
    assert fine.across_patients.masks.standard_error is None

    assert (coarse.num_components, coarse.smallest, coarse.largest, coarse.reach) == (1, 5, 5, 1)
    assert coarse.expected_positives == pytest.approx(2)
    # Of the 4 partners of a slice of a or b one is of its own case, of c's none.
    assert coarse.share_one_patient == pytest.approx(4 / 5 / 4, abs=0.01)
    # Positions 0.5, 1, 0.5, 1, 1.
    assert coarse.position_distance == pytest.approx((2 * 3 + 3 * 2) / (5 * 4) * 0.5, abs=0.01)
    assert coarse.all_pairs is not None
    # Of a0, b0 and c0 (areas equal) one partner in two is equal, as it is of a1 and b1 (one in four) ...
    assert coarse.all_pairs.areas.mean == pytest.approx((3 * 2 + 2 * 1) / (5 * 4), abs=0.01)
    # ... but a0 and c0 alone are equal in place.
    assert coarse.all_pairs.masks.mean == pytest.approx((2 * 1.5 + 1 + 2 * 1) / (5 * 4), abs=0.01)
    assert coarse.across_patients == found.random
    assert found.random is not None
    # Across cases: a0 with b0, b1, c0; a1 with b0, b1, c0; and so on; c0 with all four.
    assert found.random.areas.mean == pytest.approx((2 * 2 / 3 + 2 * 1 / 3 + 2 / 4) / 5, abs=0.01)
    assert found.random.masks.mean == pytest.approx((1.5 / 3 + 1 / 3 + 1 / 3 + 1 / 3 + 1.5 / 4) / 5, abs=0.01)
    assert found.random.areas.standard_error is not None
    assert found.by_position is not None
    # The only partners close by: a0 and b0; and any two of a1, b1, c0.
    assert found.by_position.masks.mean == pytest.approx((0.5 + 0.5 + 0.5 + 0.5 + 0) / 5, abs=0.01)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "reach"), [("position", 0.1), ("component", 1), ("none", 1)])
def test_pairs_are_drawn_as_often_as_plain_counting_says(kind: str, reach: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    n = 30
    keys = {
        "position": (random.integers(1, 21, n) / 20).astype(np.float32).astype(np.float64),
        "component": random.integers(0, 12, n),
        "none": np.zeros(n),
    }[kind]
    owners = random.integers(0, 4, n)
    allowed = (np.abs(keys[:, None] - keys) < reach) & (owners[:, None] != owners)
    num_partners = allowed.sum(axis=1)
    expected = allowed / np.maximum(num_partners, 1)[:, None] / (num_partners > 0).sum()
    num_pairs = 200_000
    pairs = pair_audit.draw_pairs(keys, owners, reach=reach, num_pairs=num_pairs, generator=random)
    found = np.zeros((n, n))
    np.add.at(found, tuple(pairs.T), 1 / num_pairs)
    assert not found[~allowed].any()
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / num_pairs)


def test_no_pair_is_drawn_where_there_is_none() -> None:
    generator = np.random.default_rng(0)
    for keys, owners in (([], []), ([1], [0]), ([1, 1], [0, 0]), ([1, 2], [0, 1])):
        pairs = pair_audit.draw_pairs(
            np.array(keys, float), np.array(owners, int), reach=1, num_pairs=9, generator=generator
        )
        assert pairs.shape == (0, 2)


def test_area_dice_by_hand() -> None:
    areas = np.array([[0.5, 0.25], [0.25, 0.25], [0, 0], [0, 0], [0.5, 0.25]])
    pairs = np.array([[0, 1], [0, 2], [2, 3], [0, 4]])
    assert pair_audit.area_dice(areas, pairs) == pytest.approx([2 * 0.5 / 1.25, 0, 1, 1])


def test_mask_dice_by_hand() -> None:
    masks = np.array(
        [[1, 1, 0, 2], [1, 0, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 5, 0]], np.uint8
    )
    first, second = pair_audit.mask_dice(
        masks, [np.array([[0, 1], [0, 2], [2, 3]]), np.array([[4, 0], [0, 5], [3, 0], [1, 1]])]
    )
    assert first == pytest.approx([2 / 3, 0, 1])
    assert second == pytest.approx([1 / 2, 0, 0, 1])


def test_slices_of_different_sizes_are_compared_on_one_grid(tmp_path: Path) -> None:
    large = LEFT.repeat(3, axis=0).repeat(5, axis=1)
    cache = write(tmp_path / "c.zarr", {"a": [LEFT], "b": [large], "c": [large * 2]}, [[0, 0, 1]])
    [level] = audited(cache).levels
    assert level.across_patients is not None
    assert (level.across_patients.areas.mean, level.across_patients.masks.mean) == (1, 1)
    comb = np.zeros((128, 192), np.uint8)
    comb[1::2, 1::3] = 1  # the pixels at the centres of the grid's cells
    [level] = audited(write(tmp_path / "e.zarr", {"a": [np.ones_like(LEFT)], "b": [comb]}, [[0, 0]])).levels
    assert level.across_patients is not None
    assert level.across_patients.areas.mean == pytest.approx(2 / 6 / (1 + 1 / 6))
    assert level.across_patients.masks.mean == 1
    shifted = np.roll(large, 10, axis=1)
    [level] = audited(write(tmp_path / "d.zarr", {"a": [LEFT], "b": [shifted]}, [[0, 0]])).levels
    assert level.across_patients is not None
    assert (level.across_patients.areas.mean, level.across_patients.masks.mean) == (1, 0.5)


def test_standard_errors_are_those_of_patients_not_of_pairs() -> None:
    random = np.random.default_rng(0)
    n = 60
    values = random.normal(size=n)
    expected = values.std(ddof=1) / np.sqrt(n)
    within = np.repeat(np.arange(n), 40)
    across = np.argwhere(np.triu(np.ones((n, n), bool), 1))
    for pairs in (np.stack([within, within], axis=1), across):
        scores = values[pairs].mean(axis=1)[None]
        [error] = pair_audit._standard_errors(scores, 7 * pairs, np.random.default_rng(1))
        assert error == pytest.approx(expected, rel=0.15)
    two = np.array([[0, 1], [1, 0], [0, 1]])
    assert pair_audit._standard_errors(np.ones((2, 3)), two, random) == (None, None)


def test_pairs_of_one_patient_are_no_pairs_across(tmp_path: Path) -> None:
    truths = {"patient001_frame01": [LEFT], "patient001_frame12": [LEFT], "patient002_frame01": [TOP]}
    [level] = audited(write(tmp_path / "c.zarr", truths, [[0, 0, 0]])).levels
    assert level.share_one_patient == pytest.approx(1 / 3, abs=0.01)
    assert level.across_patients is not None
    assert level.across_patients.masks.mean == 0.5


@pytest.mark.parametrize(("batch_size", "level"), [(1, 2), (2, 2), (3, 2), (4, 1), (7, 1), (8, 0), (100, 0)])
def test_training_takes_the_finest_level_with_a_positive_per_anchor(batch_size: int, level: int) -> None:
    # 1, 3 and 7 of the 7 other slices share the label: 1/7, 3/7 and 1 positives per further slice of a batch.
    ccl = np.array([[0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 1, 1, 1, 1], [0] * 8])
    assert auto_level(ccl, batch_size) == level


# ---------------------------------------------------------------- cases left out


def test_test_cases_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    truths = {"a": [LEFT, EMPTY], "b": [TOP, LEFT], "c": [LEFT, TOP], "d": [EMPTY, EMPTY]}
    whole = write(tmp_path / "whole.zarr", truths, [[0, 1, 0, 2, 2, 1, 3, 3], [0, 0, 0, 0, 0, 0, 1, 1]])
    rest = write(
        tmp_path / "rest.zarr",
        {case_id: truths[case_id] for case_id in ("a", "b", "c")},
        [[0, 1, 0, 2, 2, 1], [0] * 6],
    )
    found = audited(whole, test_case_ids=("d",))
    assert found.num_left_out == 1
    assert dataclasses.replace(found, num_left_out=0) == audited(rest)


def test_ground_truth_of_test_cases_and_their_twins_is_never_read(tmp_path: Path) -> None:
    path = made_caches.write_noise(tmp_path / "c.zarr", {"a": 0, "b": 1, "c": 2, "twin": 2})
    for case_id in ("c", "twin"):
        for file in (path / "cases" / case_id / "labels/ground_truth/0/c").rglob("*"):
            if file.is_file():
                file.unlink()
    with pytest.raises(CacheError, match="ground_truth"):
        audited(open_cache(path))
    found = audited(open_cache(path), test_case_ids=("c",))
    assert (found.num_left_out, found.num_slices) == (2, 6)
    assert "left out: 2 cases" in shown(found)
    with pytest.raises(UsageError, match="No case is left"):
        audited(open_cache(path), test_case_ids=("a", "b", "twin"))


# ---------------------------------------------------------------- edges


def test_one_slice_has_no_pair(tmp_path: Path) -> None:
    found = audited(write(tmp_path / "c.zarr", {"a": [LEFT]}, [[0]]))
    [level] = found.levels
    assert (level.num_components, level.share_alone, level.expected_positives, level.reach) == (1, 1, 0, 0)
    nothing = (level.share_one_patient, level.position_distance, level.all_pairs, level.across_patients)
    assert (*nothing, found.random, found.by_position) == (None,) * 6
    assert level.is_auto


def test_one_case_has_no_pair_across(tmp_path: Path) -> None:
    found = audited(write(tmp_path / "c.zarr", {"a": [LEFT, TOP, EMPTY]}, [[0, 0, 1]]))
    [level] = found.levels
    assert level.share_one_patient == 1
    assert level.all_pairs == pair_audit.Alikeness(
        areas=pair_audit.Mean(mean=1, standard_error=None),
        masks=pair_audit.Mean(mean=0.5, standard_error=None),
    )
    assert (level.across_patients, found.random, found.by_position, level.reach) == (None, None, None, 0)


def test_slices_that_are_all_equal_are_alike(tmp_path: Path) -> None:
    truths = {case_id: [LEFT, LEFT] for case_id in "abcd"}
    found = audited(write(tmp_path / "c.zarr", truths, [[0] * 8]))
    [level] = found.levels
    for alike in (level.all_pairs, level.across_patients, found.random, found.by_position):
        assert alike is not None
        assert (alike.areas.mean, alike.masks.mean) == (1, 1)
        assert (alike.areas.standard_error, alike.masks.standard_error) == (
            pytest.approx(0, abs=1e-6),
            pytest.approx(0, abs=1e-6),
        )


def test_slices_without_ground_truth_count_as_pairs_alone(tmp_path: Path) -> None:
    some = audited(write(tmp_path / "some.zarr", {"a": [LEFT, LEFT], "b": 2, "c": [LEFT]}, [[0, 0, 0, 1, 0]]))
    [level] = some.levels
    assert (some.num_slices, some.num_with_ground_truth) == (5, 3)
    assert (level.largest, level.reach) == (4, 0.8)
    assert level.across_patients is not None
    assert level.across_patients.masks.mean == 1
    none = audited(write(tmp_path / "none.zarr", {"a": 2, "b": 2}, [[0, 0, 0, 1]]))
    [level] = none.levels
    assert level.position_distance is not None
    assert (none.random, level.all_pairs, level.across_patients) == (None, None, None)
    assert "There is no ground truth" in shown(none)


def test_batches_of_one_slice_hold_no_positive(tmp_path: Path) -> None:
    cache = write(tmp_path / "c.zarr", {"a": [LEFT, LEFT], "b": [LEFT]}, [[0, 0, 1], [0, 0, 0]])
    levels = audited(cache, batch_size=1).levels
    assert [level.expected_positives for level in levels] == [0, 0]
    assert [level.is_auto for level in levels] == [False, True]


# ---------------------------------------------------------------- the table and the command


def test_the_table_has_a_row_a_level_and_two_to_compare_with(tmp_path: Path) -> None:
    cache = write(
        tmp_path / "c.zarr",
        {"a": [LEFT, EMPTY], "b": [TOP, EMPTY], "c": [LEFT]},
        [[0, 1, 0, 1, 2], [0, 0, 0, 0, 0]],
    )
    found = audited(cache)
    lines = [line.split() for line in shown(dataclasses.replace(found, labels="[red]x")).splitlines()]
    title = "Weak labels '[red]x': descriptors by hand, neighbours any; 5 slices, batches of 3"
    assert " ".join(lines[0]) == title
    [fine] = [line for line in lines if line[:1] == ["0"]]
    assert fine[1:7] == ["3", "1/2/2", "20.0", "0.40", "0.0", "0.00"]
    assert fine[7::2][:3] == ["100.0", "80.0", fine[8]]
    [coarse] = [line for line in lines if line[:2] == ["1", "auto"]]
    assert coarse[2:6] == ["1", "5/5/5", "0.0", "2.00"]
    [random] = [line for line in lines if line[:1] == ["random"]]
    assert random[1:] == coarse[-4:]
    assert random[2].startswith("±")
    assert [line for line in lines if line[:1] == ["position"]]


def test_the_command_audits_every_fresh_set_the_default_one_first(
    tmp_path: Path, supercl: Callable[..., Any]
) -> None:
    path = made_caches.write_noise(tmp_path / "c.zarr", {"a": 0, "b": 1, "c": 2})
    labels = open_cache(path).weak_labels()
    arrays = {name: getattr(labels, name) for name in ("ccl", "nearest", "similarity")}
    attributes = made_caches.label_attributes(path, labels.num_components)
    cache_writer.write_weak_labels(path, "another", arrays, attributes)
    cache_writer.write_weak_labels(path, "old", arrays, {**attributes, "slices_digest": "of others"})

    outcome = supercl("inspect", path, "--pairs")
    assert (outcome.code, outcome.err) == (0, "note: stale, left out: old\n")
    titles = [line for line in outcome.out.splitlines() if line.startswith("Weak labels")]
    assert [title.split(":")[0] for title in titles] == ["Weak labels 'by_hand'", "Weak labels 'another'"]
    assert titles[0].rstrip().endswith("batches of 32")
    assert outcome.out.count("Look at `masks across`") == 1

    outcome = supercl("inspect", path, "--pairs", "--labels", "another", "--batch-size", 5, "--json")
    [values] = json.loads(outcome.out)["weak_labels"]
    assert (values["labels"], values["batch_size"], values["num_slices"]) == ("another", 5, 9)
    assert values == json.loads(
        json.dumps(
            dataclasses.asdict(
                pair_audit.audit(open_cache(path), open_cache(path).weak_labels("another"), batch_size=5)
            )
        )
    )
    assert supercl("inspect", path, "--pairs", "--labels", "old").code == 4
    assert supercl("inspect", path, "--pairs", "--labels", "nothing").code == 4


def test_the_command_leaves_the_test_cases_of_a_split_out(
    tmp_path: Path, supercl: Callable[..., Any]
) -> None:
    path = made_caches.write_noise(tmp_path / "c.zarr", {"a": 0, "b": 1, "c": 2, "twin": 2})
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"labelled": {"1": ["a"]}, "test": ["twin"]}))
    picture = tmp_path / "pairs.png"
    outcome = supercl("inspect", path, "--pairs", "--split", split, "--gallery", picture, "--json")
    [values] = json.loads(outcome.out)["weak_labels"]
    assert (values["num_left_out"], values["num_slices"]) == (2, 6)
    assert outcome.err == f"{picture}\n"
    cache = open_cache(path)
    write_gallery(
        tmp_path / "same.png", cache, cache.weak_labels(), batch_size=32, test_case_ids=("c", "twin")
    )
    assert picture.read_bytes() == (tmp_path / "same.png").read_bytes()
    outcome = supercl("inspect", path, "--pairs", "--split", split, "--gallery", picture)
    assert outcome.out.endswith(f"{picture}\n")


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--labels", "x"], ["expected: --labels together with --pairs"]),
        (["--batch-size", 8, "--split", "s.json"], ["--batch-size, --split together with --pairs"]),
        (["--gallery", "x.png"], ["--gallery together with --pairs"]),
        (["case_a", "--pairs"], ["without a case", "case_a"]),
        (["--pairs", "--gallery", "x.jpg"], ["ends in .png", "x.png"]),
        (["--pairs", "--batch-size", 0], ["--batch-size"]),
        (["--pairs", "--split", "nothing.json"], ["The split cannot be read."]),
    ],
)
def test_options_that_make_no_sense_are_code_2(
    arguments: list[Any], texts: list[str], tmp_path: Path, supercl: Callable[..., Any]
) -> None:
    path = made_caches.write_noise(tmp_path / "c.zarr", {"case_a": 0})
    outcome = supercl("inspect", path, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    for text in texts:
        assert text in outcome.err
