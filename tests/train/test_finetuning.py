"""Fine-tuning: that it learns, where it starts from, exact resumption, and what it refuses."""

import dataclasses
import os
import shutil
import signal
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import training
from made_caches import write_noise
from safetensors.torch import load_file
from training import Killed, assert_same_weights, call_at, kill, losses_of, snapshot

import train.finetuning
from supercl_core import cache_writer
from supercl_core.cache_reader import open_cache
from supercl_core.config import from_dict, resolve
from supercl_core.errors import CacheError, PreemptedError, SuperCLError, UsageError
from supercl_core.splits import Split
from train.augment import AugmentConfig, geometric_view, intensity_view
from train.data import SliceDataset
from train.evaluate import load_network, segment
from train.finetuning import PRESETS, SCRATCH, FinetuneConfig, SegmentationLosses, finetune
from train.loading import BatchLoader
from train.methods import PretrainConfig
from train.models.backbones import build_encoder
from train.models.unet import UNet
from train.pretraining import pretrain
from train.runs import read_metrics, read_run
from train.sampling import SliceOrder

SMALL = {**training.SMALL, "batch_size": 4}
SPLIT = Split(file="split.json", labelled=("case_a", "case_b"), test=("case_c",), num_labelled_keys=2)
UNCHANGED = AugmentConfig(
    p_brightness=0.0, p_contrast=0.0, p_blur=0.0, p_geometric=0.0, crop=(1.0, 1.0), mirror_axes=()
)


@pytest.fixture
def cache(cache_path):
    return open_cache(cache_path)


def small(**changes):
    return FinetuneConfig(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def encoder(cache_path, tmp_path_factory):
    """A pre-training run that saw all cases."""
    return pretrained(cache_path, tmp_path_factory.mktemp("encoder") / "seen")


@pytest.fixture(scope="module")
def whole(cache_path, encoder, tmp_path_factory):
    """A run from a pre-trained encoder that never stopped."""
    path = tmp_path_factory.mktemp("whole") / "run"
    finetune(open_cache(cache_path), path, split=SPLIT, init=str(encoder), config=small())
    return path


def pretrained(cache_path, path, *, filters=4, excluded=()):
    config = PretrainConfig(
        steps=2, batch_size=4, patch_size=(32, 32), filters=filters, projection=0, device="cpu"
    )
    pretrain(open_cache(cache_path), path, config=config, excluded=excluded)
    return path


# ---------------------------------------------------------------- learning


def test_a_case_can_be_learned_by_heart(cache, tmp_path):
    split = dataclasses.replace(SPLIT, labelled=("case_b",))
    config = small(steps=110, batch_size=6, filters=8, lr=1e-2, augment=UNCHANGED)
    finetune(cache, tmp_path / "run", split=split, config=config)
    network = load_network(read_run(tmp_path / "run"), tmp_path / "run")
    case = cache.case("case_b")
    found, truth = segment(network, case, device=torch.device("cpu")), case.ground_truth_ZYX
    for index in (1, 2):
        overlap = 2 * ((found == index) & (truth == index)).sum()
        dsc = overlap / ((found == index).sum() + (truth == index).sum())
        share = (truth == index).mean()
        blind = 2 * share / (1 + share)  # the DSC of calling every voxel this class
        assert dsc > max(0.75, blind + 0.05)
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "run")]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


@pytest.mark.parametrize("loss", ["ce", "dice_ce"])
def test_losses_equal_a_plain_recomposition(cache, loss):
    torch.manual_seed(4)
    network = UNet(build_encoder("unet", in_channels=1, filters=4), num_classes=3)
    dataset = SliceDataset(cache, ["case_a", "case_b"], patch_size=(32, 32), ground_truth=True)
    order = SliceOrder(slices=dataset.slices, batch_size=5, seed=0)
    with closing(iter(BatchLoader(dataset, order, device=torch.device("cpu")))) as batches:
        batch = next(batches)
    config = small(loss=loss)
    losses = SegmentationLosses(network, config=config, in_channels=1)(
        batch, torch.Generator().manual_seed(9)
    )

    generator = torch.Generator().manual_seed(9)
    images = intensity_view(batch.image_BCYX, generator, config=config.augment)
    images, truth = geometric_view(
        images, generator, config=config.augment, labels_BYX=batch.ground_truth_BYX
    )
    with torch.no_grad():
        logits = network(images).numpy()
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = truth.numpy()
    wanted = {"loss_ce": -np.log(np.take_along_axis(shares, truth[:, None].astype(int), axis=1)).mean()}
    if loss == "dice_ce":
        dice = [
            (2 * (shares[:, c] * (truth == c)).sum() + 1e-5)
            / (shares[:, c].sum() + (truth == c).sum() + 1e-5)
            for c in (1, 2)
        ]
        wanted["loss_dice"] = 1 - np.mean(dice)
    wanted["loss"] = sum(wanted.values())
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(wanted, rel=1e-5)


