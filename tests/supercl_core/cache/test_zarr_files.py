"""Files of Zarr nodes: what Zarr wrote is read, and whatever else a file says ends in CacheError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from supercl_core.cache.reader import open_cache
from supercl_core.cache.schema import SLICE_ARRAYS, TABLE_ARRAYS, array_spec
from supercl_core.cache.zarr_files import (
    array_metadata,
    metadata_digest,
    read_array,
    read_attributes,
    read_node,
    read_nodes,
)
from supercl_core.errors import CacheError

POSITION = next(spec for spec in SLICE_ARRAYS if spec.name == "position")


def write(folder: Path, array: np.ndarray, **changes: Any) -> Path:
    settings = {"chunks": array.shape, "compressors": [Crc32cCodec()], **changes}
    zarr.create_array(folder, data=array, fill_value=0, config={"write_empty_chunks": True}, **settings)
    return folder


@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9))
@settings(max_examples=20, deadline=None)
def test_what_zarr_wrote_is_read(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    array = np.array(values, np.float32)
    read = read_array(write(tmp_path_factory.mktemp("a") / "position", array), POSITION)
    np.testing.assert_array_equal(read, array)
    assert not read.flags.writeable


def test_every_table_of_a_cache_is_read_as_zarr_reads_it(cache_path: Path) -> None:
    root = zarr.open_group(cache_path, mode="r")
    for spec in (*TABLE_ARRAYS, *SLICE_ARRAYS):
        stored: Any = root[spec.path]
        np.testing.assert_array_equal(read_array(cache_path / spec.path, spec), stored[...])


def test_every_mapped_array_is_what_the_schema_declares(cache_path: Path) -> None:
    for row in open_cache(cache_path).done:
        spec = array_spec("superpixels")
        shape, dtype = array_metadata(cache_path / spec.path.format(case=row.id), spec)
        assert (shape, dtype.name) == (row.shape[1:], row.superpixels_dtype)


@pytest.mark.parametrize(
    ("array", "changes"),
    [
        (np.zeros(6, np.float64), {}),
        (np.zeros(6, np.int32), {}),
        (np.zeros((2, 3), np.float32), {}),
        (np.zeros(6, np.float32), {"chunks": (3,)}),
        (np.zeros(6, np.float32), {"compressors": None}),
        (np.zeros(6, np.float32), {"compressors": "auto"}),
        (np.zeros(6, np.float32), {"shards": (6,)}),
        (
            np.zeros(6, np.float32),
            {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}}},
        ),
        (np.array(["a", "b"]), {"compressors": None}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_another_layout_than_the_declared_one_is_refused(
    array: np.ndarray, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Legal Zarr arrays all of them: other dtypes, axes, chunks and codecs are never built."""
    with pytest.raises(CacheError, match="damaged"):
        read_array(write(tmp_path / "position", array, **changes), POSITION)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes() + b"x"),
        lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 4]) + file.read_bytes()[1:]),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: (file.unlink(), file.symlink_to(file)),
    ],
)
def test_damaged_content_is_refused(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "position", np.arange(6, dtype=np.float32))
    damage(folder / "c" / "0")
    with pytest.raises(CacheError, match="damaged"):
        read_array(folder, POSITION)


@pytest.mark.parametrize(
    "shape", [[2**40], [0], [-1], [6.0], [True], ["6"], [[6]], [], None, 6, [6, 6], [2**70], [10**5000]]
)
def test_a_declared_shape_is_not_believed(shape: object, tmp_path: Path) -> None:
    folder = write(tmp_path / "position", np.arange(6, dtype=np.float32))
    node = json.loads((folder / "zarr.json").read_text())
    node["shape"] = shape
    node["chunk_grid"]["configuration"]["chunk_shape"] = shape
    (folder / "zarr.json").write_text(
        json.dumps(node) if shape != [10**5000] else '{"shape": [1' + "0" * 5000 + "]}"
    )
    with pytest.raises(CacheError, match="damaged"):
        read_array(folder, POSITION)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '"x"',
        "{}",
        '{"zarr_format": 2}',
        "[" * 100_000,
        '{"zarr_format": 3, "zarr_format": 3}',
        "\ufeff{}",
        '{"zarr_format": NaN}',
    ],
)
def test_other_text_is_no_node(text: str, tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text(text)
    with pytest.raises(CacheError, match="damaged"):
        read_node(tmp_path)


def test_bytes_that_are_no_text_are_no_node(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CacheError, match="damaged"):
        read_node(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("complete", 1),
        ("name", None),
        ("channel_names", "MRI"),
        ("class_names", [1]),
        ("config", []),
        ("schema_version", 2.0),
        ("provenance", None),
    ],
)
def test_attributes_of_another_type_are_refused(key: str, value: object, cache_copy: Path) -> None:
    node = json.loads((cache_copy / "zarr.json").read_text())
    node["attributes"]["supercl"][key] = value
    (cache_copy / "zarr.json").write_text(json.dumps(node))
    with pytest.raises(CacheError, match=key if key != "schema_version" else "version"):
        open_cache(cache_copy)


def test_digests_of_metadata_leave_out_what_varies_and_nothing_else(cache_copy: Path) -> None:
    for folder, group in ((cache_copy, "/"), (cache_copy / "cases" / "case_a", "cases/{case}")):
        nodes = {"": read_node(folder)} if group == "/" else read_nodes(folder)
        assert metadata_digest(nodes) == read_attributes(folder, group)["metadata_digest"]
    node = read_node(cache_copy)
    digest = metadata_digest({"": node})
    ours = node["attributes"]["supercl"]
    ours["provenance"], ours["metadata_digest"] = {}, ""
    assert metadata_digest({"": node}) == digest
    ours["name"] += "x"
    assert metadata_digest({"": node}) != digest
