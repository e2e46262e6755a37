"""`supercl inspect`: what it says of a cache and of a case."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supercl_core import inspection
from supercl_core.cache_reader import open_cache


def test_summary_counts_what_is_there(cache_path: Path) -> None:
    values = inspection.summary(open_cache(cache_path))
    assert json.loads(json.dumps(values)) == values
    expected = {
        "name": "Task99_Tiny",
        "num_cases": 4,
        "num_failed": 0,
        "num_slices": 23,
        "num_with_ground_truth": 3,
        "smallest_shape": [1, 5, 18, 20],
        "largest_shape": [1, 7, 24, 26],
        "image_dtypes": ["float32", "int16", "uint16"],
        "failed": [],
    }
    assert {key: values[key] for key in expected} == expected
    assert values["spacing_mm"] == {
        axis: pytest.approx([s, s]) for axis, s in zip("zyx", (3, 0.9, 0.8), strict=True)
    }
    assert values["size_bytes"] == sum(f.stat().st_size for f in cache_path.rglob("*") if f.is_file())
    [labels] = values["weak_labels"]
    assert (labels["name"], labels["default"]) == ("intensity", True)
    assert labels["components"] == list(open_cache(cache_path).weak_labels().num_components)


def test_case_summary_is_the_row_with_named_statistics(cache_path: Path) -> None:
    cache = open_cache(cache_path)
    values = inspection.case_summary(cache, "case_c")
    assert json.loads(json.dumps(values))["id"] == "case_c"
    assert values["image_offset"] == -100
    assert values["statistics"]["MRI"]["minimum"] == -100
    assert (values["largest_error"], values["num_clipped"]) == (0, 0)
    assert len(values["orientation"]) == 3


def test_rows_show_bytes_lists_and_what_is_unknown() -> None:
    rows = inspection.render_rows(
        {
            "size_bytes": 3 * 1024**2,
            "spacing_mm": None,
            "class_names": [],
            "shape": [1, 2],
            "config": {"a": 0.123456, "b": {"c": 1}},
            "failed": [{"id": "x", "reason": "no volume"}, {"id": "y", "reason": "empty"}],
        }
    )
    assert rows == [
        ("size bytes", "3 MiB"),
        ("spacing mm", "unknown"),
        ("class names", "none"),
        ("shape", "1 2"),
        ("config", "a: 0.1235"),
        ("", "b: c 1"),
        ("failed", "id: x, reason: no volume"),
        ("", "id: y, reason: empty"),
    ]
    huge = inspection.render_rows({"size_bytes": 5 * 1024**4, "small_bytes": 12})
    assert [text for _, text in huge] == ["5 TiB", "12 B"]


def test_command_prints_a_table_on_stdout(cache_path: Path, supercl: Callable[..., Any]) -> None:
    outcome = supercl("inspect", cache_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert "Task99_Tiny" in outcome.out
    assert "num slices" in outcome.out


def test_command_prints_json(cache_path: Path, supercl: Callable[..., Any]) -> None:
    assert json.loads(supercl("inspect", cache_path, "--json").out)["num_slices"] == 23
    assert json.loads(supercl("inspect", cache_path, "case_b", "--json").out)["image_dtype"] == "float32"


def test_command_refuses_unknown_cases(cache_path: Path, supercl: Callable[..., Any]) -> None:
    outcome = supercl("inspect", cache_path, "case_z")
    assert (outcome.code, outcome.out) == (4, "")
    assert "no case 'case_z'" in outcome.err
