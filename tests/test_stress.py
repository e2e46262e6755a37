"""A short round of `stress.py`, and whether what it looks with would see anything."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import stress
from cache_bytes import changed_cases, content, differences, stamps
from stress_rounds import ENVIRONMENT, Reference

from supercl_core.checks import verification


@pytest.mark.slow
def test_a_few_rounds_of_stress_meet_every_target() -> None:
    ended = subprocess.run(
        [sys.executable, stress.__file__],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ROUNDS": "3", "SEED": "7"},
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert (result["rounds"], result["differences"], result["recomputed_finished_cases"]) == (3, 0, 0)
    assert result["bytes_flipped"] == result["flips_found"] == result["flips_repaired"] == 30
    assert result["corrupt_kinds"] == result["corrupt_reported"] >= 30
    assert sum(result["kills"].values()) > 0


CHANGES = """
import pathlib, shutil, sys
target = pathlib.Path(sys.argv[1])
(target / "a").mkdir()
(target / "a" / "file").write_text("x")
(target / "a").rename(target / "b")
shutil.rmtree(target / "b")
"""


@pytest.mark.parametrize(
    ("number", "change", "left"),
    [
        (1, "os.mkdir a", []),
        (2, "open a/file", ["a"]),
        (3, "os.rename b", ["a", "a/file"]),
        (4, "os.remove b/file", ["b", "b/file"]),
        (5, "os.rmdir b", ["b"]),
    ],
)
def test_the_hook_kills_at_the_instant_before_a_change(
    number: int, change: str, left: list[str], tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "order").write_text(f"0 worker any {number} self")
    ended = subprocess.run([sys.executable, "-c", CHANGES, target], env=ENVIRONMENT, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "killed").read_text() == change
    assert sorted(entry.relative_to(target).as_posix() for entry in target.rglob("*")) == left


def test_differences_are_missing_changed_and_foreign_files(cache_copy: Path) -> None:
    whole = content(cache_copy)
    (cache_copy / "cases" / "case_a" / "zarr.json").unlink()
    (cache_copy / "cases" / "foreign").mkdir()
    (cache_copy / "zarr.json").write_text((cache_copy / "zarr.json").read_text().replace("Tiny", "Tidy"))
    assert differences(whole, content(cache_copy)) == [
        "cases/case_a/zarr.json is missing",
        "cases/foreign/ is foreign",
        "zarr.json differs",
    ]


def test_a_case_written_again_with_the_same_bytes_counts_as_recomputed(cache_copy: Path) -> None:
    before = stamps([cache_copy / "cases" / "case_a", cache_copy / "cases" / "case_b"])
    assert changed_cases(before) == set()
    file = cache_copy / "cases" / "case_b" / "asp" / "zarr.json"
    text = file.read_text()
    file.unlink()
    file.write_text(text)
    assert changed_cases(before) == {"case_b"}


def test_a_flip_that_is_not_found_is_a_problem(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = verification.Verification(
        damages=(), is_complete=True, num_cases=4, num_slices=0, num_bytes=0, seconds=0.0
    )
    monkeypatch.setattr(stress, "verify", lambda *_, **__: nothing)
    monkeypatch.setattr(stress, "UNDAMAGED", 3)
    reference = Reference(data=tmp_path, cache=cache_path, files=content(cache_path), seconds=1.0, changes={})
    outcome = stress.flip_bytes(tmp_path / "flips", reference, 2, random.Random(0))
    assert (outcome.bytes_flipped, outcome.flips_found, outcome.flips_repaired) == (2, 0, 2)
    assert len(outcome.problems) == 1
    assert outcome.problems[0].startswith("verify missed")
