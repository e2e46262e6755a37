"""The elements of a DICOM file; its pixels are counted and not read.

The library that reads the pixels believes every length that it finds, and asks for as much memory. So each is held
against the file here first, in sequences too. Only the elements that `Tag` names are read, none of which names a
patient. Source: DICOM PS3.5 (encoding) and PS3.10 (files). Called by `supercl_core.formats.dicom_headers`.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import IO, Any, Final


class Tag(IntEnum):
    """The elements that are read: group and number, under DICOM's names."""

    MEDIA_STORAGE_CLASS = 0x0002_0002
    TRANSFER_SYNTAX = 0x0002_0010
    IMAGE_TYPE = 0x0008_0008
    CLASS = 0x0008_0016
    MODALITY = 0x0008_0060
    SERIES_UID = 0x0020_000E
    SERIES_NUMBER = 0x0020_0011
    INSTANCE_NUMBER = 0x0020_0013
    POSITION = 0x0020_0032
    ORIENTATION = 0x0020_0037
    SAMPLES_PER_PIXEL = 0x0028_0002
    NUMBER_OF_FRAMES = 0x0028_0008
    ROWS = 0x0028_0010
    COLUMNS = 0x0028_0011
    PIXEL_SPACING = 0x0028_0030
    BITS_ALLOCATED = 0x0028_0100
    RESCALE_INTERCEPT = 0x0028_1052
    RESCALE_SLOPE = 0x0028_1053
    # Sequences: what all frames share, what each has of its own, and the parts of both.
    SHARED_GROUPS = 0x5200_9229
    FRAME_GROUPS = 0x5200_9230
    PLANE_POSITION = 0x0020_9113
    PLANE_ORIENTATION = 0x0020_9116
    PIXEL_MEASURES = 0x0028_9110
    PIXEL_TRANSFORMATION = 0x0028_9145


_SEQUENCES: Final = frozenset(
    {
        Tag.SHARED_GROUPS,
        Tag.FRAME_GROUPS,
        Tag.PLANE_POSITION,
        Tag.PLANE_ORIENTATION,
        Tag.PIXEL_MEASURES,
        Tag.PIXEL_TRANSFORMATION,
    }
)
_VALUES: Final = frozenset(Tag) - _SEQUENCES
_PIXELS: Final = frozenset({0x7FE0_0008, 0x7FE0_0009, 0x7FE0_0010})
"""Values of 32 and of 64-bit floating point, and integers."""
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFE_E000, 0xFFFE_E00D, 0xFFFE_E0DD
_LAST_IMAGE_GROUP: Final = 0x0028
"""Tags ascend: what has no rows up to this group is no image."""

