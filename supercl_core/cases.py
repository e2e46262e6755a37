"""The case table: one row per case, kept in `table/` so that opening a cache reads no per-case metadata.

Called by the cache's writer (rows to arrays) and reader (arrays to rows). A row of a case that is done is also
stored with the case itself, so that a table can be built again from the cases alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from supercl_core.schema import STATES, STATISTICS


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    """One case of a cache."""

    id: str
    digest: str = ""
    """SHA-256 (hex) of the source files' bytes."""
    state: str = "done"
    """`done` or `failed`."""
    reason: str = ""
    """Why the case failed."""
    source: str = ""
    """Path of the first source file."""
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

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CaseRow:
        """The row that `as_dict` gave, after a way through JSON."""
        spacing = values["spacing_mm"]
        return cls(
            **{
                **values,
                "shape": tuple(values["shape"]),
                "spacing_mm": None if spacing is None else tuple(spacing),
                "statistics": tuple(tuple(channel) for channel in values["statistics"]),
            }
        )

    def statistic(self, name: str) -> np.ndarray:
        """One statistic of every channel: float32 (c,), in the source's unit. `name` is one of STATISTICS."""
        index = STATISTICS.index(name)
        return np.array([channel[index] for channel in self.statistics], dtype=np.float32)


def rows_to_arrays(rows: list[CaseRow], *, num_channels: int) -> dict[str, np.ndarray]:
    """The columns of `table/`, by name, as the schema declares them."""
    statistics = np.full((len(rows), num_channels, len(STATISTICS)), np.nan, dtype=np.float32)
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


def rows_from_group(table: zarr.Group) -> list[CaseRow]:
    """All rows of the group `table/`, in order."""
    columns: dict[str, Any] = {name: np.asarray(array[:]) for name, array in table.arrays()}
    texts = {
        name: _texts(columns[name])
        for name in ("id", "digest", "reason", "source", "image_dtype", "superpixels_dtype")
    }
    lists = {name: columns[name].tolist() for name in columns if name not in texts}
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
                spacing_mm=None if np.isnan(spacing[0]) else tuple(spacing),
                image_scale=lists["image_scale"][index],
                image_offset=lists["image_offset"][index],
                statistics=tuple(map(tuple, lists["statistics"][index])) if state == "done" else (),
            )
        )
    return rows


def _text_column(texts: list[str]) -> np.ndarray:
    """Texts as uint8 (m, w), UTF-8, padded with zero bytes; w is at least 1."""
    encoded = [text.encode() for text in texts]
    width = max([len(text) for text in encoded] + [1])
    return np.array(encoded, dtype=f"S{width}").view(np.uint8).reshape(len(texts), width)


def _texts(column: np.ndarray) -> list[str]:
    return [bytes(row).rstrip(b"\0").decode() for row in column]
