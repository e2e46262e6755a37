"""The values of DICOM files, through SimpleITK; of compressed files in a process of their own.

Its decoders end the process on some damaged data instead of saying so (SimpleITK 2.5.7, lossless JPEG: once in some
5,000 files with changed bytes; never in 6,000 without compression). So a process for each series decodes, started as
`python -P -m supercl_core.formats.dicom_pixels`, and what ends it is an error of that series alone. Called by
`supercl_core.formats.dicom_files`, with files whose headers have been checked.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

import numpy as np

from supercl_core.errors import SuperCLError
from supercl_core.formats.dicom_headers import DicomHeader
from supercl_core.formats.volumes import run_reader, simpleitk

_LONGEST_S: Final = 600.0
"""For one compressed file; decoders manage more than 10 MB a second."""


def read_pixels(headers: Sequence[DicomHeader]) -> Iterator[np.ndarray]:
    """The rescaled values of each file in turn, (c, frames, y, x): integers, or float32 where any are no integers.

    Raises SuperCLError when SimpleITK cannot read a file, or finds other pixels than its header declares.
    """
    if any(header.is_compressed for header in headers):
        read = _read_apart(headers)
    else:
        read = (_read(header.path) for header in headers)
    for header, values_CZYX in zip(headers, read, strict=True):
        expected = (header.samples, len(header.frames), header.rows, header.columns)
        if values_CZYX.shape != expected:
            raise SuperCLError(
                "The pixels of a DICOM file are not what its header declares.",
                where=header.path,
                expected=f"(c, z, y, x) = {expected}",
                found=values_CZYX.shape,
                next_step="Remove the file, or convert it to plain grey values or colours.",
            )
        yield values_CZYX


def _read(path: Path) -> np.ndarray:
    sitk = simpleitk()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    image = run_reader(path, reader.Execute)
    array = sitk.GetArrayFromImage(image)
    values_CZYX = np.moveaxis(array, -1, 0) if image.GetNumberOfComponentsPerPixel() > 1 else array[None]
    return values_CZYX.astype(np.float32) if values_CZYX.dtype.kind == "f" else values_CZYX


def _read_apart(headers: Sequence[DicomHeader]) -> Iterator[np.ndarray]:
    """What `_read` gives of each file, in another process that may end at any of them."""
    with subprocess.Popen(
        # With -P, no module of the working folder is run, which may be that of the data.
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    ) as process:
        assert process.stdin is not None, "it is a pipe"
        assert process.stdout is not None, "it is a pipe"
        try:
            with suppress(OSError):  # of a process that has ended already
                process.stdin.write(b"\0".join(os.fsencode(header.path) for header in headers))
                process.stdin.close()
            for header in headers:
                content = _answer(process.stdout, process.kill)
                if not content:
                    raise SuperCLError(
                        "The compressed pixels of a DICOM file cannot be read.",
                        where=header.path,
                        expected=f"a compression that SimpleITK reads, undamaged, in {_LONGEST_S:,.0f} s",
                        found="a decoder that gave up or took longer",
                        next_step="Copy or export the file again, or decompress it with another tool.",
                    )
                yield np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        finally:
            process.kill()  # it may still be busy with a file that nobody wants any more


def _answer(answers: IO[bytes], give_up: Callable[[], None]) -> bytes:
    """The next answer of the other process; empty where there is none, for which it is ended after a while."""
    timer = threading.Timer(_LONGEST_S, give_up)
    timer.start()
    try:
        num_bytes = int.from_bytes(answers.read(8), "little")
        content = answers.read(num_bytes)
        return content if len(content) == num_bytes else b""
    finally:
        timer.cancel()


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer with the values of each file that is asked for, behind their length, until one cannot be read."""
    for name in requests.read().split(b"\0"):
        answer = io.BytesIO()
        np.save(answer, _read(Path(os.fsdecode(name))), allow_pickle=False)
        answers.write(len(answer.getbuffer()).to_bytes(8, "little") + answer.getbuffer())
        answers.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as answers, Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # decoders print there
        _serve(sys.stdin.buffer, answers)
