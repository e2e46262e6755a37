"""The loop: exact resumption, checkpoints, preemption, losses that are not finite, unreadable data, rates."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import train.loop
from supercl_core.cache.reader import open_cache
from supercl_core.errors import (
    CacheError,
    PreemptedError,
    StorageError,
    SuperCLError,
    UsageError,
    storage_error,
)
from train.checkpoints import State, load_checkpoint, save_checkpoint
from train.data import SliceDataset
from train.device import prepare
from train.loading import BatchLoader
from train.loop import LoopConfig, fit, step_seed
from train.runs import read_metrics

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NUM_STEPS = 9


@pytest.fixture
def dataset(cache_path):
    return SliceDataset(open_cache(cache_path), patch_size=(16, 16))


def small_network(width=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 1, 3))


def settings(**changes):
    """The settings of all runs here."""
    values = {"steps": NUM_STEPS, "batch_size": 4, "lr": 0.05, "final_lr": 0.0, "warmup_steps": 2, "seed": 1}
    values |= {"optimiser": "sgd", "precision": "float32", "weight_decay": 1e-3}
    return LoopConfig(**{**values, "log_every": 1, "checkpoint_every": 3, **changes})


def run_fit(path, dataset, *, at_step=None, network=None, make_losses=None, **changes):
    """Fit a small network; `at_step` is called with the number of steps begun. Returns the network."""
    network = network or small_network()
    config = settings(**changes)
    path.mkdir(exist_ok=True)
    begun = []
    called = prepare(network, config=config, device=CPU)

    def compute_losses(batch, generator):
        begun.append(batch)
        if at_step is not None:
            at_step(len(begun))
        noise = torch.randn(batch.image_BCYX.shape, generator=generator)
        term = called(batch.image_BCYX + 0.1 * noise).float().square().mean()
        return {"loss": 2 * term, "loss_ins": term}

    fit(
        path,
        network=network,
        dataset=dataset,
        compute_losses=make_losses(network) if make_losses else compute_losses,
        config=config,
        device=CPU,
    )
    return network


def checkpoints(path):
    return sorted(file.name for file in (path / "checkpoints").iterdir())


def logged(path):
    names = ("step", "loss", "loss_ins", "grad_norm", "lr")
    return [{name: entry.get(name) for name in names} for entry in read_metrics(path)]


def as_vector(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def assert_equal_states(one, other):
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def state_of(network, *, scale=False):
    """A network as a run has it with Adam, and with the gradients' scale of float16 if that is wanted."""
    optimiser = settings(optimiser="adam").make_optimiser(network)
    return State(network=network, optimiser=optimiser, scaler=torch.amp.GradScaler("cpu", enabled=scale))


class Killed(BaseException):
    """Ends a run in the middle of a step, as nothing in the loop expects it."""


def break_gradient(network, *, step, value, before=None):
    """Make the gradient of one step not finite; `before`: a list for the weights that every step begins with."""
    weight, calls = network[0].weight, []

    def hook(gradient):
        calls.append(None)
        if before is not None:
            before.append(weight.detach().clone())
        return gradient * value if len(calls) == step else gradient

    weight.register_hook(hook)


def kill_in_step(number):
    def at_step(begun):
        if begun == number:
            raise Killed

    return at_step


# ---------------------------------------------------------------- resumption


@pytest.mark.parametrize(
    "changes",
    [
        {"optimiser": "sgd"},
        {"optimiser": "adam", "channels_last": False},
        {"optimiser": "adamw"},
        {"optimiser": "adamw", "precision": "bfloat16", "clip_norm": 0.01},
        {"optimiser": "sgd", "precision": "float16"},
    ],
)
@pytest.mark.parametrize("step", [2, 6, 9])  # before a checkpoint, between two, in the last step
def test_a_killed_run_resumes_bit_by_bit(tmp_path, dataset, changes, step):
    assert len(dataset) // 4 == 5  # steps of an epoch: two of the checkpoints are in the middle of one
    whole = run_fit(tmp_path / "whole", dataset, **changes)
    with pytest.raises(Killed):
        run_fit(tmp_path / "killed", dataset, at_step=kill_in_step(step), **changes)
    assert len(read_metrics(tmp_path / "killed")) == step - 1
    resumed = run_fit(tmp_path / "killed", dataset, **changes)
    assert_equal_states(whole, resumed)
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert [entry["step"] for entry in logged(tmp_path / "killed")] == list(range(1, NUM_STEPS + 1))