# ---------------------------------------------------------------- where it starts from


def networks_at_start(cache, tmp_path, monkeypatch, inits, **changes):
    """The state of the network before the first step, for each init."""
    states = []

    def fit(run_path, *, network, **settings):
        states.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        raise Killed

    monkeypatch.setattr(train.finetuning, "fit", fit)
    for index, init in enumerate(inits):
        with pytest.raises(Killed):
            finetune(cache, tmp_path / str(index), split=SPLIT, init=init, config=small(**changes))
    return states


def test_scratch_and_pretrained_differ_in_the_encoder_alone(cache, encoder, tmp_path, monkeypatch):
    scratch, started = networks_at_start(cache, tmp_path, monkeypatch, [SCRATCH, str(encoder)])
    source = load_file(encoder / "weights.safetensors")
    for name, tensor in started.items():
        if name.startswith("encoder."):
            assert torch.equal(tensor, source[name]), name
        else:
            assert torch.equal(tensor, scratch[name]), name
    changed = [name for name in scratch if not torch.equal(scratch[name], started[name])]
    assert "encoder.contr_1_1.0.weight" in changed
    assert all(name.startswith("encoder.") for name in changed)


def test_the_same_seed_starts_from_the_same_network(cache, tmp_path, monkeypatch):
    one, other = networks_at_start(cache, tmp_path, monkeypatch, [SCRATCH, SCRATCH])
    assert all(torch.equal(one[name], other[name]) for name in one)
    (moved,) = networks_at_start(cache, tmp_path / "seed", monkeypatch, [SCRATCH], seed=1)
    assert not torch.equal(one["decoder.head.0.weight"], moved["decoder.head.0.weight"])


def test_the_run_is_described(cache, encoder, whole):
    run = read_run(whole)
    assert (run["kind"], run["status"], run["weak_labels"]) == ("finetune", "finished", None)
    assert run["model"] == {"backbone": "unet", "in_channels": 1, "num_classes": 3, "filters": 4}
    assert run["world_size"] == 1
    assert run["cases"] == {"train": ["case_a", "case_b"], "validation": [], "test": ["case_c"]}
    assert run["split"] == {"file": "split.json", "labelled": 2}
    assert run["init"]["source"] == str(encoder)
    assert len(run["init"]["loaded"]) == len(build_encoder("unet", in_channels=1, filters=4).state_dict())
    assert from_dict(FinetuneConfig, run["config"]) == small()
    for entry in read_metrics(whole):
        assert entry["loss"] == pytest.approx(entry["loss_ce"] + entry["loss_dice"])


def test_scratch_has_no_init(cache, tmp_path):
    finetune(cache, tmp_path / "run", split=SPLIT, config=small(steps=1))
    run = read_run(tmp_path / "run")
    assert (run["init"], run["unlabelled_test_cases_seen"]) == (None, 0)


def test_test_cases_that_pretraining_saw_are_counted(cache, cache_path, encoder, whole, tmp_path):
    assert read_run(whole)["unlabelled_test_cases_seen"] == 1
    unseen = pretrained(cache_path, tmp_path / "unseen", excluded=("case_c",))
    finetune(cache, tmp_path / "run", split=SPLIT, init=str(unseen), config=small(steps=1))
    assert read_run(tmp_path / "run")["unlabelled_test_cases_seen"] == 0


