"""Nearest neighbours and the CCL hierarchy against plain loops, at block edges and for degenerate slices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_bytes
import made_caches
import numpy as np
import pytest
import references
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from preprocess import ccl as module
from preprocess import run
from preprocess.ccl import (
    descriptor_blocks,
    first_neighbour_hierarchy,
    normalise,
)
from supercl_core.cache.reader import open_cache
from supercl_core.cache.weak_labels import MIN_COMPONENTS
from supercl_core.cache.zarr_files import read_attributes
from supercl_core.checks.verification import verify
from supercl_core.errors import CacheError, SuperCLError, UsageError


def random_rows(num_rows: int, seed: int, num_columns: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).random((num_rows, num_columns)).astype(np.float32)


def test_rows_are_centred_and_of_length_1() -> None:
    rows = np.concatenate([random_rows(5, 0), np.full((2, 6), 0.7, np.float32)])
    units = normalise(rows)
    assert units.dtype == np.float32
    np.testing.assert_allclose(units, references.centred_directions(rows), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(("num_rows", "seed"), [(1, 0), (2, 0), (6, 1), (40, 2), (120, 3), (120, 4)])
def test_hierarchy_equals_the_plain_twin(num_rows: int, seed: int) -> None:
    rows = random_rows(num_rows, seed, num_columns=4)
    hierarchy = first_neighbour_hierarchy(rows)
    expected = references.first_neighbour_hierarchy(rows)
    assert len(hierarchy.ccl) == len(expected)
    for level, labels in zip(hierarchy.ccl, expected, strict=True):
        np.testing.assert_array_equal(level, labels)


@pytest.fixture(scope="module")
def deep() -> module.Hierarchy:
    return first_neighbour_hierarchy(random_rows(400, 5, num_columns=4))


def test_each_level_is_coarser_and_nested(deep: module.Hierarchy) -> None:
    assert len(deep.num_components) >= 2
    assert list(deep.num_components) == sorted(deep.num_components, reverse=True)
    assert deep.num_components[-1] >= MIN_COMPONENTS
    assert deep.ccl.dtype == np.int32
    for level, count in zip(deep.ccl, deep.num_components, strict=True):
        np.testing.assert_array_equal(np.unique(level), np.arange(count))
    for fine, coarse in zip(deep.ccl, deep.ccl[1:], strict=False):
        assert len(set(zip(fine.tolist(), coarse.tolist(), strict=True))) == fine.max() + 1


def test_nearest_and_similarity_fill_the_nodes_of_a_level_and_nothing_more(deep: module.Hierarchy) -> None:
    for level, num_nodes in enumerate([400, *deep.num_components[:-1]]):
        assert (deep.nearest[level, :num_nodes] >= 0).all()
        assert (deep.nearest[level, :num_nodes] < num_nodes).all()
        assert (deep.nearest[level, num_nodes:] == -1).all()
        assert np.isfinite(deep.similarity[level, :num_nodes]).all()
        assert np.isnan(deep.similarity[level, num_nodes:]).all()


def test_every_level_is_what_scipy_makes_of_its_links(deep: module.Hierarchy) -> None:
    finer = np.arange(400)
    for ccl, nearest, count in zip(deep.ccl, deep.nearest, deep.num_components, strict=True):
        links = nearest[nearest >= 0]
        graph = coo_array((np.ones(len(links)), (np.arange(len(links)), links)), (len(links), len(links)))
        num_components, label_of_node = connected_components(graph, directed=False)
        assert num_components == count
        # SciPy numbers components in the order of their smallest nodes too.
        np.testing.assert_array_equal(label_of_node[finer], ccl)
        finer = ccl


def test_two_slices_linked_at_a_level_share_its_label(deep: module.Hierarchy) -> None:
    np.testing.assert_array_equal(deep.ccl[0][deep.nearest[0]], deep.ccl[0])


def test_the_finest_level_is_kept_however_few_components_it_has() -> None:
    hierarchy = first_neighbour_hierarchy(random_rows(3, 0))
    assert hierarchy.ccl.shape == (1, 3)
    assert hierarchy.num_components == (1,)
    single = first_neighbour_hierarchy(random_rows(1, 0))
    assert (single.ccl.tolist(), single.num_components) == ([[0]], (1,))


def test_constant_slices_are_alike_among_themselves_only() -> None:
    rows = np.concatenate([np.zeros((2, 8)), random_rows(6, 1, num_columns=8), np.full((2, 8), 0.4)])
    finest = first_neighbour_hierarchy(rows).ccl[0]
    assert set(np.flatnonzero(finest == finest[0])) == {0, 1, 8, 9}


def test_brightness_and_contrast_do_not_change_the_labels() -> None:
    rows = random_rows(60, 7)
    changed = rows * np.linspace(0.5, 4, 60)[:, None] + np.linspace(-3, 3, 60)[:, None]
    np.testing.assert_array_equal(first_neighbour_hierarchy(changed).ccl, first_neighbour_hierarchy(rows).ccl)


def test_descriptors_are_the_asp_maps_in_the_order_of_the_slices(cache_path: Path) -> None:
    cache = open_cache(cache_path)
    descriptors = np.concatenate([*descriptor_blocks(cache, "intensity")])
    assert descriptors.shape == (cache.num_slices, 32 * 32)
    for index in (0, 6, 22):
        row = cache.rows[cache.slice_case[index]]
        asp = cache.case(row.id).asp_ZGG[cache.slice_z[index]]
        np.testing.assert_array_equal(descriptors[index], asp.ravel().astype(np.float32))


def test_labels_of_a_cache_are_those_of_its_descriptors(cache_copy: Path) -> None:
    cache = open_cache(cache_copy)
    stored = cache.weak_labels()
    maps = np.concatenate([*descriptor_blocks(cache, "intensity")])
    assert stored.neighbours == "other-cases"  # as it has several
    expected = references.first_neighbour_hierarchy(maps, cases=cache.slice_case)
    np.testing.assert_array_equal(stored.ccl, np.stack(expected))
    assert module.weak_labels(cache) == "intensity"
    again = open_cache(cache_copy).weak_labels()
    for name in ("ccl", "nearest", "similarity"):
        np.testing.assert_array_equal(getattr(again, name), getattr(stored, name))


# ---------------------------------------------------------------- sets of labels in a cache


def describe(path: Path, *, seed: int = 0) -> np.ndarray:
    """Descriptors `encoder` of every slice of a cache, which are returned: noise, on a scale of its own."""
    values = 1e-5 * np.random.default_rng(seed).random((open_cache(path).num_slices, 12), np.float32)
    made_caches.write_descriptors(path, "encoder", values)
    return values


def test_labels_of_an_encoder_stand_beside_those_of_intensities(cache_copy: Path) -> None:
    before = open_cache(cache_copy).weak_labels()
    values = describe(cache_copy)
    assert module.weak_labels(open_cache(cache_copy), "encoder", neighbours="any") == "encoder-any"
    cache = open_cache(cache_copy)
    labels = cache.weak_labels()
    assert (labels.name, labels.descriptors, labels.neighbours) == ("encoder-any", "encoder", "any")
    np.testing.assert_array_equal(labels.ccl, first_neighbour_hierarchy(values).ccl)
    np.testing.assert_array_equal(cache.weak_labels("intensity").ccl, before.ccl)
    assert verify(cache_copy, num_workers=1, on_case=lambda: None).damages == ()


def test_the_default_can_be_kept(cache_copy: Path) -> None:
    name = module.weak_labels(open_cache(cache_copy), neighbours="other-cases", make_default=False)
    cache = open_cache(cache_copy)
    assert (name, cache.weak_labels().name) == ("intensity-other-cases", "intensity")
    assert cache.set_names("weak_labels") == ["intensity", "intensity-other-cases"]


def test_neighbours_of_other_cases_are_of_other_patients(cache_copy: Path) -> None:
    cache = open_cache(cache_copy)
    labels = cache.weak_labels(module.weak_labels(cache, neighbours="other-cases"))
    cases = cache.slice_case
    assert (cases[labels.nearest[0]] != cases).all()
    maps = np.concatenate([*descriptor_blocks(cache, "intensity")])
    expected = references.first_neighbour_hierarchy(maps, cases=cases)
    np.testing.assert_array_equal(labels.ccl, np.stack(expected))


def test_frames_of_one_patient_and_identical_cases_are_no_other_cases(tmp_path: Path) -> None:
    ids = {"patient001_frame01": 0, "patient001_frame12": 1, "patient002_frame01": 2, "x": 3, "y": 3}
    cache = open_cache(made_caches.write_noise(tmp_path / "frames.zarr", ids))
    labels = cache.weak_labels(module.weak_labels(cache, neighbours="other-cases"))
    patient = np.array([0, 0, 1, 2, 2])[cache.slice_case]
    assert (patient[labels.nearest[0]] != patient).all()


def test_a_failure_leaves_the_labels_of_before(cache_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache_bytes.content(cache_copy)
    describe(cache_copy)
    node = cache_copy / "descriptors/encoder"
    values = open_cache(cache_copy).descriptors("encoder").copy()
    values[9, 3] = np.nan
    made_caches.write_descriptors(cache_copy, "encoder", values)
    with pytest.raises(SuperCLError, match="not finite") as caught:
        module.weak_labels(open_cache(cache_copy), "encoder")
    assert str(caught.value.where).endswith("case case_b, slice 4")
    shutil.rmtree(node)
    with pytest.raises(CacheError, match="no descriptors 'other'"):
        module.weak_labels(open_cache(cache_copy), "other")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_weak_labels", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module.weak_labels(open_cache(cache_copy), neighbours="other-cases")
    assert cache_bytes.differences(before, cache_bytes.content(cache_copy)) == []
    assert not cache_copy.with_name(f"{cache_copy.name}.wip").exists()


def test_an_approximate_search_says_how_good_it_was(
    cache_copy: Path, supercl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    exact = open_cache(cache_copy).weak_labels()
    outcome = supercl("weak-labels", cache_copy, "--search", "approximate")
    assert outcome.code == 0
    assert "neighbours: 23/23 slices" in outcome.err
    found = open_cache(cache_copy).weak_labels()
    np.testing.assert_allclose(
        found.similarity[0], exact.similarity[0], atol=1e-6
    )  # equally near ones may differ
    folder = cache_copy / "weak_labels/intensity"
    assert read_attributes(folder, "weak_labels/{name}")["recall"] == 1
    monkeypatch.setattr(module.approximate, "measured_recall", lambda *_, **__: 0.75)
    module.weak_labels(open_cache(cache_copy), search="approximate")
    assert read_attributes(folder, "weak_labels/{name}")["recall"] == 0.75
    monkeypatch.setattr(module.approximate, "EXACT_LIMIT", 10)
    module.weak_labels(open_cache(cache_copy))
    assert read_attributes(folder, "weak_labels/{name}")["recall"] == 0.75
    module.weak_labels(open_cache(cache_copy), search="exact")
    assert read_attributes(folder, "weak_labels/{name}")["recall"] == 1


def test_workers_and_a_scheduler_exclude_each_other(
    cache_copy: Path, scheduler: str, supercl: Callable[..., Any]
) -> None:
    before = cache_bytes.content(cache_copy)
    outcome = supercl("weak-labels", cache_copy, "--workers", 2, "--scheduler", scheduler)
    assert (outcome.code, "exclude each other" in outcome.err) == (2, True)
    outcome = supercl("weak-labels", cache_copy, "--scheduler", scheduler)
    assert outcome.code == 0
    assert cache_bytes.differences(before, cache_bytes.content(cache_copy)) == []


def test_a_single_case_has_no_neighbours_in_other_cases(tmp_path: Path) -> None:
    cache = open_cache(made_caches.write_noise(tmp_path / "one.zarr", {"a": 0}))
    with pytest.raises(UsageError, match="at least two cases"):
        module.weak_labels(cache, neighbours="other-cases")
    assert open_cache(cache.path).weak_labels().name == "by_hand"


def test_equal_slices_are_one_component(tmp_path: Path) -> None:
    cases = {"a": 0, "b": 0}
    cache = open_cache(made_caches.write_noise(tmp_path / "equal.zarr", cases))  # their ASP maps are zeros
    labels = cache.weak_labels(module.weak_labels(cache))
    assert labels.num_components == (1,)


def test_labels_become_stale_with_the_cases_and_intensities_the_default_again(
    msd_path: Path, cache_copy: Path, scheduler: str, write_msd: Callable[..., Path], tmp_path: Path
) -> None:
    describe(cache_copy)
    module.weak_labels(open_cache(cache_copy), "encoder")
    data = Path(shutil.copytree(msd_path, tmp_path / "data"))
    declared = json.loads((data / "dataset.json").read_text())
    declared["training"] = declared["training"][1:]
    (data / "dataset.json").write_text(json.dumps(declared))
    shutil.copy(data / "imagesTr" / "case_a.nii.gz", data / "imagesTr" / "case_e.nii.gz")
    shutil.copy(data / "labelsTr" / "case_a.nii.gz", data / "labelsTr" / "case_e.nii.gz")
    declared["training"] += [{"image": "imagesTr/case_e.nii.gz", "label": "labelsTr/case_e.nii.gz"}]
    (data / "dataset.json").write_text(json.dumps(declared))
    run(data, cache_copy, scheduler=scheduler)
    cache = open_cache(cache_copy)
    assert "case_e" in [row.id for row in cache.done]
    assert cache.weak_labels().name == "intensity"
    assert cache.is_stale("weak_labels", "encoder")
    assert cache.is_stale("descriptors", "encoder")
