"""`supercl inspect`: what it says of a cache and of a case."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_caches
import numpy as np
import pytest

from supercl_core.cache.reader import open_cache
from supercl_core.cache.writer import write_tables
from supercl_core.commands import _print_rows
from supercl_core.showing import inspection


@pytest.fixture(scope="module")
def mixed_path(
    write_volume: Callable[..., Path],
    texture: Callable[[tuple[int, ...], int], np.ndarray],
    scheduler: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A cache of 14 cases, two of them identical, and one that failed; no ground truth."""
    from preprocess import run

    folder = tmp_path_factory.mktemp("mixed")
    for index in range(14):
        seed = 0 if index == 9 else index
        write_volume(
            folder / "in" / f"c{index:02}.nii.gz", (1000 * texture((2, 16, 18), seed)).astype(np.int16)
        )
    (folder / "in" / "broken.nii.gz").write_bytes(b"no volume")
    assert len(run(folder / "in", folder / "mixed.zarr", scheduler=scheduler).failed) == 1
    return folder / "mixed.zarr"


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
        "identical_cases": [],
    }
    assert {key: values[key] for key in expected} == expected
    assert values["spacing_mm"] == {
        axis: pytest.approx([s, s]) for axis, s in zip("zyx", (3, 0.9, 0.8), strict=True)
    }
    assert values["size_bytes"] == sum(f.stat().st_size for f in cache_path.rglob("*") if f.is_file())
    [labels] = values["weak_labels"]
    assert (labels["name"], labels["is_default"], labels["is_stale"]) == ("intensity", True, False)
    assert (labels["descriptors"], labels["neighbours"]) == ("intensity", "other-cases")
    assert labels["num_components"] == list(open_cache(cache_path).weak_labels().num_components)


def test_sets_over_slices_are_listed_stale_ones_too(cache_copy: Path) -> None:
    cache = open_cache(cache_copy)
    made_caches.write_descriptors(cache_copy, "encoder", np.ones((cache.num_slices, 5), np.float32))
    rows = dict(inspection.summary_rows(inspection.summary(cache)))
    assert rows["descriptors"] == "encoder: by hand"
    assert rows["weak labels"].startswith("intensity (default): ")
    write_tables(cache_copy, cache.rows[1:], num_channels=1)
    rows = dict(inspection.summary_rows(inspection.summary(open_cache(cache_copy))))
    assert rows["descriptors"] == "encoder (stale): by hand"
    assert rows["weak labels"].startswith("intensity (default, stale): ")


def test_summary_has_an_entry_for_every_case(mixed_path: Path) -> None:
    values = inspection.summary(open_cache(mixed_path))
    assert [case["id"] for case in values["cases"]] == ["broken", *(f"c{index:02}" for index in range(14))]
    broken, first = values["cases"][:2]
    assert (broken["state"], broken["shape"]) == ("failed", [0, 0, 0, 0])
    assert broken["reason"]
    assert broken["spacing_mm"] is None
    assert (first["state"], first["reason"], first["shape"]) == ("done", "", [1, 2, 16, 18])
    assert first["spacing_mm"] == pytest.approx([3, 0.9, 0.8])
    assert first["has_ground_truth"] is False
    assert values["identical_cases"] == [["c00", "c09"]]


def test_rows_tell_people_what_matters(cache_path: Path, mixed_path: Path) -> None:
    tiny = dict(inspection.summary_rows(inspection.summary(open_cache(cache_path))))
    assert tiny["cases"] == "4 done, 0 failed; 3 with ground truth"
    assert tiny["slices"] == "23; 5 to 7 a case, of 18 to 24 rows and 20 to 26 columns"
    assert tiny["spacing"] == "z 3, y 0.9, x 0.8 mm"
    assert tiny["classes"] == "background, anterior, posterior"
    assert tiny["weak labels"].startswith("intensity (default): ")
    assert "n_segments 100" in tiny["settings"]
    assert "foreground_above none" in tiny["settings"]
    assert tiny["cases done"] == "case_a: 5 slices of 24 x 20"
    assert not {"failed", "identical"} & set(tiny)
    values = inspection.summary(open_cache(mixed_path))
    rows = inspection.summary_rows(values)
    mixed = dict(rows)
    assert mixed["failed"] == f"broken: {values['cases'][0]['reason']}"
    assert mixed["identical"] == "c00 = c09"
    assert mixed["classes"] == "none"
    assert rows[-2:] == [("", "c11: 2 slices of 16 x 18"), ("", "and 2 more; --json lists all")]


