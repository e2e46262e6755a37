"""The case table: one row per case, kept in `table/` so that opening a cache reads no per-case metadata.

Called by the cache's writer (rows to arrays) and reader (arrays to rows). A row of a case that is done is also
stored with the case itself, so that a table can be built again from the cases alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from supercl_core.cache.schema import ASP_GRID, CASE_ARRAYS, STATES, STATISTICS, ArraySpec, array_spec

MAX_ID_BYTES: Final = 200
"""A case id is the name of a folder, and what is written beside it needs room for an ending."""


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    """One case of a cache. Raises ValueError for values that no cache of ours holds: a cache may come from anywhere."""

    id: str
    digest: str = ""
    """SHA-256 (hex) of the source files' bytes."""
    state: str = "done"
    """`done` or `failed`."""
    reason: str = ""
    """Why the case failed."""
    source: str = ""
    """Path of the image below the folder of the data set."""
    content_digest: str = ""
    """What `content_digest` gives: equal for cases whose stored content is identical."""
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Channels, slices, rows, columns."""
    image_dtype: str = ""
    superpixels_dtype: str = ""
    num_superpixels: int = 0
    """Largest number of superpixels in a slice."""
    has_ground_truth: bool = False
    spacing_mm: tuple[float, float, float] | None = None
    """Along z, y, x; None where the data set has no spacing."""
    image_scale: float = 1.0
    image_offset: float = 0.0
    statistics: tuple[tuple[float, ...], ...] = ()
    """Per channel, in the order of `schema.STATISTICS`."""

    def __post_init__(self) -> None:
        texts = (self.id, self.digest, self.state, self.reason, self.source, self.content_digest)
        if not all(isinstance(text, str) for text in texts) or self.state not in STATES:
            raise ValueError("a row whose texts or state are none")
        if problem := case_id_problem(self.id):
            raise ValueError(f"the case id {self.id!r} {problem}")
        numbers = (self.image_scale, self.image_offset, *(self.spacing_mm or ()), *sum(self.statistics, ()))
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise ValueError("a row whose spacing, scale, offset or statistics are no numbers")
        if not (self._is_consistent() if self.state == "done" else self.shape == (0, 0, 0, 0)):
            raise ValueError("a row whose shape, dtypes and statistics do not fit together")

    def _is_consistent(self) -> bool:
        counts = (*self.shape, self.num_superpixels)
        return (
            len(self.shape) == 4
            and all(type(count) is int and 0 < count < 2**31 for count in counts)
            and self.image_dtype in array_spec("image").dtypes
            and self.superpixels_dtype in array_spec("superpixels").dtypes
            and type(self.has_ground_truth) is bool
            and (self.spacing_mm is None or (len(self.spacing_mm) == 3 and min(self.spacing_mm) > 0))
            and len(self.statistics) == self.shape[0]
            and all(len(channel) == len(STATISTICS) for channel in self.statistics)
        )

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CaseRow:
        """The row that `as_dict` gave, after a way through JSON. Raises ValueError for any other value."""
        try:
            spacing = values["spacing_mm"]
            return cls(
                **{
                    **values,
                    "shape": tuple(values["shape"]),
                    "spacing_mm": None if spacing is None else tuple(spacing),
                    "statistics": tuple(tuple(channel) for channel in values["statistics"]),
                }
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"no row of a case: {error}") from error

    def arrays(self) -> list[ArraySpec]:
        """The mapped arrays that the case has."""
        return [spec for spec in CASE_ARRAYS if not spec.optional or self.has_ground_truth]

    def slice_layout(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype (little-endian) of one slice of the mapped array `name`."""
        channels, _, height, width = self.shape
        shape: tuple[int, ...]
        match name:
            case "image":
                shape, dtype = (channels, height, width), np.dtype(self.image_dtype)
            case "superpixels":
                shape, dtype = (height, width), np.dtype(self.superpixels_dtype)
            case "ground_truth":
                shape, dtype = (height, width), np.dtype(np.uint8)
            case _:
                shape, dtype = (ASP_GRID, ASP_GRID), np.dtype(np.float16)
        return shape, dtype.newbyteorder("<")

    def layout(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype (little-endian) of the whole mapped array `name`."""
        shape, dtype = self.slice_layout(name)
        return (*shape[:-2], self.shape[1], *shape[-2:]), dtype

    def statistic(self, name: str) -> np.ndarray:
        """One statistic of every channel: float32 (c,), in the source's unit. `name` is one of STATISTICS."""
        index = STATISTICS.index(name)
        return np.array([channel[index] for channel in self.statistics], dtype=np.float32)


def case_id_problem(case_id: str) -> str | None:
    """Why a text cannot be a case id, as the end of a sentence; None where it can.

    An id is the name of a folder and of a Zarr node, and is printed: it must not lead elsewhere, be a name that Zarr
    keeps for itself, or hold control characters.
    """
    if not case_id.strip():
        return "is empty"
    if case_id.startswith((".", "__")) or case_id == "zarr.json":
        return "is a name that Zarr or the file system keeps for itself"
    if any(character in "/\\" or not character.isprintable() for character in case_id):
        return "holds a slash, a control character or another one that cannot be printed"
    if len(case_id.encode()) > MAX_ID_BYTES:
        return f"is longer than {MAX_ID_BYTES} bytes"
    return None


def case_key(config_digest: str, source_digest: str) -> str:
    """What identifies the content of a case: settings and kernels (`config_digest`) and source files, SHA-256 (hex)."""
    return hashlib.sha256(f"{config_digest} {source_digest}".encode()).hexdigest()


def content_digest(row: CaseRow, checksums: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) over the checksums of a case: equal for equal content, whatever its files and labels.

    `checksums`: the crc32c of every slice, uint32 (z,), of the arrays `image`, `superpixels` and `asp`.
    """
    known = [row.shape, row.image_dtype, row.image_scale, row.image_offset]
    total = hashlib.sha256(json.dumps(known).encode())
    for name in ("image", "superpixels", "asp"):
        total.update(np.asarray(checksums[name]).astype("<u4").tobytes())
    return total.hexdigest()


def shards_digest(checksums: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) over the checksums of every slice of every mapped array of a case, by the array's name.

    Each slice proves itself by its checksum; this proves that they belong to this case, in this order.
    """
    total = hashlib.sha256()
    for name in sorted(checksums):
        total.update(np.asarray(checksums[name]).astype("<u4").tobytes())
    return total.hexdigest()


def slices_digest(rows: Sequence[CaseRow]) -> str:
    """SHA-256 (hex) over the content digests of the cases that are done, in order: what sets over slices belong to."""
    return hashlib.sha256(
        "".join(row.content_digest for row in rows if row.state == "done").encode()
    ).hexdigest()


def identical_cases(rows: Sequence[CaseRow]) -> list[tuple[str, ...]]:
    """Groups of case ids whose stored content is identical, each in order."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row.state == "done":
            groups.setdefault(row.content_digest, []).append(row.id)
    return [tuple(sorted(ids)) for ids in groups.values() if len(ids) > 1]


def patient_number(case_id: str) -> int | None:
    """The number in a name like `patient007_frame01`, by which published split lists know the patient; else None.

    Cases of ACDC, MM-WHS, HVSMR and CHAOS are named so (`sources.named`, `sources.chaos`).
    """
    found = re.match(r"patient0*([0-9]{1,9})(?![0-9])", case_id)
    return int(found[1]) if found else None


def patient_of(case_id: str) -> str:
    """What cases of one patient have in common: `patient 7` of `patient007_frame01`, `sub-01` of `sub-01_ses-1_T1w`.

    The latter are names of BIDS. Any other case is a patient of its own.
    """
    number = patient_number(case_id)
    subject = re.match(r"sub-[A-Za-z0-9]+", case_id)
    return f"patient {number}" if number is not None else subject[0] if subject else case_id


def patients(rows: Sequence[CaseRow]) -> np.ndarray:
    """A number for the patient of every case, integers (cases,): slices of one patient are alike without any method.

    The cases of a patient by their names (`patient_of`) are one patient, and so are cases of identical content.
    """
    number = np.unique([patient_of(row.id) for row in rows], return_inverse=True)[1]
    ids = [row.id for row in rows]
    for identical in identical_cases(rows):
        members = np.isin(number, number[np.isin(ids, identical)])
        number[members] = number[members].min()
    return number


def slice_columns(rows: Sequence[CaseRow]) -> dict[str, np.ndarray]:
    """The arrays of `slices/`, by name, as the rows of all cases give them."""
    counts = [row.shape[1] for row in rows]
    z = np.concatenate([np.arange(count) for count in counts] + [np.zeros(0, int)])
    totals = np.repeat(counts, counts)
    return {
        "case": np.repeat(np.arange(len(rows)), counts).astype(np.int32),
        "z": z.astype(np.int32),
        "position": ((z + 1) / np.maximum(totals, 1)).astype(np.float32),
    }


def rows_to_arrays(rows: list[CaseRow], *, num_channels: int) -> dict[str, np.ndarray]:
    """The columns of `table/`, by name, as the schema declares them."""
    statistics = np.full((len(rows), num_channels, len(STATISTICS)), np.nan)
    for index, row in enumerate(rows):
        if row.statistics:
            statistics[index] = row.statistics
    missing = (np.nan, np.nan, np.nan)
    return {
        "id": _text_column([row.id for row in rows]),
        "digest": _text_column([row.digest for row in rows]),
        "state": np.array([STATES.index(row.state) for row in rows], dtype=np.uint8),
        "reason": _text_column([row.reason for row in rows]),
        "source": _text_column([row.source for row in rows]),
        "content_digest": _text_column([row.content_digest for row in rows]),
        "shape": np.array([row.shape for row in rows], dtype=np.int32).reshape(-1, 4),
        "image_dtype": _text_column([row.image_dtype for row in rows]),
        "superpixels_dtype": _text_column([row.superpixels_dtype for row in rows]),
        "num_superpixels": np.array([row.num_superpixels for row in rows], dtype=np.int32),
        "has_ground_truth": np.array([row.has_ground_truth for row in rows], dtype=bool),
        "spacing_mm": np.array([row.spacing_mm or missing for row in rows], dtype=np.float64).reshape(-1, 3),
        "image_scale": np.array([row.image_scale for row in rows], dtype=np.float64),
        "image_offset": np.array([row.image_offset for row in rows], dtype=np.float64),
        "statistics": statistics,
    }


def rows_from_arrays(columns: Mapping[str, np.ndarray]) -> list[CaseRow]:
    """All rows of `table/`, in order. Raises ValueError where the columns hold what no cache of ours holds."""
    texts = {name: _texts(columns[name]) for name in _TEXT_COLUMNS}
    lists = {name: columns[name].tolist() for name in columns if name not in texts}
    if len({len(column) for column in columns.values()}) != 1 or max(lists["state"]) >= len(STATES):
        raise ValueError("a table whose columns do not fit together")
    rows = []
    for index in range(len(texts["id"])):
        spacing = lists["spacing_mm"][index]
        state = STATES[lists["state"][index]]
        rows.append(
            CaseRow(
                **{name: texts[name][index] for name in texts},
                state=state,
                shape=tuple(lists["shape"][index]),
                num_superpixels=lists["num_superpixels"][index],
                has_ground_truth=lists["has_ground_truth"][index],
                spacing_mm=None if all(map(math.isnan, spacing)) else tuple(spacing),
                image_scale=lists["image_scale"][index],
                image_offset=lists["image_offset"][index],
                statistics=tuple(map(tuple, lists["statistics"][index])) if state == "done" else (),
            )
        )
    return rows


def _text_column(texts: list[str]) -> np.ndarray:
    """Texts as uint8 (m, w), UTF-8, padded with zero bytes; w is at least 1."""
    encoded = [text.encode(errors="backslashreplace") for text in texts]
    width = max([len(text) for text in encoded] + [1])
    return np.array(encoded, dtype=f"S{width}").view(np.uint8).reshape(len(texts), width)


def _texts(column: np.ndarray) -> list[str]:
    return [bytes(row).rstrip(b"\0").decode() for row in column]


_TEXT_COLUMNS: Final = (
    "id",
    "digest",
    "reason",
    "source",
    "content_digest",
    "image_dtype",
    "superpixels_dtype",
)
