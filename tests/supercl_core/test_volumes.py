"""Volumes in and out: axes, geometry, and files that must be refused."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from supercl_core.errors import SuperCLError
from supercl_core.volumes import Geometry, orientation, read_header, read_volume, write_label_map

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
        with pytest.raises(SuperCLError, match="cannot be read as a volume") as caught:
            read(tmp_path / "scan.nii.gz")
        assert caught.value.found


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
    assert read_header(path).shape == (1, 8, 32, 32)
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
