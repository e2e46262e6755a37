"""The networks of pre-training and fine-tuning around any encoder, and the method's own encoder, that of a 2-D U-Net.

With that encoder, layer names and shapes are those of the published checkpoints, so that published weights load
strictly. Encoders of other libraries come from `train.models.backbones`, weights from `train.models.weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supercl_core.errors import SuperCLError, UsageError

# Axes: B batch, C channels, Y rows, X columns; h and w are rows and columns of a feature map, D is the width of
# a pixel embedding.
NUM_LEVELS = 4
INSTANCE_WIDTH = 512
LEAKY_SLOPE = 0.01


class Backbone(nn.Module):
    """An encoder: from images to feature maps, the finest first.

    Subclasses' `forward` takes floating point (B, in_channels, Y, X), Y and X multiples of the last stride, and
    returns one map (B, channels[i], Y / strides[i], X / strides[i]) for each stride.
    """

    strides: tuple[int, ...]
    """Pixels of the image to one of each map, growing; each a multiple of the one before."""
    channels: tuple[int, ...]
    """Of each map."""
    in_channels: int
    """Of the images."""

    def __init__(self, *, in_channels: int, strides: tuple[int, ...], channels: tuple[int, ...]) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.strides = strides
        self.channels = channels

    def check_size(self, image_BCYX: Tensor) -> None:
        """Raise SuperCLError unless the image's rows and columns are multiples of the last stride."""
        rows, columns = image_BCYX.shape[-2:]
        if rows % self.strides[-1] or columns % self.strides[-1]:
            raise SuperCLError(
                "The network cannot take images of this size.",
                expected=f"rows and columns that are multiples of {self.strides[-1]}",
                found=f"{rows} x {columns}",
                next_step="Choose another patch size, or pad the image.",
            )


