"""One volume in or out, with its geometry, through SimpleITK (every volume and image format it reads).

Reads images and label maps for preprocessing and prediction, writes label maps in the geometry of their image.
The values of NIfTI files are unpacked here: NIfTI's reference reader, through which SimpleITK reads, turns NaN and
infinite values into 0 without a word, fills up a file that is cut off with 0, and makes a slice of an axis
without any. Says nothing about which files a data set has: that is `supercl_core.sources`.
"""

from __future__ import annotations

import io
import math
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from supercl_core.errors import SuperCLError
from supercl_core.files import atomic_file

_UNPACKED_AT_ONCE: Final = 1 << 20
"""Bytes."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where a volume lies in space, as SimpleITK gives it: axes in the order x, y, z."""

    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    direction: tuple[float, ...]
    """Row-major 3 x 3 direction cosines."""


@dataclass(frozen=True, kw_only=True)
class Volume:
    """One image or label map in memory."""

    array_CZYX: np.ndarray
    """Values as stored in the file (rescaled by the format's own slope), native byte order."""
    geometry: Geometry


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of its volume before the values are read."""

    shape: tuple[int, int, int, int]
    """Channels, slices, rows, columns."""
    dtype: str
    """SimpleITK's name of the pixel type."""


def read_header(path: Path) -> Header:
    """Read the shape and pixel type of a volume without its values.

    Raises SuperCLError when the file is missing or no volume.
    """
    reader = _reader(path)
    _run(path, reader.ReadImageInformation)
    size = list(reader.GetSize())
    num_channels = reader.GetNumberOfComponents()
    if len(size) == 4:
        num_channels *= size[3]
    size = [*size[:3], 1][:3]
    sitk = _simpleitk()
    return Header(
        shape=(num_channels, size[2], size[1], size[0]),
        dtype=sitk.GetPixelIDValueAsString(reader.GetPixelID()),
    )


def read_volume(path: Path) -> Volume:
    """Read a 2-D, 3-D or multi-channel volume as (c, z, y, x); channels are the fourth axis or vector components.

    Raises SuperCLError when the file is missing, damaged or no volume, when a dimension is zero, or when a value
    is NaN or infinite.
    """
    reader = _reader(path)
    _run(path, reader.ReadImageInformation)
    nifti = _read_nifti(path) if path.name.lower().endswith((".nii", ".nii.gz")) else None
    if nifti is not None and _is_scalar(nifti, reader):
        array = stored = _rescaled(nifti, reader)
        geometry = _geometry(reader)
    else:
        image = _run(path, reader.Execute)
        array = _channels_first(path, image)
        stored = nifti.values if nifti is not None and nifti.values.dtype.kind == "f" else array
        geometry = _geometry(image)
    if array.size == 0:
        raise _empty(path, array.shape[1:])
    if array.dtype.kind == "c":
        raise SuperCLError(
            "The volume holds complex numbers.",
            where=path,
            expected="real values",
            found=array.dtype,
            next_step="Export the magnitude image.",
        )
    _check_finite(path, stored.reshape(array.shape))
    return Volume(array_CZYX=array, geometry=geometry)


def orientation(geometry: Geometry) -> str:
    """The anatomical directions in which x, y and z grow, such as `LPS`."""
    return _simpleitk().DICOMOrientImageFilter.GetOrientationFromDirectionCosines(geometry.direction)


def write_label_map(path: Path, label_map_ZYX: np.ndarray, geometry: Geometry) -> None:
    """Write a label map, uint8 (z, y, x), atomically and in the given geometry; the suffix names the format."""
    sitk = _simpleitk()
    image = sitk.GetImageFromArray(np.ascontiguousarray(label_map_ZYX, dtype=np.uint8))
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction)
    with atomic_file(path) as wip:
        wip.touch()  # where that is refused, the system says why; SimpleITK does not
        sitk.WriteImage(image, str(wip), useCompression=True)


def _check_finite(path: Path, array_CZYX: np.ndarray) -> None:
    if array_CZYX.dtype.kind != "f":
        return
    if all(np.isfinite(slice_YX).all() for volume_ZYX in array_CZYX for slice_YX in volume_ZYX):
        return
    finite = np.isfinite(array_CZYX)
    first = tuple(int(i) for i in np.argwhere(~finite)[0])
    raise SuperCLError(
        "The volume has values that are NaN or infinite.",
        where=path,
        expected="finite values",
        found=f"{int((~finite).sum())} such voxels, the first at (c, z, y, x) = {first}",
        next_step="Replace them by a background value and run again.",
    )


@dataclass(frozen=True, kw_only=True)
class _Nifti:
    """The content of a NIfTI file."""

    values: np.ndarray
    """As stored, in native byte order; axes in the order of memory, so that x is the last."""
    slope: float
    intercept: float


