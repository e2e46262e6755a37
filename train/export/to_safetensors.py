"""Export as safetensors under the names of the published checkpoints, which every framework of Python reads."""

from __future__ import annotations

from pathlib import Path

from train.export.model import Model, Written
from train.models.weights import WEIGHTS_NAME, save_tensors


def write(model: Model, folder: Path) -> Written:
    """Write the weights into `folder`; the lines load them here. `supercl finetune --init` takes the file too."""
    described = {
        "backbone": model.backbone,
        "in_channels": model.in_channels,
        "filters": model.filters,
        "adjacent_slices": model.adjacent_slices,
    }
    metadata = {name: str(value) for name, value in described.items()}
    save_tensors(model.state, folder / WEIGHTS_NAME, {**metadata, **model.metadata})
    make = f'build_encoder("{model.backbone}", in_channels={model.in_channels}, filters={model.filters})'
    if model.is_whole:
        load = f'network.load_state_dict(load_file("{WEIGHTS_NAME}"))'
        loader = "from safetensors.torch import load_file"
    else:
        load = f'print(load_pretrained(network, "{WEIGHTS_NAME}").summary())'
        loader = "from train.models.weights import load_pretrained"
    lines = [
        loader,
        "from train.models.backbones import build_encoder",
        "from train.models.unet import UNet",
        f"network = UNet({make}, num_classes={model.num_classes})",
        load,
    ]
    return Written(model.holds, lines)
