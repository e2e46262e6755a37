"""The authors' text of split lists: irregular spacing, wrapped lists, and texts that are none."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from supercl_core.errors import UsageError
from supercl_core.published_splits import parse
from supercl_core.splits import read_split

TEXT = """
All keys are of the training part.

#  ACDC
sample 2  train_keys: [73, 18 ]
sample 4 train_keys:[73 18  1,
    15]

 test :  [ 5,10
14 , ]
# ISIC 2018:
sample 1 train_keys = ['ISIC_0000001']
test: []
"""


def test_text_is_read_as_described() -> None:
    assert parse(TEXT) == {
        "ACDC": {"labelled": {"2": [73, 18], "4": [73, 18, 1, 15]}, "test": [5, 10, 14]},
        "ISIC 2018": {"labelled": {"1": ["ISIC_0000001"]}, "test": []},
    }


@pytest.mark.parametrize("seed", range(20))
def test_any_spacing_gives_the_same_lists(seed: int) -> None:
    generator = random.Random(seed)

    def blank() -> str:
        return generator.choice(["", " ", "  ", "\t"])

    def written(keys: list[int]) -> str:
        text = "[" + blank()
        for key in keys:
            text += (
                f"{key}{generator.choice([',', ', ', ' ', ' ,', chr(10), ', ' + chr(10) + '   ', ' ' * 5])}"
            )
        return text + blank() + "]" + "\n" * generator.randint(1, 3)

    wanted: dict[str, Any] = {}
    text = ""
    for name in ("MMWHS", "MSD-Heart", "HVSMR"):
        labelled = {str(n): [generator.randrange(2000) for _ in range(n)] for n in (1, 4, 40)}
        wanted[name] = {"labelled": labelled, "test": [generator.randrange(99) for _ in range(30)]}
        text += f"#{blank()}{name}{blank()}\n"
        for count, keys in labelled.items():
            text += f"{blank()}sample {count}{blank()} train_keys:{blank()}{written(keys)}"
        text += f"test{blank()}:{blank()}{written(wanted[name]['test'])}"
    assert parse(text) == wanted
    assert parse(text.replace("\n", "\r\n")) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no section"),
        ("# A\nnothing", "no section"),
        ("test: [1]", "a list before the first section"),
        ("test: [1]\n# A\ntest: [2]", "a list before the first section"),
        ("# A\ntest: [1, 2", "without its beginning or end in 'A'"),
        ("# A\ntest: 1]", "without its beginning or end"),
        ("# A\ntest: [[1]]", "without its beginning or end"),
        ("# A\nvalidation: [1]", "the list 'validation:' in 'A'"),
        ("# A\nsample x train_keys: [1]", "of no known kind"),
        ("# A\ntest: [1]\ntest: [2]", "two lists of 'test'"),
        ("# A\nsample 1 train_keys: [1]\nsample 1 train_keys: [2]", "two lists of '1'"),
        ("# A\ntest: [1]\n# A\ntest: [1]", "two sections 'A'"),
    ],
)
def test_texts_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_long_line_takes_no_longer_than_a_long_text() -> None:
    start = time.process_time()
    for text in (
        "x" * 10**6,
        "# " + " " * 10**6 + "A",
        "# A\n" + " " * 10**6,
        "# A\ntest" + " " * 10**6 + "x: [1]",
    ):
        with pytest.raises(ValueError):
            parse(text)
    assert time.process_time() - start < 2


def test_split_of_a_text_is_that_of_the_same_lists_in_json(tmp_path: Path) -> None:
    ids = [
        f"patient{number:03}_frame{frame}" for number in (1, 5, 10, 14, 15, 18, 73) for frame in ("01", "12")
    ]
    (tmp_path / "list.txt").write_text(TEXT)
    (tmp_path / "list.json").write_text(json.dumps(parse(TEXT)))
    splits = [
        read_split(f"{tmp_path}/list{ending}:ACDC", ids, data_set="x", num_labelled=2)
        for ending in (".txt", ".json")
    ]
    assert splits[0].labelled == splits[1].labelled == tuple(ids[-2:] + ids[-4:-2])
    assert splits[0].test == splits[1].test


def test_a_text_that_is_no_split_says_what_a_split_is(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# ACDC\ntest: [1")
    with pytest.raises(UsageError, match="cannot be read") as caught:
        read_split(str(tmp_path / "list.txt"), ["a"], data_set="ACDC", num_labelled=1)
    assert "without its beginning or end" in str(caught.value.found)
