"""Cores and memory that a process may use: made-up systems, each a folder with the files that Linux has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supercl_core import machine


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 8 cores and 16 GB, bound to 6 of the cores, in no control group."""
    write(tmp_path / "proc/meminfo", "MemTotal: 16000000 kB\nMemAvailable: 12000000 kB\n")
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(
        os, "sysconf", {"SC_PHYS_PAGES": 4_000_000, "SC_PAGE_SIZE": 4000}.__getitem__, raising=False
    )
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_control_groups_the_cores_it_is_bound_to_count(system: Path) -> None:
    assert machine.core_limits() == {"machine": 8, "affinity": 6}
    assert machine.num_cores() == 6
    assert machine.memory_limits() == {"machine": 16_000_000_000, "available": 12_288_000_000}


def test_version_2_takes_the_least_of_all_groups_around(system: Path) -> None:
    write(system / "proc/self/cgroup", "0::/slurm/job_1/task_0\n")
    write(system / "cgroup/cpu.max", "max 100000\n")
    write(system / "cgroup/slurm/job_1/cpu.max", "250000 100000\n")
    write(system / "cgroup/slurm/job_1/task_0/cpu.max", "400000 100000\n")
    write(system / "cgroup/slurm/job_1/memory.max", "3000000000\n")
    write(system / "cgroup/slurm/job_1/task_0/memory.max", "max\n")
    assert machine.core_limits()["cgroup"] == 2.5
    assert machine.num_cores() == 3
    assert machine.memory_limits()["cgroup"] == 3_000_000_000


def test_version_1_in_a_container_whose_path_is_that_of_the_host(system: Path) -> None:
    write(
        system / "proc/self/cgroup", "4:memory:/kubepods/x\n2:cpu,cpuacct:/kubepods/x\n1:pids:/kubepods/x\n"
    )
    write(system / "cgroup/cpu,cpuacct/cpu.cfs_quota_us", "100000\n")
    write(system / "cgroup/cpu,cpuacct/cpu.cfs_period_us", "200000\n")
    write(system / "cgroup/memory/memory.limit_in_bytes", "5000000000\n")
    assert machine.core_limits()["cgroup"] == 0.5
    assert machine.num_cores() == 1
    assert machine.memory_limits()["cgroup"] == 5_000_000_000


def test_version_1_without_a_limit_has_none(system: Path) -> None:
    write(system / "proc/self/cgroup", "4:memory:/\n2:cpu,cpuacct:/\n")
    write(system / "cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    write(system / "cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    write(system / "cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert "cgroup" not in machine.core_limits()
    assert "cgroup" not in machine.memory_limits()


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Windows: no affinity, no /proc, no sysconf."""
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert machine.core_limits() == {"machine": 1}
    assert machine.num_cores() == 1
    assert machine.memory_limits() == {}