def _read_nifti(path: Path) -> _Nifti:
    """Unpack a NIfTI file once, straight to where its values stay.

    Raises SuperCLError when the file is cut off, its gzip checksum is wrong or a dimension is zero.
    """
    import nibabel
    from isal import igzip
    from isal.igzip_lib import IsalError
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        with ExitStack() as stack:
            file: Any = stack.enter_context(path.open("rb"))
            if file.peek(2).startswith(b"\x1f\x8b"):
                unpacked = stack.enter_context(igzip.open(file))
                file = stack.enter_context(io.BufferedReader(unpacked, _UNPACKED_AT_ONCE))
            header = nibabel.Nifti1Header.from_fileobj(file)
            shape, dtype = header.get_data_shape()[::-1], header.get_data_dtype()
            if 0 in shape:
                raise _empty(path, shape)
            values = np.empty(shape, dtype)
            file.seek(header.get_data_offset())
            num_read = file.readinto(values.reshape(-1).view(np.uint8))
            if num_read < values.nbytes:
                raise EOFError(f"{num_read:,} bytes of voxels where the header asks for {values.nbytes:,}")
            while file.read(_UNPACKED_AT_ONCE):
                pass  # the checksum is behind the last byte
    except (
        OSError,
        EOFError,
        ValueError,
        zlib.error,
        IsalError,  # type: ignore[misc]  # its stubs call the class an instance
        ImageFileError,
        HeaderDataError,
    ) as error:
        raise SuperCLError(
            "The file is damaged.",
            where=path,
            expected="a NIfTI file with all its voxels and the right checksum",
            found=error,
            next_step="Copy or export it again.",
        ) from error
    if not dtype.isnative:
        values = values.byteswap(inplace=True).view(dtype.newbyteorder("="))
    return _Nifti(values=values, slope=float(header["scl_slope"]), intercept=float(header["scl_inter"]))


def _is_scalar(nifti: _Nifti, reader: Any) -> bool:
    """Whether each stored number is one voxel of the image that SimpleITK makes of the file."""
    return (
        nifti.values.dtype.kind in "iuf"
        and reader.GetNumberOfComponents() == 1
        and reader.GetDimension() <= 4
        and math.prod(reader.GetSize()) == nifti.values.size
    )


def _rescaled(nifti: _Nifti, reader: Any) -> np.ndarray:
    """The values as (c, z, y, x), with the file's slope and intercept: what SimpleITK makes of them, bit by bit."""
    size = [*reader.GetSize(), 1, 1][:4]
    array = nifti.values.reshape(size[::-1])
    slope = nifti.slope if math.isfinite(nifti.slope) and nifti.slope != 0 else 1.0
    intercept = nifti.intercept if math.isfinite(nifti.intercept) else 0.0
    tiny = float(np.finfo(np.float64).eps)
    if abs(slope) <= tiny or (abs(slope - 1) <= tiny and abs(intercept) <= tiny):
        return array
    array = array.astype(np.float64 if array.dtype == np.float64 else np.float32, copy=False)
    for channel in array:
        for part in channel:
            part[...] = part.astype(np.float64) * slope + intercept
    return array


def _channels_first(path: Path, image: Any) -> np.ndarray:
    """The values of a SimpleITK image as (c, z, y, x)."""
    array = _simpleitk().GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    elif image.GetDimension() < 4:
        array = array[None]
    if image.GetDimension() == 2:
        array = array[:, None]
    if array.ndim != 4:
        raise SuperCLError(
            "The volume has more axes than channels, slices, rows and columns.",
            where=path,
            expected="2, 3 or 4 axes",
            found=f"size {image.GetSize()} with {image.GetNumberOfComponentsPerPixel()} components",
            next_step="Split the file into one volume per time point.",
        )
    return array


def _empty(path: Path, shape: tuple[int, ...]) -> SuperCLError:
    return SuperCLError(
        "The volume is empty.",
        where=path,
        expected="at least one voxel along every axis",
        found=f"shape {shape}, columns last",
        next_step="Remove the file or export the volume again.",
    )


def _geometry(image: Any) -> Geometry:
    """Geometry of a SimpleITK image of 2 to 4 dimensions; what a 2-D image lacks is 1, 0 and identity."""
    dimension = image.GetDimension()
    used = min(dimension, 3)
    direction = np.eye(3)
    direction[:used, :used] = np.reshape(image.GetDirection(), (dimension, dimension))[:used, :used]
    return Geometry(
        spacing_mm=(*image.GetSpacing()[:3], 1.0)[:3],
        origin_mm=(*image.GetOrigin()[:3], 0.0)[:3],
        direction=tuple(direction.ravel().tolist()),
    )


def _reader(path: Path) -> Any:
    if not path.is_file():
        raise SuperCLError(
            "The file does not exist.",
            where=path,
            next_step="Check the path, or remove the case from the data set's list.",
        )
    reader = _simpleitk().ImageFileReader()
    reader.SetFileName(str(path))
    return reader


def _run(path: Path, action: Any) -> Any:
    try:
        return action()
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise SuperCLError(
            "The file cannot be read as a volume.",
            where=path,
            expected="a format that SimpleITK reads, undamaged",
            found=lines[-1] if lines else "no reason given",
            next_step="Open it with another viewer; remove it or export it again if that fails too.",
        ) from None


def _simpleitk() -> Any:
    """SimpleITK, imported on first use (0.2 s), its own messages off: errors say what they say."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk
