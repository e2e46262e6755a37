"""What the header of a volume declares, held against its file before memory is asked for. Reads no values.

The libraries that read volumes believe their headers: they follow one to any other file, ask for the terabytes that it
declares, take 1 for a spacing of 0, and some numbers keep them busy for ever. So a file is looked at here first, and
only one that can hold what it declares is handed to SimpleITK. Called by `supercl_core.formats.volumes`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from supercl_core.errors import SuperCLError
from supercl_core.formats.volume_files import (
    FORMATS,
    GZIP_MAGIC,
    check_shape,
    damaged,
    file_beside,
    foreign,
    start_of,
    unpacked,
    volume_suffix,
)

SPACINGS_MM: Final = (1e-6, 1e6)
"""From a nanometre to a kilometre; nothing else is the spacing of a volume."""

MOST_INFLATED: Final = 1032
"""Bytes that one byte of a deflate stream can become: a pair of bits for 258 bytes (RFC 1951)."""

_MOST_HEADER_BYTES: Final = 1 << 20
_MOST_OFFSET_BYTES: Final = 1 << 28
"""Of a NIfTI file's extensions, which SimpleITK reads into memory."""
_MOST_LINE: Final = 1000
"""Characters; the libraries that read these headers have buffers of a fixed size."""
_NRRD_KEY: Final = re.compile(r"[^:]+:=")
"""Begins a line of a key and its value, whatever programs add; those of 3D Slicer have thousands of characters."""
_FLAGS: Final = {"true": True, "false": False, "1": True, "0": False}
"""What MetaImage writes for yes and no, in small letters."""
_LARGEST_SHEAR: Final = 1e-3
"""Cosine between two axes: a twentieth of a degree, well above the rounding of single precision."""
_NIFTI_TYPES: Final = {2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1792, 2304}
"""Codes of integers, floats, complex numbers and colours; not those of single bits and of 128 bits."""


@dataclass(frozen=True, kw_only=True)
class VolumeFile:
    """The file of a volume that may be read."""

    image_io: str
    """SimpleITK's reader for it."""
    data_path: Path
    """The file that holds the values: the volume's own, or one beside it."""
    room_bytes: int
    """How many bytes of values that file can hold."""
    misnamed_gzip: bool = False
    """Whether it is compressed though its name says that it is not."""
    packed_at: int | None = None
    """Where a zlib stream of the values begins in `data_path`; None where there is none."""
    nifti: NiftiHeader | None = None


@dataclass(frozen=True, kw_only=True)
class NiftiHeader:
    """What the header of a NIfTI file declares."""

    shape: tuple[int, ...]
    """Axes in the order of memory, so that x is the last."""
    dtype: np.dtype
    """In the file's byte order."""
    offset_bytes: int
    """Where the values start."""
    slope: float
    intercept: float
    spacing_problem: str
    """What is wrong with the spacing; empty where nothing is."""
    oriented: bool
    """Whether the file says how the volume lies in space."""


def inspect_file(path: Path) -> VolumeFile:
    """Look at the file of a volume, and at its header as far as that can do harm.

    Raises SuperCLError when it is missing, no regular file, not readable, of no known format, empty, or smaller than
    what it declares, and when it leads to a file that does not lie beside it.
    """
    suffix = volume_suffix(path.name)
    if suffix is None:
        raise SuperCLError(
            "The file's name is not that of a volume.",
            where=path,
            expected="a name that ends in " + ", ".join(FORMATS),
            found=path.suffix or "no ending",
            next_step="Convert it to one of these formats.",
        )
    match FORMATS[suffix]:
        case "NiftiImageIO":
            return _inspect_nifti(path)
        case "NrrdImageIO":
            return _inspect_nrrd(path)
        case _:
            return _inspect_meta(path)


def files_of(path: Path) -> tuple[Path, ...]:
    """Every file that holds a part of the volume at `path`: its header and, where they lie beside it, its values."""
    if volume_suffix(path.name) in (".nii", ".nii.gz", ".mha"):
        return (path,)
    try:
        return tuple(dict.fromkeys([path, inspect_file(path).data_path]))
    except SuperCLError:
        return (path,)


def check_axes(path: Path, direction: np.ndarray) -> None:
    """Raise SuperCLError unless the axes of a volume, the columns of (3, 3), are perpendicular and of length 1."""
    plausible = np.abs(direction).max() <= 2  # not so of NaN, nor of what overflows below
    if not plausible or np.abs(direction.T @ direction - np.eye(3)).max() > _LARGEST_SHEAR:
        raise SuperCLError(
            "The volume's axes are not perpendicular.",
            where=path,
            expected="columns, rows and slices at right angles",
            found=f"direction {', '.join(f'{cosine:.4g}' for cosine in direction.ravel())}",
            next_step="Resample the volume to a grid without shear.",
        )


# ---- NIfTI


