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
from made_caches import write_cache, write_noise
from safetensors.torch import load_file
from training import Killed, assert_same_weights, call_at, kill, losses_of, snapshot

import train.finetuning
from supercl_core.cache import writer as cache_writer
from supercl_core.cache.reader import open_cache
from supercl_core.config import from_dict, resolve
from supercl_core.errors import CacheError, PreemptedError, SuperCLError, UsageError
from supercl_core.splits import Split
from train.augment import AugmentConfig, geometric_view, intensity_view
from train.data import SliceDataset, normalisation_window
from train.finetuning import SCRATCH, SegmentationLosses, finetune
from train.inference import InferenceSettings, load_network, segment
from train.loading import BatchLoader
from train.methods import PretrainConfig
from train.models.backbones import build_encoder
from train.models.unet import UNet
from train.pretraining import pretrain
from train.recipes import PRESETS, FinetuneConfig
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


def segmented(network, case):
    return segment(
        network,
        case.read("image", slice(None)).swapaxes(0, 1),
        normalisation_window(case),
        settings=InferenceSettings(),
        device=torch.device("cpu"),
    )


# ---------------------------------------------------------------- learning


def test_a_case_can_be_learned_by_heart(cache, tmp_path):
    split = dataclasses.replace(SPLIT, labelled=("case_b",))
    config = small(steps=110, batch_size=6, filters=8, lr=1e-2, augment=UNCHANGED)
    finetune(cache, tmp_path / "run", split=split, config=config)
    network = load_network(read_run(tmp_path / "run"), tmp_path / "run")
    case = cache.case("case_b")
    found, truth = segmented(network, case), case.ground_truth_ZYX
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
    with pytest.raises(UsageError, match="fine-tuned on test or validation cases") as refused:
        finetune(cache, tmp_path / "run", split=turned, init=str(whole), config=small())
    assert refused.value.found == "case_a, case_b"
    assert not (tmp_path / "run").exists()
    finetune(cache, tmp_path / "more", split=SPLIT, init=str(whole), config=small(steps=1))
    assert read_run(tmp_path / "more")["unlabelled_test_cases_seen"] == 1  # by its pre-training


def test_labels_that_an_ancestor_of_the_network_knows_are_found(cache, encoder, whole, tmp_path):
    """`whole` was fine-tuned on case_a and case_b from a pre-training that saw all; its child on case_c."""
    child = tmp_path / "child"
    other = Split(file="s", labelled=("case_c",), test=(), num_labelled_keys=1)
    finetune(cache, child, split=other, init=str(whole), config=small(steps=1))
    assert [run["kind"] for run in read_run(child)["lineage"]] == ["pretrain", "finetune"]
    turned = Split(file="s", labelled=("case_c",), test=("case_a",), num_labelled_keys=1)
    with pytest.raises(UsageError, match="fine-tuned on test or validation cases") as refused:
        finetune(cache, tmp_path / "run", split=turned, init=str(child), config=small())
    assert refused.value.found == "case_a"
    finetune(cache, tmp_path / "seen", split=SPLIT, init=str(whole), config=small(steps=1))
    assert read_run(tmp_path / "seen")["unlabelled_test_cases_seen"] == 1


def test_a_network_that_knows_labels_of_validation_cases_is_no_start(cache, whole, tmp_path):
    config = small(validation_folds=2, validate_every=1)
    with pytest.raises(UsageError, match="fine-tuned on test or validation cases") as refused:
        finetune(cache, tmp_path / "run", split=SPLIT, init=str(whole), config=config)
    assert refused.value.found == "case_a"


def test_a_labelled_case_that_is_a_test_case_by_another_name_is_refused(tmp_path):
    cache = open_cache(write_noise(tmp_path / "twins.zarr", {"a": 1, "b": 2, "twin_of_b": 2}))
    split = Split(file="mine", labelled=("a", "b"), test=("twin_of_b",), num_labelled_keys=2)
    with pytest.raises(UsageError, match="identical content") as refused:
        finetune(cache, tmp_path / "run", split=split, config=small())
    assert refused.value.found == "b = twin_of_b"
    assert not (tmp_path / "run").exists()


