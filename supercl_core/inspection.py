"""What a cache holds, as a table for people or as JSON for machines. Called by `supercl inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr

from supercl_core.cache_reader import Cache
from supercl_core.cases import CaseRow
from supercl_core.schema import STATISTICS


def summary(cache: Cache) -> dict[str, Any]:
    """Everything `supercl inspect CACHE` shows, as plain values that JSON can hold."""
    done = cache.done
    shapes = np.array([row.shape for row in done]).reshape(-1, 4)
    return {
        "path": str(cache.path),
        "name": cache.name,
        "schema_version": cache.attributes["schema_version"],
        "num_cases": len(done),
        "num_failed": len(cache.failed),
        "num_slices": cache.num_slices,
        "num_with_ground_truth": sum(row.has_ground_truth for row in done),
        "channel_names": list(cache.attributes["channel_names"]),
        "class_names": list(cache.class_names),
        "smallest_shape": shapes.min(axis=0).tolist() if done else None,
        "largest_shape": shapes.max(axis=0).tolist() if done else None,
        "image_dtypes": sorted({row.image_dtype for row in done}),
        "spacing_mm": _spacing_range(done),
        "size_bytes": sum(file.stat().st_size for file in cache.path.rglob("*") if file.is_file()),
        "weak_labels": _weak_labels(cache),
        "config": cache.attributes["config"],
        "provenance": cache.attributes["provenance"],
        "failed": [{"id": row.id, "reason": row.reason} for row in cache.failed],
    }


def case_summary(cache: Cache, case_id: str) -> dict[str, Any]:
    """Everything `supercl inspect CACHE CASE` shows, as plain values that JSON can hold."""
    row = cache.case(case_id).row
    group = zarr.open_group(cache.path / "cases" / case_id, mode="r", zarr_format=3)
    stored: Any = group.attrs["supercl"]
    return {
        **{key: value for key, value in row.as_dict().items() if key not in ("reason", "statistics")},
        "statistics": {
            channel: dict(zip(STATISTICS, values, strict=True))
            for channel, values in zip(cache.attributes["channel_names"], row.statistics, strict=True)
        },
        "orientation": stored["orientation"],
        "largest_error": stored["largest_error"],
        "num_clipped": stored["num_clipped"],
        "folder": str(cache.path / "cases" / case_id),
    }


def render_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """A summary as rows of (name, text) for a narrow table; nested values become one line a part."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = key.replace("_", " ")
        if isinstance(value, dict):
            parts = [f"{part}: {_text(inner)}" for part, inner in value.items()]
            rows += [(name if index == 0 else "", part) for index, part in enumerate(parts)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, item in enumerate(value):
                rows.append(
                    (name if index == 0 else "", ", ".join(f"{k}: {_text(v)}" for k, v in item.items()))
                )
        else:
            rows.append((name, _bytes(value) if key.endswith("_bytes") else _text(value)))
    return rows


def _weak_labels(cache: Cache) -> list[dict[str, Any]]:
    default = cache.attributes["default_weak_labels"]
    names = sorted(path.name for path in Path(cache.path / "weak_labels").iterdir() if path.is_dir())
    found = []
    for name in names:
        labels = cache.weak_labels(name)
        found.append({"name": name, "default": name == default, "components": list(labels.num_components)})
    return found


def _spacing_range(rows: list[CaseRow]) -> dict[str, list[float]] | None:
    known = np.array([row.spacing_mm for row in rows if row.spacing_mm is not None])
    if known.size == 0:
        return None
    return {
        axis: [float(known[:, index].min()), float(known[:, index].max())] for index, axis in enumerate("zyx")
    }


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " ".join(_text(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return str(value)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
