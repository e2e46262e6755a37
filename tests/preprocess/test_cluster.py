"""Where preprocessing computes: Slurm settings and a Slurm of two shell scripts, schedulers, versions of workers."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocess import cluster, run, runner
from preprocess.cluster import SlurmConfig, connect, job_script, read_slurm
from supercl_core.cache.reader import open_cache
from supercl_core.errors import SuperCLError, UsageError

SMALLEST = 'maximum_jobs = 2\ncores = 4\nmemory = "3GB"\n'


def slurm_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "slurm.toml"
    path.write_text(text)
    return path


# ---- settings of Slurm


def test_job_script_holds_the_options_and_two_threads_for_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm
    text = 'queue = "cpu"\naccount = "lab"\nwalltime = "02:00:00"\njob_extra_directives = ["--exclusive"]\n'
    text += 'job_script_prologue = ["module load python"]\nscheduler_options = {port = 8790}\n'
    lines = job_script(read_slurm(slurm_file(tmp_path, SMALLEST + text))).splitlines()
    for line in (
        *("#SBATCH -p cpu", "#SBATCH -A lab", "#SBATCH -t 02:00:00", "#SBATCH --exclusive"),
        *("#SBATCH --cpus-per-task=4", "#SBATCH --mem=3G", "module load python"),
    ):
        assert line in lines
    [worker] = [line for line in lines if "distributed.cli.dask_worker" in line]
    assert worker.startswith(sys.executable)
    assert "--nworkers 2" in worker
    assert "--nthreads 2" in worker


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lack 'maximum_jobs'"),
        ("maximum_jobs = 2\ncores = 4\n", "lack 'memory'"),
        (SMALLEST + 'que = "cpu"', "Did you mean 'queue'?"),
        (SMALLEST + "minimum_jobs = 3", "'minimum_jobs' is out of range"),
        (SMALLEST + "processes = 5", "'processes' is out of range"),
        (SMALLEST + "queue = 5", "'queue' has a value of the wrong type"),
        ("cores = -1\n" + SMALLEST.replace("cores = 4\n", ""), "'cores' is out of range"),
        (SMALLEST.replace("3GB", "much"), "'memory' is out of range"),
        (SMALLEST.replace("3GB", " "), "'memory' is out of range"),
        (SMALLEST.replace("3GB", "-3GB"), "'memory' is out of range"),
        (SMALLEST.replace("3GB", "16"), "'memory' is out of range"),
        (SMALLEST.replace("3GB", "1e400GB"), "'memory' is out of range"),
        ("cores", "not valid TOML"),
    ],
)
def test_settings_of_slurm_that_make_no_sense(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        read_slurm(slurm_file(tmp_path, text))


def test_every_setting_of_slurm_is_an_option_of_dask_jobqueue() -> None:
    from inspect import signature

    from dask_jobqueue.core import Job, JobQueueCluster
    from dask_jobqueue.slurm import SLURMJob

    known = {name for kind in (Job, JobQueueCluster, SLURMJob) for name in signature(kind).parameters}
    ours = {*SlurmConfig.__dataclass_fields__} - {"maximum_jobs", "minimum_jobs"}
    assert len(ours) > 15
    assert ours <= known


def test_without_dask_jobqueue_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue.slurm", None)
    with pytest.raises(SuperCLError, match=r"pip install 'supercl\[slurm\]'"):
        job_script(SlurmConfig(maximum_jobs=1, cores=2, memory="1GB"))


# ---- a Slurm of two shell scripts: every job is a process group of this machine


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of commands on PATH; `jobs` in it lists the ids (process groups) of all jobs submitted."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    scripts = {
        "sbatch": f'cp "$1" "{folder}/script"\nsetsid bash "{folder}/script" >"{folder}/log" 2>&1 &\n'
        f'echo $! >>"{folder}/jobs"\necho "Submitted batch job $!"',
        "scancel": f'kill -- "-$1" 2>/dev/null\necho "$1" >>"{folder}/cancelled"',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield folder
    if (folder / "jobs").exists():
        for job in (folder / "jobs").read_text().split():
            subprocess.run(["kill", "-9", "--", f"-{job}"], check=False, capture_output=True)


def alive(group: str) -> bool:
    """Whether a process group has a process that is no zombie."""
    found = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return any(
        line.split()[0] == group and not line.split()[1].startswith("Z") for line in found.splitlines()
    )


def test_jobs_of_slurm_compute_the_cases_and_end_with_the_run(
    slurm: Path, write_msd: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image = np.arange(2 * 16 * 16, dtype=np.int16).reshape(2, 16, 16)
    source = write_msd(tmp_path / "in", {f"case_{index}": (image + index, None) for index in range(6)})
    result = run(
        source,
        tmp_path / "out.zarr",
        slurm=SlurmConfig(maximum_jobs=1, cores=2, memory="2GB", interface="lo"),
    )
    assert (result.num_computed, result.failed) == (6, ())
    assert open_cache(tmp_path / "out.zarr").attributes["complete"] is True
    jobs = (slurm / "jobs").read_text().split()
    assert len(jobs) == 1  # never more than maximum_jobs
    assert (slurm / "cancelled").read_text().split() == jobs
    deadline = time.monotonic() + 10
    while alive(jobs[0]):
        assert time.monotonic() < deadline, "a job outlived the run"
        time.sleep(0.1)
    said = capfd.readouterr().err
    assert "Dask dashboard: http://" in said
    assert "waiting for one" in said
    assert "Traceback" not in said


def test_jobs_that_slurm_refuses_end_the_run_with_its_words(
    slurm: Path, msd_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (slurm / "sbatch").write_text("#!/bin/bash\necho 'error: invalid partition specified: gpu' >&2\nexit 1\n")
    config = SlurmConfig(maximum_jobs=1, cores=2, memory="2GB", interface="lo")
    with pytest.raises(SuperCLError, match=r"(?s)does not take the jobs.*invalid partition specified: gpu"):
        run(msd_path, tmp_path / "out.zarr", slurm=config)
    assert "Traceback" not in capfd.readouterr().err


def test_a_machine_without_slurm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with (
        pytest.raises(SuperCLError, match="no Slurm on this machine"),
        connect(slurm=SlurmConfig(maximum_jobs=1, cores=2, memory="1GB")),
    ):
        pass


# ---- a running scheduler


def test_a_scheduler_that_does_not_answer_is_named_and_nothing_written(
    msd_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "CONNECT_S", 1)
    with pytest.raises(SuperCLError, match="does not answer") as caught:
        run(msd_path, tmp_path / "out.zarr", scheduler="tcp://127.0.0.1:9")
    assert caught.value.where == "tcp://127.0.0.1:9"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["localhost", "http://localhost:80"])
def test_an_address_of_no_known_form_is_a_usage_error(address: str) -> None:
    with pytest.raises(UsageError, match="no known form"), connect(scheduler=address):
        pass


@pytest.fixture(scope="module")
def empty_scheduler() -> Iterator[str]:
    """Address of a scheduler without workers."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=0, memory_limit=0, dashboard_address="127.0.0.1:0") as local:
        yield local.scheduler_address


