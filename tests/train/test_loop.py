"""The loop: exact resumption, checkpoints, preemption, losses that are not finite, learning rates, devices."""

import json
import os
import signal
import threading

import pytest
import torch
from torch import nn

from supercl_core.cache_reader import open_cache
from supercl_core.errors import PreemptedError, SuperCLError, UsageError
from train.data import SliceDataset
from train.loop import (
    LoopConfig,
    fit,
    load_checkpoint,
    save_checkpoint,
    select_device,
    step_seed,
)
from train.runs import read_metrics

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
    return LoopConfig(**{**values, "weight_decay": 1e-3, "log_every": 1, "checkpoint_every": 3, **changes})


def run_fit(path, dataset, *, at_step=None, network=None, optimiser="sgd", make_losses=None):
    """Fit a small network; `at_step` is called with the number of steps begun. Returns the network."""
    network = network or small_network()
    path.mkdir(exist_ok=True)
    begun = []

    def compute_losses(batch, generator):
        begun.append(batch)
        if at_step is not None:
            at_step(len(begun))
        noise = torch.randn(batch.image_BCYX.shape, generator=generator)
        term = network(batch.image_BCYX + 0.1 * noise).square().mean()
        return {"loss": 2 * term, "loss_ins": term}

    fit(
        path,
        network=network,
        dataset=dataset,
        compute_losses=make_losses(network) if make_losses else compute_losses,
        config=settings(optimiser=optimiser),
        device=CPU,
    )
    return network


def checkpoints(path):
    return sorted(file.name for file in (path / "checkpoints").iterdir())


def logged(path):
    return [{key: entry[key] for key in ("step", "loss", "loss_ins", "lr")} for entry in read_metrics(path)]


def assert_equal_states(one, other):
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


class Killed(BaseException):
    """Ends a run in the middle of a step, as nothing in the loop expects it."""


def kill_in_step(number):
    def at_step(begun):
        if begun == number:
            raise Killed

    return at_step


# ---------------------------------------------------------------- resumption


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("step", [2, 6, 9])  # before a checkpoint, between two, in the last step
def test_a_killed_run_resumes_bit_by_bit(tmp_path, dataset, optimiser, step):
    whole = run_fit(tmp_path / "whole", dataset, optimiser=optimiser)
    with pytest.raises(Killed):
        run_fit(tmp_path / "killed", dataset, optimiser=optimiser, at_step=kill_in_step(step))
    assert len(read_metrics(tmp_path / "killed")) == step - 1
    resumed = run_fit(tmp_path / "killed", dataset, optimiser=optimiser)
    assert_equal_states(whole, resumed)
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert [entry["step"] for entry in logged(tmp_path / "killed")] == list(range(1, NUM_STEPS + 1))


def test_steps_logged_after_the_checkpoint_are_done_again(tmp_path, dataset):
    with pytest.raises(Killed):
        run_fit(tmp_path / "run", dataset, at_step=kill_in_step(6))
    assert checkpoints(tmp_path / "run") == ["step_00000003.pt"]
    steps_redone = []
    run_fit(tmp_path / "run", dataset, at_step=steps_redone.append)
    assert len(steps_redone) == NUM_STEPS - 3


def test_only_the_last_two_checkpoints_stay(tmp_path, dataset):
    run_fit(tmp_path / "run", dataset)
    assert checkpoints(tmp_path / "run") == ["step_00000006.pt", "step_00000009.pt"]


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


def test_a_run_that_fails_leaves_no_gathering_thread(tmp_path, dataset):
    with pytest.raises(Killed) as stopped:
        run_fit(tmp_path / "run", dataset, at_step=kill_in_step(2))
    assert stopped.tb is not None  # keeps the loop's frame alive
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gather")]


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
    network = small_network()
    optimiser = settings().make_optimiser(network)
    save_checkpoint(tmp_path, 9, network, optimiser)
    state = torch.load(tmp_path / "step_00000009.pt", weights_only=True)
    torch.save({**state, "step": step}, tmp_path / "step_00000009.pt")
    with pytest.raises(SuperCLError, match="cannot be restored"):
        load_checkpoint(tmp_path, network, optimiser, CPU)


def test_a_checkpoint_with_code_is_refused_without_advice_to_run_it(tmp_path):
    network = small_network()
    torch.save({"step": tmp_path}, tmp_path / "step_00000009.pt")
    with pytest.raises(SuperCLError, match="other objects than tensors") as refused:
        load_checkpoint(tmp_path, network, settings().make_optimiser(network), CPU)
    assert "weights_only" not in refused.value.message()


def test_checkpoints_restore_network_and_optimiser(tmp_path):
    network = small_network()
    optimiser = settings(optimiser="adam").make_optimiser(network)
    network(torch.ones(2, 1, 8, 8)).sum().backward()
    optimiser.step()
    save_checkpoint(tmp_path, 12, network, optimiser)
    other = small_network()
    other_optimiser = settings(optimiser="adam").make_optimiser(other)
    assert load_checkpoint(tmp_path, other, other_optimiser, CPU) == 12
    assert_equal_states(network, other)
    for one, two in zip(optimiser.state.values(), other_optimiser.state.values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert load_checkpoint(tmp_path / "nothing", other, other_optimiser, CPU) == 0


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


def test_the_rate_warms_up_and_falls_to_the_final_rate():
    config = settings(steps=104, lr=1.0, final_lr=0.2, warmup_steps=4)
    rates = [config.learning_rate(step) for step in range(105)]
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
    assert group.get("momentum", 0.9) == 0.9


def test_step_seeds_differ_by_seed_step_and_rank():
    seeds = {step_seed(seed, step, rank) for seed in range(4) for step in range(50) for rank in range(3)}
    assert len(seeds) == 4 * 50 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(1, 2) == step_seed(1, 2)


def test_devices_by_name():
    assert select_device("cpu") == CPU
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu-v9", "cuda:99", ""):
        with pytest.raises(UsageError, match="cannot be used") as refused:
            select_device(name)
        assert repr(name) in refused.value.what
