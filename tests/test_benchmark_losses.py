"""The benchmark of the contrastive loss in its quick form: it ends, and its last line has the keys that others read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.slow
def test_losses_prints_the_share_of_ilcp() -> None:
    command = [sys.executable, "-m", "benchmarks.losses", "--quick", "--device", "cpu"]
    finished = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    values = json.loads(finished.stdout.splitlines()[-1])
    assert values["ilcp_share_of_step"] == pytest.approx(values["ilcp_ms"] / values["step_ms"])
    assert 0 < values["ilcp_share_of_step"] < 1
    assert values["largest_difference"] < 1e-9
    for name, value in {
        "device": "cpu",
        "side": 128,
        "batch_size": 2,
        "ilcp_pixels": 64,
        "quick": True,
    }.items():
        assert values[name] == value
    assert {"processor", "cores", "threads", "precision", "torch"} <= set(values)
