"""Pre-training: its losses against a plain recomposition, exact resumption, and what its settings do."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import references
import torch
import training
from made_caches import write_cache, write_levels, write_noise
from safetensors.torch import load_file
from training import Killed, assert_same_weights, call_at, kill, losses_of, snapshot

import train.pretraining
from supercl_core.cache import writer as cache_writer
from supercl_core.cache.reader import open_cache
from supercl_core.cache.weak_labels import auto_level
from supercl_core.config import from_dict, resolve
from supercl_core.errors import CacheError, PreemptedError, SuperCLError, UsageError
from train.augment import AugmentConfig, pretrain_views
from train.data import Batch, SliceDataset, repeat_channels
from train.methods import PRESETS, PretrainConfig
from train.models.backbones import build_encoder
from train.models.unet import PretrainNet, UNet
from train.models.weights import load_encoder
from train.pretraining import PretrainLosses, pretrain
from train.runs import read_metrics, read_run
from train.sampling import SliceOrder

SMALL = {**training.SMALL, "projection": 8}
STEM = "encoder.contr_1_1.0.weight"


@pytest.fixture
def cache(cache_path):
    return open_cache(cache_path)


def small(**changes):
    return PretrainConfig(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def whole(cache_path, tmp_path_factory):
    """A run that never stopped."""
    path = tmp_path_factory.mktemp("whole") / "run"
    pretrain(open_cache(cache_path), path, config=small())
    return path


# ---------------------------------------------------------------- resumption


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_killed_run_resumes_to_the_same_weights(cache, whole, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(train.pretraining, "pretrain_views", call_at(step, kill, pretrain_views))
        pretrain(cache, tmp_path / "run", config=small())
    assert read_run(tmp_path / "run")["status"] == "running"
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    pretrain(cache, tmp_path / "run", config=small())
    assert_same_weights(tmp_path / "run", whole)
    assert losses_of(tmp_path / "run") == losses_of(whole)
    assert read_run(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bfloat16", "clip_norm": 1.0},
        # Its stochastic depth draws from the global generator.
        {"backbone": "monai:efficientnet-b0", "filters": 32, "steps": 4},
    ],
)
def test_a_killed_run_of_other_settings_resumes_too(cache, tmp_path, monkeypatch, changes):
    pretrain(cache, tmp_path / "whole", config=small(**changes))
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(train.pretraining, "pretrain_views", call_at(4, kill, pretrain_views))
        pretrain(cache, tmp_path / "run", config=small(**changes))
    pretrain(cache, tmp_path / "run", config=small(**changes))
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_preempted_run_says_so_and_resumes_to_the_same_weights(cache, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(PreemptedError, match="step 3 of 6"):
        stop = call_at(3, lambda: os.kill(os.getpid(), signal.SIGTERM), pretrain_views)
        patched.setattr(train.pretraining, "pretrain_views", stop)
        pretrain(cache, tmp_path / "run", config=small())
    pretrain(cache, tmp_path / "run", config=small())
    assert_same_weights(tmp_path / "run", whole)
    assert losses_of(tmp_path / "run") == losses_of(whole)


def test_sigterm_to_the_command_exits_5_and_the_same_command_finishes_it(cache_path, cache, tmp_path):
    settings = {**SMALL, "steps": 100, "patch_size": [32, 32], "device": "'cpu'"}
    assignments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "supercl_core.cli", "pretrain", str(cache_path), str(tmp_path / "run")]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(
        [*command, *assignments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(train.pretraining.__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    assert out == ""
    assert "error: Training was told to stop." in err
    assert "Run the same command again" in err
    logged = losses_of(tmp_path / "run")
    assert 1 <= len(logged) < 100
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1].name
    assert last == f"step_{len(logged):08d}.pt"

    config = resolve(PretrainConfig, assignments=assignments[1::2])  # the same command, in this process
    pretrain(cache, tmp_path / "run", config=config)
    pretrain(cache, tmp_path / "never_stopped", config=config)
    assert_same_weights(tmp_path / "run", tmp_path / "never_stopped")
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "never_stopped")


def test_a_finished_run_run_again_touches_nothing(cache, whole):
    before = snapshot(whole)
    assert pretrain(cache, whole, config=small()) == whole / "weights.safetensors"
    assert snapshot(whole) == before


def test_a_finished_run_without_its_checkpoints_is_not_trained_again(cache, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "whole"))
    shutil.rmtree(run / "checkpoints")
    before = snapshot(run)
    pretrain(cache, run, config=small())
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"lr": 0.5}, "config.lr: 0.002 there, 0.5 here"), ({"seed": 7}, "config.seed: 0 there, 7 here")],
)
def test_a_run_of_other_settings_is_refused(cache, whole, changes, named):
    before = snapshot(whole)
    with pytest.raises(UsageError) as refused:
        pretrain(cache, whole, config=small(**changes))
    assert refused.value.found == named
    assert snapshot(whole) == before


def test_other_seeds_give_other_weights(cache, whole, tmp_path):
    pretrain(cache, tmp_path / "run", config=small(seed=1))
    one, other = (load_file(path / "weights.safetensors") for path in (whole, tmp_path / "run"))
    assert not torch.equal(one[STEM], other[STEM])


# ---------------------------------------------------------------- what is written


def test_the_run_is_described(cache, whole):
    run = read_run(whole)
    assert (run["kind"], run["split"], run["init"]) == ("pretrain", None, None)
    assert run["model"] == {"backbone": "unet", "in_channels": 1, "num_classes": None, "filters": 4}
    assert run["world_size"] == 1
    assert run["cases"] == {"train": ["case_a", "case_b", "case_c", "case_d"], "validation": [], "test": []}
    assert from_dict(PretrainConfig, run["config"]) == small()
    labels = cache.weak_labels()
    assert run["weak_labels"] == {
        "name": labels.name,
        "level": auto_level(labels.ccl, 6),
        "neighbours": labels.neighbours,
        "descriptors": labels.descriptors,
        "digest": hashlib.sha256(labels.ccl[auto_level(labels.ccl, 6)].tobytes()).hexdigest(),
    }
    for entry in read_metrics(whole):
        parts = entry["loss_ins"] + entry["loss_intra"] + 0.5 * entry["loss_inter"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)


def test_the_encoder_moves_to_a_unet_of_four_channels(whole):
    weights = load_file(whole / "weights.safetensors")
    encoder = {name for name in weights if name.startswith("encoder.")}
    torch.manual_seed(5)
    network = UNet(build_encoder("unet", in_channels=4, filters=4), num_classes=3).eval()
    decoder = {name: tensor.clone() for name, tensor in network.decoder.state_dict().items()}
    report = load_encoder(network, whole)
    assert {*report.loaded, *report.adapted} == encoder
    assert report.adapted == (STEM,)
    assert all(name.startswith(("head.", "pixel_head.")) for name in report.skipped)
    assert all(torch.equal(tensor, decoder[name]) for name, tensor in network.decoder.state_dict().items())
    source = PretrainNet(build_encoder("unet", in_channels=1, filters=4), projection=8).eval()
    source.load_state_dict(weights)
    image = torch.randn(2, 1, 32, 32)
    for one, other in zip(network.encoder(repeat_channels(image, 4)), source.encoder(image), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the losses


def fixed_batch(stride=16):
    """Five slices of 64 x 48: random superpixels, one slice of padding, one whose first cells all differ."""
    random = torch.Generator().manual_seed(3)
    superpixels = torch.randint(-1, 4, (5, 64 // stride, 48 // stride), generator=random)
    superpixels[1] = -1
    superpixels[2].view(-1)[:12] = torch.arange(12)
    return Batch(
        image_BCYX=torch.randn(5, 1, 64, 48, generator=random, dtype=torch.float64),
        superpixels_Bhw=superpixels.to(torch.int16),
        ground_truth_BYX=None,
        positions_B=torch.tensor([0.1, 0.15, 0.5, 0.58, 0.66]),
        slices_B=torch.tensor([4, 0, 2, 3, 1]),
    )


CCL = torch.tensor([7, 2, 2, 5, 7], dtype=torch.int32)


def network_of(config):
    torch.manual_seed(11)
    return PretrainNet(
        build_encoder("unet", in_channels=config.in_channels or 1, filters=4),
        projection=config.projection,
        instance=config.uses_whole,
        pixel_stride=(config.ilcp_stride or 16) if config.uses_intra else None,
    ).double()


def losses_with(network, config):
    return PretrainLosses(
        network,
        config=config,
        in_channels=config.in_channels or 1,
        ccl=CCL if config.igcp == "cached" else None,
        num_superpixels=12,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"instance_rule": "view", "weights": (0.3, 2.0, 1.5), "temperature": 0.25},
        {"instance_rule": "partition", "num_partitions": 3},
        {"igcp": "none", "weights": (0.3, 2.0, 0.0)},
        {"igcp": "none", "weights": (1.0, 0.0, 0.0), "projection": 128},
        {"igcp": "none", "weights": (0.0, 1.0, 0.0)},
        {"weights": (0.0, 1.0, 0.5)},
        {"weights": (1.0, 0.0, 0.5), "igcp": "online", "projection": 128},
        {"igcp": "online", "projection": 0, "in_channels": 4},
        {"igcp": "online", "asp_divisor": "image", "view_pairs": "afterwards", "position_threshold": 0.07},
        {"batch_statistics": "each_view", "igcp": "online"},
        {"ilcp_stride": 4, "igcp": "online"},
        {"ilcp_stride": 4, "projection": 0, "ilcp_pixels": "all"},
    ],
)
def test_losses_equal_a_plain_recomposition(changes):
    config = small(**changes)
    in_channels = config.in_channels or 1
    stride = config.ilcp_stride or 16
    network = network_of(config)
    batch = fixed_batch(stride)
    losses = losses_with(network, config)(batch, torch.Generator().manual_seed(8))

    views = pretrain_views(batch.image_BCYX, torch.Generator().manual_seed(8), config=config.augment)
    local, whole = (torch.cat(pair).repeat(1, in_channels, 1, 1) for pair in (views[:2], views[2:]))
    seen = ([local] if config.uses_local else []) + ([whole] if config.uses_whole else [])
    if config.batch_statistics == "each_view":
        seen = [view for pair in seen for view in pair.chunk(2)]
    else:
        seen = [torch.cat(seen)]
    with torch.no_grad():
        maps = [network.encoder(part) for part in seen]
        levels = [torch.cat(level) for level in zip(*maps, strict=True)]
        features = levels[-1].numpy()
        instance = network.head(levels[-1][-10:]).numpy() if config.uses_whole else None
        fine = levels[network.encoder.strides.index(stride)][:10]
        pixels = network.pixel_head(fine).numpy() if config.uses_intra else None
    superpixels = batch.superpixels_Bhw.numpy()
    positions, ccl = batch.positions_B.numpy(), CCL[batch.slices_B].numpy()

    def plain(embeddings, pairs, valid=None):
        return references.supervised_contrastive(
            embeddings, pairs, temperature=config.temperature, valid=valid
        )[0]

    close = {
        "position": np.abs(positions[:, None] - positions) < config.position_threshold,
        "partition": np.ceil(3 * positions)[:, None] == np.ceil(3 * positions),
        "view": np.zeros((5, 5), bool),
    }[config.instance_rule]
    wanted = {}
    if config.weights[0]:
        wanted["loss_ins"] = plain(instance[None], references.slice_pairs(5, close)[None])
    if config.weights[1]:
        cells = (64 // stride) * (48 // stride)
        per_pixel = np.concatenate(
            [pixels[:5].reshape(5, -1, cells), pixels[5:].reshape(5, -1, cells)], axis=2
        )
        valid = np.tile(superpixels.reshape(5, cells) >= 0, 2)
        wanted["loss_intra"] = plain(per_pixel.transpose(0, 2, 1), references.ilcp_pairs(superpixels), valid)
    if config.igcp == "cached":
        wanted["loss_inter"] = plain(instance[None], references.slice_pairs(5, ccl[:, None] == ccl)[None])
    if config.igcp == "online":
        finer = 16 // stride
        pairs = references.online_igcp_pairs(
            features[:5],
            features[5:10],
            superpixels[:, finer // 2 :: finer, finer // 2 :: finer],
            divide_by=config.asp_divisor,
            view_pairs=config.view_pairs,
        )
        wanted["loss_inter"] = plain(instance[None], pairs[None])
    weights = dict(zip(("loss_ins", "loss_intra", "loss_inter"), config.weights, strict=True))
    wanted["loss"] = sum(weights[name] * term for name, term in wanted.items())
    assert min(wanted.values()) > 0.1
    if instance is not None:
        directions = instance / np.linalg.norm(instance, axis=1, keepdims=True)
        wanted["similarity"] = (directions @ directions.T).mean()
    found = {name: value.item() for name, value in losses.items()}
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    "changes", [{}, {"ilcp_stride": 4}, {"igcp": "none", "weights": (0.0, 1.0, 0.0)}, PRESETS["simclr"]]
)
def test_gradients_reach_every_parameter(changes):
    config = (
        from_dict(PretrainConfig, {**SMALL, **changes})
        if "weights" not in changes
        else small(**{**changes, "projection": 128, "weights": tuple(changes["weights"])})
    )
    network = network_of(config)
    losses_with(network, config)(fixed_batch(config.ilcp_stride or 16), torch.Generator().manual_seed(0))[
        "loss"
    ].backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        # A convolution's bias before a batch normalisation has no effect.
        if name.endswith("weight"):
            assert parameter.grad.abs().max() > 0, name


def test_the_loss_goes_down(cache, tmp_path):
    # The tiny cases are noise: what can be learned is to tell their slices apart, without large deformations.
    augment = AugmentConfig(p_geometric=0.0, mirror_axes=(), crop=(0.9, 1.0))
    settings = {"steps": 30, "batch_size": 12, "filters": 8, "lr": 1e-3, "instance_rule": "view"}
    pretrain(cache, tmp_path / "run", config=small(**settings, augment=augment))
    metrics = read_metrics(tmp_path / "run")
    for name, share in (("loss", 0.9), ("loss_ins", 0.7), ("loss_intra", 0.5)):
        losses = [entry[name] for entry in metrics]
        assert np.mean(losses[-5:]) < share * losses[0]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("projection", [0, 8])
@pytest.mark.parametrize("instance_rule", ["position", "partition", "view"])
@pytest.mark.parametrize("igcp", ["cached", "online", "none"])
def test_every_combination_of_pairs_trains(cache, tmp_path, igcp, instance_rule, projection):
    config = small(steps=2, igcp=igcp, instance_rule=instance_rule, projection=projection)
    pretrain(cache, tmp_path / "run", config=config)
    assert (read_run(tmp_path / "run")["weak_labels"] is None) == (igcp != "cached")
    assert all(("loss_inter" in entry) == (igcp != "none") for entry in read_metrics(tmp_path / "run"))
    names = load_file(tmp_path / "run" / "weights.safetensors")
    assert any(name.startswith("pixel_head.") for name in names) == (projection > 0)
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 2]


ALL_TERMS = {"loss_ins", "loss_intra", "loss_inter"}
METHOD_TERMS = {
    "default": ALL_TERMS,
    "published": ALL_TERMS,
    "demo": ALL_TERMS,
    "simclr": {"loss_ins"},
    "gcl": {"loss_ins"},
    "pcl": {"loss_ins"},
    "supercl-ilcp": {"loss_ins", "loss_intra"},
    "supercl-igcp": {"loss_ins", "loss_inter"},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train(cache, tmp_path, preset):
    settings = {**PRESETS[preset], "batch_size": 10, "filters": 4, "patch_size": (32, 32), "device": "cpu"}
    settings |= {"epochs": 1} if "epochs" in settings else {"steps": 2}
    pretrain(cache, tmp_path / "run", config=from_dict(PretrainConfig, settings))
    run = read_run(tmp_path / "run")
    assert (run["status"], run["config"]["steps"]) == ("finished", 2)
    terms = {name for name in read_metrics(tmp_path / "run")[0] if name.startswith("loss")}
    assert terms == {"loss", *METHOD_TERMS[preset]}


def test_the_published_preset_is_what_the_method_says():
    config = resolve(PretrainConfig, presets=PRESETS, preset="published")
    assert (config.optimiser, config.lr, config.weight_decay) == ("sgd", 0.1, 1e-5)
    assert (config.igcp, config.projection, config.temperature) == ("online", 0, 0.1)
    assert (config.weights, config.position_threshold, config.filters) == ((1.0, 1.0, 0.5), 0.1, 32)
    assert (config.epochs, config.batch_size, config.in_groups) == (100, 32, False)
    assert (config.batch_statistics, config.contrast) == ("each_view", "each_rank")


def test_rivals_differ_from_ours_in_their_pairs_alone():
    for preset, rule in (("simclr", "view"), ("gcl", "partition"), ("pcl", "position")):
        config = resolve(PretrainConfig, presets=PRESETS, preset=preset)
        ours = PretrainConfig(weights=(1.0, 0.0, 0.0), igcp="none", instance_rule=rule)
        assert config == ours


def test_epochs_become_steps(cache, tmp_path):
    settings = {name: value for name, value in SMALL.items() if name != "steps"}
    pretrain(cache, tmp_path / "run", config=PretrainConfig(**settings, epochs=2, batches="random"))
    stored = read_run(tmp_path / "run")["config"]
    assert (stored["steps"], stored["epochs"]) == (2 * (23 // 6), None)
    pretrain(cache, tmp_path / "run", config=PretrainConfig(**settings, epochs=2, batches="random"))
    with pytest.raises(UsageError, match=r"config\.steps: 6 there, 9 here"):
        pretrain(cache, tmp_path / "run", config=PretrainConfig(**settings, epochs=3, batches="random"))


def test_too_few_slices_for_a_batch_are_refused(cache, tmp_path):
    with pytest.raises(UsageError, match="too few slices") as refused:
        pretrain(cache, tmp_path / "run", config=small(batch_size=24))
    assert "batch_size" in refused.value.next_step
    assert not (tmp_path / "run").exists()


def test_positions_in_single_slices_are_refused(tmp_path):
    flat = {
        case_id: {
            "image": np.random.default_rng(seed).integers(0, 99, (1, 1, 32, 32)).astype(np.int16),
            "superpixels": np.zeros((1, 32, 32), np.uint8),
        }
        for seed, case_id in enumerate("abcdef")
    }
    names = {"name": "flat", "channel_names": ("RGB",), "class_names": ()}
    cache = open_cache(write_cache(tmp_path / "flat.zarr", flat, **names, levels=[np.arange(6) // 2]))
    for rule in ("position", "partition"):
        with pytest.raises(UsageError, match="single slice"):
            pretrain(cache, tmp_path / "run", config=small(instance_rule=rule))
    assert not (tmp_path / "run").exists()
    pretrain(cache, tmp_path / "run", config=small(instance_rule="view", steps=1))


def test_an_unknown_stride_is_refused(cache, tmp_path):
    with pytest.raises(UsageError, match="1 or 2 or 4 or 8 or 16"):
        pretrain(cache, tmp_path / "run", config=small(ilcp_stride=5))
    assert not (tmp_path / "run").exists()


def test_patches_suit_other_backbones(cache, tmp_path):
    settings = {"backbone": "monai:resnet10", "filters": 32, "patch_size": None, "steps": 1, "projection": 8}
    pretrain(cache, tmp_path / "run", config=small(**settings))
    assert read_run(tmp_path / "run")["model"]["backbone"] == "monai:resnet10"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"igcp": "online", "ccl_level": 0}, "ccl_level"),
        ({"igcp": "online", "weak_labels": "mine"}, "weak_labels"),
        ({"igcp": "none", "refresh_every": 2}, "refresh_every"),
        ({"igcp": "online", "batches": "groups"}, "batches"),
        ({"igcp": "none", "batches": "groups"}, "batches"),
        ({"neighbours": "other-cases"}, "neighbours"),
        ({"refresh_every": -1}, "refresh_every"),
        ({"igcp": "none", "weights": (1.0, 1.0, 0.7)}, "weights"),
        ({"igcp": "none", "weights": (0.0, 0.0, 0.5)}, "weights"),
        ({"asp_divisor": "image"}, "asp_divisor"),
        ({"view_pairs": "afterwards"}, "view_pairs"),
        ({"instance_rule": "view", "position_threshold": 0.2}, "position_threshold"),
        ({"num_partitions": 5}, "num_partitions"),
        ({"instance_rule": "partition", "num_partitions": 1}, "num_partitions"),
        ({"epochs": 3, "steps": 5}, "steps"),
        ({"epochs": 0}, "epochs"),
        ({"in_channels": 0}, "in_channels"),
        ({"ilcp_stride": 0}, "ilcp_stride"),
        ({"weights": (1.0, 1.0, 0.0)}, "igcp"),
        ({"weights": (1.0, 0.0, 0.5), "projection": 8}, "projection"),
        ({"weights": (0.0, 1.0, 0.5), "instance_rule": "view"}, "instance_rule"),
        ({"weights": (0.0, 1.0, 0.0), "igcp": "none", "ilcp_stride": 4}, "ilcp_stride"),
        ({"backbone": "monai:resnet10", "filters": 8}, "filters"),
        ({"steps": 0}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"temperature": -0.1}, "temperature"),
        ({"weights": (0.0, 0.0, 0.0)}, "weights"),
        ({"weights": (1.0, -1.0, 0.0)}, "weights"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range_or_without_effect_are_refused(changes, named):
    with pytest.raises(UsageError, match=f"'{named}'"):
        PretrainConfig(**changes)


def test_single_channel_slices_train_a_network_of_four(cache, tmp_path):
    pretrain(cache, tmp_path / "run", config=small(steps=1, in_channels=4))
    assert load_file(tmp_path / "run" / "weights.safetensors")[STEM].shape[1] == 4


# ---------------------------------------------------------------- weak labels and excluded cases


@pytest.mark.parametrize("excluded", [(), ("case_d",)])
@pytest.mark.parametrize("batch_size", [1, 3, 6, 8, 16])
def test_the_finest_level_with_a_positive_per_anchor_is_taken(cache_copy, tmp_path, batch_size, excluded):
    levels = [np.arange(23) // size for size in (1, 3, 6, 23)]
    write_levels(cache_copy, levels)
    cache_writer.set_root_attributes(cache_copy, {"default_weak_labels": "by_hand"})
    cache = open_cache(cache_copy)
    config = small(steps=1, batch_size=batch_size, batches="random")
    pretrain(cache, tmp_path / "run", config=config, excluded=excluded)

    used = [i for i, case in enumerate(cache.slice_case) if cache.rows[case].id not in excluded]
    wanted = 3
    for level in (2, 1, 0):
        pairs = [levels[level][i] == levels[level][j] for i in used for j in used if i != j]
        if (batch_size - 1) * np.mean(pairs) >= 1:
            wanted = level
    assert wanted == {1: 3, 3: 3, 6: 2, 8: 2, 16: 1}[batch_size]
    assert read_run(tmp_path / "run")["weak_labels"]["level"] == wanted


def named_levels(cache_path):
    """A cache with labels `by_hand` beside its default ones: two levels, of 12 and of 3 components."""
    write_levels(cache_path, [np.arange(23) % 12, np.arange(23) % 3])
    return open_cache(cache_path)


def test_labels_are_taken_by_name(cache_copy, tmp_path):
    cache = named_levels(cache_copy)
    pretrain(cache, tmp_path / "run", config=small(steps=1, weak_labels="by_hand", ccl_level=1))
    assert read_run(tmp_path / "run")["weak_labels"]["name"] == "by_hand"
    with pytest.raises(CacheError, match="no weak labels 'mine'"):
        pretrain(cache, tmp_path / "other", config=small(weak_labels="mine"))
    assert not (tmp_path / "other").exists()


def drawn_slices(cache, run_path, monkeypatch, *, excluded=(), **changes):
    """The slices of every batch that reaches the losses."""
    drawn = []
    compute = PretrainLosses.__call__

    def seen(losses, batch, generator):
        drawn.append(batch.slices_B.tolist())
        return compute(losses, batch, generator)

    with monkeypatch.context() as patched:
        patched.setattr(PretrainLosses, "__call__", seen)
        pretrain(cache, run_path, config=small(**changes), excluded=excluded)
    return drawn


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"batches": "groups"}, np.arange(23) % 12),
        ({"ccl_level": 1}, np.arange(23) % 3),
        ({"batches": "random"}, None),
    ],
)
def test_cached_labels_order_the_batches_unless_told_otherwise(
    cache_copy, tmp_path, monkeypatch, changes, labels
):
    settings = {"weak_labels": "by_hand", "ccl_level": 0, **changes}
    drawn = drawn_slices(named_levels(cache_copy), tmp_path / "run", monkeypatch, **settings)
    order = SliceOrder(slices=np.arange(23), batch_size=6, seed=0, labels=labels)
    assert drawn == [batch.tolist() for batch in itertools.islice(order.batches(0), 6)]


def test_groups_are_those_of_the_cases_that_are_trained_on(cache_copy, tmp_path, monkeypatch):
    cache = named_levels(cache_copy)
    settings = {"weak_labels": "by_hand", "ccl_level": 0}
    drawn = drawn_slices(cache, tmp_path / "run", monkeypatch, excluded=("case_a",), **settings)
    slices = cache.case_slices(["case_b", "case_c", "case_d"])
    order = SliceOrder(slices=slices, batch_size=6, seed=0, labels=slices % 12)
    assert drawn == [batch.tolist() for batch in itertools.islice(order.batches(0), 6)]


@pytest.mark.parametrize("igcp", ["online", "none"])
def test_batches_without_labels_are_random(cache, tmp_path, monkeypatch, igcp):
    drawn = drawn_slices(cache, tmp_path / "run", monkeypatch, igcp=igcp, batch_size=5)
    order = SliceOrder(slices=np.arange(23), batch_size=5, seed=0)
    assert drawn == [batch.tolist() for batch in itertools.islice(order.batches(0), 6)]


def test_an_odd_batch_of_groups_is_refused(cache, tmp_path):
    with pytest.raises(UsageError, match="even size"):
        pretrain(cache, tmp_path / "run", config=small(batch_size=5))
    assert not (tmp_path / "run").exists()
    pretrain(cache, tmp_path / "run", config=small(batch_size=5, batches="random", steps=1))


def test_the_level_asked_for_is_used_and_an_unknown_one_refused(cache, tmp_path):
    num_levels = len(cache.weak_labels().ccl)
    pretrain(cache, tmp_path / "run", config=small(steps=1, ccl_level=num_levels - 1))
    assert read_run(tmp_path / "run")["weak_labels"]["level"] == num_levels - 1
    with pytest.raises(UsageError, match=f"0 to {num_levels - 1}"):
        pretrain(cache, tmp_path / "other", config=small(ccl_level=num_levels))
    assert not (tmp_path / "other").exists()


def test_excluded_cases_are_never_read(cache_copy, tmp_path):
    (cache_copy / "cases" / "case_d" / "image" / "c" / "0" / "0" / "0" / "0").unlink()
    config = small(steps=6, batch_size=8)  # three epochs of the other slices
    pretrain(open_cache(cache_copy), tmp_path / "run", config=config, excluded=("case_d",))
    assert read_run(tmp_path / "run")["cases"]["train"] == ["case_a", "case_b", "case_c"]
    with pytest.raises(CacheError, match="damaged"):
        pretrain(open_cache(cache_copy), tmp_path / "all", config=config)


def test_an_excluded_case_goes_under_every_name(tmp_path):
    cache = open_cache(write_noise(tmp_path / "twins.zarr", {"a": 1, "b": 2, "c": 3, "twin_of_b": 2}))
    pretrain(cache, tmp_path / "run", config=small(steps=1), excluded=("b",))
    run = read_run(tmp_path / "run")
    assert run["cases"]["train"] == ["a", "c"]
    digests = {row.id: row.content_digest for row in cache.rows if row.id in ("a", "c")}
    assert run["content_digests"] == digests
    with pytest.raises(UsageError, match="No case is left"):
        pretrain(cache, tmp_path / "none", config=small(steps=1), excluded=("twin_of_b", "a", "c"))


def test_a_run_is_not_resumed_on_other_content(tmp_path):
    path = tmp_path / "noise.zarr"
    pretrain(open_cache(write_noise(path, {"a": 1, "b": 2})), tmp_path / "run", config=small(steps=1))
    shutil.rmtree(path)
    with pytest.raises(UsageError, match="other settings") as refused:
        pretrain(open_cache(write_noise(path, {"a": 1, "b": 3})), tmp_path / "run", config=small(steps=1))
    assert refused.value.found.count("there, ") == 1
    assert "content_digests.b: " in refused.value.found


def test_excluding_every_case_is_refused(cache, tmp_path):
    with pytest.raises(UsageError, match="No case is left"):
        pretrain(cache, tmp_path / "run", excluded=tuple(row.id for row in cache.rows))
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_stops_with_its_path(cache, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(train.pretraining, "pretrain_views", call_at(5, kill, pretrain_views))
        pretrain(cache, tmp_path / "run", config=small())
    file = tmp_path / "run" / "checkpoints" / "step_00000004.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SuperCLError, match=r"step_00000004\.pt"):
        pretrain(cache, tmp_path / "run", config=small())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"


def test_superpixels_smaller_than_the_stride_are_mentioned(cache_path, tmp_path, capsys):
    pretrain(open_cache(cache_path), tmp_path / "one", config=small(steps=1))
    said = capsys.readouterr().err
    assert "ILCP contrasts every 16th: few positive pairs. ilcp_stride = 1 has more" in said, said
    for index, changes in enumerate([{"ilcp_stride": 1}, {"weights": (1.0, 0.0, 0.5), "projection": 128}]):
        pretrain(open_cache(cache_path), tmp_path / str(index), config=small(steps=1, **changes))
        assert "ILCP" not in capsys.readouterr().err


def test_a_run_is_not_resumed_on_other_weak_labels(cache_copy, tmp_path, monkeypatch):
    cache = named_levels(cache_copy)
    config = small(weak_labels="by_hand", ccl_level=0)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(train.pretraining, "pretrain_views", call_at(3, kill, pretrain_views))
        pretrain(cache, tmp_path / "run", config=config)
    write_levels(cache_copy, [np.arange(23) // 2, np.arange(23) // 8])
    with pytest.raises(UsageError, match=r"weak_labels\.digest"):
        pretrain(open_cache(cache_copy), tmp_path / "run", config=config)


@pytest.mark.parametrize(("contrast", "batch_size"), [("all_ranks", 14), ("each_rank", 7)])
def test_the_level_suits_the_slices_that_are_contrasted(
    cache_copy, tmp_path, monkeypatch, contrast, batch_size
):
    write_levels(cache_copy, [np.arange(23) // size for size in (1, 3, 6, 23)])
    cache = open_cache(cache_copy)
    monkeypatch.setattr(train.pretraining.distributed, "world_size", lambda: 2)
    config = small(contrast=contrast, weak_labels="by_hand", batch_size=7)
    _, described = train.pretraining._weak_labels(cache, np.arange(23), config)
    assert described["level"] == auto_level(cache.weak_labels("by_hand").ccl, batch_size)
    assert described["level"] == {14: 1, 7: 2}[batch_size]


def test_a_stop_is_answered_while_data_do_not_come(cache, whole, tmp_path, monkeypatch):
    gather = SliceDataset.gather
    answers = threading.Event()

    def slow(dataset, *arguments, **options):
        if not answers.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            answers.wait(timeout=3)
        return gather(dataset, *arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(PreemptedError, match="step 0 of 6"):
        patched.setattr(SliceDataset, "gather", slow)
        pretrain(cache, tmp_path / "run", config=small())
    answers.set()
    pretrain(cache, tmp_path / "run", config=small())
    assert_same_weights(tmp_path / "run", whole)
