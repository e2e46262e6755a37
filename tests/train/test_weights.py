"""Weights: every form that is read, what is refused, the transfer of an encoder, and atomic writing."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from supercl_core.errors import SuperCLError
from train.models.unet import Encoder, PretrainNet, UNet
from train.models.weights import load_encoder, load_pretrained, read_metadata, read_weights, save_weights

STEM_NAME = "encoder.contr_1_1.0.weight"


class Dangerous:
    """Runs code when it is unpickled: it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pretrained(channels=1, filters=2, **options):
    torch.manual_seed(7)
    network = PretrainNet(Encoder(channels, filters), **options)
    network(torch.randn(2, channels, 32, 32), None)  # moves the batch statistics from their defaults
    return network


def unet(channels=1, filters=2):
    torch.manual_seed(8)
    return UNet(Encoder(channels, filters), num_classes=3)


def copy_of(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


# ---- reading


def test_safetensors_and_the_folder_of_a_run_are_read(tmp_path):
    network = pretrained()
    save_weights(network, tmp_path / "weights.safetensors", {})
    assert_same(read_weights(tmp_path / "weights.safetensors"), network.state_dict())
    assert_same(read_weights(str(tmp_path)), network.state_dict())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_published_torch_files_are_read(tmp_path, prefix, wrapped, zipped):
    network = pretrained()
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    path = tmp_path / "model.pth"
    torch.save({"net": state} if wrapped else state, path, _use_new_zipfile_serialization=zipped)
    assert_same(read_weights(path), network.state_dict())


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", ""])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(SuperCLError, match="no weights here") as caught:
        read_weights(tmp_path / name)
    assert str(tmp_path / (name or "weights.safetensors")) in str(caught.value)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"some text\n" * 9, b"PK\x03\x04" + bytes(99), bytes(400)])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SuperCLError, match="holds no weights") as caught:
        read_weights(path)
    assert caught.value.where == path


@pytest.mark.parametrize("payload", [{}, {"net": {}}, {"net": [1, 2]}, {"epoch": 3}, torch.zeros(2), [1]])
def test_a_torch_file_without_a_state_dict_is_refused(tmp_path, payload):
    torch.save(payload, tmp_path / "model.pth")
    with pytest.raises(SuperCLError, match="something else in it"):
        read_weights(tmp_path / "model.pth")


def test_the_entries_of_another_kind_of_file_are_named(tmp_path):
    optimiser = torch.optim.AdamW(unet().parameters())
    torch.save(optimiser.state_dict(), tmp_path / "optimiser.pth")
    with pytest.raises(SuperCLError, match="holds no weights") as caught:
        read_weights(tmp_path / "optimiser.pth")
    assert caught.value.found == "something else in it: state, param_groups"