class UNet(nn.Module):
    """Encoder and decoder: one score for each class and pixel.

    Where the encoder's finest map is coarser than the image, the scores of that map are brought to the pixels
    bilinearly: further convolutions would find nothing of the encoder there to draw on.

    Source: SuperCL (IEEE TIP 2026), fine-tuning network; the decoder of other encoders is our choice.
    """

    def __init__(self, encoder: Backbone, *, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder(encoder.strides, encoder.channels, num_classes=num_classes)

    def forward(self, image_BCYX: Tensor) -> Tensor:
        """Class scores of every pixel.

        `image_BCYX` is floating point (B, in_channels, Y, X), Y and X multiples of the encoder's last stride.
        Returns logits (B, num_classes, Y, X). Raises SuperCLError where Y or X is no such multiple.
        """
        logits = self.decoder(self.encoder(image_BCYX))
        if self.encoder.strides[0] == 1:
            return logits
        return F.interpolate(logits, image_BCYX.shape[-2:], mode="bilinear", align_corners=False)


class PretrainOutput(NamedTuple):
    """What the pre-training losses need of the views of B slices; None for what was not asked for."""

    instance: Tensor | None
    """(2B, 512): one embedding for each of the whole views."""
    pixels: Tensor | None
    """(2B, D, h, w): one embedding for each position of the local views at the pixel stride."""
    features: Tensor | None
    """(2B, C, h, w): the encoder's last feature map of the local views."""


class PretrainNet(nn.Module):
    """An encoder with the heads that the losses ask for. The heads do not outlive pre-training.

    `instance`: with a head that embeds whole views. `pixel_stride`: of the feature map whose positions are embedded,
    by a head of width `projection` or, where that is 0, as they are (as published); None embeds none. `decoder`: that
    map is the decoder's, not the encoder's. Of the decoder it has the blocks from the coarsest map to that stride,
    under their names in UNet; `train.models.weights.load_pretrained` moves them there.

    Raises UsageError where the encoder has no map of that stride, and where a decoder would have no block.

    Source: SuperCL (IEEE TIP 2026); the pixel head and finer strides are our choice. That pixels are contrasted in
    the decoder: MACL (IEEE JBHI 2026).
    """

    def __init__(
        self,
        encoder: Backbone,
        *,
        projection: int = 128,
        instance: bool = True,
        pixel_stride: int | None = 16,
        decoder: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder: Decoder | None = None
        self.head: nn.Module | None = None
        self.pixel_head: nn.Module | None = None
        if decoder and pixel_stride in (None, encoder.strides[-1]):
            raise UsageError(
                "No block of the decoder would be trained.",
                expected=f"pixels at a stride of {' or '.join(map(str, encoder.strides[:-1]))}",
                found=pixel_stride or "none",
                next_step="Choose such a stride, or pre-train without the decoder.",
            )
        if instance:
            width = encoder.channels[-1]
            self.head = nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(width, width),
                nn.ReLU(inplace=True),
                nn.Linear(width, INSTANCE_WIDTH),
            )
        if pixel_stride is not None:
            if pixel_stride not in encoder.strides:
                raise UsageError(
                    "The encoder has no feature map of this stride.",
                    expected=" or ".join(map(str, encoder.strides)),
                    found=pixel_stride,
                    next_step="Choose one of its strides, or another backbone.",
                )
            self.pixel_level = encoder.strides.index(pixel_stride)
            if decoder:
                self.decoder = Decoder(encoder.strides, encoder.channels, finest=self.pixel_level)
            self.pixel_head = nn.Identity()
            if projection:
                width = encoder.channels[self.pixel_level]
                self.pixel_head = nn.Sequential(
                    nn.Conv2d(width, width, 1), nn.ReLU(inplace=True), nn.Conv2d(width, projection, 1)
                )
                self.pixel_head.apply(_initialise)

    def forward(
        self, local_BCYX: Tensor | None, whole_BCYX: Tensor | None, *, passes: int = 1
    ) -> PretrainOutput:
        """Embed the views of B slices: at each position those that keep the geometry, as a whole the others.

        `local_BCYX` (x1 then x2) and `whole_BCYX` (x3 then x4) are floating point (2B, in_channels, Y, X), Y and X
        multiples of the encoder's last stride; one may be None. `passes`: equal parts in which all of them, in this
        order, go through the encoder, each with batch statistics of its own (4: one a view, as published); so do the
        local ones of each part through the decoder. Raises SuperCLError where Y or X is no such multiple.
        """
        images = torch.cat([views for views in (local_BCYX, whole_BCYX) if views is not None])
        assert len(images) % passes == 0, f"{len(images)} images in {passes} parts"
        parts = [self.encoder(part) for part in images.chunk(passes)]
        num_local = 0 if local_BCYX is None else len(local_BCYX)
        deepest = _joined([maps[-1] for maps in parts])
        instance = pixels = features = None
        if local_BCYX is not None:
            features = deepest[:num_local]
            if self.pixel_head is not None:
                starts = range(0, num_local, len(images) // passes)
                local = [
                    [map_[: num_local - start] for map_ in maps]
                    for start, maps in zip(starts, parts, strict=False)  # the parts behind are of whole views
                ]
                pixels = self.pixel_head(_joined([self._pixel_map(maps) for maps in local]))
        if whole_BCYX is not None and self.head is not None:
            instance = self.head(deepest[num_local:])
        return PretrainOutput(instance, pixels, features)

    def _pixel_map(self, maps: Sequence[Tensor]) -> Tensor:
        return maps[self.pixel_level] if self.decoder is None else self.decoder(maps)


class Encoder(Backbone):
    """Four levels of two convolutions with max pooling between them, and a centre block at stride 16."""

    def __init__(self, in_channels: int, filters: int) -> None:
        strides = tuple(2**level for level in range(NUM_LEVELS + 1))
        channels = tuple(filters * stride for stride in strides)
        super().__init__(in_channels=in_channels, strides=strides, channels=channels)
        self.pool = nn.MaxPool2d(2)
        width_in = in_channels
        for level, width in enumerate(channels[:-1], start=1):
            self.add_module(f"contr_{level}_1", _conv_block(width_in, width))
            self.add_module(f"contr_{level}_2", _conv_block(width, width))
            width_in = width
        self.center = nn.Sequential(
            nn.Conv2d(width_in, channels[-1], 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels[-1], channels[-1], 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.apply(_initialise)

    def forward(self, image_BCYX: Tensor) -> tuple[Tensor, ...]:
        """The feature maps at strides 1, 2, 4, 8 and 16, with filters * (1, 2, 4, 8, 16) channels.

        `image_BCYX` is floating point (B, in_channels, Y, X). Raises SuperCLError where Y or X is no multiple
        of 16.
        """
        self.check_size(image_BCYX)
        features: list[Tensor] = []
        x = image_BCYX
        for level in range(1, NUM_LEVELS + 1):
            x = self.get_submodule(f"contr_{level}_1")(x)
            x = self.get_submodule(f"contr_{level}_2")(x)
            features.append(x)
            x = self.pool(x)
        return *features, self.center(x)


class Decoder(nn.Module):
    """From the coarsest map to a finer one: transposed convolutions, joined with the encoder's maps, and a 1x1 head.

    `strides` and `channels`: of the encoder's maps. `finest`: index of the map at whose stride it ends. `num_classes`:
    None leaves the head out.
    """

    def __init__(
        self,
        strides: Sequence[int],
        channels: Sequence[int],
        *,
        finest: int = 0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.levels = range(len(strides) - 1, finest, -1)
        for level in self.levels:
            upscale, *expand = self.block_names(level)
            width, ratio = channels[level - 1], strides[level] // strides[level - 1]
            self.add_module(upscale, nn.ConvTranspose2d(channels[level], width, ratio, stride=ratio))
            for name, width_in in zip(expand, (2 * width, width), strict=True):
                self.add_module(name, _conv_block(width_in, width))
        self.head = nn.Sequential()
        if num_classes is not None:
            self.head.append(nn.Conv2d(channels[finest], num_classes, 1, bias=False))
        self.apply(_initialise)

    @staticmethod
    def block_names(level: int) -> tuple[str, str, str]:
        """The modules, in their order, that lead from the encoder's map `level` to the next finer one."""
        return f"upscale{level + 1}", f"expand_{level}_1", f"expand_{level}_2"

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The map (B, C, h, w) at the stride of `finest`; C is `num_classes`, the logits, or the width of that map.

        `features`: all maps of the encoder, the finest first.
        """
        x = features[-1]
        for level in self.levels:
            x = self.refined(x, features[level - 1], level)
        return self.head(x)

    def refined(self, x: Tensor, finer: Tensor, level: int) -> Tensor:
        """The decoder's map at the stride of `finer`, (B, C, h, w) like it.

        `x`: the map of `level`, of the encoder or the decoder; `finer`: the encoder's map of `level` - 1. Both are
        floating point.
        """
        upscale, *expand = map(self.get_submodule, self.block_names(level))
        x = torch.cat([upscale(x), finer], dim=1)
        for block in expand:
            x = block(x)
        return x


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other, without a copy where there is only one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
