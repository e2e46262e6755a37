"""DICOM files written element by element, right or wrong: a builder for tests.

Elements are {tag: (type, value)} in the order in which they are written; values are text, numbers (US), bytes, or lists
of such dicts (SQ). `series` writes the slices of a volume the way that a scanner would.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Elements = Mapping[int, tuple[str, Any]]

EXPLICIT, IMPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
CT, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4.1"
PATIENT = "Doe^Jane"
"""What must not be found anywhere but in the files."""

_LONG_TYPES = ("OB", "OW", "SQ", "UN", "UT")
_UNDEFINED = 0xFFFF_FFFF


def encoded(elements: Elements, syntax: str = EXPLICIT) -> bytes:
    """The elements in one of the three uncompressed encodings; sequences are of undefined length."""
    order = ">" if syntax == BIG_ENDIAN else "<"
    parts = []
    for tag, (kind, value) in elements.items():
        raw, length = _raw(kind, value, order, syntax)
        parts.append(struct.pack(order + "HH", tag >> 16, tag & 0xFFFF))
        if syntax == IMPLICIT:
            parts.append(struct.pack("<I", length))
        elif kind in _LONG_TYPES:
            parts.append(kind.encode() + bytes(2) + struct.pack(order + "I", length))
        else:
            parts.append(kind.encode() + struct.pack(order + "H", length))
        parts.append(raw)
    return b"".join(parts)


def dicom_file(elements: Elements, syntax: str = EXPLICIT) -> bytes:
    """A whole file: 128 bytes, the file's own group, and the elements."""
    own = encoded(
        {0x0002_0002: ("UI", elements.get(0x0008_0016, ("UI", CT))[1]), 0x0002_0010: ("UI", syntax)}
    )
    own = encoded({0x0002_0000: ("UL", struct.pack("<I", len(own)))}) + own
    return bytes(128) + b"DICM" + own + encoded(elements, syntax)


def image(
    values: np.ndarray,
    *,
    position: Sequence[float] | None = (0, 0, 0),
    orientation: Sequence[float] | None = (1, 0, 0, 0, 1, 0),
    spacing: Sequence[float] | None = (0.8, 0.7),
    rescaling: tuple[object, object] | None = None,
    instance: int = 1,
    number: object = 5,
    uid: str = "1.2.3.4",
    modality: str = "CT",
    others: Elements | None = None,
) -> dict[int, tuple[str, Any]]:
    """The elements of one image: 16-bit (y, x) or (frames, y, x), or 8-bit colours (y, x, 3).

    `spacing` is between rows, then between columns; `others` are further elements, or others in place of these.
    """
    colours = values.dtype == np.uint8
    shape = values.shape[:2] if colours else values.shape[-2:]
    bits = 8 * values.itemsize
    elements: dict[int, tuple[str, Any]] = {
        0x0008_0016: ("UI", CT),
        0x0008_0018: ("UI", f"{uid}.{instance}"),
        0x0008_0060: ("CS", modality),
        0x0008_103E: ("LO", f"head of {PATIENT}"),
        0x0009_0010: ("LO", "MAKER"),
        0x0009_1001: ("UN", bytes(range(64))),
        0x0009_1002: ("SQ", [{0x0009_1003: ("LO", "inner"), 0x0020_000E: ("UI", "9.9.9")}, {}]),
        0x0010_0010: ("PN", PATIENT),
        0x0010_0020: ("LO", "ID-4711"),
        0x0020_000D: ("UI", "1.2.3"),
        0x0020_000E: ("UI", uid),
        0x0020_0011: ("IS", number),
        0x0020_0013: ("IS", instance),
    }
    if position is not None:
        elements[0x0020_0032] = ("DS", _joined(position))
    if orientation is not None:
        elements[0x0020_0037] = ("DS", _joined(orientation))
    elements |= {
        0x0028_0002: ("US", 3 if colours else 1),
        0x0028_0004: ("CS", "RGB" if colours else "MONOCHROME2"),
        **({0x0028_0006: ("US", 0)} if colours else {}),
        **({0x0028_0008: ("IS", len(values))} if values.ndim == 3 and not colours else {}),
        0x0028_0010: ("US", shape[0]),
        0x0028_0011: ("US", shape[1]),
    }
    if spacing is not None:
        elements[0x0028_0030] = ("DS", _joined(spacing))
    elements |= {
        0x0028_0100: ("US", bits),
        0x0028_0101: ("US", bits),
        0x0028_0102: ("US", bits - 1),
        0x0028_0103: ("US", int(values.dtype.kind == "i")),
    }
    if rescaling is not None:
        elements |= {0x0028_1052: ("DS", rescaling[1]), 0x0028_1053: ("DS", rescaling[0])}
    elements[0x7FE0_0010] = ("OW", values)
    return dict(sorted({**elements, **(others or {})}.items()))


