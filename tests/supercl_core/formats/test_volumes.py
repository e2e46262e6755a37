"""Volumes in and out: axes, geometry, and files that must be refused."""

from __future__ import annotations

import gzip
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from supercl_core.errors import SuperCLError
from supercl_core.formats.geometry import Geometry
from supercl_core.formats.volumes import orientation, read_header, read_volume, write_label_map

TILTED = Geometry(
    spacing_mm=(0.5, 0.75, 3.0), origin_mm=(-1.0, 2.0, 30.0), direction=(0.0, -1.0, 0, 1.0, 0.0, 0, 0, 0, 1.0)
)


def nifti_header(order: str, lengths: tuple[int, ...], *, code: int, bits: int) -> bytes:
    """The first 352 bytes of a NIfTI-1 file, written by hand."""
    header = bytearray(352)
    struct.pack_into(f"{order}i", header, 0, 348)
    struct.pack_into(f"{order}{1 + len(lengths)}h", header, 40, len(lengths), *lengths)
    struct.pack_into(f"{order}2h", header, 70, code, bits)
    struct.pack_into(f"{order}8f", header, 76, *[1.0] * 8)
    struct.pack_into(f"{order}f", header, 108, 352)
    header[344:348] = b"n+1\0"
    return bytes(header)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32", "float64", "uint8"])
def test_values_come_back_in_every_format(
    suffix: str, dtype: str, write_volume: Callable[..., Path], tmp_path: Path
) -> None:
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(dtype)
    path = write_volume(tmp_path / f"scan{suffix}", array)
    volume = read_volume(path)
    assert volume.array_CZYX.dtype == dtype
    np.testing.assert_array_equal(volume.array_CZYX, array[None])
    np.testing.assert_allclose(volume.geometry.spacing_mm, (0.8, 0.9, 3.0), rtol=1e-6)
    assert read_header(path).shape == (1, 2, 3, 4)


def assert_read_as_simpleitk_reads(path: Path) -> None:
    """Same values bit by bit, same type, same geometry."""
    image = sitk.ReadImage(str(path))
    volume = read_volume(path)
    values = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        values = np.moveaxis(values, -1, 0)
    assert volume.array_CZYX.dtype == values.dtype
    assert volume.array_CZYX.ndim == 4
    assert np.squeeze(volume.array_CZYX).tobytes() == np.squeeze(values).tobytes()
    assert volume.array_CZYX.flags.writeable
    used = min(image.GetDimension(), 3)
    assert volume.geometry.spacing_mm[:used] == image.GetSpacing()[:used]
    assert volume.geometry.origin_mm[:used] == image.GetOrigin()[:used]
    direction = np.reshape(image.GetDirection(), [image.GetDimension()] * 2)[:used, :used]
    np.testing.assert_array_equal(np.reshape(volume.geometry.direction, (3, 3))[:used, :used], direction)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize(
    "scaling", [(1, 0), (0, 5), (2.5, 0), (-0.1, 1.7), (1, -1024), (1, 1e-30), (float("nan"), 3), (1e-20, 0)]
)
def test_nifti_values_are_those_of_simpleitk(
    order: str, dtype: str, scaling: tuple[float, float], tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    if dtype[0] == "f":
        values = (random.normal(size=24) * 1000).astype(order + dtype)
    else:
        limits = np.iinfo(dtype)
        values = random.integers(limits.min, limits.max, 24, dtype, endpoint=True).astype(order + dtype)
    codes = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768}
    codes |= {"i8": 1024, "u8": 1280}
    header = bytearray(nifti_header(order, (4, 3, 2), code=codes[dtype], bits=values.itemsize * 8))
    struct.pack_into(f"{order}2f", header, 112, *scaling)
    (tmp_path / "scan.nii").write_bytes(bytes(header) + values.tobytes())
    assert_read_as_simpleitk_reads(tmp_path / "scan.nii")


