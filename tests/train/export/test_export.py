"""`supercl export`: each format loaded by its framework and compared in numbers, the card, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import sys

import pytest
import torch

from train.data import repeat_channels
from train.models.unet import UNet
from train.models.weights import load_pretrained, read_weights, save_weights

pytestmark = pytest.mark.usefixtures("smp")

LIGHT = ["safetensors", "monai", "smp"]
"""Formats that are written and loaded in well under a second."""


def exported(supercl, source, folder, target, *more):
    outcome = supercl("export", source, folder, "--to", target, *more)
    assert outcome.code == 0, outcome.err
    card = json.loads((folder / "card.json").read_text())
    assert outcome.out.splitlines() == [
        f"{folder}: {card['holds']}; to load it there:",
        *(f"  {line}" for line in card["load"]),
    ]
    return card


def assert_gives(found, network, images, *, features, tolerance=1e-5):
    """Whether the answer for the images is the encoder's last feature map, or else the logits."""
    with torch.no_grad():
        images = repeat_channels(torch.from_numpy(images), network.encoder.in_channels)
        expected = network.encoder(images)[-1] if features else network(images)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def giving(module):
    """Lines that make the network give what one of its modules gives."""
    return [
        "seen = []",
        f"{module}.register_forward_hook(lambda _, __, map_: seen.append(map_))",
        "network.forward = lambda x, forward=network.forward: (forward(x), seen[-1])[1]",
    ]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("target", LIGHT)
def test_a_whole_network_loads_by_its_lines_and_answers_the_same(
    target, supercl, make_run, tmp_path, images, answer_of
):
    run, network = make_run()
    card = exported(supercl, run, tmp_path / "out", target)
    assert card["holds"] == ("the encoder" if target == "smp" else "the whole network")
    found = answer_of(tmp_path / "out", card["load"], target)
    assert_gives(found, network, images, features=target == "smp")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "module"),
    [
        ("onnx", None),
        ("safetensors", "network.encoder.center"),
        ("monai", "network.down_4"),
        ("smp", "network.encoder.center"),
    ],
)
def test_an_encoder_loads_by_its_lines_in_a_fresh_process(
    target, module, supercl, make_run, tmp_path, images, answer_of
):
    if target == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    run, network = make_run("pretrain", filters=32)
    card = exported(supercl, run, tmp_path / "out", target)
    assert card["holds"] == "the encoder"
    lines = [*card["load"], *(giving(module) if module else [])]
    found = answer_of(tmp_path / "out", lines, target, fresh=True)
    assert_gives(found, network, images, features=True, tolerance=1e-4 if target == "onnx" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "flags"), [("monai:resnet10", ["--encoder"]), ("smp:mobilenet_v2", [])])
def test_onnx_takes_encoders_of_other_libraries(
    backbone, flags, supercl, make_run, tmp_path, images, answer_of
):
    pytest.importorskip("onnxruntime")
    run, network = make_run(backbone=backbone)
    card = exported(supercl, run, tmp_path / "out", "onnx", *flags)
    names = [f"stride_{stride}" for stride in network.encoder.strides] if flags else ["logits"]
    assert card["load"][-1].startswith(f"[{', '.join(names)}] = ")
    found = answer_of(tmp_path / "out", card["load"], "onnx")
    assert_gives(found, network, images, features=bool(flags), tolerance=1e-4)


