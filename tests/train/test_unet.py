"""The network: the published names and shapes, its function written out, and its sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from supercl_core.errors import SuperCLError
from train.models.unet import Encoder, PretrainNet, UNet


def conv(name, width_in, width, size=3):
    return {f"{name}.weight": (width, width_in, size, size), f"{name}.bias": (width,)}


def conv_block(name, width_in, width):
    norm = {f"{name}.1.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return conv(f"{name}.0", width_in, width) | norm | {f"{name}.1.num_batches_tracked": ()}


def published_encoder(channels):
    return (
        conv_block("encoder.contr_1_1", channels, 32)
        | conv_block("encoder.contr_1_2", 32, 32)
        | conv_block("encoder.contr_2_1", 32, 64)
        | conv_block("encoder.contr_2_2", 64, 64)
        | conv_block("encoder.contr_3_1", 64, 128)
        | conv_block("encoder.contr_3_2", 128, 128)
        | conv_block("encoder.contr_4_1", 128, 256)
        | conv_block("encoder.contr_4_2", 256, 256)
        | conv("encoder.center.0", 256, 512)
        | conv("encoder.center.2", 512, 512)
    )


def published_decoder(num_classes):
    upscale = {}
    for number, width in ((5, 256), (4, 128), (3, 64), (2, 32)):
        name = f"decoder.upscale{number}"
        upscale |= {f"{name}.weight": (2 * width, width, 2, 2), f"{name}.bias": (width,)}
    return (
        upscale
        | conv_block("decoder.expand_4_1", 512, 256)
        | conv_block("decoder.expand_4_2", 256, 256)
        | conv_block("decoder.expand_3_1", 256, 128)
        | conv_block("decoder.expand_3_2", 128, 128)
        | conv_block("decoder.expand_2_1", 128, 64)
        | conv_block("decoder.expand_2_2", 64, 64)
        | conv_block("decoder.expand_1_1", 64, 32)
        | conv_block("decoder.expand_1_2", 32, 32)
        | {"decoder.head.0.weight": (num_classes, 32, 1, 1)}
    )


PUBLISHED_HEAD = {
    "head.2.weight": (512, 512),
    "head.2.bias": (512,),
    "head.4.weight": (512, 512),
    "head.4.bias": (512,),
}


def names_and_shapes(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("channels", [1, 4])
def test_unet_has_the_published_names_and_shapes(channels):
    network = UNet(in_channels=channels, num_classes=5)
    assert names_and_shapes(network) == published_encoder(channels) | published_decoder(5)


def test_pretrain_net_without_a_pixel_head_has_the_published_names_and_shapes():
    network = PretrainNet(in_channels=4, projection=0)
    assert names_and_shapes(network) == published_encoder(4) | PUBLISHED_HEAD


def test_unet_computes_what_its_names_say():
    generator = torch.Generator().manual_seed(0)
    network = UNet(in_channels=2, num_classes=3, filters=2).double().eval()
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.2)
            tensor.abs_()  # a variance is not negative
    state = network.state_dict()

    def convolve(x, name):
        return functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def block(x, name):
        mean, variance = state[f"{name}.1.running_mean"], state[f"{name}.1.running_var"]
        scale = state[f"{name}.1.weight"] / (variance + 1e-5).sqrt()
        shift = state[f"{name}.1.bias"] - mean * scale
        x = convolve(x, f"{name}.0") * scale[:, None, None] + shift[:, None, None]
        return torch.where(x > 0, x, 0.01 * x)

    image = torch.randn(2, 2, 32, 16, generator=generator, dtype=torch.float64)
    x, skips = image, {}
    for level in (1, 2, 3, 4):
        x = skips[level] = block(block(x, f"encoder.contr_{level}_1"), f"encoder.contr_{level}_2")
        x = functional.max_pool2d(x, 2)
    x = convolve(convolve(x, "encoder.center.0").relu(), "encoder.center.2").relu()
    for level in (4, 3, 2, 1):
        name = f"decoder.upscale{level + 1}"
        x = functional.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)
        x = torch.cat([x, skips[level]], dim=1)
        x = block(block(x, f"decoder.expand_{level}_1"), f"decoder.expand_{level}_2")
    expected = functional.conv2d(x, state["decoder.head.0.weight"])

    torch.testing.assert_close(network(image), expected)


def test_encoder_returns_five_maps_at_doubling_strides():
    features = Encoder(1, 3)(torch.zeros(2, 1, 32, 48))
    assert [tuple(map_.shape) for map_ in features] == [
        (2, 3, 32, 48),
        (2, 6, 16, 24),
        (2, 12, 8, 12),
        (2, 24, 4, 6),
        (2, 48, 2, 3),
    ]


def test_pretrain_net_returns_an_embedding_for_each_slice_and_each_pixel():
    network = PretrainNet(in_channels=1, filters=2, projection=7)
    instance, pixels, features = network(torch.randn(3, 1, 32, 48))
    assert (instance.shape, pixels.shape, features.shape) == ((3, 512), (3, 7, 2, 3), (3, 32, 2, 3))
    (instance.sum() + pixels.sum()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_without_a_pixel_head_the_pixels_are_the_features():
    output = PretrainNet(in_channels=1, filters=2, projection=0)(torch.randn(1, 1, 32, 32))
    assert output.pixels is output.features


@pytest.mark.parametrize(
    "network", [UNet(in_channels=1, num_classes=2, filters=1), PretrainNet(in_channels=1, filters=1)]
)
def test_a_size_that_is_no_multiple_of_16_is_refused(network):
    with pytest.raises(SuperCLError, match="multiples of 16") as caught:
        network(torch.zeros(1, 1, 32, 40))
    assert caught.value.found == "32 x 40"


def test_convolutions_start_with_the_variance_of_he():
    torch.manual_seed(0)
    network = PretrainNet(in_channels=1, filters=8)
    for name, width_in, size in (("encoder.center.2", 128, 3), ("pixel_head.0", 128, 1)):
        weight = network.get_parameter(f"{name}.weight")
        assert weight.std().item() == pytest.approx(
            math.sqrt(2 / (1 + 0.01**2) / (width_in * size**2)), rel=0.03
        )
        assert not network.get_parameter(f"{name}.bias").any()
