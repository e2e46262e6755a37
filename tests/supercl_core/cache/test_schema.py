"""The declaration of the cache against caches that were written: nothing missing, nothing undeclared."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import zarr

from supercl_core.cache import schema


def group_pattern(path: str) -> str:
    """The declared group that stands for a path of a cache: `cases/case_a` becomes `cases/{case}`."""
    parts = path.split("/")
    if len(parts) >= 2 and parts[0] in ("cases", "weak_labels", "descriptors"):
        parts[1] = "{case}" if parts[0] == "cases" else "{name}"
    return "/".join(parts) or "/"


@pytest.fixture(scope="module")
def root(full_cache_path: Path) -> zarr.Group:
    return zarr.open_group(full_cache_path, mode="r", zarr_format=3)


@pytest.fixture(scope="module")
def members(root: zarr.Group) -> dict[str, Any]:
    return dict(root.members(max_depth=None))


def test_every_array_of_a_cache_is_declared_with_its_dtype_and_axes(members: dict[str, Any]) -> None:
    declared = {spec.path: spec for spec in schema.ARRAYS}
    arrays = {path: member for path, member in members.items() if isinstance(member, zarr.Array)}
    assert arrays
    for path, array in arrays.items():
        spec = declared[group_pattern(path)]
        assert array.dtype.name in spec.dtypes, path
        assert array.ndim == len(spec.axes), path
        if spec.mapped:
            assert [name[-1] for name in array.metadata.dimension_names] == [*spec.axes[:-2], "y", "x"], path


def test_every_declared_array_is_in_a_cache(members: dict[str, Any]) -> None:
    found = {group_pattern(path) for path, member in members.items() if isinstance(member, zarr.Array)}
    assert found == {spec.path for spec in schema.ARRAYS}


def test_equal_axes_have_equal_lengths(members: dict[str, Any], root: zarr.Group) -> None:
    fixed = {"3": 3, "4": 4, "6": 6, "g": schema.ASP_GRID, "c": 1, "m": 4, "n": 5 + 6 + 5 + 7}
    declared = {spec.path: spec for spec in schema.ARRAYS}
    for path, array in members.items():
        if isinstance(array, zarr.Array):
            lengths = dict(zip(declared[group_pattern(path)].axes, array.shape, strict=True))
            for axis in lengths.keys() & fixed.keys():
                assert lengths[axis] == fixed[axis], (path, axis)
            if path.startswith("cases/"):
                _, num_slices, height, width = root["/".join(path.split("/")[:2])]["image"].shape
                case = {"z": num_slices, "y": height, "x": width}
                assert all(lengths[axis] == case[axis] for axis in lengths.keys() & case.keys()), path


def test_attributes_of_every_group_are_the_declared_ones(members: dict[str, Any], root: zarr.Group) -> None:
    groups = {"": root, **{path: m for path, m in members.items() if isinstance(m, zarr.Group)}}
    seen = set()
    for path, group in groups.items():
        declared = {spec.key for spec in schema.ATTRIBUTES if spec.group == group_pattern(path)}
        found: Any = group.attrs.get("supercl", {})
        assert set(found) == declared, path
        seen |= {(group_pattern(path), key) for key in found}
    assert seen == {(spec.group, spec.key) for spec in schema.ATTRIBUTES}


JSON_TYPES = {
    "integer": int,
    "boolean": bool,
    "string": str,
    "number": (int, float),
    "object": dict,
    "list": list,
    "list of strings": list,
    "list of integers": list,
}


@pytest.mark.parametrize("spec", schema.ATTRIBUTES, ids=lambda spec: f"{spec.group}:{spec.key}")
def test_attributes_have_their_declared_type(spec: schema.AttributeSpec, root: zarr.Group) -> None:
    path = spec.group.strip("/").format(case="case_b", name="intensity")
    stored: Any = (root[path] if path else root).attrs["supercl"]
    value = stored[spec.key]
    assert isinstance(value, JSON_TYPES[spec.type])
    if spec.type == "list of strings":
        assert all(isinstance(item, str) for item in value)
    if spec.type == "list of integers":
        assert all(isinstance(item, int) for item in value)


def test_nothing_but_zarr_lies_inside_a_cache(full_cache_path: Path, members: dict[str, Any]) -> None:
    folders = {full_cache_path, *(full_cache_path / path for path in members)}
    for file in full_cache_path.rglob("*"):
        if file.is_file():
            holder = next(parent for parent in file.parents if parent in folders)
            assert file == holder / "zarr.json" or file.relative_to(holder).parts[0] == "c", file


def test_paths_and_names_are_unique() -> None:
    for first, second in itertools.combinations(schema.ARRAYS, 2):
        assert first.path != second.path
    assert [schema.array_spec(spec.name) for spec in schema.CASE_ARRAYS] == list(schema.CASE_ARRAYS)
