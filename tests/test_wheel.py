"""The wheel, installed by each extra alone, takes synthetic data to a report. See wheel.sh, which also does it in
environments that are really empty."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_each_half_works_without_the_packages_of_the_other(tmp_path: Path) -> None:
    finished = subprocess.run(
        [Path(__file__).with_name("wheel.sh"), "--borrow"],
        env={**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "report: report.html" in finished.stdout
    assert not list(tmp_path.glob("tmp.*"))
