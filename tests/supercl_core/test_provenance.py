"""Provenance: plain values that say where a result comes from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from supercl_core import provenance


def test_record_holds_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/supercl", "preprocess", "in", "out.zarr"])
    record = provenance.record()
    assert json.loads(json.dumps(record)) == record
    assert record["command"] == "supercl preprocess in out.zarr"
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(record["time"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)
    assert record["versions"]["numpy"] == importlib.metadata.version("numpy")


def test_packages_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_PACKAGES", ("numpy", "no-such-package-of-ours"))
    assert list(provenance.versions()) == ["numpy"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_says_when_the_tree_differs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "x.txt").write_text("1")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "package" / "provenance.py"))
    assert provenance.commit() is None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "x.txt")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert provenance.commit() == head
    (tmp_path / "untracked.txt").touch()
    assert provenance.commit() == head
    (tmp_path / "x.txt").write_text("2")
    assert provenance.commit() == f"{head}+changes"


def test_a_broken_repository_gives_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "package" / "provenance.py"))
    assert provenance.commit() is None
