"""What the header of a DICOM file declares: its series, where its frames lie, and how many values it holds.

Says what is wrong with a file before SimpleITK is asked for its values, and reads none itself.
Source: DICOM PS3.3, C.7.6.2 (image plane) and C.7.6.16 (frames). Called by `supercl_core.formats.dicom_files`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supercl_core.formats.dicom_elements import Elements, Tag
from supercl_core.formats.volume_files import foreign, opened, start_of

_LISTING_CLASS: Final = "1.2.840.10008.1.3.10"
"""Of files that list others, such as DICOMDIR."""
_MADE_FROM_IMAGES: Final = frozenset({"SEG", "RTDOSE"})
"""Modalities of objects that have pixels, none of which was measured."""
_RESCALED_BY_FRAMES: Final = frozenset(
    f"1.2.840.10008.5.1.4.1.1.{kind}" for kind in ("2.1", "2.2", "4.1", "4.4", "13.1.3", "128.1", "130")
)
"""Classes of images (enhanced CT, MR and PET, tomosynthesis) where SimpleITK 2.5 applies the rescaling that is given
with the frames. In others it passes over it without a word."""

_MOST_FRAMES: Final = 1 << 16
"""Of a file; each takes memory before its pixels are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """Where one image of a file lies in the patient's coordinates, as far as the file says."""

    position_mm: tuple[float, ...] | None
    """Centre of the first pixel (x, y, z)."""
    orientation: tuple[float, ...] | None
    """Direction cosines of the rows (along which columns are counted), then of the columns."""
    spacing_mm: tuple[float, ...] | None
    """Between rows, then between columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DicomHeader:
    """What one DICOM file declares."""

    path: Path
    size_bytes: int
    series_uid: str
    """Empty where the file has none, or does not get so far."""
    series_number: str
    """Digits, as a viewer shows them; empty where there are none."""
    instance_number: str
    """Likewise."""
    modality: str
    """Letters and digits, such as CT; empty where there is none."""
    is_image: bool
    """Whether it holds, or may hold, pixels that were measured: not so reports, contours, segmentations, doses."""
    is_localiser: bool
    rows: int
    columns: int
    samples: int
    """Values a pixel, such as 3 of a colour image."""
    bits: int
    """Of a stored value, with padding."""
    is_compressed: bool
    frames: tuple[Frame, ...]
    """None of a file with a problem."""
    problem: str
    """Why the pixels cannot be used; empty where they can."""


def read_dicom_header(path: Path) -> DicomHeader | None:
    """Read what the DICOM file at `path` declares; None where it does not begin like one (`DICM` at byte 128).

    Raises SuperCLError where it is no file, or cannot be opened; damage is said in `problem`.
    """
    with opened(path) as file:
        if file.read(132)[128:] != b"DICM":
            return None
        size_bytes = path.stat().st_size
        elements = Elements(file, size_bytes)
    modality = elements.text(Tag.MODALITY)
    is_image = (
        (elements.has_pixels or bool(elements.damage))
        and modality not in _MADE_FROM_IMAGES
        and elements.text(Tag.MEDIA_STORAGE_CLASS) != _LISTING_CLASS
    )
    num_frames = elements.text(Tag.NUMBER_OF_FRAMES) or "1"
    problem = _path_problem(path) or _problem(elements, num_frames) if is_image else ""
    return DicomHeader(
        path=path,
        size_bytes=size_bytes,
        series_uid=elements.text(Tag.SERIES_UID),
        series_number=_digits(elements.text(Tag.SERIES_NUMBER)),
        instance_number=_digits(elements.text(Tag.INSTANCE_NUMBER)),
        modality=modality if modality.isalnum() else "",
        is_image=is_image,
        is_localiser="LOCALIZER" in elements.text(Tag.IMAGE_TYPE).split("\\"),
        rows=elements.number(Tag.ROWS),
        columns=elements.number(Tag.COLUMNS),
        samples=elements.number(Tag.SAMPLES_PER_PIXEL) or 1,
        bits=elements.number(Tag.BITS_ALLOCATED),
        is_compressed=elements.num_fragments is not None,
        frames=_frames(elements, int(num_frames)) if is_image and not problem else (),
        problem=problem,
    )


def read_image_header(path: Path) -> DicomHeader:
    """Read what a DICOM image declares. Raises SuperCLError as `read_dicom_header` does, and for any other file."""
    header = read_dicom_header(path)
    if header is None or not header.is_image:
        raise foreign(path, start_of(path, 132)[0], "a DICOM image")
    return header


def _path_problem(path: Path) -> str:
    """SimpleITK ends the process on a path that is not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "a path that is not UTF-8"
    return ""