@pytest.mark.parametrize(
    "shape", [(5, 4), (5, 4, 1), (5, 4, 3), (5, 4, 3, 1), (5, 4, 1, 3), (5, 4, 3, 2), (1, 1, 1)]
)
@pytest.mark.parametrize(("qform", "sform"), [(0, 0), (1, 0), (0, 2), (1, 1)])
def test_nifti_shapes_and_geometries_are_those_of_simpleitk(
    shape: tuple[int, ...], qform: int, sform: int, tmp_path: Path
) -> None:
    affine = np.array([[0, -0.75, 0, 10], [-0.5, 0, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1.0]])
    values = np.random.default_rng(0).integers(-999, 999, shape).astype(np.int16)
    image = nibabel.Nifti1Image(values, affine)
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    assert_read_as_simpleitk_reads(tmp_path / "scan.nii.gz")


def test_colours_and_vectors_of_nifti_are_channels(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, pixel_type in (("colour", sitk.sitkVectorUInt8), ("vector", sitk.sitkVectorFloat32)):
        values = (random.normal(size=(4, 5, 6, 3)) * 50 + 100).clip(0, 255)
        image = sitk.Cast(sitk.GetImageFromArray(values, isVector=True), pixel_type)
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
        assert_read_as_simpleitk_reads(tmp_path / f"{name}.nii.gz")
        assert read_volume(tmp_path / f"{name}.nii.gz").array_CZYX.shape == (3, 4, 5, 6)


def test_nan_of_a_vector_in_nifti_is_located(tmp_path: Path) -> None:
    values = np.zeros((4, 5, 6, 3), np.float32)
    values[3, 2, 1, 2] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=True), str(tmp_path / "vector.nii"))
    with pytest.raises(SuperCLError, match=r"first at \(c, z, y, x\) = \(2, 3, 2, 1\)"):
        read_volume(tmp_path / "vector.nii")


def test_nifti_packed_in_several_gzip_members_is_read_to_its_end(tmp_path: Path) -> None:
    """As bgzip and parallel compressors write it."""
    values = np.arange(24, dtype=np.int16)
    content = nifti_header("<", (4, 3, 2), code=4, bits=16) + values.tobytes()
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(b"".join(gzip.compress(content[start : start + 100]) for start in range(0, 400, 100)))
    np.testing.assert_array_equal(read_volume(path).array_CZYX.ravel(), values)


