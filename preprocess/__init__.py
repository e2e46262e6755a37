"""The offline half: volumes in, superpixel cache with weak labels out. Never imports `train` or torch."""

from __future__ import annotations

from typing import Any

__all__ = ["run", "weak_labels"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from preprocess.runner import run

        return run
    if name == "weak_labels":
        from importlib import import_module

        return import_module("preprocess.weak_labels").weak_labels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
