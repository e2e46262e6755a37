"""Every kind of corrupt or odd input at once: each ends as it must, and no other case notices."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corrupt
import numpy as np
import pytest

from preprocess import run
from preprocess.runner import RunResult
from supercl_core.cache.reader import Cache, open_cache

ARRAYS = ("image", "superpixels", "asp", "ground_truth")


@dataclass(frozen=True)
class Outcome:
    """What a run over every kind left."""

    data_path: Path
    expected: dict[str, tuple[str, str]]
    result: RunResult
    cache: Cache

    def case_of(self, kind: str) -> str:
        return next(case_id for case_id, (name, _) in self.expected.items() if name == kind)


@pytest.fixture(scope="module")
def outcome(scheduler: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    path = tmp_path_factory.mktemp("corrupt")
    (path / "secret.raw").write_bytes(corrupt.image().tobytes())  # what `../` leads to is there
    expected = corrupt.write_data_set(path / "data")
    (path / "data" / "secret.raw").write_bytes(corrupt.image().tobytes())
    result = run(path / "data", path / "out.zarr", scheduler=scheduler)
    return Outcome(path / "data", expected, result, open_cache(path / "out.zarr"))


def test_there_are_enough_kinds() -> None:
    assert len(corrupt.FAILING) >= 34
    assert not corrupt.FAILING.keys() & corrupt.VALID.keys()


def test_every_case_has_one_row(outcome: Outcome) -> None:
    rows = outcome.cache.rows
    assert sorted(row.id for row in rows) == sorted(outcome.expected)
    assert {row.id for row in outcome.result.failed} == {row.id for row in rows if row.state == "failed"}
    assert outcome.result.num_computed == 3 + len(corrupt.VALID)
    assert outcome.cache.attributes["complete"] is True


@pytest.mark.parametrize("kind", corrupt.FAILING)
def test_a_corrupt_case_is_listed_with_its_reason(kind: str, outcome: Outcome) -> None:
    rows = {row.id: row for row in outcome.cache.rows}
    row = rows[outcome.case_of(kind)]
    assert row.state == "failed"
    assert corrupt.FAILING[kind].reason in row.reason
    assert row.reason.isprintable()
    assert row.source.isprintable()
    # Not an exception of some library, and no address in memory, which would differ from run to run.
    assert not re.search(r"^\w*(Error|Exception|Warning):|\b0x[0-9a-f]+", row.reason)


@pytest.mark.parametrize("kind", corrupt.VALID)
def test_an_odd_case_is_computed(kind: str, outcome: Outcome) -> None:
    case = outcome.cache.case(outcome.case_of(kind))
    scale, offset = case.row.image_scale, case.row.image_offset
    values = np.asarray(case.image_ZCYX[:, 0], np.float64) * scale + offset
    expected = corrupt.VALID[kind].values
    assert expected is not None
    np.testing.assert_array_equal(values, expected)
    assert case.row.has_ground_truth


def test_missing_orientation_is_noted(outcome: Outcome) -> None:
    assert outcome.cache.case("no_orientation").attributes["orientation"] == "unknown"
    assert outcome.cache.case("good_0").attributes["orientation"] == "RAS"


def test_good_cases_are_those_of_a_run_without_the_bad_ones(
    outcome: Outcome, scheduler: str, tmp_path: Path
) -> None:
    corrupt.write_data_set(tmp_path / "data", kinds=())
    run(tmp_path / "data", tmp_path / "out.zarr", scheduler=scheduler)
    alone = open_cache(tmp_path / "out.zarr")
    assert len(alone.rows) == 3
    for row in alone.rows:
        folder = Path("cases") / row.id
        files = [file for file in (tmp_path / "out.zarr" / folder).rglob("c") if file.is_dir()]
        assert len(files) == len(ARRAYS)
        for file in (tmp_path / "out.zarr" / folder).rglob("*"):
            if file.is_file() and file.name != "zarr.json":
                beside = outcome.result.cache_path / file.relative_to(tmp_path / "out.zarr")
                assert beside.read_bytes() == file.read_bytes()


def test_the_command_names_every_failed_case_and_exits_with_3(
    outcome: Outcome, supercl: Callable[..., Any]
) -> None:
    """On the finished cache: what failed and has not changed is not tried again."""
    told = supercl("preprocess", outcome.data_path, outcome.result.cache_path)
    assert told.code == 3
    assert f"{len(corrupt.FAILING)} failed" in told.out
    for case_id, (_, reason) in outcome.expected.items():
        if reason:
            assert re.search(rf"^ *{re.escape(case_id)}: .*{re.escape(reason)}", told.err, re.MULTILINE)
    assert "Traceback" not in told.err
    assert "\x1b" not in told.err


PLAN_WITHOUT_PRIVILEGES = """
import os
from pathlib import Path
import isal.igzip, nibabel.nifti1, SimpleITK  # which others may not be allowed to read
from preprocess.pipeline import PreprocessConfig
from preprocess.plan import make_plan
from supercl_core.sources import discover
if os.geteuid() == 0:
    os.seteuid(65534)  # nobody
plan = make_plan(discover(Path("data")), Path("out.zarr"), PreprocessConfig())
print([case.id for case in plan.todo])
for row in plan.failed:
    print(f"{row.id}: {row.reason}")
"""


def test_what_may_not_be_read_is_listed(tmp_path: Path) -> None:
    """Without the privileges of root, which may read everything."""
    data = tmp_path / "data"
    for name in ("allowed.nii", "forbidden.nii", "site/scan.nii"):
        file = data / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(corrupt.nifti(corrupt.image()))
        file.chmod(0o644)
    tmp_path.chmod(0o755)
    (data / "forbidden.nii").chmod(0)
    (data / "site").chmod(0)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PLAN_WITHOUT_PRIVILEGES],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    finally:
        (data / "site").chmod(0o755)
    assert done.stdout.splitlines() == [
        "['allowed']",
        "forbidden: The file cannot be opened; expected a file that can be read, found Permission denied "
        "(data/forbidden.nii)",
        "site: The folder cannot be listed: Permission denied",
    ]
