"""What a cache holds, as rows of text for people or as JSON for machines. Called by `supercl inspect` and `view`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from supercl_core.cache.cases import CaseRow, identical_cases
from supercl_core.cache.reader import Cache
from supercl_core.cache.schema import STATISTICS
from supercl_core.cache.zarr_files import read_attributes

MAX_CASES: Final = 12
"""Cases that `summary_rows` lists; the JSON has all of them."""

Rows = list[tuple[str, str]]
"""Names and texts of a table; rows that go on with the name before have an empty one."""


def summary(cache: Cache) -> dict[str, Any]:
    """Everything there is to say of a cache, as plain values that JSON can hold."""
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
        "largest_num_superpixels": max((row.num_superpixels for row in done), default=0),
        "spacing_mm": _spacing_range(done),
        "size_bytes": sum(file.stat().st_size for file in cache.path.rglob("*") if file.is_file()),
        "weak_labels": _sets(cache, "weak_labels"),
        "descriptors": _sets(cache, "descriptors"),
        "config": cache.attributes["config"],
        "config_digest": cache.attributes["config_digest"],
        "kernels": cache.attributes["kernels"],
        "provenance": cache.attributes["provenance"],
        "identical_cases": [list(ids) for ids in identical_cases(cache.rows)],
        "cases": [
            {
                "id": row.id,
                "state": row.state,
                "reason": row.reason,
                "source": row.source,
                "shape": list(row.shape),
                "spacing_mm": row.spacing_mm and list(row.spacing_mm),
                "has_ground_truth": row.has_ground_truth,
                "content_digest": row.content_digest,
            }
            for row in cache.rows
        ],
    }


def case_summary(cache: Cache, case_id: str) -> dict[str, Any]:
    """Everything there is to say of a case, as plain values that JSON can hold.

    Raises CacheError for an unknown or failed case.
    """
    case = cache.case(case_id)
    row = case.row
    return {
        **{key: value for key, value in row.as_dict().items() if key not in ("reason", "statistics")},
        "shape": list(row.shape),
        "spacing_mm": row.spacing_mm and list(row.spacing_mm),
        "statistics": {
            channel: dict(zip(STATISTICS, values, strict=True))
            for channel, values in zip(cache.attributes["channel_names"], row.statistics, strict=True)
        },
        "orientation": case.attributes["orientation"],
        "largest_error": case.attributes["largest_error"],
        "num_clipped": case.attributes["num_clipped"],
        "identical_cases": [other for ids in identical_cases(cache.rows) if row.id in ids for other in ids],
        "folder": str(cache.path / "cases" / row.id),
    }


def summary_rows(values: dict[str, Any]) -> Rows:
    """What `summary` returned as a narrow table."""
    config, provenance = values["config"], values["provenance"]
    done = [case for case in values["cases"] if case["state"] == "done"]
    spacing = values["spacing_mm"] and [
        f"{axis} {_range(*found)}" for axis, found in values["spacing_mm"].items()
    ]
    labels = [
        f"{_set_name(one)}: {_counts(one['num_components'])} components, from {one['descriptors']}, "
        f"neighbours {one['neighbours']}"
        for one in values["weak_labels"]
    ]
    descriptors = [
        f"{_set_name(one)}: {_text(one['encoder'].get('source'))}" for one in values["descriptors"]
    ]
    more = [f"and {len(done) - MAX_CASES:,} more; --json lists all"] if len(done) > MAX_CASES else []
    return [
        ("data set", values["name"]),
        (
            "path",
            f"{values['path']} ({_bytes(values['size_bytes'])}, schema version {values['schema_version']})",
        ),
        (
            "cases",
            f"{values['num_cases']:,} done, {values['num_failed']:,} failed; "
            f"{values['num_with_ground_truth']:,} with ground truth",
        ),
        ("slices", f"{values['num_slices']:,}{_sizes(values)}"),
        ("channels", ", ".join(values["channel_names"])),
        ("classes", ", ".join(values["class_names"]) or "none"),
        ("spacing", ", ".join(spacing) + " mm" if spacing else "unknown"),
        ("stored as", ", ".join(values["image_dtypes"]) or "nothing"),
        ("superpixels", f"at most {values['largest_num_superpixels']:,} a slice"),
        *_named("descriptors", descriptors),
        *_named("weak labels", labels or ["none"]),
        ("settings", ", ".join(f"{key} {_text(value)}" for key, value in config.items())),
        ("written", f"{_text(provenance.get('time'))} on {_text(provenance.get('host'))}"),
        ("command", _text(provenance.get("command"))),
        ("versions", _text(provenance.get("versions"))),
        *_named("identical", [" = ".join(ids) for ids in values["identical_cases"]]),
        *_named(
            "failed",
            [f"{case['id']}: {case['reason']}" for case in values["cases"] if case["state"] == "failed"],
        ),
        *_named("cases done", [f"{case['id']}: {_size(case['shape'])}" for case in done[:MAX_CASES]] + more),
    ]


def case_rows(values: dict[str, Any]) -> Rows:
    """What `case_summary` returned as a narrow table."""
    spacing = values["spacing_mm"]
    precision = f"largest error {_text(values['largest_error'])}" if values["largest_error"] else "lossless"
    if values["num_clipped"]:
        precision += f", {values['num_clipped']:,} voxels clipped"
    statistics = [
        f"{channel}: {_range(found['minimum'], found['maximum'])}, "
        f"99 % {_range(found['percentile_00_5'], found['percentile_99_5'])}, "
        f"mean {found['mean']:.4g}, deviation {found['std']:.4g}"
        for channel, found in values["statistics"].items()
    ]
    return [
        ("case", values["id"]),
        ("source", values["source"]),
        ("size", _size(values["shape"])),
        (
            "spacing",
            " x ".join(f"{axis:.4g}" for axis in spacing) + " mm (z, y, x)" if spacing else "unknown",
        ),
        ("orientation", _text(values["orientation"])),
        ("stored as", f"{values['image_dtype']}, {precision}"),
        *_named("intensities", statistics),
        ("superpixels", f"at most {values['num_superpixels']:,} a slice"),
        ("ground truth", "yes" if values["has_ground_truth"] else "no"),
        *_named("identical", [" = ".join(values["identical_cases"])] if values["identical_cases"] else []),
        ("source digest", values["digest"]),
        ("content digest", values["content_digest"]),
        ("folder", values["folder"]),
    ]


def _sets(cache: Cache, group: str) -> list[dict[str, Any]]:
    """What there is to say of the sets of a group of `schema.SETS`: their attributes, and whether they are stale."""
    found = []
    for name in cache.set_names(group):
        attributes = read_attributes(cache.path / group / name, f"{group}/{{name}}")
        is_default = group == "weak_labels" and name == cache.attributes["default_weak_labels"]
        stale = cache.is_stale(group, name)
        found.append({"name": name, "is_default": is_default, "is_stale": stale, **attributes})
    return found


def _spacing_range(rows: Sequence[CaseRow]) -> dict[str, list[float]] | None:
    known = np.array([row.spacing_mm for row in rows if row.spacing_mm is not None])
    if known.size == 0:
        return None
    return {
        axis: [float(known[:, index].min()), float(known[:, index].max())] for index, axis in enumerate("zyx")
    }


# ---------------------------------------------------------------- texts


def _named(name: str, texts: Sequence[str]) -> Rows:
    return [("" if index else name, text) for index, text in enumerate(texts)]


def _set_name(one: dict[str, Any]) -> str:
    notes = [note for note, holds in (("default", one["is_default"]), ("stale", one["is_stale"])) if holds]
    return f"{one['name']} ({', '.join(notes)})" if notes else one["name"]


def _sizes(values: dict[str, Any]) -> str:
    """The range of the cases' sizes, as the end of a sentence."""
    if values["smallest_shape"] is None:
        return ""
    slices, rows, columns = (
        _range(*ends) for ends in zip(values["smallest_shape"][1:], values["largest_shape"][1:], strict=True)
    )
    return f"; {slices} a case, of {rows} rows and {columns} columns"


def _size(shape: Sequence[int]) -> str:
    channels, num_slices, height, width = shape
    text = f"{num_slices} slice{'s'[: num_slices != 1]} of {height} x {width}"
    return text + (f", {channels} channels" if channels > 1 else "")


def _range(low: float, high: float) -> str:
    """Two numbers as a range, or the one that both are in print."""
    texts = (f"{low:.4g}", f"{high:.4g}")
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def _counts(counts: Sequence[int]) -> str:
    return " > ".join(f"{count:,}" for count in counts)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return str(value)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