@pytest.mark.parametrize("tensors", [{}, {"a": torch.ones(2, dtype=torch.complex64)}])
def test_safetensors_without_weights_are_refused_like_a_torch_file(tmp_path, tensors):
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SuperCLError, match="something else in it"):
        read_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("form", "found"), [("zip", "could run code"), ("old", "could run code"), ("bare", "")]
)
def test_a_pickle_that_could_run_code_is_refused_and_runs_none(tmp_path, form, found):
    payload = {"net": Dangerous(tmp_path / "ran")}
    path = tmp_path / "model.pth"
    if form == "bare":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(SuperCLError, match="read safely") as caught:
        read_weights(path)
    assert found in caught.value.found
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(10**12),
        torch.ones(1).as_strided((2, 10**9, 3, 3), (0, 0, 0, 0)),
        torch.eye(3).to_sparse(),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(3, device="meta"),
    ],
    ids=["expanded", "strided", "sparse", "complex", "meta"],
)
def test_a_tensor_that_is_not_wholly_in_the_file_is_refused(tmp_path, tensor):
    torch.save({"a": torch.ones(2), "b": tensor}, tmp_path / "x.pt")
    with pytest.raises(SuperCLError, match="read safely"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_that_the_system_refuses_is_an_error_of_ours(tmp_path, name, monkeypatch):
    (tmp_path / name).touch()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(safetensors.torch, "load_file", refuse)
    with pytest.raises(SuperCLError, match="Permission denied"):
        read_weights(tmp_path / name)


def test_metadata_is_read_from_a_file_or_run_and_torch_files_have_none(tmp_path):
    metadata = {"backbone": "unet", "in_channels": "1"}
    save_weights(pretrained(), tmp_path / "weights.safetensors", metadata)
    assert read_metadata(tmp_path / "weights.safetensors") == read_metadata(str(tmp_path)) == metadata
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    assert read_metadata(tmp_path / "plain.safetensors") == {}
    torch.save({"net": {"a": torch.ones(1)}}, tmp_path / "model.pth")
    assert read_metadata(tmp_path / "model.pth") == {}
    with pytest.raises(SuperCLError, match="no weights here"):
        read_metadata(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("some text")
    with pytest.raises(SuperCLError, match="holds no weights"):
        read_metadata(tmp_path / "text.safetensors")


# ---- transfer


def test_only_the_encoder_is_transferred_and_everything_is_reported(tmp_path):
    source, network = pretrained(), unet()
    save_weights(source, tmp_path / "weights.safetensors", {})
    decoder = part_of(copy_of(network), "decoder.")
    report = load_pretrained(network, tmp_path)
    assert_same(network.encoder.state_dict(), source.encoder.state_dict())
    assert_same(part_of(network.state_dict(), "decoder."), decoder)

    assert set(report.loaded) == part_of(source.state_dict(), "encoder.").keys()
    assert set(report.skipped) == set(source.state_dict()) - set(report.loaded)
    assert set(report.fresh) == decoder.keys()
    assert report.adapted == ()
    assert report.summary().splitlines() == [
        f"weights: {tmp_path}",
        "  tensors loaded: 60 of encoder",
        "  tensors left in the file: 4 of head, 4 of pixel_head",
        "  tensors with initial values: 65 of decoder",
    ]


@pytest.mark.parametrize(("stored", "wanted"), [(1, 4), (4, 1)])
def test_an_adapted_stem_answers_a_repeated_image_as_before(tmp_path, stored, wanted):
    source, network = pretrained(stored).eval(), unet(wanted).eval()
    save_weights(source, tmp_path / "weights.safetensors", {})
    report = load_pretrained(network, tmp_path)
    image = torch.randn(1, 1, 32, 32)
    expected = source.encoder(image.repeat(1, stored, 1, 1))[-1]
    torch.testing.assert_close(network.encoder(image.repeat(1, wanted, 1, 1))[-1], expected)
    assert report.adapted == (STEM_NAME,)
    assert STEM_NAME not in report.loaded
    assert report.summary().splitlines()[1:3] == [
        "  tensors loaded: 59 of encoder",
        f"  tensors adapted to the input channels: {STEM_NAME}",
    ]


@pytest.mark.parametrize(("stride", "levels"), [(8, [4]), (4, [4, 3]), (2, [4, 3, 2]), (1, [4, 3, 2, 1])])
def test_a_pretrained_decoder_moves_as_far_as_it_goes_and_answers_as_before(tmp_path, stride, levels):
    options = {"pixel_stride": stride, "projection": 0, "decoder": True}
    source, network = pretrained(**options).eval(), unet().eval()
    save_weights(source, tmp_path / "weights.safetensors", {})
    before = copy_of(network)
    report = load_pretrained(network, tmp_path)

    blocks = [f"decoder.{name}." for level in levels for name in network.decoder.block_names(level)]
    moved = part_of(source.state_dict(), ("encoder.", *blocks))
    assert set(report.loaded) == moved.keys() == set(source.state_dict()) - set(report.skipped)
    assert_same({name: network.state_dict()[name] for name in moved}, moved)
    assert set(report.fresh) == before.keys() - moved.keys()
    assert_same({n: network.state_dict()[n] for n in report.fresh}, {n: before[n] for n in report.fresh})
    assert f"loaded: 60 of encoder, {16 * len(levels)} of decoder\n" in report.summary()

    seen = {}
    last = network.decoder.get_submodule(f"expand_{levels[-1]}_2")
    last.register_forward_hook(lambda _, __, output: seen.setdefault("map", output))
    image = torch.randn(2, 1, 32, 48)
    network(image)
    assert torch.equal(seen["map"], source(image, None).pixels)


def test_the_decoder_of_a_finetuned_network_is_left_for_its_own_task(tmp_path):
    torch.manual_seed(9)
    source, network = UNet(Encoder(1, 2), num_classes=3), unet()
    save_weights(source, tmp_path / "weights.safetensors", {})
    decoder = part_of(copy_of(network), "decoder.")
    report = load_pretrained(network, tmp_path)
    assert_same(network.encoder.state_dict(), source.encoder.state_dict())
    assert_same(part_of(network.state_dict(), "decoder."), decoder)
    assert set(report.skipped) == set(report.fresh) == decoder.keys()


def test_load_encoder_leaves_a_pretrained_decoder_and_asks_for_none(tmp_path):
    source = pretrained(pixel_stride=4, decoder=True)
    save_weights(source, tmp_path / "weights.safetensors", {})
    network = torch.nn.ModuleDict({"encoder": Encoder(1, 2)})
    report = load_encoder(network, tmp_path)
    assert_same(network["encoder"].state_dict(), source.encoder.state_dict())
    assert report.fresh == ()
    assert len(part_of(dict.fromkeys(report.skipped), "decoder.")) == 32


def part_of(state, prefixes):
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}


def assert_refused(network, path, *parts):
    before = copy_of(network)
    with pytest.raises(SuperCLError, match="another architecture") as caught:
        load_pretrained(network, path)
    for part in parts:
        assert part in str(caught.value)
    assert_same(network.state_dict(), before)


UPSCALE_NAME = "decoder.upscale4.weight"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({UPSCALE_NAME: torch.zeros(16, 4, 2, 2)}, ["1 tensors differ", f"{UPSCALE_NAME} (16, 4, 2, 2)"]),
        # A kernel of one channel is stretched in the encoder only.
        (
            {"decoder.expand_4_2.0.weight": torch.zeros(16, 1, 3, 3)},
            ["decoder.expand_4_2.0.weight (16, 1, 3"],
        ),
        ({UPSCALE_NAME: None}, [f"{UPSCALE_NAME} (16, 8, 2, 2)", f"{UPSCALE_NAME} absent"]),
        ({"decoder.upscale5.bias": None}, ["1 tensors differ", "decoder.upscale5.bias absent"]),
        ({"decoder.expand_2_1.0.bias": torch.zeros(4)}, ["15 tensors differ", "upscale3.weight absent"]),
        ({"decoder.blocks.0.weight": torch.zeros(2)}, ["33 tensors differ"]),
    ],
)
def test_a_decoder_that_is_not_whole_levels_of_the_networks_is_refused(tmp_path, changes, parts):
    state = copy_of(pretrained(pixel_stride=4, decoder=True)) | changes
    torch.save({name: t for name, t in state.items() if t is not None}, tmp_path / "model.pth")
    assert_refused(unet(), tmp_path / "model.pth", *parts)