@pytest.mark.parametrize("has_links", [True, False], ids=["with links", "without links, as on Windows"])
def test_compressed_nifti_without_the_ending_is_read(
    has_links: bool, write_volume: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    path = write_volume(tmp_path / "scan.nii.gz", array).rename(tmp_path / "scan.nii")

    def refuse(*_: object) -> None:
        raise OSError("A required privilege is not held by the client")

    if not has_links:
        monkeypatch.setattr(Path, "symlink_to", refuse)
    np.testing.assert_array_equal(read_volume(path).array_CZYX, array[None])


def test_a_header_that_asks_for_more_voxels_than_there_are_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scan.nii").write_bytes(nifti_header("<", (400, 30, 20), code=4, bits=16) + bytes(48))
    with pytest.raises(SuperCLError, match="damaged") as caught:
        read_volume(tmp_path / "scan.nii")
    assert "48 bytes of voxels where the header asks for 480,000" in str(caught.value)


def test_channels_are_the_fourth_axis_or_components(
    tmp_path: Path, write_volume: Callable[..., Path]
) -> None:
    array = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(2, 3, 4, 5)
    fourth = write_volume(tmp_path / "fourth.nii.gz", array)
    components = tmp_path / "components.nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(np.moveaxis(array, 0, -1), isVector=True), str(components))
    for path in (fourth, components):
        np.testing.assert_array_equal(read_volume(path).array_CZYX, array)
        assert read_header(path).shape == (2, 3, 4, 5)


def test_a_picture_is_a_volume_of_one_slice(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    image.SetSpacing((0.25, 0.5))
    sitk.WriteImage(image, str(tmp_path / "picture.mha"))
    volume = read_volume(tmp_path / "picture.mha")
    assert volume.array_CZYX.shape == read_header(tmp_path / "picture.mha").shape == (1, 1, 3, 4)
    assert volume.geometry.spacing_mm == (0.25, 0.5, 1.0)
    assert volume.geometry.direction == (1, 0, 0, 0, 1, 0, 0, 0, 1)


def test_label_map_lies_over_its_image(tmp_path: Path) -> None:
    label_map = np.random.default_rng(0).integers(0, 4, (3, 4, 5))
    write_label_map(tmp_path / "deep" / "label.nii.gz", label_map, TILTED)
    volume = read_volume(tmp_path / "deep" / "label.nii.gz")
    assert volume.array_CZYX.dtype == np.uint8
    np.testing.assert_array_equal(volume.array_CZYX[0], label_map)
    np.testing.assert_allclose(volume.geometry.direction, TILTED.direction, atol=1e-6)
    assert volume.geometry.spacing_mm == TILTED.spacing_mm
    assert volume.geometry.origin_mm == TILTED.origin_mm
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["label.nii.gz"]


def test_orientation_names_the_directions_of_the_axes() -> None:
    straight = (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)
    flipped = (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)
    names = [
        orientation(Geometry(spacing_mm=(1, 1, 1), origin_mm=(0, 0, 0), direction=direction))
        for direction in (straight, flipped, TILTED.direction)
    ]
    assert names == ["LPS", "RAS", "PRS"]


@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f4"])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_in_nifti_is_found_though_its_reader_hides_it(
    dtype: str, compressed: bool, value: float, tmp_path: Path
) -> None:
    """SimpleITK reads NaN and infinite values of NIfTI files as 0: without a look into the file they would be lost."""
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    array[1, 2, 3] = value
    order, code = dtype[0], {"f4": 16, "f8": 64}[dtype[1:]]
    header = nifti_header(order, (4, 3, 2), code=code, bits=array.itemsize * 8)
    content = header + array.tobytes()
    path = tmp_path / ("scan.nii.gz" if compressed else "scan.nii")
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(SuperCLError, match="NaN or infinite") as caught:
        read_volume(path)
    assert caught.value.found == "1 such voxels, the first at (c, z, y, x) = (0, 1, 2, 3)"
    assert caught.value.where == path


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_nan_of_a_second_channel_is_located(
    suffix: str, tmp_path: Path, write_volume: Callable[..., Path]
) -> None:
    array = np.zeros((2, 3, 4, 5), np.float32)
    array[1, 2, 0, 4] = np.inf
    with pytest.raises(SuperCLError, match=r"first at \(c, z, y, x\) = \(1, 2, 0, 4\)"):
        read_volume(write_volume(tmp_path / f"scan{suffix}", array))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_header, read_volume):
        with pytest.raises(SuperCLError, match="does not exist") as caught:
            read(tmp_path / "scan.nii.gz")
        assert caught.value.where == tmp_path / "scan.nii.gz"


@pytest.mark.parametrize("content", [b"", b"not a volume", gzip.compress(b"not a volume either")])
def test_a_file_that_is_no_volume_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(content)
    for read in (read_header, read_volume):
        with pytest.raises(SuperCLError, match=r"content is not what its name says|0 bytes") as caught:
            read(tmp_path / "scan.nii.gz")
        assert caught.value.where == tmp_path / "scan.nii.gz"


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_a_truncated_volume_is_refused(
    suffix: str, dtype: str, tmp_path: Path, write_volume: Callable[..., Path]
) -> None:
    """SimpleITK reads what is missing at the end of a NIfTI file as zeros."""
    noise = np.random.default_rng(0).integers(0, 1000, (8, 32, 32)).astype(dtype)
    path = write_volume(tmp_path / f"scan{suffix}", noise)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 9 // 10])
    with pytest.raises(SuperCLError, match=r"damaged|cannot be read as a volume") as caught:
        read_volume(path)
    assert caught.value.where == path


def test_a_wrong_gzip_checksum_is_found(tmp_path: Path, write_volume: Callable[..., Path]) -> None:
    noise = np.random.default_rng(0).integers(0, 1000, (40, 96, 96)).astype(np.int16)
    path = write_volume(tmp_path / "scan.nii.gz", noise)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    with pytest.raises(SuperCLError, match=r"damaged.\n(.*\n)*.*CRC"):
        read_volume(path)


