"""The published encoder as one of segmentation-models-pytorch, for whoever trains with that library.

Feature maps keep the library's convention, a stride of 2^i at index i. Its Unet leaves out the first one, at the size
of the image, as it does with all encoders.
"""

from __future__ import annotations

from torch import Tensor

from train.models.unet import NUM_LEVELS, Encoder


class SmpEncoder(Encoder):
    """`train.models.unet.Encoder` with what the library asks of an encoder, which makes it.

    `filters`: channels at stride 1. `depth`: levels below it that are used, 1 to 4. `output_stride`: 32, the library's
    default; as without dilation, it is 2^depth. Raises ValueError for another depth or output stride.
    """

    def __init__(self, *, filters: int, depth: int = NUM_LEVELS, output_stride: int = 32) -> None:
        super().__init__(3, filters)
        if not 1 <= depth <= NUM_LEVELS or output_stride != 32:
            raise ValueError(
                f"encoder_depth is 1 to {NUM_LEVELS} and nothing is dilated, not {depth}, {output_stride}"
            )
        self.out_channels = list(self.channels[: depth + 1])
        self.output_stride = 2**depth

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Take images of so many channels from now on; the library makes encoders of three and calls this at once."""
        self.in_channels = in_channels
        self.contr_1_1 = Encoder(in_channels, self.channels[0]).get_submodule("contr_1_1")

    def forward(self, image_BCYX: Tensor) -> list[Tensor]:  # type: ignore[override]  # the library asks for a list
        """The feature maps at strides 1, 2, 4 ... 2^depth; `image_BCYX` as `train.models.unet.Encoder` takes it."""
        return list(super().forward(image_BCYX))[: len(self.out_channels)]


def register(*, filters: int) -> str:
    """Make the encoder known to the library under a name, which is returned.

    Use it with `encoder_depth=4` and `encoder_weights=None`.
    """
    from segmentation_models_pytorch.encoders import encoders

    name = f"supercl-unet-{filters}"
    encoders[name] = {"encoder": SmpEncoder, "pretrained_settings": {}, "params": {"filters": filters}}
    return name
