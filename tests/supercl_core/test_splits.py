"""Splits: the published format, keys of both kinds, nested random lists, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from supercl_core.errors import UsageError
from supercl_core.splits import Split, read_split, write_random_split

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


def test_random_split_is_nested_and_covers_all_cases(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    assert write_random_split(path, ACDC, test_fraction=0.25, seed=3) == 2
    content = json.loads(path.read_text())
    assert list(content["labelled"]) == ["1", "2", "4", "6"]
    longest = content["labelled"]["6"]
    for count, ids in content["labelled"].items():
        assert ids == longest[: int(count)]
    assert sorted([*longest, *content["test"]]) == sorted(ACDC)
    split = read_split(str(path), ACDC, data_set="any", num_labelled=2)
    assert split.labelled == tuple(longest[:2])


def test_random_split_depends_on_the_seed_and_not_on_the_order(tmp_path: Path) -> None:
    texts = []
    for ids, seed in ((ACDC, 0), (ACDC[::-1], 0), (ACDC, 1)):
        write_random_split(tmp_path / "split.json", ids, test_fraction=0.25, seed=seed)
        texts.append(json.loads((tmp_path / "split.json").read_text())["labelled"])
    assert texts[0] == texts[1] != texts[2]


def test_two_cases_are_enough_and_one_is_not(tmp_path: Path) -> None:
    assert write_random_split(tmp_path / "split.json", ["a", "b"], test_fraction=0.25, seed=0) == 1
    with pytest.raises(UsageError, match="too few"):
        write_random_split(tmp_path / "none.json", ["a"], test_fraction=0.25, seed=0)
    assert not (tmp_path / "none.json").exists()


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


@pytest.mark.parametrize("count", [0, -1, 3, 99])
def test_unknown_count_is_refused_with_those_there_are(count: int, published: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_split(published, HIPPOCAMPUS, data_set="Hippocampus", num_labelled=count)
    assert caught.value.expected == "one of 2, 4, or fewer than 2"


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
    ],
    ids=str,
)
def test_a_file_that_is_no_split_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_split(write(tmp_path, content), ["a", "b"], data_set="any", num_labelled=1)
    assert "split.json" in str(caught.value.where)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_split(str(tmp_path / "none.json"), ["a"], data_set="any", num_labelled=1)


def test_a_split_made_in_python_is_checked_too() -> None:
    with pytest.raises(UsageError, match="both for training and for testing"):
        Split(file="mine", labelled=("a", "b"), test=("b",), num_labelled_keys=2)
