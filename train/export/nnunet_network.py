"""The published U-Net as a network of nnU-Net v2, which names it in its plans.

nnU-Net's own PlainConvUNet cannot hold the weights: it halves maps by strided convolutions, not by max pooling, and
normalises in the deepest block. So this module has to be installed where nnU-Net trains. Only nnU-Net calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor, nn

from train.models.unet import NUM_LEVELS, Decoder, Encoder

STRIDES: Final = [[1, 1], *[[2, 2]] * NUM_LEVELS]
"""As the plans of nnU-Net state them, from which it derives the sizes of its targets."""


class SuperCLUNet(nn.Module):
    """Encoder and decoder as in `train.models.unet.UNet`, with the scores at every level that nnU-Net supervises.

    Keyword arguments are those of nnU-Net (`input_channels`, `num_classes`, `deep_supervision`) and of the plans
    (`filters`, `strides`). Raises ValueError for other strides than STRIDES.
    """

    def __init__(
        self,
        *,
        input_channels: int,
        num_classes: int,
        filters: int,
        strides: Sequence[Sequence[int]],
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if [list(pair) for pair in strides] != STRIDES:
            raise ValueError(f"strides {strides} in the plans: this network has {STRIDES}")
        self.encoder = Encoder(input_channels, filters)
        self.decoder = SupervisedDecoder(
            self.encoder.channels, num_classes=num_classes, deep_supervision=deep_supervision
        )

    def forward(self, image_BCYX: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, num_classes, Y, X), or with deep supervision a list: at strides 1, 2, 4 and 8.

        `image_BCYX` is floating point (B, input_channels, Y, X), Y and X multiples of 16.
        """
        return self.decoder(self.encoder(image_BCYX))


class SupervisedDecoder(Decoder):
    """The published decoder with a head of scores at each level; nnU-Net switches `deep_supervision`."""

    def __init__(self, channels: Sequence[int], *, num_classes: int, deep_supervision: bool) -> None:
        super().__init__([2**level for level in range(len(channels))], channels)
        self.deep_supervision = deep_supervision
        # nnU-Net leaves tensors of this name out of pre-trained weights.
        self.seg_layers = nn.ModuleList(
            nn.Conv2d(channels[level - 1], num_classes, 1) for level in self.levels
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:  # type: ignore[override]
        """The scores at the finest level, or at all, finest first. `features`: all maps of the encoder."""
        x = features[-1]
        scores = []
        for level, head in zip(self.levels, self.seg_layers, strict=True):
            x = self.refined(x, features[level - 1], level)
            if self.deep_supervision or level == self.levels[-1]:
                scores.append(head(x))
        return scores[::-1] if self.deep_supervision else scores[0]
