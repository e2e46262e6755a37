"""Export for nnU-Net v2: the network against ours, plans, weights, and nnU-Net's own training with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from train.export.nnunet_network import STRIDES, SuperCLUNet

PLANS = {
    "dataset_name": "Dataset901_Tiny",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "configurations": {
        "2d": {
            "data_identifier": "nnUNetPlans_2d",
            "patch_size": [40, 28],
            "batch_size": 49,
            "normalization_schemes": ["ZScoreNormalization"],
            "architecture": {"network_class_name": "PlainConvUNet", "arch_kwargs": {"n_stages": 3}},
        },
        "3d_fullres": {"patch_size": [8, 40, 28]},
    },
}
"""What of a plans file matters here."""


@pytest.fixture
def plans_path(tmp_path):
    path = tmp_path / "nnUNetPlans.json"
    path.write_text(json.dumps(PLANS))
    return path


def exported(supercl, run, folder, plans_path):
    outcome = supercl("export", run, folder, "--to", "nnunet", "--plans", plans_path)
    assert outcome.code == 0, outcome.err
    return outcome


def as_nnunet_loads(folder, *, channels=1, num_classes=5, plans="nnUNetPlans_supercl"):
    """nnU-Net's network of the plans with the weights: all but the heads, by name and shape."""
    architecture = json.loads((folder / f"{plans}.json").read_text())["configurations"]["2d"]["architecture"]
    assert architecture["network_class_name"] == f"{SuperCLUNet.__module__}.SuperCLUNet"
    network = SuperCLUNet(
        input_channels=channels, num_classes=num_classes, **architecture["arch_kwargs"], deep_supervision=True
    )
    heads = {name: value for name, value in network.state_dict().items() if ".seg_layers." in name}
    weights = torch.load(folder / "checkpoint.pth", weights_only=True)["network_weights"]
    network.load_state_dict({**weights, **heads})
    return network.eval()


def finest_map(network, images, block):
    """The logits, and what goes into the last head."""
    seen = []
    block.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        network(images)
    return seen[-1]