def test_test_cases_are_counted_also_when_init_is_the_weights_file_of_a_run(cache, encoder, tmp_path):
    init = str(encoder / "weights.safetensors")
    finetune(cache, tmp_path / "run", split=SPLIT, init=init, config=small(steps=1))
    assert read_run(tmp_path / "run")["unlabelled_test_cases_seen"] == 1


def test_test_cases_that_pretraining_saw_under_other_names_are_counted(tmp_path):
    seeds = {"a": 1, "b": 2, "c": 3, "d": 4}
    cache = open_cache(write_noise(tmp_path / "tuned.zarr", seeds, name="one"))
    split = Split(file="s", labelled=("a",), test=("b", "c", "d"), num_labelled_keys=1)
    for index, (name, other_seeds, wanted) in enumerate(
        [
            ("two", {"x": 4, "y": 2, "z": 9}, 2),  # by content
            ("two", {"b": 7, "c": 8}, 0),  # other cases of the same names
            ("one", {"b": 7, "x": 4}, 2),  # the same data set, preprocessed otherwise
        ]
    ):
        folder = tmp_path / str(index)
        encoder = pretrained(write_noise(folder / "other.zarr", other_seeds, name=name), folder / "pre")
        finetune(cache, folder / "run", split=split, init=str(encoder), config=small(steps=1))
        assert read_run(folder / "run")["unlabelled_test_cases_seen"] == wanted


def test_a_network_that_knows_labels_of_test_cases_is_no_start(cache, whole, tmp_path):
    turned = Split(file="s", labelled=("case_c",), test=("case_a", "case_b"), num_labelled_keys=1)
    with pytest.raises(UsageError, match="fine-tuned on test cases") as refused:
        finetune(cache, tmp_path / "run", split=turned, init=str(whole), config=small())
    assert refused.value.found == "case_a, case_b"
    assert not (tmp_path / "run").exists()
    finetune(cache, tmp_path / "more", split=SPLIT, init=str(whole), config=small(steps=1))
    assert read_run(tmp_path / "more")["unlabelled_test_cases_seen"] == 0


def test_a_labelled_case_that_is_a_test_case_by_another_name_is_refused(tmp_path):
    cache = open_cache(write_noise(tmp_path / "twins.zarr", {"a": 1, "b": 2, "twin_of_b": 2}))
    split = Split(file="mine", labelled=("a", "b"), test=("twin_of_b",), num_labelled_keys=2)
    with pytest.raises(UsageError, match="identical content") as refused:
        finetune(cache, tmp_path / "run", split=split, config=small())
    assert refused.value.found == "b = twin_of_b"
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- resumption


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_killed_run_resumes_to_the_same_weights(cache, encoder, whole, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(train.finetuning, "geometric_view", call_at(step, kill, geometric_view))
        finetune(cache, tmp_path / "run", split=SPLIT, init=str(encoder), config=small())
    assert read_run(tmp_path / "run")["status"] == "running"
    finetune(cache, tmp_path / "run", split=SPLIT, init=str(encoder), config=small())
    assert_same_weights(tmp_path / "run", whole)
    assert losses_of(tmp_path / "run") == losses_of(whole)
    assert [entry["step"] for entry in losses_of(whole)] == [1, 2, 3, 4, 5, 6]


def test_a_preempted_run_says_so_and_resumes_to_the_same_weights(
    cache, encoder, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched, pytest.raises(PreemptedError, match="step 3 of 6"):
        stop = call_at(3, lambda: os.kill(os.getpid(), signal.SIGTERM), geometric_view)
        patched.setattr(train.finetuning, "geometric_view", stop)
        finetune(cache, tmp_path / "run", split=SPLIT, init=str(encoder), config=small())
    finetune(cache, tmp_path / "run", split=SPLIT, init=str(encoder), config=small())
    assert_same_weights(tmp_path / "run", whole)


def test_a_finished_run_run_again_touches_nothing(cache, encoder, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / whole.name))
    shutil.rmtree(run / "checkpoints")  # to save space; it must not train again either
    before = snapshot(run)
    again = finetune(cache, run, split=SPLIT, init=str(encoder), config=small())
    assert again == run / "weights.safetensors"
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("split", "changes", "named"),
    [
        (SPLIT, {"lr": 0.5}, "config.lr: 0.001 there, 0.5 here"),
        (SPLIT, {"augment": UNCHANGED}, "config.augment."),
        (dataclasses.replace(SPLIT, labelled=("case_a",)), {}, "cases.train: ['case_a', 'case_b'] there"),
        (dataclasses.replace(SPLIT, test=()), {}, "cases.test: ['case_c'] there, [] here"),
    ],
)
def test_a_run_of_other_settings_is_refused(cache, encoder, whole, split, changes, named):
    before = snapshot(whole)
    with pytest.raises(UsageError, match="other settings") as refused:
        finetune(cache, whole, split=split, init=str(encoder), config=small(**changes))
    assert named in refused.value.found
    assert snapshot(whole) == before