def test_the_decoder_goes_on_from_what_pretraining_made_of_it(cache, tmp_path, monkeypatch):
    config = PretrainConfig(
        **{**SMALL, "steps": 1}, igcp="none", ilcp_stride=4, ilcp_features="decoder", batches="random"
    )
    pretrain(cache, tmp_path / "pre", config=config)
    source = load_file(tmp_path / "pre" / "weights.safetensors")
    (started,) = networks_at_start(cache, tmp_path, monkeypatch, [str(tmp_path / "pre")])
    transferred = [name for name in source if name.startswith("decoder.")]
    assert "decoder.expand_3_2.0.weight" in transferred
    assert all(torch.equal(started[name], source[name]) for name in transferred)
    report = read_run(tmp_path / "0")["init"]
    assert set(transferred) <= set(report["loaded"])
    assert "decoder.head.0.weight" in report["fresh"]


def test_adjacent_slices_need_an_encoder_that_was_trained_with_them(cache, encoder, tmp_path):
    config = PretrainConfig(**{**SMALL, "steps": 1}, adjacent_slices=1, projection=0)
    pretrain(cache, tmp_path / "pre", config=config)
    run = tmp_path / "run"
    finetune(cache, run, split=SPLIT, init=str(tmp_path / "pre"), config=small(steps=1, adjacent_slices=1))
    described = read_run(run)
    assert (described["model"]["in_channels"], described["inference"]["adjacent_slices"]) == (3, 1)
    assert described["init"]["adapted"] == []
    adapted = tmp_path / "adapted"
    finetune(cache, adapted, split=SPLIT, init=str(encoder), config=small(steps=1, adjacent_slices=1))
    assert read_run(adapted)["init"]["adapted"] == ["encoder.contr_1_1.0.weight"]


def test_channels_of_another_kind_than_the_encoder_saw_are_named(cache, tmp_path, capsys):
    pretrain(
        cache, tmp_path / "pre", config=PretrainConfig(**{**SMALL, "steps": 1}, in_channels=3, projection=0)
    )
    config = small(steps=1, adjacent_slices=1)
    finetune(cache, tmp_path / "other", split=SPLIT, init=str(tmp_path / "pre"), config=config)
    assert "\nnote: trained with 0 adjacent slices on each side, used with 1\n" in capsys.readouterr().err
    config = small(steps=1, in_channels=3)
    finetune(cache, tmp_path / "same", split=SPLIT, init=str(tmp_path / "pre"), config=config)
    assert "adjacent" not in capsys.readouterr().err


# ---------------------------------------------------------------- learning rates, average, validation


def test_encoder_and_decoder_have_learning_rates_of_their_own():
    config = small(steps=100, lr=1.0, final_lr=0.0, warmup_steps=2, encoder_lr=0.5, encoder_warmup_steps=10)
    schedules = config.schedules()
    assert [schedules[""](step) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert [schedules["encoder."](step) for step in (0, 4, 10)] == [0.05, 0.25, 0.5]
    network = UNet(build_encoder("unet", in_channels=1, filters=4), num_classes=3)
    groups = {group["key"]: group["params"] for group in config.make_optimiser(network).param_groups}
    assert {id(one) for one in groups["encoder."]} == {id(one) for one in network.encoder.parameters()}
    assert {id(one) for one in groups[""]} == {id(one) for one in network.decoder.parameters()}


def test_an_encoder_without_learning_rate_stays_as_it_is(cache, encoder, tmp_path):
    config = small(steps=2, encoder_lr=0.0, ema_decay=0.0)
    finetune(cache, tmp_path / "run", split=SPLIT, init=str(encoder), config=config)
    before, after = (load_file(path / "weights.safetensors") for path in (encoder, tmp_path / "run"))
    trained = [name for name in after if name.endswith("weight")]
    assert all(torch.equal(before[name], after[name]) for name in trained if name.startswith("encoder."))
    assert "decoder.head.0.weight" in trained


def test_the_average_of_the_weights_is_what_is_kept(cache, tmp_path, monkeypatch):
    seen = []

    class Spy(train.finetuning.WeightAverage):
        def update(self, network, step):
            super().update(network, step)
            seen.append({name: value.clone() for name, value in network.state_dict().items()})

    monkeypatch.setattr(train.finetuning, "WeightAverage", Spy)
    finetune(cache, tmp_path / "run", split=SPLIT, config=small(steps=3, ema_decay=0.15))
    kept = load_file(tmp_path / "run" / "weights.safetensors")
    torch.manual_seed(0)
    mean = UNet(build_encoder("unet", in_channels=1, filters=4), num_classes=3).state_dict()
    for step, state in enumerate(seen):
        decay = min(0.15, (1 + step) / (10 + step))
        mean = {name: decay * mean[name] + (1 - decay) * value for name, value in state.items()}
    for name, value in kept.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, mean[name])
        else:
            assert value == 3