_UNDEFINED: Final = 0xFFFF_FFFF
_BULK_TYPES: Final = frozenset({b"OB", b"OW", b"OD", b"OF", b"OL", b"OV"})
_LONG_TYPES: Final = _BULK_TYPES | {b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
"""Types of values whose length takes four bytes."""
_IMPLICIT, _DEFLATED, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"

_MOST_ELEMENTS: Final = 1 << 21
"""Of a file: some seconds, and far more than those of thousands of frames have."""
_MOST_VALUE_BYTES: Final = 1024
_DEEPEST: Final = 16
"""Levels of sequences within sequences."""


class Elements:
    """What was read of one file: all of it, or what comes before its damage."""

    def __init__(self, file: IO[bytes], size_bytes: int) -> None:
        """Read `file`, of `size_bytes`, from behind its first 132 bytes on. Raises OSError where the system does."""
        self.values: dict[int, Any] = {}
        """By tag: bytes, or for a sequence the same dict of each of its items."""
        self.has_pixels = False
        self.num_pixel_bytes = 0
        """Of pixels that are not compressed."""
        self.num_fragments: int | None = None
        """Pieces of compressed pixels, the first of which is a table; None where they are not compressed."""
        self.damage = ""
        """Why reading ended before the end; empty where it did not, and where the file turned out to be no image."""
        self._file, self._size, self._order = file, size_bytes, "<"
        self._num_left = _MOST_ELEMENTS
        try:
            self._read_all()
        except ValueError as error:
            self.damage = str(error)

    def text(self, tag: Tag) -> str:
        """A value as text without padding; empty where there is none."""
        return bytes(self.values.get(tag, b"")).decode("latin-1").strip("\0 ")

    def number(self, tag: Tag) -> int:
        """A value of two bytes as an unsigned number; 0 where there is none."""
        raw = self.values.get(tag, b"")
        return int(struct.unpack(self._order + "H", raw)[0]) if len(raw) == 2 else 0

    def _read_all(self) -> None:
        """The file's own group, which is always explicit and little-endian, then all others as that declares."""
        while self._peek(2) == b"\x02\x00":
            self._read_element(self.values, self._size, explicit=True, depth=0)
        syntax = self.text(Tag.TRANSFER_SYNTAX)
        if syntax == _DEFLATED:
            raise ValueError("a deflated data set, which is not supported")
        if syntax == _BIG_ENDIAN:
            self._order = ">"
        explicit = syntax != _IMPLICIT if syntax else _is_type(self._peek(6)[4:])
        while self._file.tell() < self._size:
            if not self._read_element(self.values, self._size, explicit=explicit, depth=0):
                return

    def _read_element(self, values: dict[int, Any], end: int, *, explicit: bool, depth: int) -> bool:
        """Read the next element into `values`, or go past it; False where nothing of interest follows."""
        tag, kind, length = self._next(end, explicit=explicit)
        if depth == 0 and tag in _PIXELS:
            self.has_pixels = True
            if length == _UNDEFINED:
                self.num_fragments = len(self._items(end, length, kind, explicit=explicit, depth=0))
            else:
                self.num_pixel_bytes = length
                self._file.seek(length, 1)
        elif tag == _ITEM_END or (
            depth == 0 and tag >> 16 > _LAST_IMAGE_GROUP and Tag.ROWS not in self.values
        ):
            return False
        elif length == _UNDEFINED or kind == b"SQ" or tag in _SEQUENCES:
            # What is in a sequence of unknown type (UN) has no types (PS3.5, section 6.2.2).
            items = self._items(end, length, kind, explicit=explicit and kind != b"UN", depth=depth + 1)
            if tag in _SEQUENCES:
                values.setdefault(tag, items)
        elif tag in _VALUES and length <= _MOST_VALUE_BYTES:
            values.setdefault(tag, self._take(length))
        else:
            self._file.seek(length, 1)
        return True

    def _items(
        self, end: int, length: int, kind: bytes, *, explicit: bool, depth: int
    ) -> list[dict[int, Any]]:
        """The items of a sequence; those of pixels are pieces of compressed data, and stay unread."""
        if depth > _DEEPEST:
            raise ValueError(f"sequences nested more than {_DEEPEST} deep")
        stop = end if length == _UNDEFINED else self._file.tell() + length
        items: list[dict[int, Any]] = []
        while self._file.tell() < stop:
            tag, _, item_length = self._next(stop, explicit=explicit)
            if tag == _SEQUENCE_END:
                return items
            if tag != _ITEM:
                raise ValueError("a sequence of something else than items")
            items.append({})
            item_end = stop if item_length == _UNDEFINED else self._file.tell() + item_length
            if kind in _BULK_TYPES:
                self._file.seek(item_end)
            while self._file.tell() < item_end:
                if not self._read_element(items[-1], item_end, explicit=explicit, depth=depth + 1):
                    break
        if length == _UNDEFINED:
            raise ValueError("a file that is cut off")
        return items

    def _next(self, end: int, *, explicit: bool) -> tuple[int, bytes, int]:
        """Tag, type (empty where implicit) and length of the next element, whose value ends at `end` or before."""
        self._num_left -= 1
        if self._num_left < 0:
            raise ValueError(f"more than {_MOST_ELEMENTS:,} elements")
        head = self._take(8)
        group, element, length = struct.unpack(self._order + "HHI", head)
        kind = b""
        if explicit and group != 0xFFFE:
            kind = head[4:6]
            if not _is_type(kind):
                raise ValueError(f"an element without a type at byte {self._file.tell() - 8:,}")
            if kind in _LONG_TYPES:
                (length,) = struct.unpack(self._order + "I", self._take(4))
            else:
                (length,) = struct.unpack(self._order + "H", head[6:])
        if length != _UNDEFINED and length > end - self._file.tell():
            raise ValueError("a file that is cut off")
        return group << 16 | element, kind, length

    def _take(self, num_bytes: int) -> bytes:
        taken = self._file.read(num_bytes)
        if len(taken) < num_bytes:
            raise ValueError("a file that is cut off")
        return taken

    def _peek(self, num_bytes: int) -> bytes:
        start = self._file.tell()
        peeked = self._file.read(num_bytes)
        self._file.seek(start)
        return peeked


def _is_type(kind: bytes) -> bool:
    return len(kind) == 2 and kind.isalpha() and kind.isupper()