@pytest.mark.parametrize(
    ("target", "backbone"),
    [("monai", "monai:resnet10"), ("smp", "smp:resnet18"), ("safetensors", "monai:resnet10")],
)
@pytest.mark.parametrize("kind", ["finetune", "pretrain"])
def test_an_encoder_of_a_library_goes_back_to_it(
    target, backbone, kind, supercl, make_run, tmp_path, images, answer_of
):
    run, network = make_run(kind, backbone=backbone)
    card = exported(supercl, run, tmp_path / "out", target)
    lines = (
        card["load"]
        if target == "smp"
        else [*card["load"], "network.forward = lambda x: network.encoder(x)[-1]"]
    )
    found = answer_of(tmp_path / "out", lines, target)
    assert_gives(found, network, images, features=True)


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_networks_of_smp_are_made_around_the_published_encoder(depth):
    import segmentation_models_pytorch as smp

    from train.export.smp_encoder import register

    name = register(filters=4)
    widths = [32, 16, 8, 4][:depth]
    network = smp.Unet(
        name, encoder_depth=depth, decoder_channels=widths, encoder_weights=None, in_channels=2, classes=5
    )
    assert network.encoder.in_channels == 2
    images = torch.randn(2, 2, 48, 32)
    shapes = [tuple(map_.shape) for map_ in network.encoder(images)]
    assert shapes == [(2, 4 * s, 48 // s, 32 // s) for s in [2**level for level in range(depth + 1)]]
    assert network(images).shape == (2, 5, 48, 32)
    for wrong in ({"depth": 5}, {"depth": 0}, {"output_stride": 16}):
        with pytest.raises(ValueError, match="encoder_depth is 1 to 4"):
            smp.encoders.encoders[name]["encoder"](filters=4, **wrong)


def test_monai_gets_the_pretrained_blocks_of_a_decoder(supercl, make_run, tmp_path, images, answer_of):
    run, network = make_run("pretrain", pixel_stride=4, projection=0, decoder=True)
    card = exported(supercl, run, tmp_path / "out", "monai")
    assert card["holds"] == "the encoder and the pre-trained blocks of the decoder"
    found = answer_of(tmp_path / "out", [*card["load"], *giving("network.upcat_3")], "monai")
    with torch.no_grad():
        expected = network(torch.from_numpy(images), None).pixels
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["finetune", "pretrain"])
def test_an_export_as_safetensors_starts_a_run_like_the_run_itself(kind, supercl, make_run, tmp_path):
    run, _ = make_run(kind, **({} if kind == "finetune" else {"pixel_stride": 8, "decoder": True}))
    exported(supercl, run, tmp_path / "out", "safetensors")
    networks = [UNet(make_run("finetune", name=name)[1].encoder, num_classes=2) for name in ("one", "two")]
    networks[1].load_state_dict(networks[0].state_dict())
    for network, source in zip(networks, (run, tmp_path / "out"), strict=True):
        load_pretrained(network, source)
    states = [network.state_dict() for network in networks]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_only_the_encoder_of_a_finetuned_run_is_written_when_asked_for(supercl, make_run, tmp_path):
    run, network = make_run()
    card = exported(supercl, run, tmp_path / "out", "safetensors", "--encoder")
    assert card["holds"] == "the encoder"
    assert card["architecture"]["class_names"] is None
    assert read_weights(tmp_path / "out").keys() == {
        f"encoder.{name}" for name in network.encoder.state_dict()
    }


@pytest.mark.parametrize("in_channels", [1, 4])
def test_a_published_checkpoint_is_exported(in_channels, supercl, make_run, tmp_path, images, answer_of):
    _, network = make_run("pretrain", filters=32, in_channels=in_channels)
    torch.save({"net": network.state_dict()}, tmp_path / "published.pth")
    card = exported(supercl, tmp_path / "published.pth", tmp_path / "out", "smp")
    assert (card["training"], card["architecture"]["in_channels"]) == (None, in_channels)
    lines = [
        *card["load"],
        f"network.encoder.register_forward_pre_hook(lambda _, x: x[0].repeat(1, {in_channels}, 1, 1))",
    ]
    found = answer_of(tmp_path / "out", lines, "smp")
    assert_gives(found, network, images, features=True)


# ---------------------------------------------------------------- the card


def test_the_card_says_what_the_weights_expect_and_where_they_come_from(supercl, make_run, tmp_path):
    run, _ = make_run()
    card = exported(supercl, run, tmp_path / "out", "safetensors")
    content = (tmp_path / "out" / "weights.safetensors").read_bytes()
    assert card["files"] == {"weights.safetensors": {"sha256": hashlib.sha256(content).hexdigest()}}
    assert len(card["load"]) == 5
    assert card["architecture"] == {
        "backbone": "unet",
        "filters": 4,
        "in_channels": 1,
        "feature_strides": [1, 2, 4, 8, 16],
        "feature_channels": [4, 8, 16, 32, 64],
        "class_names": ["background", "anterior", "posterior"],
    }
    assert card["input"]["rows_and_columns"] == "multiples of 16"
    assert card["input"]["normalisation"]["clip_percentiles"] == [0.5, 99.5]
    assert card["prediction"] == {"adjacent_slices": 0, "mirror_axes": [], "largest_component": []}
    training = card["training"]
    assert (training["kind"], training["started_from"], training["commit"]) == (
        "finetune",
        "secret",
        "c0ffee",
    )
    text = json.dumps(card)
    assert not any(private in text for private in ("somewhere", "/home", str(tmp_path)))


def test_neighbouring_slices_are_in_the_card(supercl, make_run, tmp_path):
    _, network = make_run("pretrain", in_channels=3)
    save_weights(network, tmp_path / "w.safetensors", {"adjacent_slices": "1"})
    card = exported(supercl, tmp_path / "w.safetensors", tmp_path / "out", "safetensors")
    assert "of 1 slices before it, itself and 1 behind it" in card["input"]["channels"]


# ---------------------------------------------------------------- what is refused


def refused(supercl, code, texts, *arguments):
    outcome = supercl("export", *arguments)
    assert (outcome.code, outcome.out) == (code, ""), outcome
    for text in (*texts, "next:"):
        assert text in outcome.err, outcome.err


@pytest.mark.parametrize(
    ("backbone", "target", "texts"),
    [
        ("monai:resnet10", "smp", ["unet or smp:NAME", "found:    monai:resnet10", "to monai"]),
        ("smp:mobilenet_v2", "monai", ["unet or monai:NAME", "found:    smp:mobilenet_v2", "to smp"]),
    ],
)
def test_an_encoder_of_another_library_is_refused_and_leaves_nothing(
    backbone, target, texts, supercl, make_run, tmp_path
):
    run, _ = make_run("pretrain", backbone=backbone)
    refused(supercl, 2, texts, run, tmp_path / "out", "--to", target)
    assert {path.name for path in tmp_path.iterdir()} == {"pretrain"}


def test_what_is_no_finished_run_or_weights_is_refused(supercl, make_run, tmp_path):
    run, _ = make_run()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    out = tmp_path / "out"
    refused(supercl, 2, ["not finished", "supercl finetune"], run, out, "--to", "safetensors")
    refused(supercl, 1, ["no weights here"], tmp_path / "none", out, "--to", "safetensors")
    (tmp_path / "text.pth").write_text("no checkpoint")
    refused(supercl, 1, ["holds no weights"], tmp_path / "text.pth", out, "--to", "safetensors")
    assert not out.exists()


def test_options_without_effect_are_refused(supercl, make_run, tmp_path):
    run, _ = make_run("pretrain")
    out = tmp_path / "out"
    refused(supercl, 2, ["--plans", "--to smp"], run, out, "--to", "smp", "--plans", "p.json")
    refused(supercl, 2, ["--plans", "nnUNetPlans.json"], run, out, "--to", "nnunet")
    refused(supercl, 2, ["kind pretrain", "Leave --encoder out"], run, out, "--to", "smp", "--encoder")


def test_nothing_is_overwritten(supercl, make_run, tmp_path):
    run, _ = make_run()
    before = (run / "run.json").read_bytes()
    refused(supercl, 2, ["something at OUT", "folder with files"], run, run, "--to", "safetensors")
    assert (run / "run.json").read_bytes() == before
    (tmp_path / "file").touch()
    refused(supercl, 2, ["something at OUT", "a file"], run, tmp_path / "file", "--to", "safetensors")


def test_an_empty_folder_is_filled_and_not_replaced(supercl, make_run, tmp_path, monkeypatch):
    """It may be a mount point, or where the user is."""
    run, _ = make_run()
    folder = tmp_path / "empty"
    folder.mkdir()
    before = folder.stat().st_ino
    refused(supercl, 1, ["no weights here"], tmp_path / "none", folder, "--to", "safetensors")
    monkeypatch.chdir(folder)
    outcome = supercl("export", run, ".", "--to", "safetensors")
    assert (outcome.code, outcome.err) == (0, "")
    assert folder.stat().st_ino == before
    assert {path.name for path in folder.iterdir()} == {"card.json", "weights.safetensors"}


@pytest.mark.parametrize("module", ["onnxscript", "onnxruntime"])
def test_a_missing_package_for_onnx_is_named_with_the_extra(module, supercl, make_run, tmp_path, monkeypatch):
    run, _ = make_run()
    monkeypatch.setitem(sys.modules, module, None)

    def exports(*_, **__):
        import onnxscript  # noqa: F401

    monkeypatch.setattr(torch.onnx, "export", exports)
    texts = ["needs the extra 'export'", f"no module '{module}'", "pip install 'supercl[export]'"]
    if module == "onnxruntime":
        pytest.importorskip("onnxscript")
    refused(supercl, 2, texts, run, tmp_path / "out", "--to", "onnx")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_not_taken_for_a_fault_of_the_network(supercl, make_run, tmp_path, monkeypatch):
    run, _ = make_run()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.onnx, "export", full)
    refused(supercl, 1, ["The disk is full."], run, tmp_path / "out", "--to", "onnx")
    assert not (tmp_path / "out").exists()


def test_onnx_that_answers_otherwise_is_refused(supercl, make_run, tmp_path, monkeypatch):
    ort = pytest.importorskip("onnxruntime")
    run, network = make_run()

    class Session:
        def __init__(self, *_, **__):
            pass

        def run(self, _, inputs):
            with torch.no_grad():
                return [network(torch.from_numpy(inputs["image"])).numpy() + 0.001]

        def get_outputs(self):
            return [type("Output", (), {"name": "logits"})]

    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    refused(
        supercl,
        1,
        ["disagree", "output logits, images (1, 1, 48, 32)"],
        run,
        tmp_path / "out",
        "--to",
        "onnx",
    )
