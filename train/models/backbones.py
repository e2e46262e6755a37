"""Encoders by name: the method's own, and those of segmentation-models-pytorch and MONAI behind one adapter.

All start from random weights. Which networks are built around an encoder is left to `train.models.unet`. Called
wherever a network is made: pre-training, fine-tuning, evaluation and descriptors.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from supercl_core.errors import SuperCLError, UsageError
from train.models.unet import Backbone, Encoder

UNET: Final = "unet"
"""The backbone of the published checkpoints."""

PROBE_SIZE: Final = (64, 128)
"""Rows and columns of the image that tells strides, which divide both (powers of two up to 64), and channels."""


def build_encoder(backbone: str, *, in_channels: int, filters: int) -> Backbone:
    """The encoder of a name, with random weights, on the CPU unless it is ours.

    `backbone`: "unet" (ours, of `filters` channels at stride 1, on PyTorch's default device), "smp:NAME" (an encoder
    of segmentation-models-pytorch, those of timm with `tu-` in front included) or "monai:NAME" (one that MONAI has for
    its FlexibleUNet). `in_channels`: of the images.

    Raises UsageError for a name that does not exist, a library that is not installed, and an encoder that gives no
    feature maps as a U-Net needs them; SuperCLError for a library that does not fit the installed PyTorch.
    """
    if backbone == UNET:
        return Encoder(in_channels, filters)
    library, _, name = backbone.partition(":")
    if library not in ("smp", "monai"):
        raise UsageError(
            "There is no such backbone.",
            expected=f"{UNET}, smp:NAME or monai:NAME",
            found=backbone,
            next_step="For NAME take an encoder of segmentation-models-pytorch or MONAI, as in smp:resnet18.",
        )
    names, make = _smp() if library == "smp" else _monai()
    if name not in names:
        close = " or ".join(f"{library}:{one}" for one in difflib.get_close_matches(name, names))
        raise UsageError(
            f"The library has no encoder {name!r}.",
            expected=f"one of {len(names):,} names",
            found=backbone,
            next_step=f"Did you mean {close}?" if close else "See its documentation for the names.",
        )
    try:
        with torch.device("cpu"):  # what is on the meta device has no values, which these libraries ask for
            return LibraryEncoder(make(name, in_channels), in_channels=in_channels)
    except Exception as error:  # a foreign model may refuse a size, or a number of channels, in any way
        raise UsageError(
            "The backbone cannot be used.",
            where=backbone,
            expected="feature maps (B, C, Y / stride, X / stride) of images of any size, at growing powers of two",
            found=f"{type(error).__name__}: {error!s:.200}",
            next_step="Choose another: convolutional encoders, such as resnets, are of this kind.",
        ) from error


class LibraryEncoder(Backbone):
    """An encoder of another library, as it is; strides and channels are those that it shows for one image.

    The image itself, which some libraries put before their feature maps, is left out: joined with raw pixels the
    decoder would need convolutions at the image's size, and a loss on them would train nothing. So are maps
    without channels. Parameters that no map depends on, such as those of a classifier, are frozen: they have no
    gradient, which data-parallel training takes for a fault.
    """

    def __init__(self, body: nn.Module, *, in_channels: int) -> None:
        # Raises ValueError, or what the body raises, where the maps are not those of a Backbone.
        image = torch.zeros(1, in_channels, *PROBE_SIZE)
        trained = [parameter for parameter in body.parameters() if parameter.requires_grad]
        body.eval()  # keeps batch statistics as they are
        with torch.enable_grad():
            maps = list(body(image))
            kept = [index for index, map_ in enumerate(maps) if map_ is not image and map_.shape[1]]
            total = torch.stack([maps[index].sum() for index in kept]).sum()
            gradients = torch.autograd.grad(total, trained, allow_unused=True)
        body.train()
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

        strides = tuple(_stride(maps[index]) for index in kept)
        if any(coarse <= fine for fine, coarse in itertools.pairwise(strides)):
            raise ValueError(f"feature maps of strides {', '.join(map(str, strides))}")
        channels = tuple(maps[index].shape[1] for index in kept)
        super().__init__(in_channels=in_channels, strides=strides, channels=channels)
        self.body = body
        self.kept = kept

    def forward(self, image_BCYX: Tensor) -> tuple[Tensor, ...]:
        """The feature maps at `strides`, with `channels`.

        `image_BCYX` is floating point (B, in_channels, Y, X). Raises SuperCLError where Y or X is no multiple of the
        last stride.
        """
        self.check_size(image_BCYX)
        maps = self.body(image_BCYX)
        return tuple(maps[index] for index in self.kept)


Library = tuple[list[str], Callable[[str, int], nn.Module]]
"""The names of the encoders of a library, and what makes one of a name and a number of input channels."""


def _smp() -> Library:
    try:
        import timm
        from segmentation_models_pytorch.encoders import get_encoder, get_encoder_names
    except ModuleNotFoundError as error:
        raise UsageError(
            "The backbones smp:NAME need segmentation-models-pytorch.",
            expected="an installed library",
            found=f"no module {error.name}",
            next_step="pip install 'supercl[backbones]'",
        ) from error
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise SuperCLError(
            "segmentation-models-pytorch cannot be imported: the installed torchvision may not fit this PyTorch.",
            expected=f"a torchvision built for PyTorch {torch.__version__}",
            found=f"{type(error).__name__}: {error!s:.200}",
            next_step="Install torch and torchvision of one release from one source, both for the CPU or for one CUDA.",
        ) from error
    names = [*get_encoder_names(), *(f"tu-{name}" for name in timm.list_models())]
    return names, lambda name, in_channels: get_encoder(name, in_channels=in_channels, depth=5, weights=None)


def _monai() -> Library:
    from monai.networks.nets.flexible_unet import FLEXUNET_BACKBONE

    encoders = FLEXUNET_BACKBONE.register_dict

    def make(name: str, in_channels: int) -> nn.Module:
        settings = {"spatial_dims": 2, "in_channels": in_channels, "pretrained": False}
        return encoders[name]["type"](**{**encoders[name]["parameter"], **settings})

    return list(encoders), make


def _stride(map_: Tensor) -> int:
    """The stride of a feature map (1, C, h, w) of the probing image."""
    shape, (rows, columns) = tuple(map_.shape), PROBE_SIZE
    if len(shape) != 4 or rows % shape[2] or rows // shape[2] * shape[3] != columns:
        raise ValueError(f"a map of shape {shape} of an image of {rows} x {columns}")
    return rows // shape[2]