def test_steps_logged_after_the_checkpoint_are_done_again(tmp_path, dataset, capsys):
    with pytest.raises(Killed):
        run_fit(tmp_path / "run", dataset, at_step=kill_in_step(6))
    assert checkpoints(tmp_path / "run") == ["step_00000003.pt"]
    steps_redone = []
    run_fit(tmp_path / "run", dataset, at_step=steps_redone.append)
    assert len(steps_redone) == NUM_STEPS - 3
    assert "train: 9/9 steps" in capsys.readouterr().err


@pytest.mark.parametrize(("keep", "kept"), [(1, [9]), (2, [6, 9]), (7, [3, 6, 9])])
def test_only_the_last_checkpoints_stay(tmp_path, dataset, keep, kept):
    run_fit(tmp_path / "run", dataset, keep_checkpoints=keep)
    assert checkpoints(tmp_path / "run") == [f"step_{step:08d}.pt" for step in kept]


def test_a_finished_fit_takes_no_step_and_keeps_its_metrics(tmp_path, dataset):
    run_fit(tmp_path / "run", dataset)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    run_fit(tmp_path / "run", dataset, at_step=kill_in_step(1))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


# ---------------------------------------------------------------- preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_signal_ends_after_a_checkpoint_of_the_current_step(tmp_path, dataset, number):
    before = signal.getsignal(number)

    def at_step(begun):
        if begun == 5:
            os.kill(os.getpid(), number)

    with pytest.raises(PreemptedError, match="step 5 of 9"):
        run_fit(tmp_path / "run", dataset, at_step=at_step)
    assert checkpoints(tmp_path / "run") == ["step_00000003.pt", "step_00000005.pt"]
    assert signal.getsignal(number) is before
    assert_equal_states(run_fit(tmp_path / "run", dataset), run_fit(tmp_path / "whole", dataset))
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_a_stop_signal_in_the_last_step_finishes_the_run(tmp_path, dataset):
    def at_step(begun):
        if begun == NUM_STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    run_fit(tmp_path / "run", dataset, at_step=at_step)
    assert checkpoints(tmp_path / "run")[-1] == "step_00000009.pt"


def test_training_outside_the_main_thread_works_without_signals(tmp_path, dataset):
    thread = threading.Thread(target=run_fit, args=(tmp_path / "run", dataset))
    thread.start()
    thread.join()
    assert len(read_metrics(tmp_path / "run")) == NUM_STEPS


# ---------------------------------------------------------------- losses that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_optimiser_moves(tmp_path, dataset, value):
    network = small_network()
    seen = []

    def make_losses(network):
        def compute_losses(batch, generator):
            seen.append([parameter.clone() for parameter in network.parameters()])
            good = network(batch.image_BCYX).square().mean()
            bad = good * value if len(seen) == 5 else good
            return {"loss": good + bad, "loss_ins": good, "loss_intra": bad}

        return compute_losses

    with pytest.raises(SuperCLError, match="not finite: loss_intra\\.") as stopped:
        run_fit(tmp_path / "run", dataset, network=network, make_losses=make_losses)
    assert "step 4" in stopped.value.where
    assert "loss_ins = 0." in stopped.value.found
    for now, before in zip(network.parameters(), seen[-1], strict=True):
        assert torch.equal(now, before)
    assert checkpoints(tmp_path / "run") == ["step_00000003.pt"]
    assert len(read_metrics(tmp_path / "run")) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_optimiser_moves(tmp_path, dataset, value):
    network = small_network()
    break_gradient(network, step=5, value=value)
    with pytest.raises(SuperCLError, match="gradient is not finite") as stopped:
        run_fit(tmp_path / "run", dataset, network=network)
    assert f"grad_norm = {value}" in stopped.value.found
    assert checkpoints(tmp_path / "run") == ["step_00000003.pt"]
    assert len(read_metrics(tmp_path / "run")) == 4
    assert torch.isfinite(as_vector(network)).all()


def test_float16_skips_a_step_whose_gradient_overflows(tmp_path, dataset):
    network = small_network()
    before = []
    break_gradient(network, step=5, value=float("inf"), before=before)
    run_fit(tmp_path / "run", dataset, network=network, precision="float16")
    skipped = [entry["step"] for entry in read_metrics(tmp_path / "run") if "grad_norm" not in entry]
    assert 5 in skipped
    same = [step for step in range(1, NUM_STEPS) if torch.equal(before[step - 1], before[step])]
    assert same == [step for step in skipped if step < NUM_STEPS]
    assert len(same) < NUM_STEPS - 3


