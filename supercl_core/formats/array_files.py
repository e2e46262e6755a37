"""Volumes in files of arrays: `.npy`, `.npz` and HDF5. Nothing is unpickled, and no other file is followed.

An array is (y, x), (z, y, x) or (c, z, y, x), of integers, floats or truth values. Of a file of several arrays, the
image is `image`, or the only one beside `label`; the label map is `label`. Called by `supercl_core.formats.case_files`
and `supercl_core.sources.arrays`.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from supercl_core.errors import SuperCLError, printable
from supercl_core.formats.geometry import UNPLACED
from supercl_core.formats.volume_files import check_shape, damaged, ending, opened
from supercl_core.formats.volume_headers import MOST_INFLATED
from supercl_core.formats.volumes import Header, Volume, check_finite

_SUFFIXES: Final = (".npy", ".npz", ".h5", ".hdf5")

_HEADER: Final = re.compile(
    rb"\{'descr': '([<>|]?(?:O|b1|[iu][1248]|f[248]|c8|c16|[USV]\d{1,4}))', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}L?, ?)*(?:\d{1,18}L?)?)\),? *\} *\n?"
)
_MOST_HEADER_BYTES: Final = 10_000
_READ_AT_ONCE: Final = 1 << 24
"""Bytes."""

Part = Literal["image", "label"]


@dataclass(frozen=True, kw_only=True)
class _Array:
    """An array in an open file, not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    room_bytes: int
    """How many bytes of values the file can hold."""
    stored: Any
    """A stream of the values (.npy, .npz), or a dataset of h5py."""
    is_fortran: bool = False


def array_suffix(name: str) -> str | None:
    """The ending by which a file name is that of arrays; None where it is not."""
    return ending(name, _SUFFIXES)


def has_label(path: Path) -> bool:
    """Whether the file of an image holds its label map too. Raises as `read_array` does, but for what is in arrays."""
    with _names(path) as (names, _):
        return "label" in names and len(names) > 1


def read_array_header(path: Path, part: Part = "image") -> Header:
    """The shape (c, z, y, x) and the dtype of an array, without its values. Raises as `read_array` does."""
    with _array(path, part) as array:
        return Header(shape=_shape_CZYX(array.shape), dtype=array.dtype.name)


def read_array(path: Path, part: Part = "image") -> Volume:
    """Read an image or a label map as (c, z, y, x), native byte order; it has no spacing.

    Truth values become uint8, half precision becomes float32. Memory is asked for only where the file can fill it.

    Raises SuperCLError when the file is missing, damaged, holds no such array or several that could be meant, when the
    array has another number of axes, another type (such as pickled objects), keeps its values in another file, or
    holds NaN or infinite values, and when an HDF5 file is to be read without h5py.
    """
    with _array(path, part) as array:
        values = np.empty(array.shape, array.dtype, order="F" if array.is_fortran else "C")
        if hasattr(array.stored, "read_direct"):
            array.stored.read_direct(values)
        else:
            # Of Fortran order, the transposed view is in the order of the file.
            flat = (values.T if array.is_fortran else values).reshape(-1).view(np.uint8)
            if (num_read := _read_into(array.stored, flat)) < flat.nbytes:
                raise damaged(path, f"{num_read:,} bytes of values where the header asks for {flat.nbytes:,}")
    if values.dtype.kind == "b":
        values = values.view(np.uint8)
    elif values.dtype == np.float16:
        values = values.astype(np.float32)
    values = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="), copy=False))
    array_CZYX = values.reshape(_shape_CZYX(values.shape))
    check_finite(path, array_CZYX)
    return Volume(array_CZYX=array_CZYX, geometry=UNPLACED)


@contextmanager
def _array(path: Path, part: Part) -> Iterator[_Array]:
    """The image or the label map of a file, checked but for its values."""
    with _names(path) as (names, file):
        name = _chosen(path, names, part)
        array = _of_hdf5(path, file[name]) if hasattr(file, "visititems") else _of_numpy(path, file, name)
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise SuperCLError(
                "The array's type is not supported.",
                where=path,
                expected="integers, truth values, or floats of at most 64 bits",
                found=f"{array.dtype} (pickled objects are never read)"
                if array.dtype.hasobject
                else array.dtype,
                next_step="Convert the array.",
            )
        if not 2 <= len(array.shape) <= 4:
            raise SuperCLError(
                "The array has another number of axes than an image.",
                where=path,
                expected="(y, x), (z, y, x) or (c, z, y, x)",
                found=f"shape {array.shape}",
                next_step="Save one file for each case.",
            )
        check_shape(path, array.shape, array.dtype.itemsize, array.room_bytes)
        yield array


