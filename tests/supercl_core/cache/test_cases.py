"""Rows of the case table through arrays, JSON and a Zarr group and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import made_caches
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from supercl_core.cache.cases import (
    CaseRow,
    case_id_problem,
    case_key,
    content_digest,
    identical_cases,
    patients,
    rows_from_arrays,
    rows_to_arrays,
)
from supercl_core.cache.reader import open_cache
from supercl_core.cache.schema import STATISTICS, TABLE_ARRAYS

DONE = CaseRow(
    id="größe_1",
    digest="ab" * 32,
    source="imagesTr/größe_1.nii.gz",
    content_digest="cd" * 32,
    shape=(2, 3, 4, 5),
    image_dtype="uint16",
    superpixels_dtype="uint8",
    num_superpixels=97,
    has_ground_truth=True,
    spacing_mm=(3.0, 0.1, 0.3),
    image_scale=0.5,
    image_offset=-1024.0,
    statistics=((0.0, 0.25, 0.5, 1.0, 0.5, 0.125), (1.0, 2.0, 3.0, 4.0, 2.5, 0.5)),
)
FAILED = CaseRow(
    id="b", state="failed", reason="The volume is empty; expected …, found 0", source="/data/b.nii"
)
NO_SPACING = CaseRow(
    id="c",
    shape=(2, 1, 1, 1),
    image_dtype="float32",
    superpixels_dtype="uint16",
    num_superpixels=1,
    statistics=((0.0,) * 6,) * 2,
)


def through_zarr(rows: list[CaseRow], folder: Path) -> list[CaseRow]:
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    for name, array in rows_to_arrays(rows, num_channels=2).items():
        group.create_array(name, data=array)
    stored = zarr.open_group(folder, mode="r")
    return rows_from_arrays({name: np.asarray(array[:]) for name, array in stored.arrays()})  # type: ignore[index]


def test_rows_come_back_from_a_table(tmp_path: Path) -> None:
    rows = [DONE, FAILED, NO_SPACING]
    assert through_zarr(rows, tmp_path) == rows


def test_rows_come_back_through_json() -> None:
    for row in (DONE, FAILED, NO_SPACING):
        assert CaseRow.from_dict(json.loads(json.dumps(row.as_dict()))) == row


def test_columns_are_the_declared_ones_with_their_dtypes() -> None:
    arrays = rows_to_arrays([DONE, FAILED], num_channels=2)
    assert {f"table/{name}": array.dtype.name for name, array in arrays.items()} == {
        spec.path: spec.dtypes[0] for spec in TABLE_ARRAYS
    }
    assert arrays["statistics"].shape == (2, 2, 6)
    assert np.isnan(arrays["statistics"][1]).all()


def test_statistics_by_name() -> None:
    np.testing.assert_array_equal(DONE.statistic("mean"), np.float32([0.5, 2.5]))
    np.testing.assert_array_equal(DONE.statistic("percentile_99_5"), np.float32([0.5, 3.0]))
    assert DONE.statistic("std").dtype == np.float32
    assert len(STATISTICS) == 6


texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12)


@given(st.lists(texts, min_size=1, max_size=4))
def test_any_text_survives_its_column(values: list[str]) -> None:
    rows = [CaseRow(id=str(index), state="failed", reason=value) for index, value in enumerate(values)]
    column = rows_to_arrays(rows, num_channels=2)["reason"]
    assert column.dtype == np.uint8
    assert column.shape[1] >= 1
    assert [bytes(row).rstrip(b"\0").decode() for row in column] == values


@pytest.mark.parametrize(
    "case_id",
    [
        "",
        " ",
        ".",
        "..",
        ".hidden",
        "__reserved",
        "zarr.json",
        "a/b",
        "a\\b",
        "a\nb",
        "a\x1b[2J",
        "\ud800",
        "é" * 101,
    ],
)
def test_names_that_lead_elsewhere_or_cannot_be_printed_are_no_case_ids(case_id: str) -> None:
    assert case_id_problem(case_id) is not None
    with pytest.raises(ValueError, match="case id"):
        CaseRow(id=case_id, state="failed")


@pytest.mark.parametrize("case_id", ["la_003", "größe 1", "心臓", "a" * 200, "c", "x..y", "zarr"])
def test_ordinary_names_are_case_ids(case_id: str) -> None:
    assert case_id_problem(case_id) is None


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, 3, 4]},
        {"shape": [2, 3, 4, 0]},
        {"shape": [2, 3, 4, 2**31]},
        {"shape": [2, 3, 4, 5.0]},
        {"shape": None},
        {"image_dtype": "object"},
        {"superpixels_dtype": "int16"},
        {"num_superpixels": True},
        {"has_ground_truth": 1},
        {"spacing_mm": [0.0, 1.0, 1.0]},
        {"spacing_mm": [1.0, 1.0]},
        {"spacing_mm": 3},
        {"image_scale": float("nan")},
        {"image_offset": "0"},
        {"statistics": [[0.0] * 6]},
        {"statistics": [[0.0] * 5] * 2},
        {"statistics": [["x"] * 6] * 2},
        {"id": "../elsewhere"},
        {"id": 7},
        {"state": "unknown"},
        {"state": "failed"},
        {"another": 1},
    ],
)
def test_a_crafted_row_is_refused(change: dict[str, object]) -> None:
    values = json.loads(json.dumps(DONE.as_dict()))
    with pytest.raises(ValueError, match=r"row|case id"):
        CaseRow.from_dict({**values, **change})
    del values["digest"]
    assert CaseRow.from_dict(values).digest == ""


def test_columns_that_do_not_fit_together_are_refused() -> None:
    arrays = rows_to_arrays([DONE, FAILED], num_channels=2)
    for change in ({"state": arrays["state"][:1]}, {"state": np.array([0, 9], np.uint8)}):
        with pytest.raises(ValueError, match="columns"):
            rows_from_arrays({**arrays, **change})


def test_identity_and_content_are_two_things() -> None:
    assert case_key("config", "source") != case_key("config", "other") != case_key("other", "source")
    sums = {
        name: np.arange(3, dtype=np.uint32) + index
        for index, name in enumerate(("image", "superpixels", "asp"))
    }
    digest = content_digest(DONE, sums)
    renamed = dataclasses.replace(DONE, id="z", digest="ef", source="elsewhere", has_ground_truth=False)
    assert content_digest(renamed, sums) == digest
    assert content_digest(dataclasses.replace(DONE, image_offset=0.0), sums) != digest
    assert content_digest(DONE, {**sums, "image": sums["image"][::-1]}) != digest


def test_identical_cases_are_grouped() -> None:
    rows = [
        dataclasses.replace(DONE, id=name, content_digest=text)
        for name, text in zip("cabd", "xyxz", strict=True)
    ]
    assert identical_cases([*rows, FAILED, dataclasses.replace(FAILED, id="f")]) == [("b", "c")]


def test_frames_of_a_patient_and_identical_cases_are_one_patient(tmp_path: Path) -> None:
    seeds = {"patient001_frame01": 0, "patient001_frame12": 1, "patient002_frame01": 2, "patient10": 3}
    seeds |= {"patient1_x": 4, "twin_a": 5, "twin_b": 5, "x": 6, "a_copy": 1}
    seeds |= {"sub-01_T1w": 7, "sub-01_ses-2_FLAIR": 8, "sub-011_T1w": 9}
    rows = open_cache(made_caches.write_noise(tmp_path / "c.zarr", seeds)).rows
    number = dict(zip((row.id for row in rows), patients(rows).tolist(), strict=True))
    groups = [{case_id for case_id in number if number[case_id] == one} for one in set(number.values())]
    assert sorted(map(sorted, groups)) == [
        ["a_copy", "patient001_frame01", "patient001_frame12", "patient1_x"],
        ["patient002_frame01"],
        ["patient10"],
        ["sub-011_T1w"],
        ["sub-01_T1w", "sub-01_ses-2_FLAIR"],
        ["twin_a", "twin_b"],
        ["x"],
    ]
