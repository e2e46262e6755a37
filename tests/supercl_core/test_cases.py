"""Rows of the case table through arrays, JSON and a Zarr group and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import zarr
from hypothesis import given
from hypothesis import strategies as st

from supercl_core.cases import CaseRow, rows_from_group, rows_to_arrays
from supercl_core.schema import STATISTICS, TABLE_ARRAYS

DONE = CaseRow(
    id="größe_1",
    digest="ab" * 32,
    source="/data/größe_1.nii.gz",
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
NO_SPACING = CaseRow(id="c", shape=(2, 1, 1, 1), statistics=((0.0,) * 6,) * 2)


def through_zarr(rows: list[CaseRow], folder: Path) -> list[CaseRow]:
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    for name, array in rows_to_arrays(rows, num_channels=2).items():
        group.create_array(name, data=array)
    return rows_from_group(zarr.open_group(folder, mode="r"))


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
    column = rows_to_arrays([CaseRow(id=value) for value in values], num_channels=2)["id"]
    assert column.dtype == np.uint8
    assert column.shape[1] >= 1
    assert [bytes(row).rstrip(b"\0").decode() for row in column] == values
