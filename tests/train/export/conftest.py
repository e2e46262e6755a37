"""Runs to export, made without training, and what the lines of an export give for some images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import made_runs
import numpy as np
import pytest
import torch

from train.models.backbones import build_encoder
from train.models.unet import PretrainNet, UNet
from train.models.weights import save_weights

ANSWERS = {
    "safetensors": "network.eval()(torch.from_numpy(images))",
    "monai": "network.eval()(torch.from_numpy(images))",
    "smp": "network.eval().encoder(torch.from_numpy(images))[-1]",
    "onnx": "torch.from_numpy(session.run(None, {'image': images})[-1])",
}
"""By format, what the names that the lines leave behind give for images."""

SHIM = """
import torch
try:
    import torchvision
except RuntimeError:  # built for another PyTorch: see the fixture smp
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@pytest.fixture
def torchvision_shim():
    """What a process of another library runs first: it needs a torchvision that can be imported."""
    return SHIM


@pytest.fixture
def images():
    """Float32 (2, 1, 96, 64), the size of none that an export was traced with."""
    return np.random.default_rng(0).normal(size=(2, 1, 96, 64)).astype(np.float32)


@pytest.fixture
def make_run(tmp_path):
    """Write a finished run with a network whose batch statistics and biases have moved from their defaults."""

    def make(kind="finetune", *, backbone="unet", filters=4, in_channels=1, name=None, **options):
        torch.manual_seed(1)
        encoder = build_encoder(backbone, in_channels=in_channels, filters=filters)
        whole = kind == "finetune"
        network = (
            UNet(encoder, num_classes=len(made_runs.CLASSES)) if whole else PretrainNet(encoder, **options)
        )
        views = torch.randn(4, in_channels, 64, 64)
        with torch.no_grad():
            network(*((views,) if whole else (views, views)))
            for parameter in network.parameters():
                parameter += 0.01 * torch.randn(parameter.shape)
        path = made_runs.write_run(tmp_path / (name or kind), {"a": [0.5, 0.5]}, kind=kind)
        record = json.loads((path / "run.json").read_text())
        model = {"backbone": backbone, "in_channels": in_channels, "filters": filters}
        record["model"] |= model
        record["cache"]["class_names"] = made_runs.CLASSES
        record["init"] = {"source": "/home/someone/secret"}
        record["provenance"] = {"time": "now", "host": "somewhere", "versions": {}, "commit": "c0ffee"}
        (path / "run.json").write_text(json.dumps(record))
        save_weights(network, path / "weights.safetensors", {key: str(value) for key, value in model.items()})
        return path, network.eval()

    return make


@pytest.fixture
def answer_of(tmp_path, images):
    """What the lines of a format give for the images, run in this process or a fresh one, in the export's folder."""

    def answer(folder: Path, lines: list[str], target: str, *, fresh: bool = False) -> torch.Tensor:
        np.save(tmp_path / "images.npy", images)
        last = [
            "import numpy, torch",
            f"images = numpy.load({str(tmp_path / 'images.npy')!r})",
            f"with torch.no_grad(): answer = ({ANSWERS[target]}).numpy()",
        ]
        script = "\n".join([*lines, *last])
        if not fresh:
            names: dict[str, object] = {}
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                exec(script, names)
            return torch.from_numpy(names["answer"])
        script = f"{SHIM if target == 'smp' else ''}\n{script}\nnumpy.save({str(tmp_path / 'answer.npy')!r}, answer)"
        subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, timeout=300)
        return torch.from_numpy(np.load(tmp_path / "answer.npy"))

    return answer
