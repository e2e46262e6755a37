"""The memory map against plain zarr, byte for byte; and caches that must be refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import made_caches
import numpy as np
import pytest
import SimpleITK as sitk
import zarr

from supercl_core.cache import writer as cache_writer
from supercl_core.cache.reader import Cache, open_cache
from supercl_core.cache.schema import CASE_ARRAYS, SCHEMA_VERSION
from supercl_core.errors import CacheError, StorageError


@pytest.fixture(scope="module")
def cache(cache_path: Path) -> Cache:
    return open_cache(cache_path)


@pytest.fixture(scope="module")
def wide_cache(
    write_msd: Callable[..., Path],
    texture: Callable[..., np.ndarray],
    tmp_path_factory: pytest.TempPathFactory,
    scheduler: str,
) -> Cache:
    """Two channels, and more than 256 superpixels a slice."""
    from preprocess import run
    from preprocess.pipeline import PreprocessConfig

    folder = tmp_path_factory.mktemp("wide")
    image = np.rint(texture((2, 4, 48, 40), 5) * 5000).astype(np.int16)
    image[:, 1] = 0
    write_msd(folder / "in", {"two_channels": (image, None)}, channel_names=("T1", "T2"))
    config = PreprocessConfig(n_segments=700, compactness=50)
    run(folder / "in", folder / "wide.zarr", config=config, scheduler=scheduler)
    return open_cache(folder / "wide.zarr")


def assert_maps_equal_zarr(cache: Cache) -> set[tuple[str, str]]:
    """Compare every mapped array of a cache, slice by slice; return the (array, dtype) pairs that were seen."""
    root = zarr.open_group(cache.path, mode="r", zarr_format=3)
    seen = set()
    for row in cache.done:
        for spec in CASE_ARRAYS:
            path = spec.path.format(case=row.id)
            if path not in root:
                assert spec.optional
                continue
            stored: Any = root[path]
            mapped = cache.mapped(row, spec.name)
            axis = spec.axes.index("z")
            assert mapped.shape == np.moveaxis(np.empty(stored.shape, bool), axis, 0).shape
            assert mapped.dtype == stored.dtype
            for z in range(len(mapped)):
                expected = stored[:, z] if axis == 1 else stored[z]
                assert mapped[z].tobytes() == np.asarray(expected).tobytes(), (path, z)
            seen.add((spec.name, mapped.dtype.name))
    return seen


def test_memory_map_equals_the_bytes_that_zarr_reads(cache: Cache) -> None:
    assert assert_maps_equal_zarr(cache) == {
        ("image", "int16"),
        ("image", "uint16"),
        ("image", "float32"),
        ("superpixels", "uint8"),
        ("ground_truth", "uint8"),
        ("asp", "float16"),
    }


def test_memory_map_equals_zarr_for_channels_and_wide_superpixels(wide_cache: Cache) -> None:
    seen = assert_maps_equal_zarr(wide_cache)
    assert {("image", "int16"), ("superpixels", "uint16")} <= seen
    case = wide_cache.case("two_channels")
    assert case.image_ZCYX.shape == (4, 2, 48, 40)
    assert case.superpixels_ZYX.max() + 1 == case.row.num_superpixels > 256


def test_empty_slices_are_mapped_and_take_their_place_in_the_shard(cache: Cache, wide_cache: Cache) -> None:
    assert not cache.case("case_a").image_ZCYX[2].any()
    assert cache.case("case_a").image_ZCYX[3].any()
    assert not cache.case("case_a").ground_truth_ZYX[1].any()  # type: ignore[index]
    assert not wide_cache.case("two_channels").image_ZCYX[1].any()


def test_stored_intensities_and_labels_are_those_of_the_source(cache: Cache, msd_path: Path) -> None:
    for row in cache.done:
        folder = "imagesTr" if row.has_ground_truth else "imagesTs"
        source = sitk.GetArrayFromImage(sitk.ReadImage(str(msd_path / folder / f"{row.id}.nii.gz")))
        case = cache.case(row.id)
        values = case.image_ZCYX[:, 0] * row.image_scale + row.image_offset
        np.testing.assert_array_equal(values, source)
        if row.has_ground_truth:
            label = sitk.GetArrayFromImage(sitk.ReadImage(str(msd_path / "labelsTr" / f"{row.id}.nii.gz")))
            np.testing.assert_array_equal(case.ground_truth_ZYX, label)


def test_views_are_read_only_and_copy_nothing(cache: Cache) -> None:
    image = cache.case("case_b").image_ZCYX
    assert np.shares_memory(image[2], image)
    assert image is cache.case("case_b").image_ZCYX
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0, 0, 0] = 1


def test_threads_read_what_one_thread_reads(cache: Cache) -> None:
    fresh = open_cache(cache.path)
    ids = [row.id for row in cache.done] * 8
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(lambda case_id: float(fresh.case(case_id).asp_ZGG.astype(float).sum()), ids))
    assert sums == [float(cache.case(case_id).asp_ZGG.astype(float).sum()) for case_id in ids]


def test_a_cache_is_read_without_write_permission_and_left_as_it_was(cache_copy: Path) -> None:
    for path in [cache_copy, *cache_copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted((path, path.stat().st_mtime_ns) for path in cache_copy.rglob("*"))
    try:
        case = open_cache(cache_copy).case("case_a")
        case.image_ZCYX.sum()
        assert before == sorted((path, path.stat().st_mtime_ns) for path in cache_copy.rglob("*"))
    finally:
        for path in [cache_copy, *cache_copy.rglob("*")]:
            path.chmod(0o755)


def test_slice_table_is_in_case_order(cache: Cache) -> None:
    assert [row.id for row in cache.rows] == ["case_a", "case_b", "case_c", "case_d"]
    assert cache.num_slices == 5 + 6 + 5 + 7
    np.testing.assert_array_equal(cache.slice_case, np.repeat([0, 1, 2, 3], [5, 6, 5, 7]))
    np.testing.assert_array_equal(cache.slice_z[5:11], range(6))
    np.testing.assert_allclose(cache.slice_position[5:11], np.arange(1, 7) / 6)
    np.testing.assert_array_equal(cache.case_slices(["case_d", "case_b"]), [*range(5, 11), *range(16, 23)])
    assert cache.case_slices([]).size == 0


def test_properties_of_the_data_set(cache: Cache, wide_cache: Cache) -> None:
    assert cache.name == "Task99_Tiny"
    assert cache.class_names == ("background", "anterior", "posterior")
    assert (cache.num_channels, wide_cache.num_channels) == (1, 2)
    assert len(cache.done) == 4
    assert cache.failed == []
    assert cache.case("case_d").ground_truth_ZYX is None


def test_geometry_is_that_of_the_source_file(cache: Cache, msd_path: Path) -> None:
    source = sitk.ReadImage(str(msd_path / "imagesTr" / "case_c.nii.gz"))
    geometry = cache.case("case_c").geometry()
    assert geometry.spacing_mm == source.GetSpacing()
    assert geometry.origin_mm == source.GetOrigin()
    assert geometry.direction == source.GetDirection()


def test_weak_labels_by_name_and_by_default(cache: Cache) -> None:
    labels = cache.weak_labels()
    assert labels.name == "intensity"
    assert labels.ccl.shape == labels.nearest.shape == labels.similarity.shape
    assert [level.max() + 1 for level in labels.ccl] == list(labels.num_components)
    np.testing.assert_array_equal(cache.weak_labels("intensity").ccl, labels.ccl)
    with pytest.raises(CacheError, match="no weak labels 'features'"):
        cache.weak_labels("features")


def test_descriptors_by_name(cache_copy: Path) -> None:
    values = np.random.default_rng(0).random((open_cache(cache_copy).num_slices, 5), np.float32)
    made_caches.write_descriptors(cache_copy, "encoder", values)
    cache = open_cache(cache_copy)
    assert cache.set_names("descriptors") == ["encoder"]
    np.testing.assert_array_equal(cache.descriptors("encoder"), values)
    assert cache.descriptors_digest("encoder") == hashlib.sha256(values.tobytes()).hexdigest()
    with pytest.raises(CacheError, match="no descriptors 'other'") as caught:
        cache.descriptors("other")
    assert (caught.value.expected, "supercl describe" in caught.value.next_step) == ("encoder", True)


def test_descriptors_of_another_encoder_are_not_taken_for_these(cache_copy: Path) -> None:
    values = np.random.default_rng(0).random((open_cache(cache_copy).num_slices, 5), np.float32)
    made_caches.write_descriptors(cache_copy, "encoder", values)
    chunk = cache_copy / "descriptors/encoder/values/c/0/0"
    foreign = chunk.read_bytes()
    made_caches.write_descriptors(cache_copy, "encoder", 1 - values)
    chunk.write_bytes(foreign)  # its checksum fits
    with pytest.raises(CacheError, match="digest"):
        open_cache(cache_copy).descriptors("encoder")


def test_descriptors_and_labels_of_other_slices_are_stale(cache_copy: Path) -> None:
    cache = open_cache(cache_copy)
    made_caches.write_descriptors(cache_copy, "encoder", np.ones((cache.num_slices, 5), np.float32))
    cache_writer.write_tables(cache_copy, cache.rows[1:], num_channels=1)
    cache = open_cache(cache_copy)
    for read, name in ((cache.weak_labels, "intensity"), (cache.descriptors, "encoder")):
        with pytest.raises(CacheError, match=f"{name}' are stale"):
            read(name)
    assert cache.is_stale("descriptors", "encoder")


def test_labels_of_descriptors_that_were_computed_again_are_stale(cache_copy: Path) -> None:
    labels = open_cache(cache_copy).weak_labels()
    values = np.ones((labels.ccl.shape[1], 5), np.float32)
    made_caches.write_descriptors(cache_copy, "encoder", values)
    digest = open_cache(cache_copy).descriptors_digest("encoder")
    attributes = made_caches.label_attributes(cache_copy, labels.num_components)
    cache_writer.write_weak_labels(
        cache_copy,
        "encoder",
        {name: getattr(labels, name) for name in ("ccl", "nearest", "similarity")},
        {**attributes, "descriptors": "encoder", "descriptors_digest": digest},
    )
    assert open_cache(cache_copy).weak_labels("encoder").descriptors == "encoder"
    made_caches.write_descriptors(cache_copy, "encoder", 2 * values)
    with pytest.raises(CacheError, match="are stale"):
        open_cache(cache_copy).weak_labels("encoder")
    assert open_cache(cache_copy).weak_labels("intensity").name == "intensity"


def test_unknown_case_is_named_with_examples(cache: Cache) -> None:
    with pytest.raises(CacheError, match=r"no case 'case_z'.*\n.*\n.*case_a, case_b, case_c"):
        cache.case("case_z")


# ---- damage


def shard_of(cache_path: Path, array: str = "image") -> Path:
    return cache_path / "cases" / "case_a" / array / "c" / "0" / "0" / "0" / ("0" if array == "image" else "")


@pytest.mark.parametrize("position", [0, 1234, 4 * 964 + 100])
def test_zarr_finds_a_flipped_byte_by_its_checksum(cache_copy: Path, position: int) -> None:
    shard = shard_of(cache_copy)
    content = bytearray(shard.read_bytes())
    content[position] ^= 1
    shard.write_bytes(content)
    stored: Any = zarr.open_group(cache_copy, mode="r")["cases/case_a/image"]
    with pytest.raises(ValueError, match=r"[Cc]hecksum"):
        stored[:, position // 964]
    other = (position // 964 + 1) % 5
    np.testing.assert_array_equal(
        stored[:, other], open_cache(cache_copy).case("case_a").image_ZCYX[other][:, :]
    )


@pytest.mark.parametrize("size", [0, 1, -1])
def test_a_shard_of_another_size_is_refused(cache_copy: Path, size: int) -> None:
    shard = shard_of(cache_copy)
    content = shard.read_bytes()
    shard.write_bytes(content[:size] if size else b"")
    with pytest.raises(CacheError, match="damaged") as caught:
        _ = open_cache(cache_copy).case("case_a").image_ZCYX
    assert caught.value.where == shard
    assert caught.value.expected == f"{len(content):,} bytes"


def test_a_missing_shard_is_refused(cache_copy: Path) -> None:
    shutil.rmtree(cache_copy / "cases" / "case_b" / "asp" / "c")
    with pytest.raises(CacheError, match="no file"):
        _ = open_cache(cache_copy).case("case_b").asp_ZGG


# ---- caches that are none


def change_attributes(path: Path, changes: dict[str, Any]) -> None:
    content = json.loads((path / "zarr.json").read_text())
    content["attributes"]["supercl"].update(changes)
    (path / "zarr.json").write_text(json.dumps(content))


def test_incomplete_cache_is_refused_but_for_its_writer(cache_copy: Path) -> None:
    change_attributes(cache_copy, {"complete": False})
    with pytest.raises(CacheError, match="not complete") as caught:
        open_cache(cache_copy)
    assert "supercl preprocess INPUT CACHE" in caught.value.next_step
    assert open_cache(cache_copy, unfinished=True).num_slices == 23


def test_other_schema_version_is_refused(cache_copy: Path) -> None:
    change_attributes(cache_copy, {"schema_version": SCHEMA_VERSION + 1})
    with pytest.raises(CacheError) as caught:
        open_cache(cache_copy)
    assert caught.value.expected == f"version {SCHEMA_VERSION}"
    assert caught.value.found == f"version {SCHEMA_VERSION + 1}"


@pytest.mark.parametrize(
    ("prepare", "found"),
    [
        (lambda path: None, "nothing"),
        (lambda path: path.mkdir(), "another folder"),
        (lambda path: path.write_text("x"), "a file"),
        (lambda path: zarr.open_group(path, mode="w", zarr_format=3), "no attributes of supercl"),
    ],
)
def test_other_things_are_no_cache(tmp_path: Path, prepare: Callable[[Path], Any], found: str) -> None:
    prepare(tmp_path / "other.zarr")
    with pytest.raises(CacheError) as caught:
        open_cache(tmp_path / "other.zarr")
    assert caught.value.found == found
    assert caught.value.where == tmp_path / "other.zarr"


def test_slices_are_read_as_copies(cache_path: Path) -> None:
    case = open_cache(cache_path).case("case_a")
    for name, view in (
        ("image", case.image_ZCYX),
        ("superpixels", case.superpixels_ZYX),
        ("ground_truth", case.ground_truth_ZYX),
        ("asp", case.asp_ZGG),
    ):
        for slices in (slice(None), slice(1, 3), slice(4, 9)):
            copied = case.read(name, slices)
            np.testing.assert_array_equal(copied, view[slices])
            assert copied.flags.writeable


def test_a_file_cut_short_is_an_error_for_who_reads(cache_copy: Path) -> None:
    case = open_cache(cache_copy).case("case_a")
    shard = case.cache.shard(case.row, "image")
    os.truncate(shard.file, 0)
    with pytest.raises(StorageError, match=r"image.*slice 0"):
        case.read("image", slice(0, 2))
