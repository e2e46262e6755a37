"""What the files of a run hold, as shapes that a JSON value is checked against before it is used.

A shape is a test of a value; a list with the shape of its items; an object with the shapes of the keys that are used,
the key None standing for every key; or a tuple with the shape of what may also be null. Called by `train.runs`.
"""

from __future__ import annotations

from typing import Any, Final

from train.metrics import METRICS


def check(value: Any, shape: Any, name: str = "") -> None:
    """Raise ValueError, with the dotted name of what differs, unless the JSON value is of the `shape`."""
    if isinstance(shape, tuple):
        if value is not None:
            check(value, shape[0], name)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"no list{_at(name)}")
        for index, item in enumerate(value):
            check(item, shape[0], f"{name}[{index}]")
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"no object{_at(name)}")
        for key in [*shape, *(value if None in shape else ())]:
            if key in value:
                check(value[key], shape.get(key, shape.get(None)), f"{name}.{key}")
            elif key is not None:
                raise ValueError(f"no {repr(key)[:100]}{_at(name)}")
    elif not shape(value):
        raise ValueError(f"{repr(value)[:100]}{_at(name)}")


def _at(name: str) -> str:
    return f" at {name.removeprefix('.')[:200]}" if name else ""


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def count(value: Any) -> bool:
    """Whether the value is a whole number from 0, as JSON readers agree on it."""
    return type(value) is int and 0 <= value < 1 << 53


def _size(value: Any) -> bool:
    """Whether the value is a number of channels, such that no network overflows."""
    return type(value) is int and 0 < value < 1 << 16


def _mirror_axes(value: Any) -> bool:
    """Whether the value lists rows, columns, both or neither."""
    return value in ([], ["y"], ["x"], ["y", "x"], ["x", "y"])


def _number(value: Any) -> bool:
    """Whether the value is a number that can still be multiplied, summed and drawn."""
    return type(value) in (int, float) and abs(value) < 1e30


_SCORES: Final = dict.fromkeys(METRICS, (_number,))

LINEAGE: Final = [{"kind": _text, "data_set": _text, "content_digests": {None: _text}}]
"""What weights have learned from, run by run."""

RUN: Final = {
    "name": _text,
    "status": _text,
    "kind": lambda value: value in ("pretrain", "finetune"),
    "config": _object,
    "world_size": _size,
    "model": {
        "backbone": _text,
        "in_channels": _size,
        "num_classes": (_size,),
        "filters": _size,
    },
    "inference": ({"adjacent_slices": count, "mirror_axes": _mirror_axes, "largest_component": [_size]},),
    "cache": {
        "path": _text,
        "name": _text,
        "config_digest": _text,
        "num_channels": _size,
        "num_slices": count,
        "class_names": [_text],
    },
    "cases": {"train": [_text], "validation": [_text], "test": [_text]},
    "content_digests": {None: _text},
    "split": ({"file": _text, "labelled": count},),
    "init": ({"source": _text},),
    "lineage": LINEAGE,
    "unlabelled_test_cases_seen": count,
    "weak_labels": ({"name": _text, "level": count, None: _text},),
    "provenance": _object,
}
"""run.json."""

METRICS_LINE: Final = {"step": count, None: _number}
"""One line of metrics.jsonl."""

EVALUATION: Final = {
    "protocol": _text,
    "unit": _text,
    "class_names": [_text],
    "rows": [{"case": _text, "class": _text, **_SCORES}],
    "summary": {
        None: {
            **_SCORES,
            "num_cases": count,
            "num_missing_in_prediction": count,
            "num_missing_in_truth": count,
        }
    },
    "paper": (
        {
            "description": _text,
            "crop": [_size],
            "num_slices": count,
            "summary": {None: {**_SCORES, "num_empty_slices": count}},
        },
    ),
}
"""evaluation.json and validation.json."""
