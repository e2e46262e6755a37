"""`supercl doctor`: what it finds on this machine, and how it judges what it might find on others."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supercl_core import cli, doctor

DECLARED = [
    "numpy>=1.26",
    "zarr>=3.1; python_version >= '3'",
    "dask>=2024.8; extra == 'preprocess'",
    "scipy>=1.12; extra == 'preprocess'",
    "scipy>=1.12; extra == 'train'",
    "torch>=2.6; extra == 'train'",
    "faiss-cpu>=1.8; extra == 'index'",
    "never>=1; extra == 'dev'",
]


def facts(**changes: Any) -> dict[str, Any]:
    """Of a machine with nothing wrong."""
    extra = {"commands": ["x"], "missing": [], "too_old": [], "install": "pip install supercl"}
    return {
        "platform": "Linux",
        "python": "3.11.7",
        "cores": {"machine": 8, "affinity": 8, "cgroup": 2.5, "usable": 3},
        "omp_num_threads": "3",
        "memory": {"machine": 16_000_000_000, "available": 12_000_000_000},
        "folder": {"path": "/data", "free_bytes": 80_000_000_000, "write_bytes_per_s": 450_000_000},
        "has_nvidia_driver": True,
        "torch": {"threads": 3, "devices": [{"name": "NVIDIA X", "memory_bytes": 80_000_000_000}]},
        "extras": {"core": extra},
        "versions": {"supercl": "0.1.0", "torch": "2.13.0"},
        **changes,
    }


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that this environment seems to have; what a test removes or changes is as it says."""
    versions = {
        "supercl": "0.1.0",
        "numpy": "2.0",
        "zarr": "3.1",
        "dask": "2026.1",
        "scipy": "1.12",
        "torch": "2.6",
    }

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: DECLARED)
    return versions


def test_the_facts_of_this_machine(tmp_path: Path) -> None:
    found = doctor.examine(tmp_path)
    assert 1 <= found["cores"]["usable"] <= found["cores"]["machine"]
    assert found["folder"]["path"] == str(tmp_path.resolve())
    assert found["folder"]["write_bytes_per_s"] > 0
    assert list(tmp_path.iterdir()) == []
    assert found["torch"]["threads"] >= 1
    assert found["extras"]["train"]["commands"][:2] == ["describe", "pretrain"]
    json.dumps(found, allow_nan=False)


def test_every_command_of_a_half_stands_beside_its_extra() -> None:
    listed = {name for extra in ("preprocess", "train") for name in doctor._EXTRAS[extra]}
    assert listed == {name for name, entry in cli.COMMANDS.items() if entry.extra}


def test_every_extra_that_a_user_may_need_is_looked_at() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    declared = tomllib.loads(text)["project"]["optional-dependencies"]
    assert doctor._EXTRAS.keys() - {"core"} == declared.keys() - {"dev", "fuzz"}


def test_what_is_missing_is_named_with_the_command_that_installs_it(
    installed: dict[str, str], tmp_path: Path
) -> None:
    del installed["torch"]
    found = doctor.examine(tmp_path)
    lacking = {name: extra["missing"] for name, extra in found["extras"].items()}
    assert {name: packages for name, packages in lacking.items() if packages} == {
        "train": ["torch"],
        "index": ["faiss-cpu"],
    }
    assert found["torch"] is None
    rows = dict(doctor.rows(found))
    assert rows["train"].startswith("lacks torch: pip install 'supercl[train]' (describe, pretrain, ")
    assert rows["preprocess"].startswith("ready (phantom, preprocess, ")
    assert "devices" not in rows
    assert "never" not in rows["versions"]
    assert not [what for what, _ in doctor.problems(found) if "torch" in what]


@pytest.mark.parametrize(
    ("package", "version", "problem"),
    [
        ("torch", "2.5.1", "train lacks torch>=2.6 (has 2.5.1)"),
        ("zarr", "2.18", "core lacks zarr>=3.1 (has 2.18)"),
        ("numpy", None, "core lacks numpy"),
    ],
)
def test_what_is_too_old_is_a_problem_and_what_all_commands_need_is_one(
    installed: dict[str, str], tmp_path: Path, package: str, version: str | None, problem: str
) -> None:
    if version is None:
        del installed[package]
    else:
        installed[package] = version
    extra = problem.split()[0]
    install = "pip install supercl" if extra == "core" else f"pip install 'supercl[{extra}]'"
    assert (problem, install) in list(doctor.problems(doctor.examine(tmp_path)))