@pytest.mark.parametrize(
    ("suffix", "lengths"),
    [(".nii", (4, 3, 0)), (".nii", (4, 0, 2)), (".mha", (4, 3, 0)), (".mha", (0, 3, 2))],
)
def test_a_volume_with_a_zero_dimension_is_refused(
    suffix: str, lengths: tuple[int, ...], tmp_path: Path
) -> None:
    """SimpleITK reads such a NIfTI file as one slice of zeros."""
    path = tmp_path / f"scan{suffix}"
    if suffix == ".nii":
        path.write_bytes(nifti_header("<", lengths, code=4, bits=16) + bytes(4 * 3 * 2 * 2))
    else:
        size = " ".join(map(str, lengths))
        path.write_text(
            f"ObjectType = Image\nNDims = 3\nDimSize = {size}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
        )
    with pytest.raises(SuperCLError, match="The volume is empty") as caught:
        read_volume(path)
    assert caught.value.found == f"shape {lengths[::-1]}, columns last"


def test_no_channel_at_all_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    path.write_bytes(nifti_header("<", (4, 3, 2, 0), code=4, bits=16) + bytes(4 * 3 * 2 * 2))
    with pytest.raises(SuperCLError, match="The volume is empty"):
        read_volume(path)


def test_complex_values_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((2, 3, 4), np.complex64)), str(path))
    with pytest.raises(SuperCLError, match="complex"):
        read_volume(path)


def test_a_series_of_multi_channel_volumes_is_refused(tmp_path: Path) -> None:
    image = sitk.Image([5, 4, 3, 2], sitk.sitkVectorInt16, 3)
    sitk.WriteImage(image, str(tmp_path / "scan.mha"))
    with pytest.raises(SuperCLError, match="more axes"):
        read_volume(tmp_path / "scan.mha")


# ---- what a header declares, against the file that it is in


def test_a_metaimage_made_from_nifti_is_read(tmp_path):
    """SimpleITK copies the fields of the NIfTI header into it, some with an index in their name."""
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), tmp_path / "scan.nii.gz")
    sitk.WriteImage(sitk.ReadImage(tmp_path / "scan.nii.gz"), tmp_path / "scan.mhd")
    assert "dim[0] = 3" in (tmp_path / "scan.mhd").read_text()
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.mhd").array_CZYX[0], voxels)


