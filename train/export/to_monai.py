"""Export for MONAI: our U-Net as its BasicUNet, an encoder of MONAI as it is.

BasicUNet has the layers of the published U-Net in another order of names, and differs in three points, which the lines
that load it set right: its deepest block normalises, its last upsampling keeps all channels, and it puts the encoder's
map before what it upsamples. Its head has a bias, which is exported as zeros.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from supercl_core.errors import UsageError
from train.export.model import Model, Written
from train.models.backbones import UNET
from train.models.unet import LEAKY_SLOPE, NUM_LEVELS
from train.models.weights import WEIGHTS_NAME, save_tensors

_LAYERS = {"0": "conv", "1": "adn.N"}


def write(model: Model, folder: Path) -> Written:
    """Write the weights into `folder`; the lines load them strictly, with MONAI alone.

    Raises UsageError for an encoder that is not of MONAI.
    """
    library, _, name = model.backbone.partition(":")
    if library == "monai":
        save_tensors(body_state(model), folder / WEIGHTS_NAME, model.metadata)
        settings = f'in_channels={model.in_channels}, out_channels={model.num_classes}, backbone="{name}"'
        lines = [
            "from monai.networks.nets import FlexibleUNet",
            "from safetensors.torch import load_file",
            f"network = FlexibleUNet({settings})",
            f'network.encoder.load_state_dict(load_file("{WEIGHTS_NAME}"))',
        ]
        return Written("the encoder", lines)
    if model.backbone != UNET:
        raise UsageError(
            "MONAI has no encoder of this name.",
            where=model.source,
            expected=f"backbone {UNET} or monai:NAME",
            found=model.backbone,
            next_step="Export it to smp, or to safetensors.",
        )
    save_tensors(basic_unet_state(model.state), folder / WEIGHTS_NAME, model.metadata)
    f0 = model.filters
    widths = ", ".join(str(width) for width in (*model.network.encoder.channels, f0))
    lines = [
        "import torch",
        "from monai.networks.nets.basic_unet import BasicUNet, UpCat",
        "from safetensors.torch import load_file",
        f'kind = {{"act": ("LeakyReLU", {{"negative_slope": {LEAKY_SLOPE}}}), "norm": "batch", "bias": True}}',
        f"network = BasicUNet(2, {model.in_channels}, {model.num_classes}, features=({widths}), **kind)",
        "for block in network.down_4.convs: block.adn = torch.nn.ReLU()",
        f"network.upcat_1 = UpCat(2, {2 * f0}, {f0}, {f0}, **kind)",
        f'network.load_state_dict({{**network.state_dict(), **load_file("{WEIGHTS_NAME}")}})',
    ]
    return Written(model.holds, lines)


def body_state(model: Model) -> dict[str, Tensor]:
    """The state dict of a library's encoder, under its own names."""
    return {name.removeprefix("body."): tensor for name, tensor in model.encoder_state.items()}


def basic_unet_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `train.models.unet.UNet` under the names, and in the shapes, of MONAI's BasicUNet."""
    found = {}
    for name, tensor in state.items():
        match name.split("."):
            case ["encoder", "center", index, kind]:
                found[f"down_{NUM_LEVELS}.convs.conv_{int(index) // 2}.conv.{kind}"] = tensor
            case ["encoder", block, layer, kind]:
                level, number = (int(digit) for digit in re.findall(r"\d", block))
                stage = "conv_0" if level == 1 else f"down_{level - 1}.convs"
                found[f"{stage}.conv_{number - 1}.{_LAYERS[layer]}.{kind}"] = tensor
            case ["decoder", "head", _, kind]:
                found[f"final_conv.{kind}"] = tensor
                found["final_conv.bias"] = torch.zeros(len(tensor))
            case ["decoder", upscale, kind]:
                level = int(upscale[-1]) - 1
                found[f"upcat_{level}.upsample.deconv.{kind}"] = tensor
            case ["decoder", block, layer, kind]:
                level, number = (int(digit) for digit in re.findall(r"\d", block))
                if tensor.ndim == 4 and number == 1:
                    tensor = torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1)
                found[f"upcat_{level}.convs.conv_{number - 1}.{_LAYERS[layer]}.{kind}"] = tensor
    return found