def test_a_source_tree_that_is_not_installed(installed: dict[str, str], tmp_path: Path) -> None:
    installed.clear()
    found = doctor.examine(tmp_path)
    assert ("SuperCL is not installed here", "in its folder: pip install '.[preprocess,train]'") in list(
        doctor.problems(found)
    )
    assert dict(doctor.rows(found))["versions"] == "not known"


def test_a_torch_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = doctor.examine(tmp_path)
    assert list(found["torch"]) == ["failure"]
    assert next(what for what, _ in doctor.problems(found)).startswith("torch cannot be loaded: ")


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    def refuse(_: int) -> None:
        raise RuntimeError("CUDA driver initialization failed\nmore")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    found = doctor.examine(tmp_path)
    what, next_step = next(pair for pair in doctor.problems(found) if "torch" in pair[0])
    assert what == "torch cannot use the GPU of this machine: CUDA driver initialization failed"
    assert "CUDA_VISIBLE_DEVICES" in next_step
    assert dict(doctor.rows(found))["devices"] == "no GPU: training runs on the CPU"


def test_a_folder_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: Path) -> float:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(doctor, "_write_speed", refuse)
    found = doctor.examine(tmp_path)
    assert "write_bytes_per_s" not in found["folder"]
    expected = (
        f"{tmp_path.resolve()} cannot be written to: Permission denied",
        "caches and runs need another folder",
    )
    assert expected in list(doctor.problems(found))
    assert dict(doctor.rows(found))["folder"].endswith("cannot be written to")


def test_nothing_wrong_is_no_problem() -> None:
    assert list(doctor.problems(facts())) == []
    assert list(doctor.problems(facts(torch=None, memory={}))) == []


@pytest.mark.parametrize(
    ("changes", "what", "next_step"),
    [
        (
            {"torch": {"threads": 8, "devices": []}, "has_nvidia_driver": False},
            "training on the CPU starts 8 threads, and may use 3 cores",
            "export OMP_NUM_THREADS=3",
        ),
        (
            {"torch": {"threads": 3, "devices": []}},
            "torch does not see the GPU of this machine",
            "install a build for its driver, or see CUDA_VISIBLE_DEVICES",
        ),
        (
            {"memory": {"machine": 16_000_000_000, "cgroup": 512_000_000}},
            "512 MB of memory can be used",
            "end other work, or ask for more",
        ),
        (
            {"folder": {"path": "/data", "free_bytes": 999_999_999, "write_bytes_per_s": 1}},
            "1,000 MB are free in /data",
            "free some space, or use another disk",
        ),
    ],
)
def test_what_is_a_problem_elsewhere(changes: dict[str, Any], what: str, next_step: str) -> None:
    assert list(doctor.problems(facts(**changes))) == [(what, next_step)]


def test_rows_for_people() -> None:
    rows = doctor.rows(facts(memory={"cgroup": 512_000_000}))
    assert rows[0] == ("problem", "512 MB of memory can be used; end other work, or ask for more")
    named = dict(rows)
    assert named["cores"] == "3 of 8, affinity 8, cgroup 2.5; OMP_NUM_THREADS is 3"
    assert named["folder"] == "/data: 80.0 GB free, writes 450 MB/s"
    assert named["devices"] == "NVIDIA X (80.0 GB)"
    assert dict(doctor.rows(facts(memory={}, omp_num_threads=None)))["memory"] == "not known"


def test_the_command_prints_rows_or_json_and_exits_with_1_where_there_is_a_problem(
    supercl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda folder: facts())
    outcome = supercl("doctor")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("system")
    monkeypatch.setattr(doctor, "examine", lambda folder: facts(versions={}))
    outcome = supercl("doctor", tmp_path, "--json")
    assert outcome.code == 1
    assert outcome.err.startswith("error: Problems: 1.\n  next: ")
    assert json.loads(outcome.out)["problems"][0]["what"] == "SuperCL is not installed here"
    assert json.loads(outcome.out)["cores"]["usable"] == 3


def test_a_folder_that_is_not_there_is_wrong_usage(supercl: Callable[..., Any], tmp_path: Path) -> None:
    outcome = supercl("doctor", tmp_path / "nothing")
    assert (outcome.code, outcome.out) == (2, "")
    assert "does not exist" in outcome.err
