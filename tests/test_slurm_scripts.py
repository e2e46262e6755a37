"""The scripts of docs/slurm on a Slurm of one Python file: the whole chain, with a preemption in the middle."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from train.runs import read_evaluation, read_metrics, read_run

SCRIPTS = Path(__file__).parents[1] / "docs" / "slurm"

SLURM = """
import json, os, pathlib, re, signal, subprocess, sys, time

state = pathlib.Path(__file__).parent
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
options = [text for text in arguments if text.startswith("--")]


def record(**entry):
    with (state / "calls").open("a") as file:
        file.write(json.dumps(entry) + "\\n")


def sbatch():
    # Runs the job to its end, each element of an array in a process group of its own, again where it is requeued.
    script = next(text for text in arguments if not text.startswith("--"))
    after = [text.removeprefix("--dependency=afterok:") for text in options if text.startswith("--dependency")]
    for job in after:
        if (state / f"{job}.status").read_text() != "0":
            sys.exit(f"{script}: the dependency {job} has failed")
    settings = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\\S+)", pathlib.Path(script).read_text(), re.M))
    job = str(4711 + len(list(state.glob("*.job"))))
    (state / f"{job}.job").touch()
    record(command="sbatch", script=script, after=after, settings=settings)
    first, last = [int(text) for text in settings.get("array", "0-0").split("-")]
    tasks = int(settings["nodes"]) * int(settings.get("ntasks") or settings["ntasks-per-node"])
    running = []
    for element in range(last, first - 1, -1):
        variables = {
            "SLURM_JOB_ID": f"{job}_{element}" if "array" in settings else job,
            "SLURM_ARRAY_JOB_ID": job,
            "SLURM_ARRAY_TASK_ID": str(element),
            "SLURM_ARRAY_TASK_MAX": str(last),
            "SLURM_CPUS_PER_TASK": settings["cpus-per-task"],
            "SLURM_NTASKS": str(tasks),
            "SLURM_JOB_NODELIST": "localhost",
        }
        running.append((variables, start(script, variables, 0)))
    for variables, process in reversed(running):
        job_id, restarts = variables["SLURM_JOB_ID"], 0
        while True:
            status = process.wait()
            requeued = state / f"{job_id}.requeue"
            if not requeued.exists():
                break
            requeued.unlink()
            restarts += 1
            process = start(script, variables, restarts)
        (state / f"{job_id}.status").write_text(str(status))
    print(job)


def start(script, variables, restarts):
    if restarts:
        variables = {**variables, "SLURM_RESTART_COUNT": str(restarts)}
    log = (state / f"{variables['SLURM_JOB_ID']}.log").open("a")
    process = subprocess.Popen(
        ["bash", script], env={**os.environ, **variables}, stdout=log, stderr=log, start_new_session=True
    )
    (state / f"{variables['SLURM_JOB_ID']}.pid").write_text(str(process.pid))
    return process


def srun():
    command = arguments[next(i for i, text in enumerate(arguments) if not text.startswith("--")):]
    processes = [
        subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(int(os.environ["SLURM_NTASKS"]))
    ]
    preempt(processes, " ".join(command))
    codes = [process.wait() for process in processes]
    codes = [code if code >= 0 else 128 - code for code in codes]
    record(command="srun", options=options, arguments=command, codes=codes)
    sys.exit(max(codes))


def preempt(processes, command):
    # PREEMPT: words of the command, and the file that has to be longer than so many lines first.
    words, file, lines = json.loads(os.environ["PREEMPT"])
    if words not in command or "SLURM_RESTART_COUNT" in os.environ:
        return
    file = pathlib.Path(file)
    while not file.exists() or len(file.read_text().splitlines()) < lines:
        if any(process.poll() is not None for process in processes):
            return
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGUSR1)


def scontrol():
    if arguments[:2] == ["show", "hostnames"]:
        print(arguments[2])
    else:
        assert arguments[0] == "requeue" and len(arguments) == 2, arguments
        record(command="requeue", job=arguments[1])
        (state / f"{arguments[1]}.requeue").touch()