def _problem(elements: Elements, num_frames: str) -> str:
    """Why the pixels of an image cannot be used; empty where they can."""
    if elements.damage:
        return elements.damage
    described = elements.values.get(Tag.FRAME_GROUPS, [])
    count = int(_digits(num_frames) or 0)
    if count > _MOST_FRAMES:
        return f"{count:,} frames where at most {_MOST_FRAMES:,} are read"
    if count == 0 or (described and len(described) != count):
        return f"{num_frames[:12]!r} frames, {len(described)} of which are described"
    return _size_problem(elements, count) or _rescaling_problem(elements, count)


def _size_problem(elements: Elements, num_frames: int) -> str:
    """Why the file cannot hold its pixels."""
    num_bits = elements.number(Tag.BITS_ALLOCATED) * (elements.number(Tag.SAMPLES_PER_PIXEL) or 1)
    num_pixels = elements.number(Tag.ROWS) * elements.number(Tag.COLUMNS) * num_frames
    if num_bits * num_pixels == 0:
        return "no rows, columns or bits"
    if elements.num_fragments is not None:
        images = elements.num_fragments - 1
        return f"{max(images, 0)} compressed images for {num_frames} frames" if images < num_frames else ""
    needed, found = math.ceil(num_bits * num_pixels / 8), elements.num_pixel_bytes
    return f"{found:,} bytes of pixels where the header asks for {needed:,}" if found < needed else ""


def _rescaling_problem(elements: Elements, num_frames: int) -> str:
    """Why SimpleITK, which knows one slope and one intercept for a file, would not give its values."""
    rescalings = {
        (
            _of_frame(elements, index, Tag.PIXEL_TRANSFORMATION, Tag.RESCALE_SLOPE) or b"1",
            _of_frame(elements, index, Tag.PIXEL_TRANSFORMATION, Tag.RESCALE_INTERCEPT) or b"0",
        )
        for index in range(num_frames)
    }
    own = (
        elements.values.get(Tag.RESCALE_SLOPE) or b"1",
        elements.values.get(Tag.RESCALE_INTERCEPT) or b"0",
    )
    is_applied = rescalings == {own} or elements.text(Tag.CLASS) in _RESCALED_BY_FRAMES
    if len(rescalings) > 1 or not is_applied:
        return "a rescaling of single frames, which is not supported"
    slope = _numbers(b"\\".join(rescalings.pop()), 2)
    return "" if slope and slope[0] else "a rescale slope or intercept that cannot be"


def _frames(elements: Elements, num_frames: int) -> tuple[Frame, ...]:
    return tuple(
        Frame(
            position_mm=_numbers(_of_frame(elements, index, Tag.PLANE_POSITION, Tag.POSITION), 3),
            orientation=_numbers(_of_frame(elements, index, Tag.PLANE_ORIENTATION, Tag.ORIENTATION), 6),
            spacing_mm=_numbers(_of_frame(elements, index, Tag.PIXEL_MEASURES, Tag.PIXEL_SPACING), 2),
        )
        for index in range(num_frames)
    )


def _of_frame(elements: Elements, index: int, group: Tag, tag: Tag) -> bytes:
    """An element of a frame: its own, or the one that all frames share, or the file's; empty where there is none."""
    values = elements.values
    for groups in (
        *values.get(Tag.FRAME_GROUPS, [])[index : index + 1],
        *values.get(Tag.SHARED_GROUPS, [])[:1],
    ):
        for item in groups.get(group, [])[:1]:
            if tag in item:
                return bytes(item[tag])
    return bytes(values.get(tag, b""))


def _digits(text: str) -> str:
    return str(int(text)) if text.isascii() and text.isdecimal() and len(text) <= 12 else ""


def _numbers(raw: bytes, count: int) -> tuple[float, ...] | None:
    """Decimal numbers with backslashes between them; None unless there are `count` finite ones."""
    try:
        numbers = tuple(float(part) for part in raw.decode("ascii").replace("\0", " ").split("\\"))
    except ValueError:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None
