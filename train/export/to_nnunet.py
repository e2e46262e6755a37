"""Export for nnU-Net v2: plans of the data set with our network in them, and weights for `-pretrained_weights`.

The network is `train.export.nnunet_network.SuperCLUNet`. Everything else of the plans stays as nnU-Net made it, so
that data that it has preprocessed serves as it is.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from supercl_core.errors import SuperCLError, UsageError
from supercl_core.files import read_json, write_json
from train.export.model import Model, Written
from train.export.nnunet_network import STRIDES, SuperCLUNet
from train.models.backbones import UNET
from train.models.weights import only_channels_differ, with_channels
from train.run_shapes import check

FILE_NAME: Final = "checkpoint.pth"

CONFIGURATION: Final = "2d"
"""The configuration of the plans that is taken over; the others are of networks of another kind."""

SUFFIX: Final = "_supercl"
"""What is appended to the name of the plans."""

STEM: Final = "encoder.contr_1_1.0.weight"

_STRIDE: Final = 2 ** (len(STRIDES) - 1)

_LARGEST_BYTES: Final = 1 << 26


def _is_name(value: Any) -> bool:
    """Whether the value can be a part of a path and of a line for a shell."""
    return isinstance(value, str) and re.fullmatch(r"\w[\w.-]*", value, re.ASCII) is not None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 1 << 16


_PLANS: Final = {
    "plans_name": _is_name,
    "dataset_name": _is_name,
    "configurations": {CONFIGURATION: {"patch_size": [_is_size], "normalization_schemes": [lambda _: True]}},
}
"""Of a plans file, what is used here."""


def write(model: Model, folder: Path, plans_path: Path) -> Written:
    """Write plans and weights into `folder`; the lines train with them.

    `plans_path`: the plans that nnU-Net made of the data set to train on. Their configuration 2d gets the network, and
    a patch of multiples of 16 rows and columns. A first convolution of one channel is made one of several where the
    data set has several, or the other way round. What was not trained has initial values.

    Raises UsageError for another backbone than the published one, SuperCLError for a file that holds no such plans,
    and for another number of channels.
    """
    if model.backbone != UNET:
        raise UsageError(
            "The plans for nnU-Net take the published U-Net only.",
            where=model.source,
            expected=f"backbone {UNET}",
            found=model.backbone,
            next_step="Export it to monai or smp.",
        )
    plans = _with_network(_read_plans(plans_path), filters=model.filters)
    channels = len(plans["configurations"][CONFIGURATION]["normalization_schemes"])
    content = io.BytesIO()  # onto a full disk torch.save itself raises a RuntimeError that says nothing of it
    torch.save({"network_weights": _weights(model, channels)}, content)
    (folder / FILE_NAME).write_bytes(content.getbuffer())
    name = plans["plans_name"]
    write_json(folder / f"{name}.json", plans)
    data_set = plans["dataset_name"]
    lines = [
        "# In the environment of nnU-Net, once:  pip install 'supercl[train]'",
        f'cp {name}.json "$nnUNet_preprocessed/{data_set}/"',
        f"nnUNetv2_train {data_set} {CONFIGURATION} 0 -p {name} -pretrained_weights {FILE_NAME}",
    ]
    return Written(f"{model.holds}, but for its head" if model.is_whole else model.holds, lines)


def _read_plans(path: Path) -> dict[str, Any]:
    try:
        plans: dict[str, Any] = read_json(path, limit_bytes=_LARGEST_BYTES)
        check(plans, _PLANS)
    except (OSError, ValueError) as error:
        raise SuperCLError(
            "The file holds no plans of nnU-Net v2.",
            where=path,
            expected=f"nnUNetPlans.json with a configuration {CONFIGURATION}",
            found=error,
            next_step="Run `nnUNetv2_plan_and_preprocess`, and name the plans in $nnUNet_preprocessed/DATASET.",
        ) from error
    return plans


def _with_network(plans: dict[str, Any], *, filters: int) -> dict[str, Any]:
    """The plans with the configuration 2d alone, and our network in it."""
    configuration = plans["configurations"][CONFIGURATION]
    return {
        **plans,
        "plans_name": plans["plans_name"] + SUFFIX,
        "configurations": {
            CONFIGURATION: {
                **configuration,
                "patch_size": [-(-side // _STRIDE) * _STRIDE for side in configuration["patch_size"]],
                "architecture": {
                    "network_class_name": f"{SuperCLUNet.__module__}.{SuperCLUNet.__name__}",
                    "arch_kwargs": {"filters": filters, "strides": STRIDES},
                    "_kw_requires_import": [],
                },
            }
        },
    }


def _weights(model: Model, channels: int) -> dict[str, Tensor]:
    """All tensors that nnU-Net asks for, for images of so many channels."""
    state = {
        name: tensor.contiguous()
        for name, tensor in model.network.state_dict().items()
        if not name.startswith("decoder.head.")
    }
    stem = state[STEM]
    if stem.shape[1] != channels:
        wanted = torch.Size((stem.shape[0], channels, *stem.shape[2:]))
        if not only_channels_differ(stem.shape, wanted):
            raise SuperCLError(
                "The network takes images of another number of channels than the data set has.",
                where=model.source,
                expected=f"{channels}, or 1: one channel is repeated",
                found=stem.shape[1],
                next_step="Export an encoder that was pre-trained on as many channels, or on one.",
            )
        state[STEM] = with_channels(stem, channels)
    return state
