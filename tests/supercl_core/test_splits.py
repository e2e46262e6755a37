"""Splits: the published format, keys of both kinds, nested random lists, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from made_caches import write_noise

from supercl_core.cache.cases import CaseRow
from supercl_core.cache.schema import STATISTICS
from supercl_core.errors import UsageError
from supercl_core.splits import (
    Split,
    cases_without,
    check_patients,
    fold_numbers,
    of_same_patients,
    read_split,
    write_random_split,
)

HIPPOCAMPUS = [f"hippocampus_{index:03d}" for index in range(1, 40, 3)]
ACDC = [f"patient{patient:03d}_frame{frame:02d}" for patient in (1, 2, 10, 100) for frame in (1, 12)]
PUBLISHED = {
    "note": "how the keys are meant",
    "ACDC": {"classes": 4, "labelled": {"1": [10], "3": [10, 1, 100]}, "test": [2]},
    "MSD-Hippocampus": {"labelled": {"2": [9, 0], "4": [9, 1, 2, 3]}, "test": [4, 12]},
    "ISIC2018": {"labelled_counts": [208], "test_count": 519},
}


@pytest.fixture
def published(tmp_path: Path) -> str:
    (tmp_path / "paper.json").write_text(json.dumps(PUBLISHED))
    return str(tmp_path / "paper.json")


@pytest.mark.parametrize("name", ["Hippocampus", "hippocampus", "Task04_Hippocampus", "MSD-Hippocampus"])
def test_section_is_found_by_the_name_of_the_data_set(published: str, name: str) -> None:
    split = read_split(published, HIPPOCAMPUS, data_set=name, num_labelled=2)
    assert split.labelled == (HIPPOCAMPUS[9], HIPPOCAMPUS[0])
    assert split.test == (HIPPOCAMPUS[4], HIPPOCAMPUS[12])
    assert split.num_labelled_keys == 2


def test_section_can_be_named(published: str) -> None:
    split = read_split(f"{published}:ACDC", ACDC, data_set="my hearts", num_labelled=1)
    assert split.file == f"{published}:ACDC"
    assert split.labelled == ("patient010_frame01", "patient010_frame12")


def test_acdc_keys_are_patients_with_both_frames(published: str) -> None:
    split = read_split(published, ACDC, data_set="ACDC", num_labelled=3)
    assert split.num_labelled_keys == 3
    assert split.labelled == tuple(
        f"patient{patient}_frame{frame}" for patient in ("010", "001", "100") for frame in ("01", "12")
    )
    assert split.test == ("patient002_frame01", "patient002_frame12")


def test_fewer_than_published_takes_the_first_keys_of_the_smallest_list(published: str) -> None:
    assert read_split(published, ACDC, data_set="ACDC", num_labelled=2 - 1).num_labelled_keys == 1
    split = read_split(published, HIPPOCAMPUS, data_set="Hippocampus", num_labelled=1)
    assert split.labelled == (HIPPOCAMPUS[9],)


def test_counts_between_and_above_the_published_ones_are_nested(published: str) -> None:
    cases = {
        count: read_split(published, HIPPOCAMPUS, data_set="Hippocampus", num_labelled=count).labelled
        for count in (1, 2, 3, 4, 5)
    }
    names = tuple(HIPPOCAMPUS[key] for key in (9, 0, 1, 2, 3))
    assert cases == {1: names[:1], 2: names[:2], 3: names[:3], 4: (names[0], *names[2:]), 5: names}


def test_all_labelled_leaves_out_test_cases_under_any_name_and_cases_without_labels(tmp_path: Path) -> None:
    file = write(tmp_path, {"labelled": {"1": ["a"]}, "test": ["c", "f"]})
    cases = rows("abc", identical="bc") + rows("d", has_ground_truth=False) + rows("efg")
    split = read_split(file, list("abcdefg"), data_set="any", num_labelled="all", rows=cases)
    assert split.labelled == ("a", "e", "g")
    assert split.test == ("c", "f")
    assert split.num_labelled_keys == 3


def test_all_labelled_counts_patients(published: str) -> None:
    split = read_split(published, ACDC, data_set="ACDC", num_labelled="all", rows=rows(ACDC))
    assert split.num_labelled_keys == 3
    assert split.labelled == tuple(ACDC[:2] + ACDC[4:])


def test_all_labelled_counts_cases_where_the_split_names_cases(tmp_path: Path) -> None:
    """Elsewhere `all` of 4 frames would be 2 on the axis of the labelled count, left of a list of 3 frames."""
    file = write(tmp_path, {"labelled": {"1": ACDC[2:3]}, "test": ACDC[:2]})
    split = read_split(file, ACDC, data_set="ACDC", num_labelled="all", rows=rows(ACDC))
    assert split.num_labelled_keys == len(split.labelled) == len(ACDC) - 2


# ---- folds


def test_folds_hold_whole_patients_and_differ_by_one_at_most() -> None:
    cases = [f"patient{patient:03}_frame{frame}" for patient in (7, 3, 9, 1, 5) for frame in ("01", "12")]
    folds = fold_numbers(cases, rows(sorted(cases)), num_folds=2)
    assert folds == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0]
    together = rows("abcde", identical="ad")
    assert fold_numbers(list("abcde"), together, num_folds=3) == [0, 1, 2, 0, 0]


def test_a_case_keeps_its_fold_when_the_list_gets_longer() -> None:
    assert fold_numbers(list("hcabd"), rows("abcdefgh"), num_folds=3)[:3] == fold_numbers(
        list("hca"), rows("abcdefgh"), num_folds=3
    )


@pytest.mark.parametrize("num_folds", [-1, 0, 1, 3])
def test_more_folds_than_patients_are_refused(num_folds: int) -> None:
    with pytest.raises(UsageError, match=f"into {num_folds} folds") as caught:
        fold_numbers(list("acd"), rows("abcd", identical="cd"), num_folds=num_folds)
    assert caught.value.found == f"{num_folds} folds, 2 patients (a, c, d)"


def test_pretraining_takes_no_labelled_case(published: str) -> None:
    split = read_split(published, ACDC, data_set="ACDC", num_labelled=None)
    assert (split.labelled, split.num_labelled_keys) == ((), 0)
    assert len(split.test) == 2


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("data_set", "counts", "num_test"), [("Task04_Hippocampus", (21, 52), 52), ("ACDC", (8, 20), 20)]
)
def test_published_file_resolves_on_the_real_data_sets(
    data_set: str, counts: tuple[int, int], num_test: int, real_data: Path
) -> None:
    from supercl_core.sources import discover

    source = discover(real_data / data_set)
    ids = [case.id for case in source.cases]
    per_key = 2 if data_set == "ACDC" else 1
    for count in counts:
        split = read_split(
            str(real_data / "paper_splits.json"), ids, data_set=source.name, num_labelled=count
        )
        assert len(set(split.labelled)) == count * per_key
        assert len(set(split.test)) == num_test * per_key


# ---- random splits


def rows(
    case_ids: Sequence[str], *, identical: Sequence[str] = (), has_ground_truth: bool = True
) -> list[CaseRow]:
    """Rows of cases that are done; those of `identical` have the same content."""
    return [
        CaseRow(
            id=case_id,
            content_digest=identical[0] if case_id in identical else case_id,
            shape=(1, 1, 1, 1),
            image_dtype="int16",
            superpixels_dtype="uint8",
            num_superpixels=1,
            has_ground_truth=has_ground_truth,
            statistics=((0.0,) * len(STATISTICS),),
        )
        for case_id in case_ids
    ]


CASES = [f"la_{number:03}" for number in range(8)]


def test_random_split_is_nested_and_covers_all_cases(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    assert write_random_split(path, rows(CASES), test_fraction=0.25, seed=3) == (2, 6)
    content = json.loads(path.read_text())
    assert list(content["labelled"]) == ["1", "2", "4", "6"]
    longest = content["labelled"]["6"]
    for count, ids in content["labelled"].items():
        assert ids == longest[: int(count)]
    assert sorted([*longest, *content["test"]]) == sorted(CASES)
    split = read_split(str(path), CASES, data_set="any", num_labelled=2)
    assert split.labelled == tuple(longest[:2])


def test_random_split_depends_on_the_seed_and_not_on_the_order(tmp_path: Path) -> None:
    texts = []
    for ids, seed in ((CASES, 0), (CASES[::-1], 0), (CASES, 1)):
        write_random_split(tmp_path / "split.json", rows(ids), test_fraction=0.25, seed=seed)
        texts.append(json.loads((tmp_path / "split.json").read_text())["labelled"])
    assert texts[0] == texts[1] != texts[2]


def test_two_cases_are_enough_and_one_is_not(tmp_path: Path) -> None:
    assert write_random_split(tmp_path / "split.json", rows("ab"), test_fraction=0.25, seed=0) == (1, 1)
    for too_few in (rows("a"), rows("abc", identical="abc"), rows("ab") + rows("c", has_ground_truth=False)):
        with pytest.raises(UsageError, match="too few"):
            write_random_split(tmp_path / "none.json", too_few, test_fraction=0.8, seed=0)
    assert not (tmp_path / "none.json").exists()


def test_a_cache_without_ground_truth_needs_no_split(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No case of the cache has a ground truth"):
        unlabelled = rows("abcd", has_ground_truth=False)
        write_random_split(tmp_path / "none.json", unlabelled, test_fraction=0.25, seed=0)
    assert not (tmp_path / "none.json").exists()


def test_cases_without_ground_truth_are_in_no_list(tmp_path: Path) -> None:
    cases = rows("abc") + rows("xyz", has_ground_truth=False)
    assert write_random_split(tmp_path / "split.json", cases, test_fraction=0.25, seed=0) == (1, 2)
    content = json.loads((tmp_path / "split.json").read_text())
    assert sorted([*content["labelled"]["2"], *content["test"]]) == ["a", "b", "c"]


@pytest.mark.parametrize("seed", range(4))
def test_frames_of_a_patient_stay_together(seed: int, tmp_path: Path) -> None:
    ids = [f"patient{patient:03}_frame{frame}" for patient in range(1, 9) for frame in ("01", "12")]
    path = tmp_path / "split.json"
    assert write_random_split(path, rows(ids), test_fraction=0.3, seed=seed) == (6, 10)
    written = json.loads(path.read_text())
    for part in (written["test"], *written["labelled"].values()):
        assert len({case_id[:10] for case_id in part}) == len(part) / 2


# ---- cases with identical content


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("identical", ["ch", "bcd", "abcdefg"])
def test_identical_cases_stay_together(identical: str, seed: int, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    num_test, num_train = write_random_split(
        path, rows("abcdefghij", identical=identical), test_fraction=0.3, seed=seed
    )
    content = json.loads(path.read_text())
    test, labelled = content["test"], content["labelled"]
    assert (len(test), num_test + num_train) == (num_test, 10)
    assert sorted([*test, *labelled[str(num_train)]]) == list("abcdefghij")
    assert 3 <= num_test < 3 + len(identical)
    for ids in (test, *labelled.values()):
        assert set(identical) <= set(ids) or not set(identical) & set(ids)
    longest = labelled[str(num_train)]
    assert all(ids == longest[: int(count)] for count, ids in labelled.items())


def test_the_command_names_the_cases_that_it_keeps_together(
    tmp_path: Path, supercl: Callable[..., Any]
) -> None:
    cache = write_noise(tmp_path / "twins.zarr", {"a": 1, "b": 2, "c": 3, "d": 2, "e": 5})
    outcome = supercl("split", cache, tmp_path / "split.json")
    assert outcome.code == 0
    assert outcome.err.startswith("note: cases of identical content stay together: b, d\n")


@pytest.mark.parametrize("seed", range(6))
def test_the_last_group_stays_for_training(seed: int, tmp_path: Path) -> None:
    cases = rows("abcd", identical="bcd")
    sizes = write_random_split(tmp_path / "split.json", cases, test_fraction=0.5, seed=seed)
    assert sizes in ((1, 3), (3, 1))


def test_lists_grow_to_the_end_of_a_group(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    lists = []
    for seed in range(20):
        write_random_split(path, rows("abcdefgh", identical="abc"), test_fraction=0.1, seed=seed)
        labelled = json.loads(path.read_text())["labelled"]
        if set("abc") <= set(labelled[max(labelled)][:3]):
            lists.append(list(labelled))
    assert lists
    assert all(counts == ["3", "4", "7"] for counts in lists)


def test_the_other_names_of_cases_are_found_by_content() -> None:
    cases = rows("abc", identical="ab") + rows("xyz", identical="xyz") + rows("q", identical="q")
    assert of_same_patients(cases, ["b"]) == ("a",)
    assert of_same_patients(cases, ["y", "c", "a"]) == ("b", "x", "z")
    assert of_same_patients(cases, ["c", "q", "unknown"]) == ()


def test_a_test_case_under_another_name_is_refused_among_the_labelled() -> None:
    split = Split(file="mine", labelled=("a", "c", "d"), test=("b", "e"), num_labelled_keys=3)
    check_patients(split, rows("abcde"))
    check_patients(split, rows("abcde", identical="ac"))
    with pytest.raises(UsageError, match="both for training and for testing") as caught:
        check_patients(split, rows("abcde", identical="bda"))
    assert caught.value.found == "a = b, d = b"
    assert caught.value.where == "mine"


def test_the_other_frame_of_a_test_patient_is_no_training_case(tmp_path: Path) -> None:
    cases = rows(["patient001_frame01", "patient001_frame12", "patient002_frame01"])
    ids = [row.id for row in cases]
    split = Split(file="mine", labelled=(ids[1],), test=(ids[0],), num_labelled_keys=1)
    with pytest.raises(UsageError, match="cases of one patient") as caught:
        check_patients(split, cases)
    assert caught.value.found == f"{ids[1]} = {ids[0]}"
    assert of_same_patients(cases, [ids[0]]) == (ids[1],)
    assert cases_without(cases, [ids[0]]) == [ids[2]]
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"labelled": {"1": [ids[2]]}, "test": [ids[0]]}))
    found = read_split(str(path), ids, data_set="x", num_labelled="all", rows=cases)
    assert found.labelled == (ids[2],)


# ---- refused


def write(path: Path, content: Any) -> str:
    (path / "split.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path / "split.json")


def test_unknown_cases_are_listed(tmp_path: Path) -> None:
    file = write(tmp_path, {"labelled": {"1": ["patient001_frame01"]}, "test": [f"x{i}" for i in range(7)]})
    with pytest.raises(UsageError, match="cases that the cache does not have") as caught:
        read_split(file, ACDC, data_set="ACDC", num_labelled=1)
    assert caught.value.found == "x0, x1, x2, x3, x4 and 2 more"
    assert "patient001_frame01" in str(caught.value.expected)


@pytest.mark.parametrize("key", [-1, len(HIPPOCAMPUS), "hippocampus_1"])
def test_keys_out_of_range_are_unknown(key: Any, tmp_path: Path) -> None:
    file = write(tmp_path, {"labelled": {"1": [key]}, "test": [0]})
    with pytest.raises(UsageError) as caught:
        read_split(file, HIPPOCAMPUS, data_set="any", num_labelled=1)
    assert caught.value.found == str(key)


def test_a_patient_of_another_number_is_not_taken_for_one_with_more_digits(tmp_path: Path) -> None:
    file = write(tmp_path, {"labelled": {"1": [1]}, "test": [10]})
    split = read_split(file, ACDC, data_set="any", num_labelled=1)
    assert split.labelled == ("patient001_frame01", "patient001_frame12")


def test_cases_for_training_and_testing_at_once_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, {"labelled": {"2": ["b", "a"]}, "test": ["c", "a"]})
    with pytest.raises(UsageError, match="both for training and for testing") as caught:
        read_split(file, ["a", "b", "c"], data_set="any", num_labelled=2)
    assert caught.value.found == "a"
    assert read_split(file, ["a", "b", "c"], data_set="any", num_labelled=1).labelled == ("b",)


def test_unknown_section_is_refused_with_those_there_are(published: str) -> None:
    with pytest.raises(UsageError, match="no section for 'Spleen'") as caught:
        read_split(published, ACDC, data_set="Spleen", num_labelled=1)
    assert caught.value.expected == "one of ACDC, MSD-Hippocampus"
    with pytest.raises(UsageError, match="no section for 'CHAOS'"):
        read_split(f"{published}:CHAOS", ACDC, data_set="ACDC", num_labelled=1)


@pytest.mark.parametrize("count", [0, -1, 6, 99])
def test_counts_that_cannot_be_are_refused_with_those_there_are(count: int, published: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_split(published, HIPPOCAMPUS, data_set="Hippocampus", num_labelled=count)
    assert caught.value.expected == "1 to 5, such as 2, 4"


@pytest.mark.parametrize(("labelled", "test"), [(["b", "c", "b"], ["a"]), (["b"], ["a", "c", "c"])])
def test_a_case_that_is_listed_twice_is_refused(labelled: list[str], test: list[str], tmp_path: Path) -> None:
    file = write(tmp_path, {"labelled": {"1": labelled}, "test": test})
    with pytest.raises(UsageError, match="twice in one list") as caught:
        read_split(file, ["a", "b", "c"], data_set="any", num_labelled=1)
    assert caught.value.found in ("b", "c")


def test_two_names_of_one_case_are_one_case(tmp_path: Path) -> None:
    file = write(tmp_path, {"labelled": {"2": [1, "b"]}, "test": ["a"]})
    with pytest.raises(UsageError, match="twice in one list") as caught:
        read_split(file, ["a", "b", "c"], data_set="any", num_labelled=2)
    assert caught.value.found == "b"


def test_labelled_cases_without_ground_truth_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, {"labelled": {"3": ["a", "c", "b"]}, "test": ["d"]})
    cases = rows("ad") + rows("bc", has_ground_truth=False)
    assert read_split(file, list("abcd"), data_set="any", num_labelled=1, rows=cases).labelled == ("a",)
    with pytest.raises(UsageError, match="no ground truth") as caught:
        read_split(file, list("abcd"), data_set="any", num_labelled=3, rows=cases)
    assert caught.value.found == "c, b"


def test_a_labelled_case_with_the_content_of_a_test_case_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, {"labelled": {"1": ["a"]}, "test": ["d"]})
    with pytest.raises(UsageError, match="identical content"):
        read_split(file, list("abd"), data_set="any", num_labelled=1, rows=rows("abd", identical="ad"))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not JSON",
        [1, 2],
        "null",
        {},
        {"labelled": {"1": ["a"]}},
        {"test": ["a"]},
        {"labelled": {}, "test": ["a"]},
        {"labelled": ["a"], "test": ["b"]},
        {"labelled": {"few": ["a"]}, "test": ["b"]},
        {"labelled": {"1": "a"}, "test": ["b"]},
        {"labelled": {"1": ["a"]}, "test": 5},
        {"labelled": {"1": ["a"]}, "test": [["b"]]},
        {"labelled": {"1": [True]}, "test": ["b"]},
        {"labelled": {"01": ["a"], "1": ["b"]}, "test": ["b"]},
        {"labelled": {"9" * 5000: ["a"]}, "test": ["b"]},
        {"labelled": {"1": ["a\0"]}, "test": ["b"]},
        "[" * 100_000,
    ],
    ids=lambda content: str(content)[:50],
)
def test_a_file_that_is_no_split_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_split(write(tmp_path, content), ["a", "b"], data_set="any", num_labelled=1)
    assert "split.json" in str(caught.value.where)


@pytest.mark.parametrize("name", ["none.json", "a\0b", "x" * 300, "."])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_split(str(tmp_path / name), ["a"], data_set="any", num_labelled=1)


def test_many_keys_of_many_cases_take_no_time_that_is_their_product(tmp_path: Path) -> None:
    case_ids = [f"patient{number:05d}_frame01" for number in range(20_000)]
    keys = [*range(10_000), *case_ids[10_000:]]
    file = write(tmp_path, {"labelled": {"1": ["x"]}, "test": keys})
    start = time.process_time()
    assert len(read_split(file, case_ids, data_set="any", num_labelled=None).test) == 20_000
    assert time.process_time() - start < 2


def test_a_split_made_in_python_is_checked_too() -> None:
    with pytest.raises(UsageError, match="both for training and for testing"):
        Split(file="mine", labelled=("a", "b"), test=("b",), num_labelled_keys=2)