def test_a_fold_of_the_labelled_cases_is_not_trained_on(cache, tmp_path):
    config = small(
        steps=3,
        validation_folds=2,
        validation_fold=1,
        validate_every=2,
        mirrored_inference=False,
        largest_component=False,
    )
    finetune(cache, tmp_path / "run", split=SPLIT, config=config)
    cases = read_run(tmp_path / "run")["cases"]
    assert (cases["train"], cases["validation"], cases["test"]) == (["case_a"], ["case_b"], ["case_c"])
    scores = {
        entry["step"]: entry["validation_dsc"]
        for entry in read_metrics(tmp_path / "run")
        if "validation_dsc" in entry
    }
    assert list(scores) == [2, 3]
    network = load_network(read_run(tmp_path / "run"), tmp_path / "run")
    case = cache.case("case_b")
    found, truth = segmented(network, case), case.ground_truth_ZYX
    dsc = [
        2 * ((found == index) & (truth == index)).sum() / ((found == index).sum() + (truth == index).sum())
        for index in (1, 2)
    ]
    assert scores[3] == pytest.approx(np.mean(dsc))


def test_predictions_are_mirrored_as_training_was_and_keep_one_component(cache, tmp_path, monkeypatch):
    pieces = []

    def single_component_classes(truths, num_classes):
        pieces.append([truth.shape for truth in truths])
        return (num_classes - 1,)

    monkeypatch.setattr(train.finetuning, "single_component_classes", single_component_classes)
    for name, changes, axes in (
        ("both", {}, ["y", "x"]),
        ("one", {"augment": AugmentConfig(mirror_axes=("x",))}, ["x"]),
        ("none", {"mirrored_inference": False, "largest_component": False}, []),
    ):
        finetune(cache, tmp_path / name, split=SPLIT, config=small(steps=1, **changes))
        settings = read_run(tmp_path / name)["inference"]
        assert settings["mirror_axes"] == axes
        assert settings["largest_component"] == ([] if name == "none" else [2])
    assert pieces == 2 * [[cache.case(case_id).ground_truth_ZYX.shape for case_id in SPLIT.labelled]]


def test_a_validation_case_without_any_class_is_passed_over(cache, tmp_path, monkeypatch):
    """Its DSC is undefined where the network rightly finds nothing."""
    seen = []

    def dice(*_, **__):
        seen.append(None)
        return np.full(3, np.nan) if len(seen) % 2 else np.array([np.nan, 0.5, np.nan])

    monkeypatch.setattr(train.finetuning, "dice", dice)
    split = dataclasses.replace(SPLIT, labelled=("case_a", "case_b", "case_c"), test=())
    finetune(
        cache, tmp_path / "run", split=split, config=small(steps=1, validation_folds=2, validate_every=1)
    )
    assert len(seen) == 2
    assert read_metrics(tmp_path / "run")[-1]["validation_dsc"] == 0.5


