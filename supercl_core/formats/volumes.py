"""One volume in or out, with its geometry, through SimpleITK (every volume and image format it reads).

Reads images and label maps for preprocessing and prediction, writes label maps in the geometry of their image.
The values of NIfTI files are unpacked here: NIfTI's reference reader, through which SimpleITK reads, turns NaN and
infinite values into 0 without a word, fills up a file that is cut off with 0, and makes a slice of an axis
without any. Says nothing about which files a data set has: that is `supercl_core.sources`.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from supercl_core.errors import SuperCLError, printable
from supercl_core.files import atomic_file
from supercl_core.formats.geometry import Geometry
from supercl_core.formats.volume_files import check_packed, check_shape, damaged, unpacked
from supercl_core.formats.volume_headers import SPACINGS_MM, NiftiHeader, VolumeFile, check_axes, inspect_file

_UNPACKED_AT_ONCE: Final = 1 << 20
"""Bytes."""
_FARTHEST_MM: Final = 1e9
_MOST_PADDING: Final = 4096
"""Bytes behind the last voxel that are no sign of a wrong header."""


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
    """The type of the values, as the reader of the format calls it."""


def read_header(path: Path) -> Header:
    """Read the shape and pixel type of a volume without its values.

    Raises SuperCLError when the file is missing, no volume, or smaller than what it declares.
    """
    with _reader(path) as (_, reader):
        return _header(reader)


def read_volume(path: Path) -> Volume:
    """Read a 2-D, 3-D or multi-channel volume as (c, z, y, x); channels are the fourth axis or vector components.

    Raises SuperCLError when the file is missing, damaged, no volume or smaller than what it declares, when its axes
    are not perpendicular, or when a value is NaN or infinite. Memory is asked for only where the file can fill it.
    """
    with _reader(path) as (file, reader):
        geometry = _geometry(path, file, reader)
        header = file.nifti
        values = None if header is None else _read_nifti(file, header)
        if header is not None and values is not None and _is_scalar(values, reader):
            array = stored = _rescaled(values, header, reader)
        else:
            if file.packed_at is not None:
                check_packed(file.data_path, file.packed_at)
            array = _channels_first(run_reader(path, reader.Execute))
            stored = values if values is not None and values.dtype.kind == "f" else array
    if array.dtype.kind == "c":
        raise SuperCLError(
            "The volume holds complex numbers.",
            where=path,
            expected="real values",
            found=array.dtype,
            next_step="Export the magnitude image.",
        )
    check_finite(path, stored.reshape(array.shape))
    return Volume(array_CZYX=array, geometry=geometry)


def orientation(geometry: Geometry) -> str:
    """The anatomical directions in which x, y and z grow, such as `LPS`; `unknown` where the file does not say."""
    if not geometry.oriented:
        return "unknown"
    return simpleitk().DICOMOrientImageFilter.GetOrientationFromDirectionCosines(geometry.direction)


def write_label_map(path: Path, label_map_ZYX: np.ndarray, geometry: Geometry) -> None:
    """Write a label map, uint8 (z, y, x), atomically and in the given geometry; the suffix names the format."""
    sitk = simpleitk()
    image = sitk.GetImageFromArray(np.ascontiguousarray(label_map_ZYX, dtype=np.uint8))
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction)
    with atomic_file(path) as wip:
        wip.touch()  # where that is refused, the system says why; SimpleITK does not
        sitk.WriteImage(image, str(wip), useCompression=True)


def check_finite(path: Path, array_CZYX: np.ndarray) -> None:
    """Raise SuperCLError where a value of a volume is NaN or infinite."""
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


def _read_nifti(file: VolumeFile, header: NiftiHeader) -> np.ndarray:
    """Unpack the values of a NIfTI file once, straight to where they stay: as stored, in native byte order.

    Raises SuperCLError when the file is cut off, longer than its header says, or its gzip checksum is wrong.
    """
    values = np.empty(header.shape, header.dtype)
    with unpacked(file.data_path, _UNPACKED_AT_ONCE) as data:
        data.seek(header.offset_bytes)
        num_read = data.readinto(values.reshape(-1).view(np.uint8))
        num_behind = len(data.read(_MOST_PADDING + 1))  # the checksum is behind the last byte
    if num_read < values.nbytes:
        raise damaged(
            file.data_path, f"{num_read:,} bytes of voxels where the header asks for {values.nbytes:,}"
        )
    if num_behind > _MOST_PADDING:
        raise damaged(
            file.data_path, f"more values than the header's shape {header.shape} (columns last) has voxels"
        )
    if not header.dtype.isnative:
        values = values.byteswap(inplace=True).view(header.dtype.newbyteorder("="))
    return values


def _is_scalar(values: np.ndarray, reader: Any) -> bool:
    """Whether each stored number is one voxel of the image that SimpleITK makes of the file."""
    return (
        values.dtype.kind in "iuf"
        and reader.GetNumberOfComponents() == 1
        and math.prod(reader.GetSize()) == values.size
    )


def _rescaled(values: np.ndarray, header: NiftiHeader, reader: Any) -> np.ndarray:
    """The values as (c, z, y, x), with the file's slope and intercept: what SimpleITK makes of them, bit by bit."""
    size = [*reader.GetSize(), 1, 1, 1][:4]
    array = values.reshape(size[::-1])
    slope = header.slope if math.isfinite(header.slope) and header.slope != 0 else 1.0
    intercept = header.intercept if math.isfinite(header.intercept) else 0.0
    tiny = float(np.finfo(np.float64).eps)
    if abs(slope) <= tiny or (abs(slope - 1) <= tiny and abs(intercept) <= tiny):
        return array
    array = array.astype(np.float64 if array.dtype == np.float64 else np.float32, copy=False)
    for channel in array:
        for part in channel:
            with np.errstate(over="ignore", invalid="ignore"):  # found as infinite values, and said
                part[...] = part.astype(np.float64) * slope + intercept
    return array