@contextmanager
def _names(path: Path) -> Iterator[tuple[list[str], Any]]:
    """The names of the arrays in a file (of an `.npy` file, which has none, `image`), and the open file."""
    with opened(path) as stream:
        try:
            match array_suffix(path.name):
                case ".npy":
                    yield ["image"], stream
                case ".npz":
                    with zipfile.ZipFile(stream) as archive:
                        yield [info.filename.removesuffix(".npy") for info in archive.infolist()], archive
                case _:
                    with _h5py(path).File(path, "r") as file:
                        yield _datasets(file), file
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            TypeError,
            RuntimeError,  # what h5py and zipfile raise for what they do not know
            struct.error,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise damaged(path, error, expected="an undamaged file of arrays") from error


def _chosen(path: Path, names: list[str], part: Part) -> str:
    """The rule by which one of the arrays of a file is the image or the label map."""
    others = [name for name in names if name != "label"]
    if part in names:
        return part
    if len(names) == 1 or (part == "image" and len(others) == 1):
        return (others or names)[0]
    shown = ", ".join(printable(name)[:40] for name in names[:8]) + (", ..." if len(names) > 8 else "")
    raise SuperCLError(
        f"The file does not say which array is the {part}.",
        where=path,
        expected="an array `image` and, where there are labels, one `label`; or one array alone",
        found=shown or "no array",
        next_step="Rename the arrays, or save one for each file.",
    )


def _of_numpy(path: Path, file: Any, name: str) -> _Array:
    """An array of an `.npy` file, or a member of an archive of such files."""
    if isinstance(file, zipfile.ZipFile):
        member = next(info for info in file.infolist() if info.filename.removesuffix(".npy") == name)
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise damaged(path, f"compression {member.compress_type}", expected="what NumPy writes")
        stream: Any = file.open(member)
        room_bytes = min(member.file_size, member.compress_size * MOST_INFLATED)
    else:
        stream, room_bytes = file, path.stat().st_size
    return _with_header(path, stream, room_bytes)


def _with_header(path: Path, stream: Any, room_bytes: int) -> _Array:
    """The array of which a stream of the `.npy` format comes; its values are what is left to be read.

    NumPy parses this header as Python code; here it has to be as NumPy writes it.
    """
    start = stream.read(8)
    length_bytes = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}.get(start, 0)
    header = stream.read(min(int.from_bytes(stream.read(length_bytes), "little"), _MOST_HEADER_BYTES))
    found = _HEADER.fullmatch(header)
    if found is None:
        raise damaged(
            path, f"{start + header[:80]!r}", expected="a header as NumPy writes it, of one plain type"
        )
    shape = tuple(int(length) for length in found[3].replace(b"L", b"").split(b",") if length.strip())
    return _Array(
        shape=shape,
        dtype=np.dtype(found[1].decode()),
        room_bytes=room_bytes,
        stored=stream,
        is_fortran=found[2] == b"True",
    )


def _read_into(stream: Any, flat: np.ndarray) -> int:
    """Fill `flat`, uint8, from a stream; returns how many bytes there were."""
    num_read = 0
    while num_read < flat.size and (count := stream.readinto(flat[num_read : num_read + _READ_AT_ONCE])):
        num_read += count
    if num_read == flat.size:
        stream.read(1)  # the checksum of a member of an archive is compared at its end
    return num_read


def _of_hdf5(path: Path, dataset: Any) -> _Array:
    if dataset.external or dataset.is_virtual:
        raise SuperCLError(
            "The HDF5 file takes its values from elsewhere.",
            where=path,
            expected="values in the same file",
            found=f"{printable(dataset.name)} in other files",
            next_step="Save the volume as one file.",
        )
    room_bytes = dataset.id.get_storage_size() * MOST_INFLATED
    if dataset.chunks is not None:  # each is unpacked as a whole, however little of it the array uses
        check_shape(path, dataset.chunks, dataset.dtype.itemsize, room_bytes)
    return _Array(shape=dataset.shape or (), dtype=dataset.dtype, room_bytes=room_bytes, stored=dataset)


def _datasets(file: Any) -> list[str]:
    """The datasets of an HDF5 file, by their path in it; links, which may lead to other files, are not followed."""
    found: list[str] = []
    file.visititems(lambda name, item: found.append(name) if hasattr(item, "shape") else None)
    return found


def _h5py(path: Path) -> Any:
    try:
        import h5py
    except ImportError:
        raise SuperCLError(
            "HDF5 files need h5py, which is not installed.",
            where=path,
            next_step="pip install 'supercl[hdf5]'",
        ) from None
    return h5py


def _shape_CZYX(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    channels, slices, rows, columns = (1,) * (4 - len(shape)) + tuple(shape)
    return channels, slices, rows, columns
