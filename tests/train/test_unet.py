"""The network: the published names and shapes, its function written out, and its sizes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional

from supercl_core.errors import SuperCLError, UsageError
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
    network = UNet(Encoder(channels, 32), num_classes=5)
    assert names_and_shapes(network) == published_encoder(channels) | published_decoder(5)


def test_pretrain_net_without_a_pixel_head_has_the_published_names_and_shapes():
    network = PretrainNet(Encoder(4, 32), projection=0)
    assert names_and_shapes(network) == published_encoder(4) | PUBLISHED_HEAD


def test_unet_computes_what_its_names_say():
    generator = torch.Generator().manual_seed(0)
    network = UNet(Encoder(2, 2), num_classes=3).double().eval()
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
    encoder = Encoder(1, 3)
    assert (encoder.in_channels, encoder.strides) == (1, (1, 2, 4, 8, 16))
    assert encoder.channels == (3, 6, 12, 24, 48)
    features = encoder(torch.zeros(2, 1, 32, 48))
    assert [tuple(map_.shape) for map_ in features] == [
        (2, 3, 32, 48),
        (2, 6, 16, 24),
        (2, 12, 8, 12),
        (2, 24, 4, 6),
        (2, 48, 2, 3),
    ]


def images(count, channels=1, size=(32, 48), seed=3):
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(seed))


def test_pretrain_net_embeds_each_whole_view_and_each_position_of_the_local_ones():
    network = PretrainNet(Encoder(1, 2), projection=7)
    instance, pixels, features = network(images(6), images(6, seed=4))
    assert (instance.shape, pixels.shape, features.shape) == ((6, 512), (6, 7, 2, 3), (6, 32, 2, 3))
    (instance.sum() + pixels.sum()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_heads_see_only_the_views_that_they_embed():
    network = PretrainNet(Encoder(1, 2), projection=7).eval()  # so that no image changes another's features
    local, whole = images(2), images(4, seed=4)
    output = network(local, whole)
    deepest = network.encoder(torch.cat([local, whole]))[-1]
    torch.testing.assert_close(output.instance, network.head(deepest[2:]))
    torch.testing.assert_close(output.pixels, network.pixel_head(deepest[:2]))
    torch.testing.assert_close(output.features, deepest[:2])


def test_what_is_not_asked_for_is_neither_made_nor_returned():
    local, whole = images(2), images(2, seed=4)
    for network in (PretrainNet(Encoder(1, 2)), PretrainNet(Encoder(1, 2), instance=False)):
        output = network(local, None)
        assert output.instance is None
        assert len(output.pixels) == len(output.features) == 2
    assert network.head is None
    network = PretrainNet(Encoder(1, 2), pixel_stride=None)
    assert not [name for name, _ in network.named_parameters() if name.startswith("pixel_head")]
    output = network(local, whole)
    assert output.pixels is None
    assert len(output.instance) == len(output.features) == 2
    output = network(None, whole)
    assert output.pixels is output.features is None
    assert len(output.instance) == 2


def test_without_a_pixel_head_the_pixels_are_the_features():
    network = PretrainNet(Encoder(1, 2), projection=0)
    output = network(images(2), None)
    assert torch.equal(output.pixels, output.features)


@pytest.mark.parametrize(("stride", "width"), [(1, 2), (4, 8)])
def test_pixels_may_come_from_a_finer_map(stride, width):
    network = PretrainNet(Encoder(1, 2), projection=0, pixel_stride=stride).eval()
    output = network(images(2), images(2, seed=4))
    expected = network.encoder(images(2))[network.encoder.strides.index(stride)]
    torch.testing.assert_close(output.pixels, expected)
    assert output.features.shape == (2, 32, 2, 3)
    network = PretrainNet(Encoder(1, 2), projection=5, pixel_stride=stride)
    assert network.pixel_head[0].in_channels == width
    assert network(images(2), None).pixels.shape == (2, 5, 32 // stride, 48 // stride)


@pytest.mark.parametrize(("stride", "levels"), [(8, [4]), (4, [4, 3]), (1, [4, 3, 2, 1])])
def test_the_pretraining_decoder_has_the_names_of_the_unets_down_to_its_stride(stride, levels):
    whole = names_and_shapes(UNet(Encoder(1, 2), num_classes=3))
    found = names_and_shapes(PretrainNet(Encoder(1, 2), pixel_stride=stride, decoder=True))
    decoder = {name: shape for name, shape in found.items() if name.startswith("decoder.")}
    starts = [f"decoder.{part}" for n in levels for part in (f"upscale{n + 1}.", f"expand_{n}_")]
    assert decoder == {name: shape for name, shape in whole.items() if name.startswith(tuple(starts))}


@pytest.mark.parametrize("stride", [8, 4, 1])
def test_pixels_of_the_decoder_are_the_map_that_a_unet_has_at_that_stride(stride):
    network = PretrainNet(Encoder(1, 2), projection=5, pixel_stride=stride, decoder=True).eval()
    unet = UNet(network.encoder, num_classes=3).eval()
    unet.load_state_dict(
        {name: t for name, t in network.state_dict().items() if name.startswith("decoder.")}, strict=False
    )
    level, seen = network.encoder.strides.index(stride), []
    unet.decoder.get_submodule(f"expand_{level + 1}_2").register_forward_hook(
        lambda _, __, output: seen.append(output)
    )
    unet(images(4))
    output = network(images(4), images(2, seed=4))
    assert output.pixels.shape == (4, 5, 32 // stride, 48 // stride)
    torch.testing.assert_close(output.pixels, network.pixel_head(seen[0]))
    assert output.features.shape == (4, 32, 2, 3)


def test_the_decoder_passes_double_precision_gradient_checks():
    torch.manual_seed(0)
    network = PretrainNet(Encoder(1, 1), projection=2, instance=False, pixel_stride=8, decoder=True).double()
    network.eval()  # so that the numeric differences do not move the batch statistics
    image = images(1, size=(16, 32)).double()
    names, parameters = zip(*network.decoder.named_parameters(), strict=True)

    def pixels(*values):
        state = {f"decoder.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(network, state, (image, None)).pixels

    assert torch.autograd.gradcheck(pixels, parameters, fast_mode=True)


@pytest.mark.parametrize("stride", [8, 4, 2, 1])
@pytest.mark.parametrize("instance", [True, False])
def test_losses_reach_every_parameter_of_the_encoder_and_the_pretraining_decoder(stride, instance):
    network = PretrainNet(Encoder(1, 2), instance=instance, pixel_stride=stride, decoder=True)
    output = network(images(4), images(4, seed=4) if instance else None)
    (output.pixels.sum() + (output.instance.sum() if instance else 0)).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("stride", [16, None])
def test_a_decoder_without_a_block_is_refused_with_the_strides_that_have_some(stride):
    with pytest.raises(UsageError, match=r"(?s)No block.*1 or 2 or 4 or 8\n") as caught:
        PretrainNet(Encoder(1, 2), pixel_stride=stride, decoder=True)
    assert caught.value.found == (stride or "none")


def test_a_stride_that_the_encoder_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(UsageError, match="1 or 2 or 4 or 8 or 16") as caught:
        PretrainNet(Encoder(1, 2), pixel_stride=3)
    assert caught.value.found == 3


@pytest.mark.parametrize(("passes", "local_parts"), [(1, 1), (2, 1), (4, 2)])
def test_the_decoder_has_statistics_of_the_local_views_of_each_pass(passes, local_parts):
    network = PretrainNet(Encoder(1, 2), projection=0, pixel_stride=4, decoder=True)
    encoder, decoder = copy.deepcopy(network.encoder), copy.deepcopy(network.decoder)
    local, whole = images(4), images(4, seed=4) * 3 + 1
    output = network(local, whole, passes=passes)
    parts = [encoder(part) for part in torch.cat([local, whole]).chunk(passes)][:local_parts]
    size = 4 // local_parts
    expected = torch.cat([decoder([map_[:size] for map_ in maps]) for maps in parts])
    assert torch.equal(output.pixels, expected)
    assert network.decoder.expand_4_1[1].num_batches_tracked == local_parts
    for found, wanted in zip(network.decoder.buffers(), decoder.buffers(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_each_pass_has_batch_statistics_of_its_own(passes):
    torch.manual_seed(0)
    network, twin = PretrainNet(Encoder(1, 2), pixel_stride=4), Encoder(1, 2)
    twin.load_state_dict(network.encoder.state_dict())
    local, whole = images(4), images(4, seed=4) * 3 + 1
    output = network(local, whole, passes=passes)
    parts = [twin(part) for part in torch.cat([local, whole]).chunk(passes)]
    deepest = torch.cat([maps[-1] for maps in parts])
    assert torch.equal(output.features, deepest[:4])
    assert torch.equal(output.instance, network.head(deepest[4:]))
    assert torch.equal(output.pixels, network.pixel_head(torch.cat([maps[2] for maps in parts])[:4]))
    state = twin.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.encoder.state_dict().items())
    assert state["contr_1_1.1.num_batches_tracked"] == passes


@pytest.mark.parametrize("make", [lambda: UNet(Encoder(1, 1), num_classes=2), lambda: Encoder(1, 1)])
def test_a_size_that_is_no_multiple_of_16_is_refused(make):
    with pytest.raises(SuperCLError, match="multiples of 16") as caught:
        make()(torch.zeros(1, 1, 32, 40))
    assert caught.value.found == "32 x 40"


def test_convolutions_start_with_the_variance_of_he():
    torch.manual_seed(0)
    network = PretrainNet(Encoder(1, 8))
    for name, width_in, size in (("encoder.center.2", 128, 3), ("pixel_head.0", 128, 1)):
        weight = network.get_parameter(f"{name}.weight")
        assert weight.std().item() == pytest.approx(
            math.sqrt(2 / (1 + 0.01**2) / (width_in * size**2)), rel=0.03
        )
        assert not network.get_parameter(f"{name}.bias").any()
