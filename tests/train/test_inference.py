"""Inference: volumes segmented slice by slice, mirrored, with neighbours, and the rule of the largest component."""

import numpy as np
import pytest
import torch
from scipy import ndimage

import train.inference
from train.inference import InferenceSettings, load_network, segment, single_component_classes
from train.models.backbones import build_encoder
from train.models.unet import Encoder, UNet
from train.models.weights import save_weights

CLASSES = ("background", "anterior", "posterior")
CPU = torch.device("cpu")
WINDOW = np.array([[20, 900, 400, 150]], np.float32)


def made_network(in_channels=4, num_classes=3):
    """A network of random weights whose batch statistics moved from their defaults, in evaluation mode."""
    torch.manual_seed(3)
    network = UNet(Encoder(in_channels, 4), num_classes=num_classes)
    network(torch.randn(4, in_channels, 32, 32))
    return network.eval()


def made_volume(shape, seed=0):
    volume = np.random.default_rng(seed).normal(500, 400, shape)
    return ndimage.gaussian_filter(volume, (0, 0, 2, 2)).astype(np.int16) * 4 - 1500


def normal(stored, window=WINDOW):
    """Stored intensities as training normalises them, float32."""
    low, high, mean, std = (part[:, None, None, None] for part in window.T)
    return ((np.clip(stored.astype(np.float64), low, high) - mean) / std).astype(np.float32)


@torch.no_grad()
def probabilities(network, image_CYX):
    """Of one slice, padded to multiples of 16 at its end."""
    _, height, width = image_CYX.shape
    padded = np.pad(image_CYX, ((0, 0), (0, -height % 16), (0, -width % 16)))
    image = torch.from_numpy(padded)[None].expand(1, network.encoder.in_channels, -1, -1)
    return network(image)[0, :, :height, :width].softmax(dim=0).numpy()


def assert_same_classes(found, scores):
    """Equal but where the two best scores tie within rounding."""
    best = np.sort(scores, axis=1)
    ties = best[:, -1] - best[:, -2] < 1e-4
    assert ties.mean() < 0.01
    np.testing.assert_array_equal(found[~ties], scores.argmax(axis=1)[~ties])
    assert len(np.unique(found)) > 1


def segmented(network, stored, window=WINDOW, **settings):
    return segment(network, stored, window, settings=InferenceSettings(**settings), device=CPU)


# ---------------------------------------------------------------- whole volumes


@pytest.mark.parametrize(("shape", "pixels"), [((5, 24, 20), 1), ((6, 18, 26), 2500), ((3, 32, 16), 2**16)])
def test_segment_equals_slices_padded_one_by_one(monkeypatch, shape, pixels):
    monkeypatch.setattr(train.inference, "PIXELS_AT_ONCE", {"cpu": pixels})
    network, stored = made_network(), made_volume((1, *shape))
    found = segmented(network, stored)
    assert (found.shape, found.dtype) == (shape, np.uint8)
    assert_same_classes(
        found, np.stack([probabilities(network, image) for image in normal(stored)[0][:, None]])
    )


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32])
def test_every_stored_type_is_read_and_left_as_it_is(dtype):
    network, stored = made_network(), np.abs(made_volume((1, 3, 24, 20)))
    typed = stored.astype(dtype)
    typed.flags.writeable = False  # as a view of a memory map
    np.testing.assert_array_equal(segmented(network, typed), segmented(network, stored))


@pytest.mark.parametrize("pixels", [1, 2500, 2**16])
def test_neighbours_are_channels_and_repeat_at_the_ends(monkeypatch, pixels):
    monkeypatch.setattr(train.inference, "PIXELS_AT_ONCE", {"cpu": pixels})
    network, stored = made_network(in_channels=10), made_volume((2, 6, 24, 20))
    window = np.array([[20, 900, 400, 150], [0, 500, 100, 90]], np.float32)
    found = segmented(network, stored, window, adjacent_slices=2)
    images = normal(stored, window).swapaxes(0, 1)
    around = [[min(max(z + step, 0), 5) for step in (-2, -1, 0, 1, 2)] for z in range(6)]
    scores = [probabilities(network, np.concatenate([images[z] for z in some])) for some in around]
    assert_same_classes(found, np.stack(scores))


@pytest.mark.parametrize("axes", [("y",), ("x",), ("y", "x")])
def test_probabilities_are_averaged_over_mirrored_slices(axes):
    network, stored = made_network(), made_volume((1, 3, 32, 48))
    flips = {("y",): [(), (1,)], ("x",): [(), (2,)], ("y", "x"): [(), (1,), (2,), (1, 2)]}[axes]
    scores = [
        np.mean([np.flip(probabilities(network, np.flip(image, f).copy()), f) for f in flips], axis=0)
        for image in normal(stored)[0][:, None]
    ]
    assert_same_classes(segmented(network, stored, mirror_axes=axes), np.stack(scores))