def _inspect_nifti(path: Path) -> VolumeFile:
    pair = path.name.lower().endswith(".hdr")
    start, size = start_of(path, 348)
    packed = start.startswith(GZIP_MAGIC)
    if packed:
        with unpacked(path, 4096) as file:
            start = file.read(348)
    data_path = path
    if pair:
        bare = path.with_suffix(".img")
        compressed = path.with_suffix(".img.gz")
        data_path = compressed if compressed.exists() and not bare.exists() else bare
        start_of_data, size = start_of(data_path, 2)
        packed = start_of_data.startswith(GZIP_MAGIC)
    header = _nifti_header(path, start, pair=pair)
    room_bytes = size * (MOST_INFLATED if packed else 1) - header.offset_bytes
    check_shape(path, header.shape, header.dtype.itemsize, max(room_bytes, 0))
    return VolumeFile(
        image_io="NiftiImageIO",
        data_path=data_path,
        room_bytes=room_bytes,
        misnamed_gzip=packed and path.name.lower().endswith(".nii"),
        nifti=header,
    )


def _nifti_header(path: Path, start: bytes, *, pair: bool) -> NiftiHeader:
    """Read a NIfTI-1 header of 348 bytes without mending anything; of a pair it may be one of Analyze 7.5.

    That has the same fields as far as the values go, and says nothing of slope, intercept and orientation.
    """
    from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
    from nibabel.spatialimages import HeaderDataError

    expected = "a NIfTI-1 header"
    sizes = {order: int.from_bytes(start[:4], order) for order in ("little", "big")}
    if 540 in sizes.values():
        raise foreign(path, start, f"{expected} (NIfTI-2 is not supported)")
    if len(start) < 348 or 348 not in sizes.values():
        raise foreign(path, start, expected)
    order = "<" if sizes["little"] == 348 else ">"
    header = (Nifti1PairHeader if pair else Nifti1Header)(start, order, check=False)
    magic, dim = bytes(header["magic"].item()), header["dim"].tolist()
    is_analyze = pair and magic == b""
    if magic not in (b"n+1", b"ni1") and not is_analyze:
        raise damaged(path, f"the magic {magic!r}", expected="a NIfTI-1 header with the magic n+1 or ni1")
    if not 1 <= dim[0] <= 7:
        raise damaged(path, f"{dim[0]} dimensions", expected="1 to 7 dimensions")
    code = int(header["datatype"])
    if code not in _NIFTI_TYPES:
        raise SuperCLError(
            "The volume's type is not supported.",
            where=path,
            expected="integers of 8 to 64 bits, or floating-point numbers of 32 or 64 bits",
            found=f"NIfTI's data type {code}",
            next_step="Convert the volume.",
        )
    try:
        dtype, offset = header.get_data_dtype(), header.get_data_offset()
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise damaged(path, error, expected=expected) from error
    if header["bitpix"] != dtype.itemsize * 8:
        raise damaged(path, f"{header['bitpix']} bits a voxel for {dtype.name}", expected=expected)
    if not 0 <= offset <= _MOST_OFFSET_BYTES:
        raise damaged(path, f"values from byte {offset:,} on", expected=expected)
    return NiftiHeader(
        shape=tuple(dim[dim[0] : 0 : -1]),
        dtype=dtype,
        offset_bytes=offset,
        slope=1.0 if is_analyze else float(header["scl_slope"]),
        intercept=0.0 if is_analyze else float(header["scl_inter"]),
        spacing_problem=_pixdim_problem(header["pixdim"][1:4].tolist(), dim),
        oriented=not is_analyze and _has_orientation(path, header),
    )


def _pixdim_problem(pixdim: list[float], dim: list[int]) -> str:
    """SimpleITK takes 1 for a spacing that is zero, NaN or infinite; of an axis of one voxel it does not matter."""
    smallest, largest = SPACINGS_MM
    used = [spacing for axis, spacing in enumerate(pixdim, 1) if axis <= dim[0] and dim[axis] > 1]
    return (
        ""
        if all(smallest <= spacing <= largest for spacing in used)
        else f"a spacing (x, y, z) of {tuple(pixdim)}"
    )


def _has_orientation(path: Path, header: Any) -> bool:
    """Whether the header says how the volume lies in space; raises SuperCLError where it says what cannot be."""
    rows = [header[name] for name in ("srow_x", "srow_y", "srow_z")]
    numbers = [header[f"quatern_{axis}"] for axis in "bcd"] + [header[f"qoffset_{axis}"] for axis in "xyz"]
    if (header["sform_code"] > 0 and not np.isfinite(rows).all()) or (
        header["qform_code"] > 0 and not np.isfinite(numbers).all()
    ):
        raise damaged(path, "an orientation or origin that is NaN or infinite", expected="finite numbers")
    if header["sform_code"] > 0 and header["qform_code"] <= 0:  # of two, SimpleITK takes the one that can be
        columns = np.array(rows, np.float64)[:, :3]
        lengths = np.linalg.norm(columns, axis=0)
        check_axes(path, columns / np.where(lengths > 0, lengths, 1))
    return bool(header["sform_code"] > 0 or header["qform_code"] > 0)