def scancel():
    job, first, last = re.fullmatch(r"(\\d+)_\\[(\\d+)-(\\d+)\\]", arguments[0]).groups()
    for element in range(int(first), int(last) + 1):
        os.killpg(int((state / f"{job}_{element}.pid").read_text()), signal.SIGTERM)
        record(command="scancel", job=f"{job}_{element}")


globals()[name]()
"""

SMALL = {
    "preprocess.sbatch": {"--array=0-7": "--array=0-1", "--cpus-per-task=8": "--cpus-per-task=1"},
    "pretrain.sbatch": {
        "--nodes=2": "--nodes=1",
        "--ntasks-per-node=4": "--ntasks-per-node=2",
        "--cpus-per-task=4": "--cpus-per-task=1",
    },
    "finetune.sbatch": {"--array=0-4": "--array=0-0", "--cpus-per-task=4": "--cpus-per-task=1"},
    "study.sbatch": {"--array=0-7": "--array=0-1", "--cpus-per-task=4": "--cpus-per-task=1"},
}
"""What a user changes in the scripts, here for one machine of two cores."""


@pytest.fixture
def slurm(tmp_path, msd_path, monkeypatch):
    """A folder with the scripts, and a Slurm on PATH whose state lies in `slurm`."""
    state = tmp_path / "slurm"
    state.mkdir()
    for name in ("sbatch", "srun", "scontrol", "scancel"):
        (state / name).write_text(f"#!{sys.executable}\n{SLURM}")
        (state / name).chmod(0o755)
    scripts = shutil.copytree(SCRIPTS, tmp_path / "scripts")
    for name, changes in SMALL.items():
        text = (scripts / name).read_text()
        for before, after in changes.items():
            assert before in text
            text = text.replace(before, after)
        (scripts / name).write_text(text)
    (tmp_path / "activate").write_text(f"export PATH={Path(sys.executable).parent}:{state}:$PATH\n")
    (tmp_path / "split.json").write_text(
        json.dumps({"labelled": {"1": ["case_a"]}, "test": ["case_b", "case_c"]})
    )
    small = "--set device=cpu --set filters=4 --set batch_size=2 --set patch_size=[16,16] --set log_every=1"
    variables = {
        "PATH": f"{state}:{os.environ['PATH']}",
        "INPUT": msd_path,
        "CACHE": tmp_path / "cache.zarr",
        "RUNS": tmp_path / "runs",
        "SPLIT": tmp_path / "split.json",
        "LABELLED": 1,
        "STUDY": tmp_path / "tiny.toml",
        "STUDY_OUT": tmp_path / "study",
        "PRETRAIN_OPTIONS": f"{small} --set steps=200 --set keep_checkpoints=9",
        "FINETUNE_OPTIONS": f"{small} --set steps=3",
        "ACTIVATE": tmp_path / "activate",
        "PREEMPT": json.dumps(["supercl pretrain", str(tmp_path / "runs/pretrain/metrics.jsonl"), 5]),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path


def submit(slurm):
    return subprocess.run(
        [slurm / "scripts" / "submit.sh"], capture_output=True, text=True, timeout=120, check=False
    )


def calls(slurm, command):
    entries = map(json.loads, (slurm / "slurm/calls").read_text().splitlines())
    return [entry for entry in entries if entry["command"] == command]


def logs(slurm):
    return "\n".join(f"{file.name}:\n{file.read_text()}" for file in sorted(slurm.glob("slurm/*.log")))


@pytest.mark.slow
def test_the_chain_runs_through_a_preemption(slurm):
    finished = submit(slurm)
    assert finished.returncode == 0, finished.stderr + logs(slurm)
    assert finished.stdout == "preprocess 4711, then pretrain 4712, then finetune 4713\n"
    assert [entry["after"] for entry in calls(slurm, "sbatch")] == [[], ["4711_0"], ["4712"]]
    assert [entry["job"] for entry in calls(slurm, "scancel")] == ["4711_1"]
    assert [entry["job"] for entry in calls(slurm, "requeue")] == ["4712"]
    assert [entry["codes"] for entry in calls(slurm, "srun")] == [[0], [5, 5], [0, 0], [0], [0]]
    assert not list(slurm.glob("cache.zarr.scheduler*"))

    run = slurm / "runs" / "pretrain"
    assert (read_run(run)["status"], read_run(run)["world_size"]) == ("finished", 2)
    assert [entry["step"] for entry in read_metrics(run)] == list(range(1, 201))
    [stopped, last] = sorted(int(file.stem[5:]) for file in (run / "checkpoints").iterdir())
    assert 5 <= stopped < last == 200
    evaluation = read_evaluation(slurm / "runs/finetune-0")
    assert {row["case"] for row in evaluation["rows"]} == {"case_b", "case_c"}


@pytest.mark.slow
def test_the_workers_of_a_study_go_on_after_a_preemption(slurm, monkeypatch, cache_path):
    settings = "steps = 200\nbatch_size = 2\nfilters = 4\npatch_size = [16, 16]\nlog_every = 1"
    (slurm / "tiny.toml").write_text(
        f'cache = "{cache_path}"\nsplit = "split.json"\nlabelled = [1]\nseeds = [0]\nbaseline = "pcl"\n'
        f"[pretrain]\n{settings}\n[recipes.short]\n{settings}\n"
        '[arms.pcl]\npreset = "pcl"\n[arms.simclr]\npreset = "simclr"\n'
    )
    metrics = slurm / "study/pretrain/simclr/seed_0/metrics.jsonl"
    monkeypatch.setenv("PREEMPT", json.dumps(["supercl study", str(metrics), 5]))
    script = slurm / "scripts" / "study.sbatch"
    subprocess.run(["sbatch", "--parsable", script], check=True, capture_output=True, timeout=300)
    assert sorted(entry["job"] for entry in calls(slurm, "requeue")) == ["4711_0", "4711_1"], logs(slurm)
    assert sorted(entry["codes"] for entry in calls(slurm, "srun")) == [[0], [0], [5], [5]]
    results = json.loads((slurm / "study" / "results.json").read_text())
    assert {(cell["arm"], cell["status"]) for cell in results["cells"]} == {
        ("pcl", "finished"),
        ("simclr", "finished"),
    }
    assert [entry["step"] for entry in read_metrics(metrics.parent)] == list(range(1, 201))


def test_a_run_that_fails_is_not_requeued_and_ends_the_chain(slurm, monkeypatch, cache_path):
    shutil.copytree(cache_path, slurm / "cache.zarr")
    (slurm / "scripts/preprocess.sbatch").write_text(
        textwrap.dedent(
            """\
            #!/bin/bash
            #SBATCH --array=0-0
            #SBATCH --nodes=1
            #SBATCH --ntasks=1
            #SBATCH --cpus-per-task=1
            """
        )
    )
    monkeypatch.setenv("PREEMPT", '["nothing", "", 0]')
    monkeypatch.setenv("PRETRAIN_OPTIONS", "--set lr=-1")
    finished = submit(slurm)
    assert finished.returncode == 1
    assert "finetune.sbatch: the dependency 4712 has failed" in finished.stderr
    assert [entry["codes"] for entry in calls(slurm, "srun")] == [[2, 2]]
    assert calls(slurm, "requeue") == []


def test_requeueing_has_an_end(slurm, tmp_path):
    stub = tmp_path / "stopped"
    stub.mkdir()
    (stub / "supercl").write_text("#!/bin/bash\nexit 5\n")
    (stub / "supercl").chmod(0o755)
    (tmp_path / "activate").write_text(f'export PATH={stub}:$PATH PREEMPT=\'["nothing", "", 0]\'\n')
    for script in ("pretrain", "finetune", "study"):
        path = slurm / "scripts" / f"{script}.sbatch"
        subprocess.run(["sbatch", "--parsable", path], check=True, capture_output=True, timeout=60)
    requeued = [entry["job"] for entry in calls(slurm, "requeue")]
    assert requeued[:40] == ["4711"] * 20 + ["4712_0"] * 20
    assert sorted(requeued[40:]) == ["4713_0"] * 20 + ["4713_1"] * 20
    for job in ("4711", "4712_0", "4713_0", "4713_1"):
        assert (slurm / f"slurm/{job}.status").read_text() == "5"


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.iterdir() if path.suffix != ".md"))
def test_scripts_are_valid_bash(script):
    assert subprocess.run(["bash", "-n", SCRIPTS / script], capture_output=True, check=True).stderr == b""