def test_a_metaimage_made_of_a_dicom_file_keeps_its_tags_and_is_read(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    image.SetMetaData("0008|0060", "CT")
    image.SetMetaData("0028|1053", "2")
    sitk.WriteImage(image, tmp_path / "scan.mha")
    assert b"0008|0060 = CT" in (tmp_path / "scan.mha").read_bytes()
    np.testing.assert_array_equal(
        read_volume(tmp_path / "scan.mha").array_CZYX[0], sitk.GetArrayFromImage(image)
    )


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.nrrd", "scan.mha", "scan.mhd"])
def test_a_volume_of_terabytes_is_refused_before_memory_is_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither NumPy nor SimpleITK gets as far as the values."""
    path = tmp_path / name
    nifti = nifti_header("<", (30_000, 30_000, 30_000), code=4, bits=16) + bytes(1000)
    sizes = "30000 30000 30000"
    meta = f"ObjectType = Image\nNDims = 3\nDimSize = {sizes}\nElementType = MET_SHORT\nElementDataFile = "
    (tmp_path / "scan.raw").write_bytes(bytes(1000))
    path.write_bytes(
        {
            "scan.nii": nifti,
            "scan.nii.gz": gzip.compress(nifti),
            "scan.nrrd": f"NRRD0004\ntype: short\ndimension: 3\nsizes: {sizes}\nencoding: gzip\n\n".encode(),
            "scan.mha": meta.encode() + b"LOCAL\n" + bytes(1000),
            "scan.mhd": meta.encode() + b"scan.raw\n",
        }[name]
    )
    monkeypatch.setattr(np, "empty", None)
    monkeypatch.setattr(sitk, "ImageFileReader", None)
    for read in (read_header, read_volume):
        with pytest.raises(
            SuperCLError, match=r"bytes of voxels where the header asks for (54|27),000,000,000,000"
        ):
            read(path)


def test_a_segmentation_of_slicer_is_read_with_its_long_lines(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    image = sitk.GetImageFromArray(values)
    image.SetMetaData("Segmentation_ConversionParameters", "Collapse labelmaps|1|Merge the labelmaps&" * 100)
    sitk.WriteImage(image, str(tmp_path / "scan.seg.nrrd"))
    assert max(map(len, (tmp_path / "scan.seg.nrrd").read_bytes().split(b"\n"))) > 3000
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.seg.nrrd").array_CZYX[0], values)


def test_wide_voxels_count_too(tmp_path: Path) -> None:
    """One byte a voxel would have room in the file, and these have eight."""
    path = tmp_path / "scan.nrrd"
    path.write_bytes(
        b"NRRD0004\ntype: double\ndimension: 3\nsizes: 4 3 2\nencoding: raw\nendian: little\n\n" + bytes(24)
    )
    with pytest.raises(SuperCLError, match=r"header asks for 192\n"):
        read_header(path)


def test_the_best_compression_there_is_has_room(tmp_path: Path) -> None:
    """Zeros: what is refused as too much for a file must be more than gzip can do."""
    content = nifti_header("<", (512, 512, 64), code=4, bits=16) + bytes(512 * 512 * 64 * 2)
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(content, 9))
    assert len(content) > 1000 * (tmp_path / "scan.nii.gz").stat().st_size
    assert not read_volume(tmp_path / "scan.nii.gz").array_CZYX.any()


def test_more_values_than_declared_are_noticed_and_padding_is_not(tmp_path: Path) -> None:
    content = nifti_header("<", (4, 3, 2), code=4, bits=16) + bytes(48)
    (tmp_path / "padded.nii").write_bytes(content + bytes(4096))
    assert read_volume(tmp_path / "padded.nii").array_CZYX.shape == (1, 2, 3, 4)
    (tmp_path / "more.nii").write_bytes(content + bytes(4097))
    with pytest.raises(SuperCLError, match=r"more values than the header's shape \(2, 3, 4\)"):
        read_volume(tmp_path / "more.nii")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        # A number too few, which is read from the next line.
        ("ElementSpacing = 1 1\n1 ElementDataFile = /etc/hostname", "fields, each given once"),
        (" ElementDataFile = /etc/hostname", "fields, each given once"),
        ("elementdatafile = /etc/hostname", "fields, each given once"),
        ("Comment = " + "x" * 2000, "a line of 2,010 characters"),
    ],
)
def test_a_second_way_to_read_a_header_is_refused(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "scan.mha"
    header = f"ObjectType = Image\nNDims = 3\n{line}\nDimSize = 4 3 2\nElementType = MET_SHORT\n"
    path.write_bytes(header.encode() + b"ElementDataFile = LOCAL\n" + bytes(48))
    with pytest.raises(SuperCLError, match=message):
        read_volume(path)


def test_values_of_a_header_lie_beside_it_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "secret.raw").write_bytes(bytes(48))
    (tmp_path / "in").mkdir()
    for name in ("scan.mhd", "scan.nrrd"):
        for place in ("../secret.raw", str(tmp_path / "secret.raw"), "LIST", "scan%02d.raw 1 2 1"):
            header = {
                "scan.mhd": f"ObjectType = Image\nNDims = 3\nDimSize = 4 3 2\nElementType = MET_SHORT\n"
                f"ElementDataFile = {place}\n",
                "scan.nrrd": f"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 3 2\nencoding: raw\nendian: little\n"
                f"data file: {place}\n",
            }[name]
            (tmp_path / "in" / name).write_text(header)
            with pytest.raises(SuperCLError, match="takes its values from elsewhere"):
                read_volume(tmp_path / "in" / name)
            (tmp_path / "in" / name).write_text(header.replace(place, "own.raw"))
            (tmp_path / "in" / "own.raw").write_bytes(np.arange(24, dtype="<i2").tobytes())
            np.testing.assert_array_equal(
                read_volume(tmp_path / "in" / name).array_CZYX.ravel(), np.arange(24)
            )


def test_a_pair_of_header_and_values_is_read_as_one_file_is(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32)
    content = bytearray(nifti_header("<", (4, 3, 2), code=16, bits=32))
    content[344:348] = b"ni1\0"
    struct.pack_into("<f", content, 108, 0)
    (tmp_path / "scan.hdr").write_bytes(content[:348])
    (tmp_path / "scan.img").write_bytes(values.tobytes())
    assert_read_as_simpleitk_reads(tmp_path / "scan.hdr")
    values[5] = np.nan
    (tmp_path / "scan.img").write_bytes(values.tobytes())
    with pytest.raises(SuperCLError, match=r"first at \(c, z, y, x\) = \(0, 0, 1, 1\)"):
        read_volume(tmp_path / "scan.hdr")
    (tmp_path / "scan.img").write_bytes(values.tobytes()[:-4])
    with pytest.raises(SuperCLError, match="92 bytes of voxels where the header asks for 96"):
        read_volume(tmp_path / "scan.hdr")


def test_spacing_that_cannot_be_is_told_and_replaced(tmp_path: Path) -> None:
    """Where an axis has one voxel it does not matter."""
    for lengths, pixdim, problem in [
        ((4, 3, 2), (0.5, 2, 0), "a spacing (x, y, z) of (0.5, 2.0, 0.0)"),
        ((4, 3, 2), (0.5, -2, 1), "a spacing (x, y, z) of (0.5, -2.0, 1.0)"),
        ((4, 3, 2), (0.5, 2, np.inf), "a spacing (x, y, z) of (0.5, 2.0, inf)"),
        ((4, 3, 1), (0.5, 2, 0), ""),
        ((4, 3), (0.5, 2, np.nan), ""),
    ]:
        header = bytearray(nifti_header("<", lengths, code=4, bits=16))
        struct.pack_into("<3f", header, 80, *pixdim)
        (tmp_path / "scan.nii").write_bytes(bytes(header) + bytes(48))
        geometry = read_volume(tmp_path / "scan.nii").geometry
        assert geometry.spacing_problem == problem
        assert min(geometry.spacing_mm) > 0


def test_a_line_of_voxels_is_a_volume(tmp_path: Path) -> None:
    (tmp_path / "scan.nii").write_bytes(nifti_header("<", (4,), code=4, bits=16) + bytes(8))
    volume = read_volume(tmp_path / "scan.nii")
    assert volume.array_CZYX.shape == read_header(tmp_path / "scan.nii").shape == (1, 1, 1, 4)
    assert volume.geometry.spacing_mm == (1, 1, 1)


def test_orientation_of_a_file_without_one_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "scan.nii").write_bytes(nifti_header("<", (4, 3, 2), code=4, bits=16) + bytes(48))
    assert orientation(read_volume(tmp_path / "scan.nii").geometry) == "unknown"


def test_a_reason_is_the_same_in_every_run(tmp_path: Path) -> None:
    """SimpleITK puts addresses in memory and full paths into its messages, and reasons are stored in the cache."""
    reasons = set()
    for folder in ("a", "b"):
        path = tmp_path / folder / "scan.nrrd"
        path.parent.mkdir()
        path.write_bytes(
            b"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 3 2\nencoding: raw\nspacings: 0 1 1\n\n"
            + bytes(48)
        )
        with pytest.raises(SuperCLError, match="cannot be read as a volume") as caught:
            read_volume(path)
        reasons.add(caught.value.one_line())
    assert len(reasons) == 1
    assert folder + "/" not in reasons.pop()


def test_directions_that_keep_simpleitk_busy_for_ever_are_refused(tmp_path: Path) -> None:
    """Its singular value decomposition does not end for an infinite matrix."""
    header = (
        "ObjectType = Image\nNDims = 3\nTransformMatrix = 1 0 0 0 1 0 1e308 0 1\nElementSpacing = 1 1 3\n"
        "DimSize = 4 3 2\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    (tmp_path / "scan.mha").write_bytes(header.encode() + bytes(48))
    with pytest.raises(SuperCLError, match="not perpendicular"):
        read_volume(tmp_path / "scan.mha")


def test_an_origin_that_cannot_be_is_refused(tmp_path: Path) -> None:
    header = "ObjectType = Image\nNDims = 3\nOffset = 1e300 0 0\nDimSize = 4 3 2\nElementType = MET_SHORT\n"
    (tmp_path / "scan.mha").write_bytes(header.encode() + b"ElementDataFile = LOCAL\n" + bytes(48))
    with pytest.raises(SuperCLError, match="origin"):
        read_volume(tmp_path / "scan.mha")


HEADER = nifti_header("<", (4, 3, 2), code=4, bits=16)
changes = st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=6)
words = st.lists(
    st.tuples(
        st.integers(0, 87).map(lambda i: 4 * i),
        st.sampled_from([0, -1, 1, 2**31 - 1, -(2**31), 0x7FC00000, 0x7F800000, 0x00010001, 0x7FFF7FFF]),
    ),
    max_size=3,
)


@given(changes, words, st.sampled_from([".nii", ".nii.gz", ".hdr"]))
@settings(max_examples=300, deadline=None)
def test_any_header_gives_a_volume_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, changed: list, wide: list, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzzed{suffix}"
    content = bytearray(HEADER + np.arange(24, dtype="<i2").tobytes())
    for place, value in wide:
        struct.pack_into("<i", content, place, value)
    for place, value in changed:
        content[place] = value
    path.write_bytes(gzip.compress(content, 1) if suffix == ".nii.gz" else content)
    path.with_suffix(".img").write_bytes(content[352:])
    for read in (read_header, read_volume):
        with suppress(SuperCLError):
            read(path)


@given(st.binary(max_size=200), st.sampled_from([".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"]))
@settings(max_examples=100, deadline=None)
def test_any_bytes_give_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"random{suffix}"
    start = {".nrrd": b"NRRD0004\n", ".mha": b"ObjectType = Image\nNDims = 3\n", ".nii.gz": b"\x1f\x8b\x08"}
    path.write_bytes(start.get(suffix, b"") + content)
    with pytest.raises(SuperCLError):
        read_volume(path)


def test_threads_that_read_at_a_time_do_not_abort_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two threads within SimpleITK may, once in a thousand runs: what can be tested is that there are never two.
    paths = [tmp_path / f"{index}.nrrd" for index in range(6)]
    for path in paths:
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 3, 4), np.int16)), str(path))
    at_a_time = {"now": 0, "most": 0}

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            at_a_time["now"] += 1
            at_a_time["most"] = max(at_a_time.values())
            time.sleep(0.005)
            try:
                return method(*arguments)
            finally:
                at_a_time["now"] -= 1

        return call

    for name in ("ReadImageInformation", "Execute"):
        monkeypatch.setattr(sitk.ImageFileReader, name, watched(getattr(sitk.ImageFileReader, name)))
    with ThreadPoolExecutor(6) as pool:
        shapes = [volume.array_CZYX.shape for volume in pool.map(read_volume, paths)]
    assert shapes == [(1, 2, 3, 4)] * 6
    assert at_a_time == {"now": 0, "most": 1}


@pytest.mark.parametrize("order", ["<", ">"])
def test_analyze_pairs_are_read_without_slope_and_orientation(order: str, tmp_path: Path) -> None:
    """Where NIfTI has these, Analyze 7.5 has other things."""
    from nibabel.analyze import AnalyzeHeader, AnalyzeImage

    values = np.arange(24, dtype=np.int16).reshape(4, 3, 2)
    header = AnalyzeHeader(endianness=order)
    header.set_data_dtype(np.int16)
    image = AnalyzeImage(values, np.diag([0.5, 0.75, 3, 1]), header)
    image.to_filename(tmp_path / "scan.img")
    content = bytearray((tmp_path / "scan.hdr").read_bytes())
    content[112:120] = np.array([5, 7], f"{order}f4").tobytes()
    content[252:256] = b"text"
    (tmp_path / "scan.hdr").write_bytes(content)
    volume = read_volume(tmp_path / "scan.hdr")
    np.testing.assert_array_equal(volume.array_CZYX[0], values.T)
    assert volume.geometry.spacing_mm == (0.5, 0.75, 3)
    assert not volume.geometry.oriented