def series(
    folder: Path,
    values_ZYX: np.ndarray,
    *,
    step_mm: float = 2.5,
    names: str = "IM{:04d}",
    skip: Sequence[int] = (),
    **given: Any,
) -> list[Path]:
    """Write an axial volume as one file a slice, numbered against the direction of z; gives the files, z upwards."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for z, values_YX in enumerate(values_ZYX):
        if z not in skip:
            instance = len(values_ZYX) - z
            paths.append(folder / names.format(instance))
            elements = image(
                values_YX, **{"position": (-10, -20, 5 + step_mm * z), "instance": instance, **given}
            )
            paths[-1].write_bytes(dicom_file(elements))
    return paths


def enhanced(
    values: np.ndarray, positions: Sequence[Sequence[float]], **given: Any
) -> dict[int, tuple[str, Any]]:
    """The elements of an enhanced MR image: int16 (frames, y, x), each frame with a position of its own."""
    shared = {
        0x0020_9116: ("SQ", [{0x0020_0037: ("DS", "1\\0\\0\\0\\1\\0")}]),
        0x0028_9110: ("SQ", [{0x0018_0050: ("DS", "2.5"), 0x0028_0030: ("DS", "0.8\\0.7")}]),
        0x0028_9145: ("SQ", [{0x0028_1052: ("DS", "-10"), 0x0028_1053: ("DS", "2")}]),
    }
    frames = [{0x0020_9113: ("SQ", [{0x0020_0032: ("DS", _joined(position))}])} for position in positions]
    groups: Elements = {
        0x0008_0016: ("UI", ENHANCED_MR),
        0x5200_9229: ("SQ", [shared]),
        0x5200_9230: ("SQ", frames),
    }
    plain: dict[str, Any] = {"position": None, "orientation": None, "spacing": None, "modality": "MR"}
    return image(values, **{**plain, "others": groups, **given})


def _joined(values: Sequence[float]) -> str:
    return "\\".join(str(value) for value in values)


def _raw(kind: str, value: Any, order: str, syntax: str) -> tuple[bytes, int]:
    """The bytes of a value, and its length."""
    if kind == "SQ":
        items = b"".join(
            struct.pack(order + "HHI", 0xFFFE, 0xE000, _UNDEFINED)
            + encoded(item, syntax)
            + struct.pack(order + "HHI", 0xFFFE, 0xE00D, 0)
            for item in value
        )
        return items + struct.pack(order + "HHI", 0xFFFE, 0xE0DD, 0), _UNDEFINED
    if isinstance(value, np.ndarray):
        raw = value.astype(value.dtype.newbyteorder(order)).tobytes()
    elif kind == "US" and not isinstance(value, bytes):
        raw = struct.pack(order + "H", value)
    else:
        raw = value if isinstance(value, bytes) else str(value).encode()
    raw += (b"\0" if kind in ("UI", "OW") else b" ") * (len(raw) % 2)
    return raw, len(raw)