def test_a_disk_that_takes_no_more_is_named_and_leaves_nothing(supercl, make_run, tmp_path, plans_path):
    resource = pytest.importorskip("resource")
    run, _ = make_run()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        outcome = supercl("export", run, tmp_path / "out", "--to", "nnunet", "--plans", plans_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert outcome.code == 1
    assert "larger than the system allows" in outcome.err
    assert not (tmp_path / "out").exists()


def test_features_of_a_finetuned_network_are_those_of_the_run(
    supercl, make_run, tmp_path, plans_path, images
):
    run, ours = make_run()
    exported(supercl, run, tmp_path / "out", plans_path)
    theirs = as_nnunet_loads(tmp_path / "out")
    images = torch.from_numpy(images)
    found, expected = (finest_map(network, images, network.decoder.expand_1_2) for network in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_scores_are_given_at_every_level_that_is_supervised_and_then_at_one(make_run, images):
    network = SuperCLUNet(input_channels=1, num_classes=3, filters=4, strides=STRIDES, deep_supervision=True)
    images = torch.from_numpy(images)
    scores = network(images)
    assert [tuple(one.shape) for one in scores] == [(2, 3, 96 // s, 64 // s) for s in (1, 2, 4, 8)]
    network.decoder.deep_supervision = False
    torch.testing.assert_close(network(images), scores[0])
    sum(one.sum() for one in scores).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_other_strides_in_the_plans_are_refused():
    with pytest.raises(ValueError, match="strides"):
        SuperCLUNet(input_channels=1, num_classes=3, filters=4, strides=[[1, 1], [2, 2]])


def test_plans_stay_what_they_were_but_for_the_network_and_the_patch(supercl, make_run, tmp_path, plans_path):
    run, _ = make_run("pretrain")
    outcome = exported(supercl, run, tmp_path / "out", plans_path)
    plans = json.loads((tmp_path / "out" / "nnUNetPlans_supercl.json").read_text())
    own, theirs = plans["configurations"].pop("2d"), PLANS["configurations"]["2d"]
    assert plans == {**PLANS, "plans_name": "nnUNetPlans_supercl", "configurations": {}}
    assert own["architecture"]["arch_kwargs"] == {"filters": 4, "strides": STRIDES}
    assert {**own, "architecture": theirs["architecture"]} == {**theirs, "patch_size": [48, 32]}
    assert "nnUNetv2_train Dataset901_Tiny 2d 0 -p nnUNetPlans_supercl -pretrained" in outcome.out


def test_an_encoder_comes_with_initial_values_that_are_the_same_each_time(
    supercl, make_run, tmp_path, plans_path, images
):
    run, ours = make_run("pretrain", pixel_stride=8, projection=0, decoder=True)
    for name in ("out", "again"):
        exported(supercl, run, tmp_path / name, plans_path)
    one, two = (as_nnunet_loads(tmp_path / name).state_dict() for name in ("out", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one if ".seg_layers." not in name)
    theirs, images = as_nnunet_loads(tmp_path / "out"), torch.from_numpy(images)
    found = finest_map(theirs, images, theirs.decoder.expand_4_2)
    with torch.no_grad():
        expected = ours(images, None).pixels
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stored", "wanted"), [(1, 4), (4, 1)])
def test_the_first_convolution_is_adapted_to_the_channels_of_the_data_set(
    stored, wanted, supercl, make_run, tmp_path, plans_path, images
):
    run, ours = make_run(in_channels=stored)
    plans = json.loads(json.dumps(PLANS))
    plans["configurations"]["2d"]["normalization_schemes"] *= wanted
    plans_path.write_text(json.dumps(plans))
    exported(supercl, run, tmp_path / "out", plans_path)
    theirs, images = as_nnunet_loads(tmp_path / "out", channels=wanted), torch.from_numpy(images)
    with torch.no_grad():
        found = theirs.encoder(images.repeat(1, wanted, 1, 1))[-1]
        expected = ours.encoder(images.repeat(1, stored, 1, 1))[-1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda plans: plans.pop("configurations"), "no 'configurations'"),
        (lambda plans: plans["configurations"].pop("2d"), "no '2d' at configurations"),
        (
            lambda plans: plans["configurations"]["2d"].update(patch_size=[0, 8]),
            "0 at configurations.2d.patch",
        ),
        (lambda plans: plans["configurations"]["2d"].update(patch_size=[32.0, 8]), "32.0 at"),
        (lambda plans: plans.update(plans_name="../../etc"), "'../../etc' at plans_name"),
        (lambda plans: plans.update(dataset_name="a; rm -r b"), "'a; rm -r b' at dataset_name"),
    ],
)
def test_a_file_that_holds_no_plans_is_refused(change, found, supercl, make_run, tmp_path, plans_path):
    run, _ = make_run()
    plans = json.loads(json.dumps(PLANS))
    change(plans)
    plans_path.write_text(json.dumps(plans))
    outcome = supercl("export", run, tmp_path / "out", "--to", "nnunet", "--plans", plans_path)
    assert outcome.code == 1
    assert "no plans of nnU-Net" in outcome.err
    assert found in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_network_that_does_not_fit_is_refused(supercl, make_run, tmp_path, plans_path):
    options = ("--to", "nnunet", "--plans", plans_path)
    outcome = supercl("export", make_run(in_channels=3)[0], tmp_path / "out", *options)
    assert outcome.code == 0, outcome.err
    plans = json.loads(json.dumps(PLANS))
    plans["configurations"]["2d"]["normalization_schemes"] *= 4
    plans_path.write_text(json.dumps(plans))
    outcome = supercl("export", tmp_path / "finetune", tmp_path / "other", *options)
    assert (outcome.code, outcome.out) == (1, "")
    assert "expected: 4, or 1" in outcome.err
    outcome = supercl(
        "export", make_run(backbone="monai:resnet10", name="r")[0], tmp_path / "other", *options
    )
    assert (outcome.code, outcome.out) == (2, "")
    assert "published U-Net only" in outcome.err
    outcome = supercl(
        "export", tmp_path / "finetune", tmp_path / "other", *options[:3], tmp_path / "none.json"
    )
    assert (outcome.code, outcome.out) == (1, "")
    assert "nnUNetv2_plan_and_preprocess" in outcome.err


# ---------------------------------------------------------------- nnU-Net itself

TRAINER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
import torch

class FewSteps(nnUNetTrainer):
    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1
        super().initialize()

    def on_train_start(self):
        images = torch.linspace(-1, 1, 2 * 48 * 64).reshape(2, 1, 48, 64)
        self.network.eval()
        with torch.no_grad():
            torch.save(self.network.encoder(images), PATH)
        super().on_train_start()
"""


def write_raw(folder: Path) -> None:
    """Six small volumes in the layout of nnU-Net v2."""
    generator = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(6):
        label = np.zeros((6, 48, 64), np.uint8)
        label[1:5, 10:30, 10 + number : 40] = 1
        image = (label * 100 + generator.normal(0, 10, label.shape)).astype(np.float32)
        for array, file in ((image, f"imagesTr/c{number}_0000"), (label, f"labelsTr/c{number}")):
            volume = sitk.GetImageFromArray(array)
            volume.SetSpacing((1, 1, 5))
            sitk.WriteImage(volume, str(folder / f"{file}.nii.gz"))
    declared = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(declared))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_nnunet_trains_from_the_exported_weights(kind, supercl, make_run, tmp_path, torchvision_shim):
    """Plans, preprocessing and training by nnU-Net's own commands, with the lines that the export prints."""
    scripts = Path(sys.executable).parent
    folders = {f"nnUNet_{part}": str(tmp_path / part) for part in ("raw", "preprocessed", "results")}
    environment = {
        **os.environ,
        **folders,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(
            [str(tmp_path / "shim"), str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
        ),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_extTrainer": str(tmp_path / "trainers"),
    }
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(torchvision_shim)
    write_raw(tmp_path / "raw" / "Dataset901_Tiny")
    (tmp_path / "trainers").mkdir()
    seen_path = tmp_path / "features.pt"
    trainer = TRAINER.replace("PATH", repr(str(seen_path)))
    (tmp_path / "trainers" / "FewSteps.py").write_text(trainer)

    def run_shell(line, folder):
        done = subprocess.run(
            ["bash", "-ec", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run_shell("nnUNetv2_plan_and_preprocess -d 901 -c 2d -np 1 -npfp 1", tmp_path)
    run, network = make_run(kind, filters=8)
    plans_path = tmp_path / "preprocessed" / "Dataset901_Tiny" / "nnUNetPlans.json"
    plans = json.loads(plans_path.read_text())
    plans["configurations"]["2d"]["batch_size"] = 2  # a batch for a GPU takes minutes
    plans_path.write_text(json.dumps(plans))
    exported(supercl, run, tmp_path / "out", plans_path)
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    copy, train = card["load"][1:]
    run_shell(copy, tmp_path / "out")
    said = run_shell(f"nnUNet_n_proc_DA=0 {train} -tr FewSteps -device cpu", tmp_path / "out")
    assert "Loading pretrained weights" in said
    assert "Training done" in said
    images = torch.linspace(-1, 1, 2 * 48 * 64).reshape(2, 1, 48, 64)
    with torch.no_grad():
        expected = network.encoder(images)
    for found, map_ in zip(torch.load(seen_path, weights_only=True), expected, strict=True):
        torch.testing.assert_close(found, map_, rtol=1e-5, atol=1e-5)
    trained = tmp_path / "results" / "Dataset901_Tiny" / "FewSteps__nnUNetPlans_supercl__2d" / "fold_0"
    assert (trained / "checkpoint_final.pth").is_file()
