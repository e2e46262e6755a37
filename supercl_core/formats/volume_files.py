"""The files of volumes as files: their names, how they are opened and unpacked, and what is said of bad ones.

Called by what reads one format (`volume_headers`, `volumes`, `flat_images`, `array_files`) and by the layouts in
`supercl_core.sources`.
"""

from __future__ import annotations

import errno
import io
import math
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Final

from supercl_core.errors import SuperCLError

FORMATS: Final = {
    ".nii.gz": "NiftiImageIO",
    ".nii": "NiftiImageIO",
    ".seg.nrrd": "NrrdImageIO",
    ".nrrd": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
    ".hdr": "NiftiImageIO",
}
"""File name endings of volumes, and SimpleITK's reader for each. `.seg.nrrd`: segmentations of 3D Slicer."""

GZIP_MAGIC: Final = b"\x1f\x8b"


def volume_suffix(name: str) -> str | None:
    """The ending by which a file name is that of a volume; None where it is not."""
    return ending(name, FORMATS)


def ending(name: str, known: Iterable[str]) -> str | None:
    """The first of the `known` endings, in small letters, that a file name has behind something else; else None."""
    return next((end for end in known if name.lower().endswith(end) and len(name) > len(end)), None)


@contextmanager
def unpacked(path: Path, buffer_bytes: int) -> Iterator[Any]:
    """Open a file for reading, through gzip where it is compressed; `buffer_bytes` are unpacked at once.

    Raises SuperCLError where it cannot be opened, and for whatever reading from it raises.
    """
    from isal import igzip
    from isal.igzip_lib import IsalError

    with ExitStack() as stack:
        file: Any = stack.enter_context(opened(path))
        try:
            if file.peek(2).startswith(GZIP_MAGIC):
                file = stack.enter_context(igzip.open(file))
                file = stack.enter_context(io.BufferedReader(file, buffer_bytes))
            yield file
        except (
            OSError,
            EOFError,
            ValueError,
            zlib.error,
            IsalError,  # type: ignore[misc]  # its stubs call the class an instance
        ) as error:
            raise damaged(path, error, expected="content up to its end, with the right checksum") from error


def check_packed(path: Path, start: int) -> None:
    """Raise SuperCLError unless a whole zlib stream begins at byte `start`: MetaImage's reader never ends on others."""
    stream = zlib.decompressobj(wbits=47)
    with opened(path) as file:
        file.seek(start)
        while not stream.eof:
            part = stream.unconsumed_tail or file.read(1 << 16)
            if not part:
                raise damaged(path, "compressed values that end too early")
            try:
                stream.decompress(part, 1 << 20)
            except zlib.error as error:
                raise damaged(path, error) from error


def check_shape(path: Path, shape: tuple[int, ...], itemsize: int, room_bytes: int) -> None:
    """Raise SuperCLError unless every axis has a voxel, and the voxels of `itemsize` bytes have room in the file."""
    if 0 in shape:
        raise SuperCLError(
            "The volume is empty.",
            where=path,
            expected="at least one voxel along every axis",
            found=f"shape {shape}, columns last",
            next_step="Remove the file or export the volume again.",
        )
    if min(shape) < 0:
        raise damaged(path, f"a shape of {shape}, columns last")
    if (declared_bytes := math.prod(shape) * itemsize) > room_bytes:
        raise damaged(
            path,
            f"{room_bytes:,} bytes of voxels where the header asks for {declared_bytes:,}",
            expected="room for all the voxels that the header declares",
        )


def damaged(path: Path, found: object, *, expected: str = "an undamaged file") -> SuperCLError:
    """The error for a file whose content cannot be right."""
    return SuperCLError(
        "The file is damaged.",
        where=path,
        expected=expected,
        found=found,
        next_step="Copy or export it again.",
    )


def foreign(path: Path, start: bytes, expected: str) -> SuperCLError:
    """The error for a file whose first bytes are not those of its format."""
    return SuperCLError(
        "The file's content is not what its name says.",
        where=path,
        expected=expected,
        found=f"content that starts with {start[:24]!r}",
        next_step="Open it with a text editor or another viewer; copy or download it again.",
    )


def opened(path: Path) -> IO[bytes]:
    """Open a regular file; what else may have the name of a volume is refused, above all what one would wait for."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
        if kind == stat.S_IFREG:
            return path.open("rb")
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # no fault of this file
        raise _unreachable(path, error) from None
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    raise SuperCLError(
        "Something else than a file has the name of a volume.",
        where=path,
        expected="a file",
        found=kinds.get(kind, "a device"),
        next_step="Rename or remove it.",
    )


def _unreachable(path: Path, error: OSError) -> SuperCLError:
    missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
    if error.errno == errno.ELOOP:
        what, found = "The link leads back to itself.", error.strerror
    elif missing and path.is_symlink():
        what, found = "The link leads nowhere.", f"no file at {str(path.readlink())!r}"
    elif missing:
        what, found = "The file does not exist.", "nothing"
    else:
        what, found = "The file cannot be opened.", error.strerror
    return SuperCLError(
        what,
        where=path,
        expected="a file that can be read",
        found=found,
        next_step="Check the path and its permissions, or remove the case from the data set.",
    )


def start_of(path: Path, num_bytes: int) -> tuple[bytes, int]:
    """The first bytes of a file, and its size. Raises SuperCLError where there are none to be read."""
    with opened(path) as file:
        size = path.stat().st_size
        if size == 0:
            raise damaged(path, "an empty file, 0 bytes", expected="a volume")
        return file.read(num_bytes), size


def file_beside(path: Path, name: str) -> Path:
    """The file in the same folder that a header names for its values. Raises SuperCLError for any other place."""
    if name in ("", ".", "..") or name.startswith("LIST") or any(character in name for character in "/\\%\0"):
        raise SuperCLError(
            "The header takes its values from elsewhere.",
            where=path,
            expected="values in the same file, or in one file beside it",
            found=repr(name),
            next_step="Save the volume as one file.",
        )
    return path.with_name(name)