def test_another_number_of_filters_is_another_architecture(tmp_path):
    save_weights(pretrained(filters=4), tmp_path / "weights.safetensors", {})
    assert_refused(
        unet(),
        tmp_path,
        f"{STEM_NAME} (2, 1, 3, 3)",
        f"{STEM_NAME} (4, 1, 3, 3)",
        "encoder.contr_1_1.0.bias (4,)",
    )


def test_other_input_channels_than_one_are_not_adapted(tmp_path):
    save_weights(pretrained(channels=3), tmp_path / "weights.safetensors", {})
    assert_refused(unet(channels=4), tmp_path, f"{STEM_NAME} (2, 4, 3, 3)", f"{STEM_NAME} (2, 3, 3, 3)")


def test_a_checkpoint_that_names_its_backbone_is_refused_by_that_name(tmp_path):
    for metadata, called in (({"backbone": "smp:x"}, " of backbone smp:x"), ({}, "")):
        save_weights(pretrained(filters=4), tmp_path / "weights.safetensors", metadata)
        with pytest.raises(SuperCLError, match=f"The checkpoint{called} is of another architecture"):
            load_pretrained(unet(), tmp_path)


def test_kernels_that_differ_in_more_than_the_channels_of_the_image_are_not_adapted(tmp_path):
    network, state = unet(channels=4), copy_of(pretrained())
    for shape in ((3, 1, 3, 3), (2, 1, 5, 5), (2, 1, 3), (2,)):
        torch.save(state | {STEM_NAME: torch.zeros(shape)}, tmp_path / "model.pth")
        assert_refused(network, tmp_path / "model.pth", "1 tensors differ", f"found:    {STEM_NAME} {shape}")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor * torch.nan,
        lambda tensor: tensor + torch.inf,
        lambda tensor: tensor.double() + 1e300,
        lambda tensor: tensor.to(torch.int8),
        lambda tensor: tensor > 0,
    ],
    ids=["nan", "infinite", "too large", "whole", "boolean"],
)
def test_numbers_that_cannot_be_weights_are_refused_and_leave_the_network(tmp_path, change):
    state = copy_of(pretrained())
    torch.save(state | {STEM_NAME: change(state[STEM_NAME])}, tmp_path / "model.pth")
    network = unet()
    before = copy_of(network)
    with pytest.raises(SuperCLError, match="cannot be weights") as caught:
        load_pretrained(network, tmp_path / "model.pth")
    assert caught.value.found.endswith(f" {STEM_NAME}")
    assert_same(network.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_weights_of_another_precision_become_those_of_the_network(tmp_path, dtype):
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in pretrained().state_dict().items()}
    torch.save(state, tmp_path / "model.pth")
    network = unet(channels=4)
    load_pretrained(network, tmp_path / "model.pth")
    found = network.state_dict()
    assert found[STEM_NAME].equal(state[STEM_NAME].float().repeat(1, 4, 1, 1) / 4)
    name = "encoder.center.0.weight"
    assert found[name].equal(state[name].float())


