"""The page `cache_schema.md`: current, complete, and its examples of the form of what is written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zarr

from supercl_core.cache import schema
from supercl_core.cache.schema_page import EXAMPLES, markdown

REPOSITORY = Path(__file__).parents[3]


def test_cache_schema_md_is_current() -> None:
    written = (REPOSITORY / "cache_schema.md").read_text(encoding="utf-8")
    assert written == markdown(), "run `make schema`"


def test_page_names_every_array_and_attribute_once() -> None:
    text = markdown()
    for spec in schema.ARRAYS:
        assert text.count(f"| `{spec.path.replace('{', '<').replace('}', '>')}` |") == 1
    lines = [f"| `{one.key}` | {one.type} | {one.meaning} |" for one in schema.ATTRIBUTES]
    assert {line: text.count(line) for line in lines} == Counter(lines)


@pytest.mark.parametrize("group", sorted({spec.group for spec in schema.ATTRIBUTES}))
def test_examples_are_of_the_form_of_what_is_written(group: str, full_cache_path: Path) -> None:
    path = group.strip("/").format(case="case_c", name="intensity")
    written: Any = zarr.open_group(full_cache_path / path, mode="r", zarr_format=3).attrs["supercl"]
    assert list(EXAMPLES[group]) == [spec.key for spec in schema.ATTRIBUTES if spec.group == group]
    assert_same_form(EXAMPLES[group], written, where=group)


def assert_same_form(example: Any, written: Any, *, where: str) -> None:
    """The same keys and types all the way down; None stands for anything, a list for its first element.

    `versions` holds those packages that are installed.
    """
    if example is None or written is None:
        return
    number = isinstance(example, float) and isinstance(written, int)
    assert number or type(example) is type(written), where
    if isinstance(example, dict):
        assert where.endswith("versions") or example.keys() == written.keys(), where
        for key in example:
            assert_same_form(example[key], written[key], where=f"{where} {key}")
    elif isinstance(example, list) and example and written:
        assert_same_form(example[0], written[0], where=where)