def _channels_first(image: Any) -> np.ndarray:
    """The values of a SimpleITK image as (c, z, y, x)."""
    array = simpleitk().GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    elif image.GetDimension() < 4:
        array = array[None]
    return array[:, None] if image.GetDimension() == 2 else array


def _geometry(path: Path, file: VolumeFile, reader: Any) -> Geometry:
    """Geometry of a file of 2 to 4 dimensions; what a 2-D image lacks is 1, 0 and identity."""
    dimension = reader.GetDimension()
    used = min(dimension, 3)
    direction = np.eye(3)
    direction[:used, :used] = np.reshape(reader.GetDirection(), (dimension, dimension))[:used, :used]
    check_axes(path, direction)
    origin_mm = tuple([*reader.GetOrigin(), 0.0, 0.0][:3])
    if not np.abs(origin_mm).max() <= _FARTHEST_MM:
        raise damaged(
            path, f"the origin {origin_mm}", expected=f"coordinates of at most {_FARTHEST_MM:,.0f} mm"
        )
    declared = np.array([*reader.GetSpacing(), 1.0, 1.0][:3])
    usable = (declared >= SPACINGS_MM[0]) & (declared <= SPACINGS_MM[1])
    problem = file.nifti.spacing_problem if file.nifti is not None else ""
    if not problem and not usable.all():
        problem = f"a spacing (x, y, z) of {tuple(declared.tolist())}"
    return Geometry(
        spacing_mm=tuple(np.where(usable, declared, 1.0).tolist()),
        origin_mm=origin_mm,
        direction=tuple(direction.ravel().tolist()),
        oriented=file.nifti is None or file.nifti.oriented,
        spacing_problem=problem,
    )


_READING: Final = threading.Lock()
"""Held while SimpleITK reads: two threads that do so at a time may, rarely, abort the process (SimpleITK issue 74)."""


def _header(reader: Any) -> Header:
    size = [*reader.GetSize(), 1, 1, 1][:4]
    return Header(
        shape=(reader.GetNumberOfComponents() * size[3], size[2], size[1], size[0]),
        dtype=simpleitk().GetPixelIDValueAsString(reader.GetPixelID()),
    )


@contextmanager
def _reader(path: Path) -> Iterator[tuple[VolumeFile, Any]]:
    """A SimpleITK reader that has read the header of a file which can hold what that declares."""
    sitk = simpleitk()
    file = inspect_file(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(file.image_io)
    with ExitStack() as stack:
        name = path
        if file.misnamed_gzip:  # SimpleITK goes by the name
            name = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "volume.nii.gz"
            try:
                name.symlink_to(path.resolve())
            except OSError:  # Windows allows links to few users
                shutil.copyfile(path, name)
        reader.SetFileName(str(name))
        run_reader(path, reader.ReadImageInformation)
        size, num_components = reader.GetSize(), reader.GetNumberOfComponents()
        if len(size) + (num_components > 1) > 4:
            raise SuperCLError(
                "The volume has more axes than channels, slices, rows and columns.",
                where=path,
                expected="2, 3 or 4 axes",
                found=f"size {size} with {num_components} components",
                next_step="Split the file into one volume per time point.",
            )
        if file.nifti is None:  # of a NIfTI file, this is the type after rescaling
            itemsize = sitk.Image([1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
            check_shape(path, (num_components, *size[::-1]), itemsize, file.room_bytes)
        yield file, reader


def run_reader(path: Path, action: Callable[[], Any]) -> Any:
    """What `action`, a method of a SimpleITK reader of `path`, returns; SuperCLError where that cannot read it.

    One thread at a time, in the whole process.
    """
    try:
        with _READING:
            return action()
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Addresses in memory and the full path differ from run to run, and the reason is stored.
        reason = re.sub(r"\(0x[0-9a-f]+\)|\S*/(?=\S*\.)", "", lines[-1] if lines else "no reason given")
        raise SuperCLError(
            "The file cannot be read as a volume.",
            where=path,
            expected="a format that SimpleITK reads, undamaged",
            found=printable(reason),
            next_step="Open it with another viewer; remove it or export it again if that fails too.",
        ) from None


def simpleitk() -> Any:
    """SimpleITK, imported on first use (0.2 s), its own messages off: errors say what they say."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk
