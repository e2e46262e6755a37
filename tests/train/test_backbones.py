"""Encoders of other libraries: what they are taken for, in both networks, on disk, and which are refused."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from supercl_core.errors import SuperCLError, UsageError
from train.models.backbones import LibraryEncoder, build_encoder
from train.models.unet import Encoder, PretrainNet, UNet
from train.models.weights import load_pretrained, read_weights, save_weights

RESNET = "monai:resnet10"
MOBILENET = "smp:mobilenet_v2"
TRANSFORMER = "smp:mit_b0"
"""An encoder without a map at stride 2, in whose place the library puts one of no channels."""
STEMS = "smp:mobileone_s0"
"""An encoder with several convolutions of the image."""

pytestmark = pytest.mark.usefixtures("smp")
one_of_each_library = pytest.mark.parametrize("backbone", [RESNET, MOBILENET])


def build(backbone, in_channels=1):
    torch.manual_seed(0)
    return build_encoder(backbone, in_channels=in_channels, filters=8)


def images(count=4, channels=1, size=(64, 96), seed=3):
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(seed))


# ---- what an encoder is taken for


@pytest.mark.parametrize(
    ("backbone", "strides", "channels"),
    [
        (RESNET, (2, 4, 8, 16, 32), (64, 64, 128, 256, 512)),
        ("monai:efficientnet-b0", (2, 4, 8, 16, 32), (16, 24, 40, 112, 320)),
        (MOBILENET, (2, 4, 8, 16, 32), (16, 24, 32, 96, 1280)),
        (TRANSFORMER, (4, 8, 16, 32), (32, 64, 160, 256)),
        (STEMS, (2, 4, 8, 16, 32), (48, 48, 128, 256, 1024)),
        ("smp:tu-tf_mobilenetv3_small_minimal_100", (2, 4, 8, 16, 32), (16, 16, 24, 48, 576)),
    ],
)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_strides_and_channels_are_those_of_the_feature_maps(backbone, strides, channels, in_channels):
    encoder = build(backbone, in_channels).eval()
    assert (encoder.in_channels, encoder.strides, encoder.channels) == (in_channels, strides, channels)
    with torch.no_grad():
        maps = encoder(images(2, in_channels))
    expected = [(2, width, 64 // s, 96 // s) for width, s in zip(channels, strides, strict=True)]
    assert [tuple(map_.shape) for map_ in maps] == expected


def test_unet_is_the_published_encoder():
    torch.manual_seed(0)
    expected = Encoder(3, 4).state_dict()
    torch.manual_seed(0)
    found = build_encoder("unet", in_channels=3, filters=4).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@one_of_each_library
def test_looking_at_an_encoder_leaves_no_trace_in_it(backbone):
    encoder = build(backbone)
    assert all(module.training for module in encoder.modules())
    state = encoder.state_dict()
    assert not any(count for name, count in state.items() if name.endswith("num_batches_tracked"))
    assert all(parameter.grad is None for parameter in encoder.parameters())
    with torch.no_grad(), torch.device("meta"):
        again = build(backbone).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def test_a_size_that_is_no_multiple_of_the_last_stride_is_refused():
    with pytest.raises(SuperCLError, match="multiples of 32") as caught:
        build(RESNET)(images(size=(64, 48)))
    assert caught.value.found == "64 x 48"


# ---- in the networks


@pytest.mark.parametrize(
    ("backbone", "unused"),
    [
        (RESNET, set()),
        (MOBILENET, set()),
        (TRANSFORMER, set()),
        (
            "monai:efficientnet-b0",
            {"_conv_head.weight", "_bn1.weight", "_bn1.bias", "_fc.weight", "_fc.bias"},
        ),
    ],
)
def test_gradients_of_pretraining_reach_every_parameter_that_is_not_frozen(backbone, unused):
    network = PretrainNet(build(backbone), projection=8)
    instance, pixels, features = network(images(), images(seed=4))
    last = network.encoder.channels[-1]
    assert (instance.shape, pixels.shape, features.shape) == ((4, 512), (4, 8, 4, 6), (4, last, 2, 3))
    (instance.sum() + pixels.sum()).backward()
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"encoder.body.{name}" for name in unused}
    assert frozen == {name for name, parameter in network.named_parameters() if parameter.grad is None}


@one_of_each_library
@pytest.mark.parametrize("passes", [1, 4])
def test_passes_equal_separate_calls_of_the_encoder(backbone, passes):
    network, twin = PretrainNet(build(backbone), projection=0), build(backbone)
    local, whole = images(), images(seed=4) * 3 + 1
    output = network(local, whole, passes=passes)
    parts = [twin(part) for part in torch.cat([local, whole]).chunk(passes)]
    deepest = torch.cat([maps[-1] for maps in parts])
    assert torch.equal(output.features, deepest[:4])
    assert torch.equal(output.pixels, torch.cat([maps[-2] for maps in parts])[:4])
    assert torch.equal(output.instance, network.head(deepest[4:]))
    state = twin.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.encoder.state_dict().items())


@pytest.mark.parametrize("backbone", [RESNET, MOBILENET, TRANSFORMER])
def test_unet_scores_every_pixel(backbone):
    network = UNet(build(backbone, 3), num_classes=5)
    logits = network(images(2, 3))
    assert logits.shape == (2, 5, 64, 96)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    network.eval()
    with torch.no_grad():
        coarse = network.decoder(network.encoder(images(2, 3)))
        stride = network.encoder.strides[0]
        assert coarse.shape[2:] == (64 // stride, 96 // stride)
        expected = functional.interpolate(coarse, scale_factor=stride, mode="bilinear")
        torch.testing.assert_close(network(images(2, 3)), expected)


@pytest.mark.parametrize("backbone", ["unet", RESNET, MOBILENET])
@pytest.mark.parametrize("make", [lambda one: UNet(one, num_classes=2), PretrainNet])
def test_channels_last_and_bfloat16_change_rounding_only(backbone, make):
    network = make(build(backbone)).eval()
    inputs = (images(),) if isinstance(network, UNet) else (images(), images(seed=4))
    with torch.no_grad():
        expected = network(*inputs)
        network.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            found = network(*(one.to(memory_format=torch.channels_last) for one in inputs))
    pairs = [(found, expected)] if isinstance(network, UNet) else zip(found, expected, strict=True)
    for one, other in pairs:
        assert one.dtype == torch.bfloat16
        assert one.is_contiguous(memory_format=torch.channels_last) or one.ndim == 2
        torch.testing.assert_close(one.float(), other, rtol=0, atol=0.05 * other.abs().max().item())


# ---- on disk


def moved(encoder):
    """The encoder with batch statistics that have moved from their defaults, in evaluation mode."""
    with torch.no_grad():
        encoder(images(8, encoder.in_channels))
    return encoder.eval()


@one_of_each_library
def test_weights_come_back_as_they_were(backbone, tmp_path):
    network = PretrainNet(moved(build(backbone)), projection=8)
    save_weights(network, tmp_path / "weights.safetensors", {})
    torch.manual_seed(1)
    other = PretrainNet(build_encoder(backbone, in_channels=1, filters=1), projection=8)
    other.load_state_dict(read_weights(tmp_path))
    assert all(
        torch.equal(one, two)
        for one, two in zip(*(net.state_dict().values() for net in (network, other)), strict=True)
    )


@pytest.mark.parametrize(("backbone", "stems"), [(RESNET, 1), (MOBILENET, 1), (TRANSFORMER, 1), (STEMS, 2)])
@pytest.mark.parametrize(("stored", "wanted"), [(1, 3), (3, 1)])
def test_an_adapted_encoder_answers_a_repeated_image_as_before(backbone, stems, stored, wanted, tmp_path):
    source = moved(build(backbone, stored)).double()
    save_weights(nn.ModuleDict({"encoder": source}), tmp_path / "weights.safetensors", {})
    network = UNet(build(backbone, wanted), num_classes=2).double().eval()
    report = load_pretrained(network, tmp_path)
    assert len(report.adapted) == stems
    assert len(report.loaded) == len(source.state_dict()) - stems
    with torch.no_grad():
        image = images(2).double()
        found = network.encoder(image.repeat(1, wanted, 1, 1))[-1]
        expected = source(image.repeat(1, stored, 1, 1))[-1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backbone", [RESNET, MOBILENET, TRANSFORMER])
@pytest.mark.parametrize("level", [0, 1])
def test_a_pretrained_decoder_moves_into_the_unet_of_the_same_encoder(backbone, level, tmp_path):
    encoder = build(backbone)
    source = PretrainNet(encoder, projection=0, pixel_stride=encoder.strides[level], decoder=True)
    output = source(images(), images(seed=4))
    (output.pixels.sum() + output.instance.sum()).backward()
    trained = {name for name, parameter in source.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in source.named_parameters() if parameter.grad is not None}

    save_weights(source, tmp_path / "weights.safetensors", {})
    torch.manual_seed(1)
    network = UNet(build_encoder(backbone, in_channels=1, filters=8), num_classes=2).eval()
    report = load_pretrained(network, tmp_path)
    assert all(name.startswith("head.") for name in report.skipped)
    assert len(report.fresh) == 1 + 16 * level
    seen = []
    network.decoder.get_submodule(f"expand_{level + 1}_2").register_forward_hook(
        lambda _, __, map_: seen.append(map_)
    )
    with torch.no_grad():
        network(images())
        assert torch.equal(seen[0], source.eval()(images(), None).pixels)


def test_a_checkpoint_of_another_backbone_says_which(tmp_path):
    network = PretrainNet(build(RESNET))
    save_weights(network, tmp_path / "weights.safetensors", {"backbone": RESNET})
    with pytest.raises(SuperCLError, match=f"of backbone {RESNET} is of another architecture"):
        load_pretrained(UNet(Encoder(1, 2), num_classes=2), tmp_path)
    with pytest.raises(SuperCLError, match=f"of backbone {RESNET} is of another architecture"):
        load_pretrained(UNet(build(MOBILENET), num_classes=2), tmp_path)


# ---- refusals


@pytest.mark.parametrize(
    ("backbone", "parts"),
    [
        ("resnet18", ["no such backbone", "unet, smp:NAME or monai:NAME"]),
        ("smp:resnet81", ["no encoder 'resnet81'", "names", "smp:resnet18"]),
        ("smp:tu-resnet", ["no encoder", "smp:tu-resnet"]),
        ("monai:resnet11", ["no encoder 'resnet11'", "one of 17 names", "monai:resnet10"]),
        ("monai:", ["no encoder ''", "documentation"]),
    ],
)
def test_an_unknown_name_is_refused_with_close_ones(backbone, parts):
    with pytest.raises(UsageError) as caught:
        build(backbone)
    for part in [*parts, f"found:    {backbone}"]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("backbone", "found"),
    [
        ("smp:tu-vit_tiny_patch16_224", "downsampling"),
        ("smp:tu-swin_tiny_patch4_window7_224", "doesn't match"),
    ],
)
def test_an_encoder_for_images_of_one_size_is_refused(backbone, found):
    with pytest.raises(UsageError, match="cannot be used") as caught:
        build(backbone)
    assert found in str(caught.value)
    assert caught.value.where == backbone


class Body(nn.Module):
    """From an image to the maps that `make` makes of it."""

    def __init__(self, make):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 1)
        self.make = make

    def forward(self, image):
        return [image, *self.make(self.stem(image))]


def pooled(x, *strides):
    return [functional.avg_pool2d(x, stride) for stride in strides]


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda x: [*pooled(x, 2), x.flatten(2)], r"shape \(1, 2, 8192\)"),
        (lambda x: [*pooled(x, 2), functional.avg_pool2d(x, (2, 4))], r"shape \(1, 2, 32, 32\)"),
        (lambda x: pooled(x, 3), r"shape \(1, 2, 21, 42\)"),
        (lambda x: pooled(x, 4, 2), "strides 4, 2"),
        (lambda x: pooled(x, 2, 4, 4), "strides 2, 4, 4"),
    ],
)
def test_maps_that_no_decoder_could_join_are_refused(make, found):
    with pytest.raises(ValueError, match=found):
        LibraryEncoder(Body(make), in_channels=1)


def test_maps_at_the_size_of_the_image_count_unless_they_are_the_image():
    encoder = LibraryEncoder(Body(lambda x: [x, *pooled(x, 2, 8)]), in_channels=1)
    assert (encoder.strides, encoder.channels) == ((1, 2, 8), (2, 2, 2))
    assert UNet(encoder, num_classes=3)(images()).shape == (4, 3, 64, 96)


def test_a_library_that_is_not_installed_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.encoders", None)
    with pytest.raises(UsageError, match=r"(?s)need segmentation-models-pytorch.*supercl\[backbones\]"):
        build("smp:resnet18")


def test_a_torchvision_of_another_pytorch_is_named(monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name == "timm":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(SuperCLError, match=r"(?s)torchvision may not fit.*nms does not exist") as caught:
        build("smp:resnet18")
    assert torch.__version__ in caught.value.expected
