"""The method's 2-D U-Net, its encoder, and the network that pre-training runs.

Layer names and shapes are those of the published checkpoints, so that published weights load strictly. Which
weights go where is left to `train.models.weights`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from supercl_core.errors import SuperCLError

# Axes: B batch, C channels, Y rows, X columns; h and w are rows and columns at stride 16.
NUM_LEVELS = 4
STRIDE = 2**NUM_LEVELS
INSTANCE_WIDTH = 512
LEAKY_SLOPE = 0.01


class UNet(nn.Module):
    """Encoder and decoder: one score for each class and pixel.

    Source: SuperCL (IEEE TIP 2026), fine-tuning network.
    """

    def __init__(self, *, in_channels: int, num_classes: int, filters: int = 32) -> None:
        super().__init__()
        self.encoder = Encoder(in_channels, filters)
        self.decoder = Decoder(num_classes, filters)

    def forward(self, image_BCYX: Tensor) -> Tensor:
        """Class scores of every pixel.

        `image_BCYX` is floating point (B, in_channels, Y, X), Y and X multiples of 16. Returns logits
        (B, num_classes, Y, X). Raises SuperCLError where Y or X is no multiple of 16.
        """
        return self.decoder(self.encoder(image_BCYX))


class PretrainOutput(NamedTuple):
    """What the pre-training losses need of one view."""

    instance: Tensor
    """(B, 512): one embedding for each slice."""
    pixels: Tensor
    """(B, D, h, w): one embedding for each position at stride 16."""
    features: Tensor
    """(B, 16 * filters, h, w): the encoder's last feature map."""


class PretrainNet(nn.Module):
    """Encoder with an instance head and, unless `projection` is 0, a pixel head of that width.

    Only the encoder outlives pre-training. Without a pixel head the pixel embeddings are the encoder's
    features, as published. Source: SuperCL (IEEE TIP 2026); the pixel head is our choice.
    """

    def __init__(self, *, in_channels: int, filters: int = 32, projection: int = 128) -> None:
        super().__init__()
        width = filters * 2**NUM_LEVELS
        self.encoder = Encoder(in_channels, filters)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, width),
            nn.ReLU(inplace=True),
            nn.Linear(width, INSTANCE_WIDTH),
        )
        self.pixel_head: nn.Module = nn.Identity()
        if projection:
            self.pixel_head = nn.Sequential(
                nn.Conv2d(width, width, 1), nn.ReLU(inplace=True), nn.Conv2d(width, projection, 1)
            )
            self.pixel_head.apply(_initialise)

    def forward(self, image_BCYX: Tensor) -> PretrainOutput:
        """Embeddings of one view.

        `image_BCYX` is floating point (B, in_channels, Y, X), Y and X multiples of 16. Raises SuperCLError
        where they are not.
        """
        features = self.encoder(image_BCYX)[-1]
        return PretrainOutput(self.head(features), self.pixel_head(features), features)


class Encoder(nn.Module):
    """Four levels of two convolutions with max pooling between them, and a centre block at stride 16."""

    def __init__(self, in_channels: int, filters: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        width_in = in_channels
        for level in range(1, NUM_LEVELS + 1):
            width = filters * 2 ** (level - 1)
            self.add_module(f"contr_{level}_1", _conv_block(width_in, width))
            self.add_module(f"contr_{level}_2", _conv_block(width, width))
            width_in = width
        width = filters * 2**NUM_LEVELS
        self.center = nn.Sequential(
            nn.Conv2d(width_in, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.apply(_initialise)

    def forward(self, image_BCYX: Tensor) -> tuple[Tensor, ...]:
        """The feature maps at strides 1, 2, 4, 8 and 16, with filters * (1, 2, 4, 8, 16) channels.

        `image_BCYX` is floating point (B, in_channels, Y, X). Raises SuperCLError where Y or X is no multiple
        of 16.
        """
        rows, columns = image_BCYX.shape[-2:]
        if rows % STRIDE or columns % STRIDE:
            raise SuperCLError(
                "The network cannot take images of this size.",
                expected=f"rows and columns that are multiples of {STRIDE}",
                found=f"{rows} x {columns}",
                next_step="Choose another patch size, or pad the image.",
            )
        features: list[Tensor] = []
        x = image_BCYX
        for level in range(1, NUM_LEVELS + 1):
            x = self.get_submodule(f"contr_{level}_1")(x)
            x = self.get_submodule(f"contr_{level}_2")(x)
            features.append(x)
            x = self.pool(x)
        return *features, self.center(x)


class Decoder(nn.Module):
    """Four steps of upsampling by two, each joined with the encoder's map of that size, and a 1x1 head."""

    def __init__(self, num_classes: int, filters: int) -> None:
        super().__init__()
        for level in range(NUM_LEVELS, 0, -1):
            width = filters * 2 ** (level - 1)
            self.add_module(f"upscale{level + 1}", nn.ConvTranspose2d(2 * width, width, 2, stride=2))
            self.add_module(f"expand_{level}_1", _conv_block(2 * width, width))
            self.add_module(f"expand_{level}_2", _conv_block(width, width))
        self.head = nn.Sequential(nn.Conv2d(filters, num_classes, 1, bias=False))
        self.apply(_initialise)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        """Logits (B, num_classes, Y, X) from the encoder's five feature maps, finest first."""
        *skips, x = features
        for level in range(NUM_LEVELS, 0, -1):
            x = self.get_submodule(f"upscale{level + 1}")(x)
            x = torch.cat([x, skips[level - 1]], dim=1)
            x = self.get_submodule(f"expand_{level}_1")(x)
            x = self.get_submodule(f"expand_{level}_2")(x)
        return self.head(x)


def _conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
    )


def _initialise(module: nn.Module) -> None:
    """He initialisation of convolutions; all other layers keep PyTorch's own."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