# ---- NRRD and MetaImage: a header of text, then the values there or in another file


def _inspect_nrrd(path: Path) -> VolumeFile:
    start, size = start_of(path, _MOST_HEADER_BYTES)
    text = re.split(rb"\r?\n\r?\n", start, maxsplit=1)[0]
    lines = [line for line in _split(text) if not _NRRD_KEY.match(line)]
    _check_lengths(path, lines)
    if not lines or not re.fullmatch(r"NRRD000[1-5]", lines[0]):
        raise foreign(path, start, "a NRRD header")
    fields = _fields(path, [line for line in lines[1:] if not line.startswith("#")], r"[\w ]+")
    encoding = fields.get("encoding", "")
    if encoding not in ("raw", "gzip", "gz", "txt", "text", "ascii", "hex"):
        raise damaged(path, f"the encoding {encoding!r}", expected="raw, gzip, text or hex")
    return _text_headed(
        path, "NrrdImageIO", size, fields.get("sizes", ""), fields.get("datafile"), packed=encoding != "raw"
    )


def _inspect_meta(path: Path) -> VolumeFile:
    start, size = start_of(path, _MOST_HEADER_BYTES)
    end = re.search(rb"^ElementDataFile\s*[=:].*$", start, re.MULTILINE)
    if end is None or not re.match(rb"[\w \t]+[=:]", start):
        raise foreign(path, start, "a MetaImage header")
    # SimpleITK writes what it knows of a NIfTI or DICOM file as further fields: `dim[0] = 3`, `0008|0060 = CT`.
    lines = _split(start[: end.end()])
    _check_lengths(path, lines)
    fields = _fields(path, lines, r"[\w|]+(?:\[\d+\])?")
    num_axes, axes = fields.get("ndims"), fields.get("dimsize", "")
    if num_axes not in ("2", "3", "4") or len(axes.split()) != int(num_axes):
        raise damaged(path, f"NDims {num_axes!r} and DimSize {axes!r}", expected="2 to 4 axes")
    is_packed, is_binary = fields.get("compresseddata", "False"), fields.get("binarydata", "True")
    if not {is_packed.lower(), is_binary.lower()} <= _FLAGS.keys():
        raise damaged(
            path, f"CompressedData {is_packed!r:.80}, BinaryData {is_binary!r:.80}", expected="True or False"
        )
    packed = _FLAGS[is_packed.lower()] or not _FLAGS[is_binary.lower()]
    name = fields["elementdatafile"]
    file = _text_headed(
        path, "MetaImageIO", size, axes, None if name.upper() == "LOCAL" else name, packed=packed
    )
    packed_bytes = fields.get("compresseddatasize", "0")
    if not packed_bytes.isdecimal() or int(packed_bytes) > file.data_path.stat().st_size:
        raise damaged(
            path, f"{packed_bytes!r} bytes of compressed values", expected="fewer than the file has"
        )
    if not _FLAGS[is_packed.lower()]:
        return file
    return dataclasses.replace(file, packed_at=end.end() + 1 if file.data_path == path else 0)


def _split(text: bytes) -> list[str]:
    """The lines of a header as the libraries see them: Python's `splitlines` knows other ends of a line too."""
    return [line.removesuffix("\r") for line in text.decode("latin-1").removesuffix("\n").split("\n")]


def _check_lengths(path: Path, lines: list[str]) -> None:
    """Raise SuperCLError for a line, be it a comment, that is longer than the libraries' buffers."""
    if (longest := max(map(len, lines), default=0)) > _MOST_LINE:
        raise damaged(
            path, f"a line of {longest:,} characters", expected=f"header lines of at most {_MOST_LINE:,}"
        )


def _fields(path: Path, lines: list[str], name_pattern: str) -> dict[str, str]:
    """`name: value` or `name = value` of each line; names in small letters, without spaces.

    Stricter than the libraries, so that there is no second way to read the same header.
    """
    fields: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(rf"({name_pattern})\s*[:=]\s*(.*?)\s*", line)
        key = match[1].lower().replace(" ", "") if match else ""
        if match is None or key in fields:
            raise damaged(path, f"the line {line[:80]!r}", expected="a header of fields, each given once")
        fields[key] = match[2]
    return fields


def _text_headed(
    path: Path, image_io: str, size: int, axes: str, data_name: str | None, *, packed: bool
) -> VolumeFile:
    """`axes`: the lengths as the header gives them; `packed`: whether values may take less room than in memory."""
    data_path = path
    if data_name is not None:
        data_path = file_beside(path, data_name)
        size = start_of(data_path, 0)[1]
    try:
        shape = tuple(int(length) for length in axes.split()[::-1])
    except ValueError:
        shape = ()
    if not shape:
        raise damaged(path, f"the axes {axes[:80]!r}", expected="the number of voxels along each axis")
    room_bytes = size * (MOST_INFLATED if packed else 1)
    check_shape(path, shape, 1, room_bytes)
    return VolumeFile(image_io=image_io, data_path=data_path, room_bytes=room_bytes)