def test_a_kernel_without_channels_is_not_adapted(tmp_path):
    torch.save(copy_of(pretrained()) | {STEM_NAME: torch.zeros(2, 0, 3, 3)}, tmp_path / "model.pth")
    assert_refused(unet(), tmp_path / "model.pth", f"{STEM_NAME} (2, 0, 3, 3)")


def test_missing_and_unknown_encoder_tensors_are_another_architecture(tmp_path):
    state = copy_of(pretrained())
    torch.save(
        {name: t for name, t in state.items() if name != "encoder.center.2.bias"}, tmp_path / "less.pth"
    )
    assert_refused(unet(), tmp_path / "less.pth", "encoder.center.2.bias absent")
    torch.save(state | {"encoder.contr_5_1.0.bias": torch.zeros(2)}, tmp_path / "more.pth")
    assert_refused(unet(), tmp_path / "more.pth", "encoder.contr_5_1.0.bias (2,)")
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "other.pth")
    assert_refused(unet(), tmp_path / "other.pth", "52 tensors differ", "and 49 more")


# ---- writing


def test_metadata_is_in_the_header_and_any_memory_format_is_written(tmp_path):
    network = pretrained().to(memory_format=torch.channels_last)
    path = tmp_path / "weights.safetensors"
    save_weights(network, path, {"epoch": "3"})
    assert_same(read_weights(path), network.state_dict())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"epoch": "3"}


def test_a_write_that_fails_leaves_the_old_weights_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_weights(pretrained(), path, {})
    before = path.read_bytes()

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_weights(unet(), path, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
