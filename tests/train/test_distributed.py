"""Two gloo ranks under torchrun against one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("ranks_script.py")


def run(*command: object) -> None:
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("igcp", ["cached", "online"])
def test_two_ranks_give_the_losses_and_gradients_of_one_process(
    cache_path: Path, tmp_path: Path, igcp: str
) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    run(sys.executable, SCRIPT, cache_path, tmp_path / "one.pt", igcp)
    run(*torchrun, SCRIPT, cache_path, tmp_path / "two.pt", igcp)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one["loss"].keys() == {"loss", "loss_ins", "loss_intra", "loss_inter"}
    assert min(one["loss"].values()) > 0
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    for name, gradient in one["gradients"].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-6, atol=1e-6)


def test_two_ranks_train_one_run_and_resume_it(cache_path: Path, tmp_path: Path) -> None:
    supercl = Path(sys.executable).with_name("supercl")
    settings = (
        "--set",
        "filters=4",
        "--set",
        "batch_size=2",
        "--set",
        "patch_size=[16, 16]",
        "--set",
        "device=cpu",
    )
    command = (
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            2,
            "--no-python",
        ),
        *(
            supercl,
            "pretrain",
            cache_path,
            tmp_path / "run",
            *settings,
            "--set",
            "log_every=1",
            "--set",
            "steps=3",
        ),
    )
    run(*command)
    weights = (tmp_path / "run" / "weights.safetensors").read_bytes()
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 3
    (tmp_path / "run" / "checkpoints" / "step_00000003.pt").unlink(missing_ok=True)
    run(*command)
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == weights
