"""Weak labels from the encoder in training: equal to the offline ones, in use at once, kept by every checkpoint."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import training
from made_caches import write_levels, write_noise
from training import Killed, assert_same_weights, call_at, kill, losses_of

import train.pretraining
import train.refresh
from preprocess.ccl import first_neighbour_hierarchy as offline_hierarchy
from supercl_core.cache.reader import open_cache
from supercl_core.cache.weak_labels import auto_level
from supercl_core.errors import PreemptedError, SuperCLError, UsageError
from train.augment import pretrain_views
from train.data import SliceDataset
from train.descriptors import describe
from train.methods import PretrainConfig
from train.models.unet import Encoder
from train.pretraining import PretrainLosses, pretrain
from train.refresh import Refresh
from train.runs import read_metrics
from train.sampling import SliceOrder

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = {**training.SMALL, "projection": 8, "steps": 10, "refresh_every": 1}
NUM_SLICES = 23
FIRST = np.arange(NUM_SLICES) // 6
"""Labels of the cache: 4 components, 12 pairs, an epoch of 4 steps."""
SECOND = np.arange(NUM_SLICES) % 8
"""Labels of a refresh: 8 components, 15 pairs, an epoch of 5 steps."""


@pytest.fixture
def cache(cache_copy):
    write_levels(cache_copy, [FIRST])
    return open_cache(cache_copy)


def small(**changes):
    return PretrainConfig(**{**SMALL, "weak_labels": "by_hand", **changes})


def refresh_of(cache, *, excluded=(), level=None, neighbours="any", labels=None, adjacent_slices=0):
    case_ids = [row.id for row in cache.done if row.id not in excluded]
    dataset = SliceDataset(cache, case_ids, adjacent_slices=adjacent_slices)
    torch.manual_seed(4)
    return Refresh(
        dataset=dataset,
        encoder=Encoder(dataset.num_channels, 4),
        ccl=torch.tensor(FIRST, dtype=torch.int32),
        order=SliceOrder(slices=dataset.slices, batch_size=6, seed=0, labels=labels),
        every=2,
        level=level,
        neighbours=neighbours,
        batch_size=6,
    )


def refreshed_to(levels, monkeypatch):
    """From now on, every refresh finds these levels."""
    found = [torch.tensor(level, dtype=torch.int32) for level in levels]
    monkeypatch.setattr(train.refresh, "first_neighbour_hierarchy", lambda descriptors, groups: found)


# ---------------------------------------------------------------- which labels


@pytest.mark.parametrize("excluded", [(), ("case_b",)])
@pytest.mark.parametrize("neighbours", ["any", "other-cases"])
def test_labels_equal_the_offline_ones_of_the_same_descriptors(cache, neighbours, excluded):
    refresh = refresh_of(cache, excluded=excluded, level=0, neighbours=neighbours)
    ids, slices = refresh.dataset.case_ids, refresh.dataset.slices
    found = refresh(5)
    descriptors = describe(refresh.encoder, cache, ids, device=CPU).numpy()
    cases = cache.slice_case[slices] if neighbours == "other-cases" else None
    offline = offline_hierarchy(descriptors, cases)
    assert refresh.ccl[slices].tolist() == offline.ccl[0].tolist()
    assert found == {"ccl_level": 0, "num_components": offline.num_components[0]}
    others = np.setdiff1d(np.arange(NUM_SLICES), slices)
    assert refresh.ccl[others].tolist() == FIRST[others].tolist()
    assert refresh.encoder.training
    if neighbours == "other-cases":
        by_case = [set(cache.slice_case[slices][offline.ccl[0] == c]) for c in np.unique(offline.ccl[0])]
        assert all(len(cases) > 1 for cases in by_case)


def test_an_encoder_that_trains_on_adjacent_slices_is_asked_with_them(cache):
    refresh = refresh_of(cache, level=0, adjacent_slices=1)
    refresh(0)
    descriptors = describe(refresh.encoder, cache, adjacent_slices=1, device=CPU).numpy()
    assert refresh.ccl.tolist() == offline_hierarchy(descriptors, None).ccl[0].tolist()


@pytest.mark.parametrize(("level", "taken"), [(0, 0), (1, 1), (2, 2), (7, 2), (None, 1)])
def test_the_level_is_chosen_as_for_labels_of_the_cache(cache, monkeypatch, level, taken):
    levels = [np.arange(NUM_SLICES) // size for size in (2, 8, 12)]
    assert auto_level(np.array(levels), 6) == 1
    refreshed_to(levels, monkeypatch)
    refresh = refresh_of(cache, level=level)
    assert refresh(0) == {"ccl_level": taken, "num_components": int(levels[taken].max()) + 1}
    assert refresh.ccl.tolist() == levels[taken].tolist()


def test_a_refresh_is_due_after_that_many_epochs_of_its_order(cache, monkeypatch):
    refreshed_to([SECOND], monkeypatch)
    refresh = refresh_of(cache, labels=FIRST)
    assert refresh.order.steps_per_epoch == 4
    assert next(step for step in range(30) if refresh.due(step)) == 8
    refresh(8)
    assert refresh.order.steps_per_epoch == 5
    assert next(step for step in range(8, 30) if refresh.due(step)) == 18


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize(("batches", "refreshes"), [("groups", [4, 9]), ("random", [3, 6, 9])])
def test_new_labels_are_used_by_losses_and_batches_at_once(cache, tmp_path, monkeypatch, batches, refreshes):
    refreshed_to([SECOND], monkeypatch)
    used, drawn = [], []
    compute = PretrainLosses.__call__

    def seen(losses, batch, generator):
        used.append(losses.ccl.tolist())
        drawn.append(batch.slices_B.tolist())
        return compute(losses, batch, generator)

    monkeypatch.setattr(PretrainLosses, "__call__", seen)
    pretrain(cache, tmp_path / "run", config=small(batches=batches))

    wanted, labels, begin = [], FIRST, 0
    for end in (*refreshes, 10):
        order = SliceOrder(
            slices=np.arange(NUM_SLICES),
            batch_size=6,
            seed=0,
            labels=labels if batches == "groups" else None,
            first_step=begin,
        )
        wanted += [batch.tolist() for batch in itertools.islice(order.batches(begin), end - begin)]
        labels, begin = SECOND, end
    assert drawn == wanted
    assert used == [FIRST.tolist()] * refreshes[0] + [SECOND.tolist()] * (10 - refreshes[0])
    entries = [entry for entry in read_metrics(tmp_path / "run") if "num_components" in entry]
    assert [entry["step"] for entry in entries] == [step + 1 for step in refreshes]
    assert all((entry["ccl_level"], entry["num_components"]) == (0, 8) for entry in entries)
    assert all("loss" not in entry for entry in entries)


@pytest.fixture(scope="module", params=["groups", "random"])
def whole(request, cache_path, tmp_path_factory):
    """The settings of a run of 10 steps that labels its slices again in the middle, and one that never stopped."""
    config = small(weak_labels=None, batches=request.param, ccl_level=0)
    path = tmp_path_factory.mktemp("whole") / "run"
    pretrain(open_cache(cache_path), path, config=config)
    refreshes = [entry["step"] - 1 for entry in read_metrics(path) if "num_components" in entry]
    assert len(refreshes) >= 2
    return config, path, refreshes


def assert_resumes_to(whole, cache, run_path):
    config, path, _ = whole
    pretrain(cache, run_path, config=config)
    assert_same_weights(run_path, path)
    assert losses_of(run_path) == losses_of(path)
    one, other = (torch.load(run / "checkpoints/step_00000010.pt")["refresh"] for run in (run_path, path))
    assert torch.equal(one["labels"], other["labels"])
    assert one["first_step"] == other["first_step"]


@pytest.mark.parametrize("step", range(3, 11))
def test_a_run_killed_at_any_step_resumes_to_the_same_weights(whole, cache_path, tmp_path, monkeypatch, step):
    cache = open_cache(cache_path)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(train.pretraining, "pretrain_views", call_at(step, kill, pretrain_views))
        pretrain(cache, tmp_path / "run", config=whole[0])
    assert_resumes_to(whole, cache, tmp_path / "run")


def test_a_run_killed_while_it_labels_resumes_to_the_same_weights(whole, cache_path, tmp_path, monkeypatch):
    cache = open_cache(cache_path)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(train.refresh, "describe", call_at(2, kill, describe))
        pretrain(cache, tmp_path / "run", config=whole[0])
    assert_resumes_to(whole, cache, tmp_path / "run")


def test_a_run_stopped_just_before_it_labels_resumes_to_the_same_weights(
    whole, cache_path, tmp_path, monkeypatch
):
    config, _, [_, last_step, *_] = whole
    cache = open_cache(cache_path)
    stop = call_at(last_step, lambda: os.kill(os.getpid(), signal.SIGTERM), pretrain_views)
    with monkeypatch.context() as patched, pytest.raises(PreemptedError, match=f"step {last_step} of 10"):
        patched.setattr(train.pretraining, "pretrain_views", stop)
        pretrain(cache, tmp_path / "run", config=config)
    assert_resumes_to(whole, cache, tmp_path / "run")


def test_features_that_are_not_finite_stop_the_run_and_leave_its_checkpoint(cache, tmp_path, monkeypatch):
    describe_now = train.refresh.describe

    def diverged(encoder, *arguments, **settings):
        with torch.no_grad():
            encoder.center[0].weight.fill_(torch.nan)
        return describe_now(encoder, *arguments, **settings)

    monkeypatch.setattr(train.refresh, "describe", diverged)
    with pytest.raises(SuperCLError, match="not finite"):
        pretrain(cache, tmp_path / "run", config=small())
    kept = sorted(file.name for file in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step_00000002.pt", "step_00000004.pt"]
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    monkeypatch.undo()
    pretrain(cache, tmp_path / "run", config=small())  # with the encoder of the checkpoint


def test_cases_of_one_patient_have_no_other_cases(tmp_path):
    cache = open_cache(
        write_noise(tmp_path / "noise.zarr", {"patient001_frame01": 1, "patient001_frame12": 2})
    )
    config = small(weak_labels=None, batch_size=2, steps=1)
    with pytest.raises(UsageError, match="'neighbours'"):
        pretrain(
            cache, tmp_path / "run", config=PretrainConfig(**{**vars(config), "neighbours": "other-cases"})
        )
    assert not (tmp_path / "run").exists()
    pretrain(cache, tmp_path / "run", config=config)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "change",
    [
        {"labels": torch.zeros(NUM_SLICES + 1, dtype=torch.int32)},
        {"labels": None},
        {"first_step": 9},
        {"first_step": -1},
        {"first_step": 0.5},
    ],
)
def test_a_checkpoint_with_labels_that_cannot_be_is_refused(cache, tmp_path, change):
    pretrain(cache, tmp_path / "run", config=small(steps=8))
    file = tmp_path / "run/checkpoints/step_00000008.pt"
    state = torch.load(file)
    assert (state["refresh"]["labels"].dtype, len(state["refresh"]["labels"])) == (torch.int32, NUM_SLICES)
    torch.save({**state, "refresh": {**state["refresh"], **change}}, file)
    (tmp_path / "run/weights.safetensors").unlink()
    described = tmp_path / "run/run.json"
    described.write_text(described.read_text().replace('"finished"', '"running"'))
    with pytest.raises(SuperCLError, match="cannot be restored"):
        pretrain(cache, tmp_path / "run", config=small(steps=8))


# ---------------------------------------------------------------- several processes

RANKS = """
import sys
import numpy as np, torch
from supercl_core.cache.reader import open_cache
from train import distributed
from train.data import SliceDataset
from train.models.unet import Encoder
from train.refresh import Refresh
from train.sampling import SliceOrder

dataset = SliceDataset(open_cache(sys.argv[1]))
with distributed.process_group():
    torch.manual_seed(distributed.rank())  # other encoders would find other labels
    refresh = Refresh(
        dataset=dataset,
        encoder=Encoder(1, 4),
        ccl=torch.zeros(len(dataset), dtype=torch.int32),
        order=SliceOrder(slices=dataset.slices, batch_size=6, seed=0, labels=np.zeros(len(dataset))),
        every=1,
        level=None,
        neighbours="any",
        batch_size=3,
    )
    found = refresh(4)
    result = {**found, "labels": refresh.ccl, "order": torch.tensor(refresh.order.labels)}
    torch.save(result, f"{sys.argv[2]}.{distributed.rank()}")
"""


def test_two_ranks_have_the_labels_of_the_first(cache_path, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for name, arguments in (("one", ()), ("two", torchrun)):
        command = [sys.executable, *arguments, script, cache_path, tmp_path / name]
        finished = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert finished.returncode == 0, finished.stderr
    wanted, *found = (torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    for result in found:
        assert result["labels"].tolist() == result["order"].tolist() == wanted["labels"].tolist()
        assert result["num_components"] == wanted["num_components"] > 1
        assert result["ccl_level"] == wanted["ccl_level"]