def test_the_mode_of_the_network_is_restored():
    network, stored = made_network(), made_volume((1, 3, 32, 16))
    wanted = segmented(network, stored)
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    np.testing.assert_array_equal(segmented(network, stored), wanted)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.eval()
    segmented(network, stored)
    assert not network.training


def test_reduced_precision_is_used_and_float16_falls_back_on_a_cpu():
    network, stored = made_network(), made_volume((1, 3, 32, 48))
    seen = []
    network.encoder.register_forward_hook(lambda module, inputs, maps: seen.append(maps[-1].dtype))
    full = segmented(network, stored)
    reduced = segmented(network, stored, precision="bfloat16")
    np.testing.assert_array_equal(segmented(network, stored, precision="float16"), full)
    assert seen == [torch.float32, torch.bfloat16, torch.float32]
    assert (reduced == full).mean() > 0.95


def test_the_network_of_another_backbone_segments_as_it_did_in_training(tmp_path):
    model = {"backbone": "monai:resnet10", "in_channels": 2, "num_classes": 3, "filters": 32}
    torch.manual_seed(3)
    trained = UNet(build_encoder("monai:resnet10", in_channels=2, filters=32), num_classes=3)
    trained(torch.randn(4, 2, 64, 64))
    trained.eval()
    save_weights(trained, tmp_path / "weights.safetensors", {})
    network = load_network({"model": model, "cache": {"class_names": list(CLASSES)}}, tmp_path)
    assert not network.training

    stored = made_volume((1, 2, 40, 16))
    padded = np.pad(normal(stored)[0], ((0, 0), (0, 24), (0, 16)))  # to multiples of 32
    with torch.no_grad():
        logits = trained(torch.from_numpy(padded)[:, None].repeat(1, 2, 1, 1))
    assert_same_classes(segmented(network, stored), logits[:, :, :40, :16].numpy())


def test_settings_come_from_the_run():
    run = {
        "config": {"precision": "bfloat16", "steps": 3},
        "inference": {"adjacent_slices": 1, "mirror_axes": ["x"], "largest_component": [2]},
    }
    assert InferenceSettings.from_run(run) == InferenceSettings(
        adjacent_slices=1, mirror_axes=("x",), largest_component=(2,), precision="bfloat16"
    )


# ---------------------------------------------------------------- the largest component


class Painted(UNet):
    """Instead of a network: the class of a pixel is its normalised value."""

    def __init__(self):
        super().__init__(Encoder(1, 1), num_classes=3)

    def forward(self, image_BCYX):
        return torch.stack([-((image_BCYX[:, 0] - index) ** 2) for index in range(3)], dim=1)


def painted():
    """Two classes of two pieces each, of which one voxel of class 2 touches its larger piece by a corner only."""
    classes = np.zeros((1, 4, 16, 16), np.int16)
    classes[0, 0:2, 2:6, 2:6] = 1
    classes[0, 3, 10, 10] = 1
    classes[0, 1, 8:12, 8:12] = 2
    classes[0, 2, 12, 12] = 2
    classes[0, 0, 15, 0:3] = 2
    return classes


def test_only_the_largest_component_of_the_named_classes_stays():
    classes, window = painted(), np.array([[0, 2, 0, 1]], np.float32)
    np.testing.assert_array_equal(segmented(Painted(), classes, window), classes[0])
    wanted = classes[0].copy()
    wanted[0, 15, 0:3] = 0
    np.testing.assert_array_equal(segmented(Painted(), classes, window, largest_component=(2,)), wanted)
    wanted[3, 10, 10] = 0
    np.testing.assert_array_equal(segmented(Painted(), classes, window, largest_component=(1, 2)), wanted)


def test_a_class_is_of_one_piece_if_it_is_in_every_case_that_has_it():
    blob = np.zeros((3, 20, 20), np.uint8)
    blob[1, :10, :10] = 1  # 100 voxels
    with_crumb, with_crumbs, with_two = blob.copy(), blob.copy(), blob.copy()
    with_crumb[1, 15, 15] = 1  # 1 in 101 is below 1 %
    with_crumbs[1, 15, 15:17] = 1  # 2 in 102 are not
    with_two[0, 12:14, 12:14], with_two[2, 18:20, 18:20] = 2, 2
    by_corner = blob.copy()
    by_corner[0, 12, 12], by_corner[1, 13, 13] = 2, 2
    assert single_component_classes([blob, with_crumb], 4) == (1,)  # 2 and 3 are in no case
    assert single_component_classes([blob, with_crumbs], 4) == ()
    assert single_component_classes([blob, with_two], 3) == (1,)
    assert single_component_classes([blob, by_corner], 3) == (1, 2)
    assert single_component_classes(iter([by_corner, with_two]), 3) == (1,)
    assert single_component_classes([], 3) == ()