def test_float16_logs_and_clips_the_gradient_without_its_scale(tmp_path, dataset):
    still = {"lr": 1e-9, "weight_decay": 0.0, "clip_norm": 0.01}
    networks, norms = {}, {}
    for precision in ("float16", "float32"):
        networks[precision] = run_fit(tmp_path / precision, dataset, precision=precision, **still)
        norms[precision] = read_metrics(tmp_path / precision)[-1]["grad_norm"]
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.02)
    clipped = torch.stack([parameter.grad.norm() for parameter in networks["float16"].parameters()])
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_float16_does_not_skip_for_ever(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(train.loop, "MOST_SKIPPED", 3)
    network = small_network()
    network[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(SuperCLError, match="gradient is not finite") as stopped:
        run_fit(tmp_path / "run", dataset, network=network, precision="float16")
    assert stopped.value.where.endswith("step 3")


def test_float16_may_skip_any_number_of_steps_that_are_not_in_a_row(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(train.loop, "MOST_SKIPPED", 3)
    network, calls = small_network(), itertools.count()
    network[0].weight.register_hook(lambda grad: grad * float("inf") if next(calls) % 2 else grad)
    run_fit(tmp_path / "run", dataset, network=network, precision="float16")
    assert sum("grad_norm" not in entry for entry in read_metrics(tmp_path / "run")) > 3


def test_large_gradients_are_scaled_down(tmp_path, dataset):
    settings = {"steps": 1, "warmup_steps": 0, "weight_decay": 0.0, "lr": 0.5}
    before = as_vector(small_network())
    moved = {}
    for clip_norm in (0.0, 0.01, 1e6):
        path = tmp_path / str(clip_norm)
        after = as_vector(run_fit(path, dataset, clip_norm=clip_norm, **settings))
        moved[clip_norm] = (after - before).norm().item()
        [entry] = read_metrics(path)
        assert entry["grad_norm"] == pytest.approx(moved[0.0] / 0.5, rel=1e-4)
    assert moved[0.0] == pytest.approx(moved[1e6])
    assert moved[0.0] > 0.5 * 0.02
    assert moved[0.01] == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_a_run_that_fails_leaves_no_gathering_thread(tmp_path, dataset):
    with pytest.raises(Killed) as stopped:
        run_fit(tmp_path / "run", dataset, at_step=kill_in_step(2))
    assert stopped.tb is not None  # keeps the loop's frame alive
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gather")]


# ---------------------------------------------------------------- data that cannot be read


def fail_to_read(monkeypatch, *, step, error):
    """From now on, the batch of that step cannot be had."""

    class Vanishing(BatchLoader):
        def __iter__(self):
            for index, batch in enumerate(super().__iter__(), 1):
                if index == step:
                    raise error
                yield batch

    monkeypatch.setattr(train.loop, "BatchLoader", Vanishing)


@pytest.mark.parametrize(
    ("error", "kind", "found"),
    [
        (storage_error(OSError(errno.EIO, "I/O error", "/mnt/a/0.shard")), StorageError, "I/O error; "),
        (OSError(errno.ESTALE, "Stale file handle", "/mnt/a/0.shard"), StorageError, "Stale file handle; "),
        (CacheError("Gone.", where="/mnt/a/0.shard", next_step="Mount it."), CacheError, ""),
    ],
)
def test_a_cache_that_vanishes_leaves_a_checkpoint_of_the_steps_done(
    tmp_path, dataset, monkeypatch, error, kind, found
):
    with monkeypatch.context() as patched, pytest.raises(kind) as stopped:
        fail_to_read(patched, step=6, error=error)
        run_fit(tmp_path / "run", dataset)
    assert stopped.value.where == "/mnt/a/0.shard"
    assert stopped.value.found == f"{found}the run can go on after step 5: run the same command again"
    assert checkpoints(tmp_path / "run") == ["step_00000003.pt", "step_00000005.pt"]
    assert_equal_states(run_fit(tmp_path / "run", dataset), run_fit(tmp_path / "whole", dataset))
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_a_cache_that_vanishes_at_once_leaves_no_checkpoint(tmp_path, dataset, monkeypatch):
    fail_to_read(monkeypatch, step=1, error=OSError(errno.EIO, "I/O error", "/mnt/a/0.shard"))
    with pytest.raises(StorageError) as stopped:
        run_fit(tmp_path / "run", dataset)
    assert stopped.value.found == "I/O error"
    assert not (tmp_path / "run/checkpoints").exists()


def test_processes_that_see_different_checkpoints_do_not_start(tmp_path, dataset, monkeypatch):
    run_fit(tmp_path / "run", dataset)
    monkeypatch.setattr(train.loop.distributed, "of_rank_0", lambda step: step - 3)
    with pytest.raises(SuperCLError, match="see different checkpoints"):
        run_fit(tmp_path / "run", dataset, at_step=kill_in_step(1))


def test_a_mistake_in_reading_keeps_its_traceback_and_the_steps_done(tmp_path, dataset, monkeypatch):
    fail_to_read(monkeypatch, step=5, error=ZeroDivisionError("a mistake"))
    with pytest.raises(ZeroDivisionError, match="a mistake"):
        run_fit(tmp_path / "run", dataset)
    assert checkpoints(tmp_path / "run") == ["step_00000003.pt", "step_00000004.pt"]


RANKS = """
import os, sys, types
from pathlib import Path
import torch
import train.loop
from supercl_core.errors import StorageError, SuperCLError, UsageError
from train import distributed
from train.loop import LoopConfig, fit

class Loader:
    wait_s = 0.0
    def __init__(self, *arguments, rank, **settings):
        self.rank = rank
    def __iter__(self):
        for step in range(9):
            if step == 4 and self.rank == 1:
                raise StorageError("The disk reports an error.", where="shard", found="EIO", next_step="Look.")
            yield types.SimpleNamespace(image=torch.ones(2, 3) * self.rank)

train.loop.BatchLoader = Loader
config = LoopConfig(steps=9, batch_size=2, lr=0.1, final_lr=0, warmup_steps=0, log_every=1, precision="float32")
def refuse():
    assert distributed.rank() == 0, "rank 0 has failed before"
    raise UsageError("Another run.", next_step="Name another folder.")

with distributed.process_group():
    refused = None
    try:
        distributed.rank_0_first(refuse)
    except UsageError as error:
        refused = error.what
    network = torch.nn.Linear(3, 1)
    called = distributed.parallel(network, torch.device("cpu"))
    draws = []
    def losses(batch, generator):
        draws.append(torch.rand(1, generator=generator).item())
        return {"loss": called(batch.image).mean()}
    try:
        fit(Path(sys.argv[1]), network=network, dataset=types.SimpleNamespace(slices=range(8)),
            compute_losses=losses, config=config, device=torch.device("cpu"), order=object())
    except SuperCLError as error:
        files = os.listdir(Path(sys.argv[1]) / "checkpoints")
        result = {"refused": refused, "error": error.message(), "draws": draws, "files": files}
        torch.save(result, Path(sys.argv[1]) / f"rank_{distributed.rank()}.pt")
"""


def test_a_rank_that_cannot_read_stops_all_after_a_checkpoint(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    finished = subprocess.run(
        [str(part) for part in (sys.executable, *torchrun, script, tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert finished.returncode == 0, finished.stderr
    results = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in (0, 1)]
    assert results[0]["error"].startswith("Another process could not read its slices.")
    assert results[1]["error"].startswith("The disk reports an error.")
    for result in results:
        assert result["refused"] == "Another run."
        assert "the run can go on after step 4" in result["error"]
        assert result["files"] == ["step_00000004.pt"]
    assert results[0]["draws"] == results[1]["draws"]
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert steps[0]["loss"] != steps[1]["loss"]


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_usable(tmp_path, dataset, damage):
    whole = run_fit(tmp_path / "run", dataset)
    file = tmp_path / "run" / "checkpoints" / "step_00000009.pt"
    content = {"truncated": file.read_bytes()[:300], "empty": b"", "foreign": b"no checkpoint\n" * 9}[damage]
    file.write_bytes(content)
    with pytest.raises(SuperCLError, match="last checkpoint cannot be restored") as refused:
        run_fit(tmp_path / "run", dataset)
    assert refused.value.where == file
    file.unlink()  # what the message says
    assert_equal_states(run_fit(tmp_path / "run", dataset), whole)
    assert len(logged(tmp_path / "run")) == NUM_STEPS


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, dataset):
    run_fit(tmp_path / "run", dataset)
    with pytest.raises(SuperCLError, match="same network"):
        run_fit(tmp_path / "run", dataset, network=small_network(width=5))


@pytest.mark.parametrize("step", [-1, 2.5, "9", None])
def test_a_checkpoint_of_no_step_is_refused(tmp_path, step):
    state = state_of(small_network())
    save_checkpoint(tmp_path, 9, state, keep=1)
    stored = torch.load(tmp_path / "step_00000009.pt", weights_only=True)
    torch.save({**stored, "step": step}, tmp_path / "step_00000009.pt")
    with pytest.raises(SuperCLError, match="cannot be restored"):
        load_checkpoint(tmp_path, state, CPU)


def test_a_checkpoint_with_code_is_refused_without_advice_to_run_it(tmp_path):
    torch.save({"step": tmp_path}, tmp_path / "step_00000009.pt")
    with pytest.raises(SuperCLError, match="other objects than tensors") as refused:
        load_checkpoint(tmp_path, state_of(small_network()), CPU)
    assert "weights_only" not in refused.value.message()


def test_checkpoints_restore_network_and_optimiser(tmp_path):
    state, other = state_of(small_network(), scale=True), state_of(small_network(), scale=True)
    state.scaler.scale(state.network(torch.ones(2, 1, 8, 8)).sum()).backward()
    state.scaler.step(state.optimiser)
    state.scaler.update(1024.0)
    save_checkpoint(tmp_path, 12, state, keep=1)
    assert load_checkpoint(tmp_path, other, CPU) == 12
    assert_equal_states(state.network, other.network)
    for one, two in zip(state.optimiser.state.values(), other.optimiser.state.values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert other.scaler.get_scale() == 1024
    assert load_checkpoint(tmp_path / "nothing", other, CPU) == 0


# ---------------------------------------------------------------- what is logged, rates, seeds, devices


def test_logged_steps_hold_losses_rate_and_throughput(tmp_path, dataset):
    run_fit(tmp_path / "run", dataset)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for line in lines:
        entry = json.loads(line)
        assert entry["loss"] == pytest.approx(2 * entry["loss_ins"])
        assert entry["samples_per_s"] == pytest.approx(4 / entry["seconds"])
        assert 0 <= entry["data_wait_share"] <= 1
    assert [json.loads(line)["lr"] for line in lines[:3]] == [0.025, 0.05, 0.05]


def test_waiting_for_data_is_said_once(tmp_path, dataset, monkeypatch, capsys):
    class Slow(BatchLoader):
        def __iter__(self):
            for batch in super().__iter__():
                self.wait_s += 100
                yield batch

    monkeypatch.setattr(train.loop, "BatchLoader", Slow)
    run_fit(tmp_path / "run", dataset, log_every=2)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "of the time goes into waiting for data" in notes[0]
    assert read_metrics(tmp_path / "run")[0]["data_wait_share"] > 100


def test_the_rate_warms_up_and_falls_to_the_final_rate():
    config = settings(steps=104, lr=1.0, final_lr=0.2, warmup_steps=4)
    rates = [config.schedules()[""](step) for step in range(105)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[54] == pytest.approx(0.6)
    assert rates[104] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_the_rate_reaches_the_optimiser(tmp_path, dataset):
    network = nn.Conv2d(1, 1, 1)
    start = network.bias.item()
    fit(
        tmp_path,
        network=network,
        dataset=dataset,
        compute_losses=lambda batch, generator: {"loss": network(batch.image_BCYX).mean()},
        config=settings(steps=1, lr=0.8, warmup_steps=4, optimiser="sgd", weight_decay=0.0),
        device=CPU,
    )
    assert network.bias.item() == pytest.approx(start - 0.8 / 4)  # the bias has a gradient of 1


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_optimisers_carry_their_settings(name, kind):
    optimiser = settings(optimiser=name, lr=0.3, weight_decay=0.02).make_optimiser(small_network())
    assert type(optimiser) is kind
    (group,) = optimiser.param_groups
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.3, 0.02, 6)
    assert group["fused"]
    assert group.get("momentum", 0.9) == 0.9


def test_step_seeds_differ_by_seed_and_step():
    seeds = {step_seed(seed, step) for seed in range(4) for step in range(50)}
    assert len(seeds) == 4 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(1, 2) == step_seed(1, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"keep_checkpoints": 0},
        {"clip_norm": -1.0},
        {"clip_norm": float("inf")},
        {"lr": float("nan")},
        {"warmup_steps": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        settings(**wrong)