def start_worker(address: str, *, python_path: Path | None = None) -> subprocess.Popen[bytes]:
    """A worker process, whose Python finds first what lies in `python_path`."""
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "2"]
    paths = [*([str(python_path)] if python_path else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        command,
        cwd=python_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def with_other_version(folder: Path) -> None:
    (folder / "supercl-9.9.9.dist-info").mkdir()
    (folder / "supercl-9.9.9.dist-info" / "METADATA").write_text("Name: supercl\nVersion: 9.9.9\n")


def without_the_package(folder: Path) -> None:
    (folder / "preprocess.py").touch()


@pytest.mark.parametrize(
    ("prepare", "message", "late"),
    [
        (with_other_version, "supercl 9.9.9", False),
        (with_other_version, "supercl 9.9.9", True),
        (without_the_package, "No module named 'preprocess.cluster'", False),
    ],
    ids=["version", "version of a late worker", "no package"],
)
def test_workers_with_other_software_are_named(
    prepare: Callable[[Path], Any],
    message: str,
    late: bool,
    msd_path: Path,
    empty_scheduler: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "site").mkdir()
    prepare(tmp_path / "site")
    if late:  # the check of the workers that are there finds none
        monkeypatch.setattr(cluster, "_check_workers", lambda client: None)
    worker = start_worker(empty_scheduler, python_path=tmp_path / "site")
    try:
        from distributed import Client

        with Client(empty_scheduler) as client:
            client.wait_for_workers(1, timeout=30)
        with pytest.raises(SuperCLError) as caught:
            run(msd_path, tmp_path / "out.zarr", scheduler=empty_scheduler)
        assert message in str(caught.value.found)
        assert (tmp_path / "out.zarr").exists() == late
    finally:
        worker.kill()
        worker.wait()


def test_a_run_waits_for_the_first_worker(
    msd_path: Path,
    cache_path: Path,
    empty_scheduler: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runner, "POLL_S", 0.2)
    monkeypatch.setattr(cluster, "NO_WORKER_S", 0.0)  # holds for workers that went, not for the first
    worker = start_worker(empty_scheduler)
    try:
        assert run(msd_path, tmp_path / "out.zarr", scheduler=empty_scheduler).num_computed == 4
    finally:
        worker.kill()
        worker.wait()
    assert f"No Dask worker at {empty_scheduler}; waiting for one." in capfd.readouterr().err


def test_on_windows_there_is_no_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(ImportError):
        cluster._check_open_files(1)
    monkeypatch.setattr(sys, "platform", "win32")
    cluster._check_open_files(1)


def test_verbose_leaves_dask_s_log_on(monkeypatch: pytest.MonkeyPatch, scheduler: str) -> None:
    def level() -> int:
        with connect(scheduler=scheduler):
            return logging.getLogger("distributed.core").level

    assert level() == logging.CRITICAL
    monkeypatch.setattr(cluster, "is_verbose", lambda: True)
    assert level() == logging.INFO
