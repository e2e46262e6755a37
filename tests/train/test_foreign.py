"""Encoders from files of timm, MONAI and segmentation-models-pytorch: found by name, compared in what they give."""

from __future__ import annotations

import pytest
import torch

from supercl_core.errors import SuperCLError
from train.models.backbones import build_encoder
from train.models.foreign import encoder_tensors
from train.models.unet import UNet
from train.models.weights import load_encoder, load_pretrained

pytestmark = pytest.mark.usefixtures("smp")


def unet(backbone, in_channels=3):
    torch.manual_seed(0)
    return UNet(build_encoder(backbone, in_channels=in_channels, filters=32), num_classes=2).eval()


def trained(network):
    """The network with other batch statistics than at the start, in evaluation mode."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("running_mean", "running_var")):
                tensor += torch.rand(tensor.shape)
    return network.eval()


def timm_model(name):
    import timm

    return trained(timm.create_model(name))


def smp_unet(name, **options):
    import segmentation_models_pytorch as smp

    return trained(smp.Unet(name, encoder_weights=None, **options))


def monai_unet(name):
    from monai.networks.nets import FlexibleUNet

    return trained(FlexibleUNet(in_channels=3, out_channels=2, backbone=name))


def write(path, network, prefix=""):
    torch.save({prefix + name: tensor for name, tensor in network.state_dict().items()}, path)
    return path


# ---------------------------------------------------------------- files of the libraries


@pytest.mark.parametrize(
    ("make", "features", "backbone", "left"),
    [
        (lambda: timm_model("resnet18"), "forward_features", "smp:resnet18", {"fc"}),
        (lambda: timm_model("resnet18"), "forward_features", "smp:tu-resnet18", {"fc"}),
        # timm has `stages.0` here, and `stages_0` where it takes the network for its features.
        (lambda: timm_model("convnext_atto"), "forward_features", "smp:tu-convnext_atto", {"head"}),
        (lambda: smp_unet("mobilenet_v2"), "encoder", "smp:mobilenet_v2", {"decoder", "segmentation_head"}),
        (lambda: smp_unet("mobilenet_v2").encoder, "forward", "smp:mobilenet_v2", set()),
        (lambda: monai_unet("resnet10"), "encoder", "monai:resnet10", {"decoder", "segmentation_head"}),
        (lambda: monai_unet("resnet10").encoder, "forward", "monai:resnet10", set()),
    ],
    ids=[
        "timm",
        "timm to timm",
        "timm renamed",
        "smp network",
        "smp encoder",
        "MONAI network",
        "MONAI encoder",
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.net."])
def test_the_encoder_answers_as_in_its_own_library(make, features, backbone, left, prefix, tmp_path):
    library, network = make(), unet(backbone)
    report = load_pretrained(network, write(tmp_path / "library.pth", library, prefix))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = getattr(library, features)(images)
        expected = expected if isinstance(expected, torch.Tensor) else expected[-1]
        torch.testing.assert_close(network.encoder(images)[-1], expected)
    assert set(report.loaded) == {f"encoder.{name}" for name in network.encoder.state_dict()}
    assert {name.removeprefix(prefix).partition(".")[0] for name in report.skipped} == left
    assert len(report.loaded) + len(report.skipped) == len(library.state_dict())
    assert all(name.startswith("decoder.") for name in report.fresh)


def test_colours_are_summed_for_one_channel_and_the_report_says_so(tmp_path):
    library, network = timm_model("resnet18"), unet("smp:resnet18", in_channels=1)
    report = load_pretrained(network, write(tmp_path / "library.pth", library))
    image = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        expected = library.forward_features(image.repeat(1, 3, 1, 1))
        torch.testing.assert_close(network.encoder(image)[-1], expected, rtol=1e-4, atol=1e-4)
    assert report.summary().splitlines()[1:] == [
        "  tensors loaded: 119 of encoder",
        "  tensors adapted to the input channels: encoder.body.conv1.weight",
        "  tensors left in the file: 2 of fc",
        "  tensors with initial values: 65 of decoder",
    ]


def test_a_bare_published_encoder_is_read(tmp_path):
    source, network = unet("unet", in_channels=1), unet("unet", in_channels=1)
    with torch.no_grad():
        source.encoder.center[0].bias += 1
    report = load_encoder(network, write(tmp_path / "bare.pth", source.encoder))
    assert len(report.loaded) == 60
    assert torch.equal(network.encoder.center[0].bias, source.encoder.center[0].bias)


def test_old_files_without_counters_are_read(tmp_path):
    state = timm_model("resnet18").state_dict()
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    torch.save({name: state[name] for name in state.keys() - counters}, tmp_path / "old.pth")
    network = unet("smp:resnet18")
    report = load_encoder(network, tmp_path / "old.pth")
    assert {f"encoder.body.{name}" for name in counters} == {
        n for n in report.fresh if n.startswith("encoder.")
    }
    assert torch.equal(network.encoder.body.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize("key", ["net", "state_dict", "model", "model_state_dict"])
def test_a_state_dict_is_found_under_the_keys_that_others_use(key, tmp_path):
    state = monai_unet("resnet10").state_dict()
    torch.save({"epoch": 3, key: state}, tmp_path / "wrapped.pth")
    network = unet("monai:resnet10")
    load_pretrained(network, tmp_path / "wrapped.pth")
    assert torch.equal(network.encoder.body.conv1.weight, state["encoder.conv1.weight"])


@pytest.mark.parametrize(
    ("stored", "backbone", "text"),
    [
        ("resnet34", "smp:resnet18", "encoder.body.layer1.2.conv1.weight absent"),
        ("resnet18", "smp:resnet34", "encoder.body.layer1.2.conv1.weight (64, 64, 3, 3)"),
        ("resnet18", "unet", "encoder.contr_1_1.0.weight (32, 3, 3, 3)"),
    ],
)
def test_another_architecture_is_refused_and_nothing_is_taken(stored, backbone, text, tmp_path):
    network = unet(backbone)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(SuperCLError, match="another architecture") as caught:
        load_pretrained(network, write(tmp_path / "library.pth", timm_model(stored)))
    assert text in caught.value.expected
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# ---------------------------------------------------------------- names alone


OURS = ["encoder.body.conv1.weight", "encoder.body.layer_1.0.weight", "encoder.body.layer_2.0.weight"]


@pytest.mark.parametrize("prefix", ["", "encoder.", "a.b_c."])
def test_names_are_found_behind_any_prefix_and_with_dots_for_underscores(prefix):
    theirs = [prefix + name for name in ("conv1.weight", "layer.1.0.weight", "layer_2.0.weight", "fc.weight")]
    assert encoder_tensors(theirs, OURS) == dict(zip(OURS, theirs, strict=False))


def test_the_prefix_with_most_of_the_encoder_is_taken():
    theirs = ["momentum.conv1.weight", "encoder.conv1.weight", "encoder.layer_1.0.weight"]
    assert encoder_tensors(theirs, OURS) == dict(zip(OURS, theirs[1:], strict=False))


def test_blocks_behind_the_end_are_left_and_those_within_are_given():
    theirs = [name.removeprefix("encoder.body.") for name in OURS]
    assert encoder_tensors([*theirs, "layer_2.1.weight"], OURS) == dict(zip(OURS, theirs, strict=True))
    found = encoder_tensors([*theirs, "layer_1.1.weight"], OURS)
    assert found.keys() - {*OURS} == {"encoder.body.layer_1.1.weight"}


def test_nothing_is_found_without_the_first_tensor():
    assert encoder_tensors(["layer_1.0.weight", "layer_2.0.weight"], OURS) == {}
    assert encoder_tensors([], OURS) == encoder_tensors(["a"], []) == {}
