"""`supercl doctor`: what is installed and what is missing for which command."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from supercl_core.doctor import report


def test_everything_installed_is_ready() -> None:
    rows = dict(report())
    assert rows["extra preprocess"].startswith("ready (phantom preprocess repair weak-labels")
    assert rows["extra train"].startswith("ready (describe pretrain finetune")
    assert "GB free" in rows["disk here"]
    assert "Python 3." in rows["system"]
    assert rows["accelerators"]


def test_missing_modules_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> object:
        return None if name in ("numba", "torch") else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    rows = dict(report())
    assert rows["extra preprocess"].startswith("missing numba: pip install 'supercl[preprocess]' (phantom")
    assert rows["extra train"].startswith("missing torch: pip install 'supercl[train]'")
    assert "accelerators" not in rows


def test_command_prints_the_report(supercl: Callable[..., Any]) -> None:
    outcome = supercl("doctor")
    assert outcome.code == 0
    assert "extra train" in outcome.out