def test_a_run_from_an_encoder_is_not_taken_for_one_from_scratch(cache, encoder, whole):
    with pytest.raises(UsageError) as refused:
        finetune(cache, whole, split=SPLIT, init=SCRATCH, config=small())
    assert refused.value.found == f"init: {str(encoder)!r} there, None here"


def test_a_pretraining_run_is_not_taken_for_a_finetuning_run(cache, encoder):
    with pytest.raises(UsageError, match="kind: 'pretrain' there, 'finetune' here"):
        finetune(cache, encoder, split=SPLIT, config=small())


# ---------------------------------------------------------------- settings and refusals


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train(cache, tmp_path, preset):
    changes = {"steps": 2, "batch_size": 4, "filters": 4, "patch_size": (32, 32), "device": "cpu"}
    config = from_dict(FinetuneConfig, {**PRESETS[preset], **changes})
    finetune(cache, tmp_path / "run", split=SPLIT, config=config)
    assert ("loss_dice" in read_metrics(tmp_path / "run")[0]) == (preset != "published")


def test_the_published_preset_is_what_the_method_says():
    config = resolve(FinetuneConfig, presets=PRESETS, preset="published")
    assert (config.optimiser, config.loss, config.weight_decay) == ("adam", "ce", 1e-5)
    assert (config.lr, config.final_lr) == (5e-4, 5e-6)
    assert (config.augment.crop, config.augment.p_geometric) == ((1.0, 1.0), 0.67)


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("lr", 0.0), ("final_lr", -1.0), ("seed", -1), ("batch_size", 0)]
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UsageError, match=f"'{name}'"):
        FinetuneConfig(**{name: value})


def test_an_encoder_of_another_architecture_leaves_no_run_folder(cache, cache_path, tmp_path):
    wide = pretrained(cache_path, tmp_path / "wide", filters=8)
    with pytest.raises(SuperCLError, match="another architecture") as refused:
        finetune(cache, tmp_path / "run", split=SPLIT, init=str(wide), config=small())
    assert "(4, 1, 3, 3)" in refused.value.expected
    assert "(8, 1, 3, 3)" in refused.value.found
    assert not (tmp_path / "run").exists()


def test_missing_weights_leave_no_run_folder(cache, tmp_path):
    with pytest.raises(SuperCLError, match="no weights here"):
        finetune(cache, tmp_path / "run", split=SPLIT, init="scrach", config=small())
    assert not (tmp_path / "run").exists()


def test_a_labelled_case_without_ground_truth_is_refused(cache, tmp_path):
    split = dataclasses.replace(SPLIT, labelled=("case_a", "case_d"))
    with pytest.raises(CacheError, match="case_d"):
        finetune(cache, tmp_path / "run", split=split, config=small())
    assert not (tmp_path / "run").exists()


def test_an_empty_list_of_labelled_cases_is_refused(cache, tmp_path):
    with pytest.raises(UsageError, match="no slices"):
        finetune(cache, tmp_path / "run", split=dataclasses.replace(SPLIT, labelled=()), config=small())
    assert not (tmp_path / "run").exists()


def test_a_cache_without_classes_is_refused(cache_copy, tmp_path):
    cache_writer.set_root_attributes(cache_copy, {"class_names": []})
    with pytest.raises(UsageError, match="no classes"):
        finetune(open_cache(cache_copy), tmp_path / "run", split=SPLIT, config=small())
    assert not (tmp_path / "run").exists()