def test_a_cache_without_a_case_that_is_done_is_shown(cache_path: Path) -> None:
    values = inspection.summary(open_cache(cache_path))
    nothing = {"smallest_shape": None, "largest_shape": None, "spacing_mm": None, "cases": []}
    rows = dict(
        inspection.summary_rows(
            {**values, **nothing, "num_slices": 0, "image_dtypes": [], "weak_labels": [], "descriptors": []}
        )
    )
    assert (rows["slices"], rows["spacing"], rows["stored as"]) == ("0", "unknown", "nothing")
    assert rows["weak labels"] == "none"


def test_case_summary_is_the_row_with_named_statistics(cache_path: Path, mixed_path: Path) -> None:
    values = inspection.case_summary(open_cache(cache_path), "case_c")
    assert json.loads(json.dumps(values)) == values
    assert values["image_offset"] == -100
    assert values["statistics"]["MRI"]["minimum"] == -100
    assert (values["largest_error"], values["num_clipped"]) == (0, 0)
    assert len(values["orientation"]) == 3
    assert values["identical_cases"] == []
    rows = dict(inspection.case_rows(values))
    assert rows["size"] == "5 slices of 24 x 20"
    assert rows["spacing"] == "3 x 0.9 x 0.8 mm (z, y, x)"
    assert rows["stored as"] == "uint16, lossless"
    assert rows["intensities"].startswith("MRI: -100 to ")
    quantised = dict(inspection.case_rows({**values, "largest_error": 0.25, "num_clipped": 1200}))
    assert quantised["stored as"] == "uint16, largest error 0.25, 1,200 voxels clipped"
    assert dict(inspection.case_rows(inspection.case_summary(open_cache(mixed_path), "c09")))[
        "identical"
    ] == ("c00 = c09")


@pytest.mark.parametrize(
    ("size", "text"),
    [(12, "12 B"), (3 * 1024**2, "3 MiB"), (5 * 1024**4, "5 TiB"), (3000 * 1024**4, "3000 TiB")],
)
def test_sizes_have_units(size: int, text: str) -> None:
    assert inspection._bytes(size) == text


def test_command_prints_one_line_a_row_where_there_is_no_terminal(
    cache_path: Path, supercl: Callable[..., Any]
) -> None:
    outcome = supercl("inspect", cache_path)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "data set     Task99_Tiny"
    assert len(lines) == len(inspection.summary_rows(inspection.summary(open_cache(cache_path))))
    assert max(map(len, lines)) > 100  # the versions
    assert all(line == line.rstrip() for line in lines)


def test_rows_fold_to_the_width_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    _print_rows([("name", "a long text " * 6 + "/a/path-" + "q" * 50), ("other", "")])
    lines = [
        line.replace("\x1b[1m", "").replace("\x1b[0m", "") for line in capsys.readouterr().out.splitlines()
    ]
    assert len(lines) > 4
    assert max(map(len, lines)) <= 40
    assert lines[0].startswith("name   a long text")
    assert all(line.startswith("       ") for line in lines[1:-1])
    assert "".join(line.strip() for line in lines[1:]).count("q") == 50


def test_names_cannot_command_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    _print_rows([("classes", "liver\x1b[2J\x07\u202e\udc80\nspleen, 心")])
    assert capsys.readouterr().out == "classes  liver\\x1b[2J\\x07\\u202e\\udc80\\nspleen, 心\n"


def test_command_prints_json(cache_path: Path, supercl: Callable[..., Any]) -> None:
    assert json.loads(supercl("inspect", cache_path, "--json").out)["num_slices"] == 23
    assert json.loads(supercl("inspect", cache_path, "case_b", "--json").out)["image_dtype"] == "float32"


def test_command_refuses_unknown_and_failed_cases(
    cache_path: Path, mixed_path: Path, supercl: Callable[..., Any]
) -> None:
    outcome = supercl("inspect", cache_path, "case_z")
    assert (outcome.code, outcome.out) == (4, "")
    assert "no case 'case_z'" in outcome.err
    outcome = supercl("inspect", mixed_path, "broken")
    assert (outcome.code, outcome.out) == (4, "")
    assert "a failed case: " in outcome.err
