"""Every recipe of `cache_schema.md`, run as it is printed, and what it finds compared with the cache's own reader."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image
from skimage.segmentation import find_boundaries

from supercl_core.cache.reader import Cache, open_cache
from supercl_core.cache.recipes import RECIPES
from supercl_core.cache.schema_page import markdown

PRINTED = dict(re.findall(r"^### ([^\n]+)\n\nNeeds [^\n]+\n\n```python\n(.*?)^```$", markdown(), re.M | re.S))
CASE, Z = "case_c", 3
IMPORTED_AS = {"pillow": "PIL", "ome-zarr": "ome_zarr"}


@pytest.fixture(scope="module")
def cache(cache_path: Path) -> Cache:
    return open_cache(cache_path)


@pytest.fixture
def run(cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the recipe whose title begins like this, in an empty folder; gives the names that it leaves."""
    monkeypatch.chdir(tmp_path)

    def call(title: str, path: Path = cache_path) -> dict[str, Any]:
        [code] = [code for printed, code in PRINTED.items() if printed.startswith(title)]
        names: dict[str, Any] = {"CACHE": str(path), "CASE": CASE, "Z": Z}
        exec(code, names)
        return names

    return call


def test_every_recipe_is_printed_and_none_needs_this_package() -> None:
    assert list(PRINTED) == [recipe.title for recipe in RECIPES]
    for recipe in RECIPES:
        imported = set()
        for node in ast.walk(ast.parse(PRINTED[recipe.title])):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
        needed = {IMPORTED_AS.get(package, package) for package in recipe.packages}
        assert imported - sys.stdlib_module_names == needed, recipe.title


def test_cases_are_listed_with_state_and_reason(
    run: Any, cache_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table: Any = zarr.open_group(cache_copy, mode="r+")["table"]
    table["state"][1] = 1
    reasons = np.zeros((4, 12), np.uint8)
    reasons[1, :9] = list(b"no pixels")
    table.create_array("reason", data=reasons, overwrite=True)
    assert run("List the cases", cache_copy)["cases"] == [
        ("case_a", "done", ""),
        ("case_b", "failed", "no pixels"),
        ("case_c", "done", ""),
        ("case_d", "done", ""),
    ]
    assert "case_b failed no pixels\n" in capsys.readouterr().out


def test_a_slice_opens_in_the_sources_intensities(run: Any, cache: Cache) -> None:
    names = run("Open one slice")
    case = cache.case(CASE)
    assert case.row.image_offset == -100  # the tiny data set's: lost unless the recipe undoes it
    np.testing.assert_array_equal(names["image"], case.image_ZCYX[Z].astype(float) - 100)
    np.testing.assert_array_equal(names["superpixels"], case.superpixels_ZYX[Z])


def test_borders_of_superpixels_are_drawn(run: Any, cache: Cache, tmp_path: Path) -> None:
    run("Draw the borders")
    picture = np.asarray(Image.open(tmp_path / "superpixels.png")).astype(int)
    superpixels = np.kron(cache.case(CASE).superpixels_ZYX[Z], np.ones((4, 4), int))
    assert picture.shape == (*superpixels.shape, 3)
    drawn = (picture == (255, 220, 0)).all(axis=-1)
    assert not (drawn & ~find_boundaries(superpixels, mode="thick")).any()
    for ids, there in ((superpixels, drawn), (superpixels.T, drawn.T)):
        assert (there[1:] | there[:-1])[ids[1:] != ids[:-1]].all()
    grey = picture[~drawn]
    assert (grey == grey[:, :1]).all()
    assert np.ptp(grey) > 150


def test_classes_have_names(run: Any, cache: Cache) -> None:
    truth = cache.case(CASE).ground_truth_ZYX
    expected = {name: int((truth == value).sum()) for value, name in enumerate(cache.class_names)}
    assert expected.keys() == {"background", "anterior", "posterior"}
    assert run("Ground truth")["voxels"] == expected


def test_members_of_a_ccl_group_are_listed(run: Any, cache: Cache, cache_copy: Path) -> None:
    finest = cache.weak_labels().ccl[0]
    levels = np.stack([finest, np.zeros_like(finest)])  # the tiny cache has one level
    group: Any = zarr.open_group(cache_copy, mode="r+")["weak_labels/intensity"]
    group.create_array("ccl", data=levels, overwrite=True)
    own = int(cache.case_slices([CASE])[Z])
    expected = [
        (cache.rows[cache.slice_case[n]].id, int(cache.slice_z[n]))
        for n in range(cache.num_slices)
        if finest[n] == finest[own]
    ]
    assert run("List a CCL group", cache_copy)["members"] == expected
    assert (CASE, Z) in expected
    assert 1 < len(expected) < cache.num_slices


def test_the_asp_map_is_the_stored_one(run: Any, cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("Paint the ASP map")
    assert float(capsys.readouterr().out) < 2**-12  # half a step of float16 below 1
    assert names["asp"].shape == cache.case(CASE).superpixels_ZYX[Z].shape
    assert np.ptp(names["asp"]) > 0.5


def test_numpy_reads_a_slice_from_the_shard(run: Any, cache: Cache) -> None:
    stored = run("Read a slice with nothing but NumPy")["stored"]
    np.testing.assert_array_equal(stored, cache.case(CASE).image_ZCYX[Z])
    assert stored.dtype == cache.case(CASE).image_ZCYX.dtype


def test_ome_zarr_gives_an_image_and_two_label_layers(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("Open a case as an image")["layers"].keys() == {CASE, "superpixels", "ground_truth"}
    assert f"{CASE} (1, 5, 24, 20) uint16\n" in capsys.readouterr().out
