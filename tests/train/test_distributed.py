"""Two gloo ranks under torchrun against one process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import assert_same_weights

from supercl_core.files import write_json

SCRIPT = Path(__file__).with_name("ranks_script.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)


def run(*command: object) -> None:
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("igcp", ["cached", "online"])
def test_two_ranks_give_the_losses_and_gradients_of_one_process(
    cache_path: Path, tmp_path: Path, igcp: str
) -> None:
    run(sys.executable, SCRIPT, cache_path, tmp_path / "one.pt", igcp)
    run(*TORCHRUN, SCRIPT, cache_path, tmp_path / "two.pt", igcp)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one["loss"].keys() == {"loss", "loss_ins", "loss_intra", "loss_inter", "similarity"}
    assert min(one["loss"].values()) > 0
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    for name, gradient in one["gradients"].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-6, atol=1e-6)


def test_two_ranks_train_one_run_and_resume_it(cache_path: Path, tmp_path: Path) -> None:
    supercl = Path(sys.executable).with_name("supercl")
    settings = ("filters=4", "batch_size=2", "patch_size=[16, 16]", "device=cpu", "log_every=1", "steps=4")
    assignments = [part for setting in (*settings, "checkpoint_every=2") for part in ("--set", setting)]

    def train(run_path: Path) -> None:
        command = (*TORCHRUN, "--no-python", supercl, "pretrain", cache_path, run_path, *assignments)
        run(*command)

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(whole)
    assert len((whole / "metrics.jsonl").read_text().splitlines()) == 4
    shutil.copytree(whole, resumed)
    # As if it had been killed after step 3.
    (resumed / "checkpoints" / "step_00000004.pt").unlink()
    (resumed / "weights.safetensors").unlink()
    described = json.loads((resumed / "run.json").read_text())
    write_json(resumed / "run.json", {**described, "status": "running", "name": "resumed"})
    train(resumed)
    assert len((resumed / "metrics.jsonl").read_text().splitlines()) == 4
    assert_same_weights(resumed, whole)
