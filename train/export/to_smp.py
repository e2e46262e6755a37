"""Export for segmentation-models-pytorch: its own encoders as they are, ours for `train.export.smp_encoder`."""

from __future__ import annotations

from pathlib import Path

from supercl_core.errors import UsageError
from train.export.model import Model, Written
from train.export.to_monai import body_state
from train.models.backbones import UNET
from train.models.weights import WEIGHTS_NAME, save_tensors


def write(model: Model, folder: Path) -> Written:
    """Write the encoder's weights into `folder`; the lines load them strictly.

    Raises UsageError for an encoder that is not of the library.
    """
    library, _, name = model.backbone.partition(":")
    settings = f"encoder_weights=None, in_channels={model.in_channels}, classes={model.num_classes}"
    load = f'network.encoder.load_state_dict(load_file("{WEIGHTS_NAME}"))'
    imports = ["import segmentation_models_pytorch as smp", "from safetensors.torch import load_file"]
    if library == "smp":
        save_tensors(body_state(model), folder / WEIGHTS_NAME, model.metadata)
        return Written("the encoder", [*imports, f'network = smp.Unet("{name}", {settings})', load])
    if model.backbone != UNET:
        raise UsageError(
            "segmentation-models-pytorch has no encoder of this name.",
            where=model.source,
            expected=f"backbone {UNET} or smp:NAME",
            found=model.backbone,
            next_step="Export it to monai, or to safetensors.",
        )
    save_tensors(model.encoder_state, folder / WEIGHTS_NAME, model.metadata)
    widths = ", ".join(str(width) for width in model.network.encoder.channels[-2::-1])
    lines = [
        *imports,
        "from train.export.smp_encoder import register",
        f"name = register(filters={model.filters})",
        f"network = smp.Unet(name, encoder_depth=4, decoder_channels=({widths}), {settings})",
        load,
    ]
    return Written("the encoder", lines)