def test_a_validation_part_that_shows_no_class_is_refused(tmp_path):
    random = np.random.default_rng(0)
    arrays = {
        "image": random.integers(0, 1000, (1, 3, 32, 32)).astype(np.int16),
        "superpixels": np.zeros((3, 32, 32), np.uint8),
    }
    cases = {
        name: {**arrays, "ground_truth": np.full((3, 32, 32), value, np.uint8)}
        for name, value in (("a", 0), ("b", 1))
    }
    cases["b"]["image"] = cases["b"]["image"] + np.int16(1)
    names = {"channel_names": ("MRI",), "class_names": ("background", "lesion")}
    cache = open_cache(write_cache(tmp_path / "lesions.zarr", cases, name="lesions", **names))
    split = Split(file="s", labelled=("a", "b"), test=(), num_labelled_keys=2)
    config = small(validation_folds=2, validation_fold=0, validate_every=1, keep="best")
    with pytest.raises(UsageError, match="No validation case shows a class"):
        finetune(cache, tmp_path / "run", split=split, config=config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scores", [(0.1, 0.4, 0.2), (0.3, 0.2, 0.1)])
def test_the_best_network_on_the_validation_cases_is_kept(cache, tmp_path, monkeypatch, scores):
    states = []

    def dice(*_, **__):
        return np.full(3, scores[len(states) - 1])

    class Noted(train.finetuning.Validation):
        def __call__(self, done):
            states.append({name: value.clone() for name, value in self.network.state_dict().items()})
            return super().__call__(done)

    monkeypatch.setattr(train.finetuning, "dice", dice)
    monkeypatch.setattr(train.finetuning, "Validation", Noted)
    config = small(steps=3, validation_folds=2, validate_every=1, keep="best")
    finetune(cache, tmp_path / "run", split=SPLIT, config=config)
    kept = load_file(tmp_path / "run" / "weights.safetensors")
    best = states[int(np.argmax(scores))]
    assert all(torch.equal(kept[name], best[name]) for name in best)


def test_a_run_with_validation_and_average_resumes_to_the_same_weights(cache, tmp_path, monkeypatch):
    config = small(validation_folds=2, validate_every=1, keep="best", foreground_share=0.5)
    finetune(cache, tmp_path / "whole", split=SPLIT, config=config)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(train.finetuning, "geometric_view", call_at(4, kill, geometric_view))
        finetune(cache, tmp_path / "run", split=SPLIT, config=config)
    finetune(cache, tmp_path / "run", split=SPLIT, config=config)
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")


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
    changes = {
        "epochs": None,
        "steps": 2,
        "batch_size": 4,
        "filters": 4,
        "patch_size": (32, 32),
        "device": "cpu",
    }
    config = from_dict(FinetuneConfig, {**PRESETS[preset], **changes})
    finetune(cache, tmp_path / "run", split=SPLIT, config=config)
    assert ("loss_dice" in read_metrics(tmp_path / "run")[0]) == (preset != "published")


def test_the_published_preset_is_what_the_method_says():
    config = resolve(FinetuneConfig, presets=PRESETS, preset="published")
    assert (config.optimiser, config.loss, config.weight_decay) == ("adam", "ce", 1e-5)
    assert (config.lr, config.final_lr, config.epochs) == (5e-4, 5e-6, 100)
    assert config.batch_size == 10
    assert (config.ema_decay, config.foreground_share, config.mirrored_inference) == (0, 0, False)
    assert (config.augment.crop, config.augment.p_geometric) == ((1.0, 1.0), 0.67)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("lr", 0.0),
        ("final_lr", -1.0),
        ("seed", -1),
        ("batch_size", 0),
        ("epochs", 0),
        ("adjacent_slices", -1),
        ("encoder_lr", -1.0),
        ("ema_decay", 1.0),
        ("foreground_share", 1.1),
        ("validation_folds", 1),
        ("validation_fold", 1),
        ("validate_every", 10),
        ("keep", "best"),
    ],
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


def test_a_class_that_no_labelled_case_shows_is_refused(cache_copy, tmp_path):
    cache_writer.set_root_attributes(cache_copy, {"class_names": ["background", "liver", "spleen", "heart"]})
    with pytest.raises(UsageError, match="No labelled case shows") as refused:
        finetune(open_cache(cache_copy), tmp_path / "run", split=SPLIT, config=small())
    assert refused.value.found == "no voxel of heart in case_a, case_b"
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
