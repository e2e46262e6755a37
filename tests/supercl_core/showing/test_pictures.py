"""What slices look like: windows, ASP maps at full resolution, colours and the aspect of pixels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from supercl_core.cache.reader import open_cache
from supercl_core.showing import pictures


@pytest.mark.parametrize("case_id", ["case_a", "case_b", "case_c"])
def test_grey_spans_the_percentiles_of_the_case(cache_path: Path, case_id: str) -> None:
    case = open_cache(cache_path).case(case_id)
    low, high = (float(case.row.statistic(name)[0]) for name in ("percentile_00_5", "percentile_99_5"))
    for z in range(case.row.shape[1]):
        values = case.image_ZCYX[z, 0].astype(np.float64) * case.row.image_scale + case.row.image_offset
        found = pictures.grey_slice(case, z)
        assert found.dtype == np.uint8
        expected = np.clip((values - low) / (high - low), 0, 1) * 255
        np.testing.assert_allclose(found, expected, atol=0.5 + 1e-6)


def test_asp_is_the_mean_of_each_superpixel(cache_path: Path) -> None:
    case = open_cache(cache_path).case("case_b")
    superpixels_YX = case.superpixels_ZYX[2]
    grey_YX, found_YX = pictures.grey_slice(case, 2), pictures.asp_slice(case, 2)
    assert found_YX.shape == superpixels_YX.shape
    for label in np.unique(superpixels_YX):
        inside_YX = superpixels_YX == label
        assert len(np.unique(found_YX[inside_YX])) == 1
        assert found_YX[inside_YX][0] == pytest.approx(grey_YX[inside_YX].mean(), abs=1)


def test_a_constant_slice_is_drawn(cache_path: Path) -> None:
    case = open_cache(cache_path).case("case_a")  # its slice 2 holds zeros
    assert len(np.unique(pictures.grey_slice(case, 2))) == 1
    assert len(np.unique(pictures.asp_slice(case, 2))) == 1


def test_colours_of_many_classes_differ_from_each_other_and_from_borders() -> None:
    colours = {pictures.class_rgb(value) for value in range(1, 60)} | {pictures.BORDER_RGB}
    assert len(colours) == 60
    assert all(0 <= part <= 255 for colour in colours for part in colour)
    assert all(pictures.class_rgb(value) for value in range(1, 256))


def test_classes_without_a_name_are_numbered() -> None:
    assert [pictures.class_name(("background", "liver"), value) for value in (1, 2)] == ["liver", "class 2"]


@pytest.mark.parametrize(
    ("spacing_mm", "aspect"),
    [((9.0, 2.4, 1.2), 2.0), (None, 1.0), ((1.0, 1e300, 1e-300), 50.0), ((1.0, 1e-300, 1e300), 0.02)],
)
def test_aspect_is_height_over_width(
    cache_path: Path, spacing_mm: tuple[float, float, float] | None, aspect: float
) -> None:
    row = dataclasses.replace(open_cache(cache_path).rows[0], spacing_mm=spacing_mm)
    assert pictures.pixel_aspect(row) == aspect
