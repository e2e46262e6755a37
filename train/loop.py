"""The one training loop, for pre-training and fine-tuning: steps, checkpoints, metrics, preemption.

Everything random is a function of (seed, step), and the learning rate of the step, so a checkpoint needs only the
step, the network, the optimiser and the weak labels where they are computed again while training, and a resumed run
equals one that never stopped, bit by bit on the CPU.
"""

from __future__ import annotations

import json
import math
import operator
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from supercl_core.config import check_setting
from supercl_core.errors import PreemptedError, SuperCLError, UsageError
from supercl_core.files import atomic_file
from supercl_core.progress import progress
from train import distributed
from train.data import Batch, BatchLoader, SliceDataset
from train.models.weights import read_torch_file
from train.refresh import Refresh
from train.runs import forget_metrics_after
from train.sampling import SliceOrder

KEPT_CHECKPOINTS: Final = 2
"""The last checkpoints that stay on disk."""

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

OptimiserName = Literal["sgd", "adam", "adamw"]
ComputeLosses = Callable[[Batch, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The settings that pre-training and fine-tuning share; each adds its own."""

    steps: int
    """Optimiser steps. An epoch is slices / batch_size steps, or a few more where batches hold groups."""
    batch_size: int
    """Slices a step and process."""
    patch_size: tuple[int, int] | None = None
    """Rows and columns of a crop, multiples of 16; None takes the cache's median slice size."""
    filters: int = 32
    """Channels of the network's first level (f0); fine-tuning needs those of its encoder."""
    in_channels: int | None = None
    """Input channels of the network; None takes the cache's. Single-channel images are repeated."""
    optimiser: OptimiserName = "adamw"
    lr: float
    """Highest learning rate, after the warm-up."""
    final_lr: float
    """Learning rate at the end of a half cosine."""
    warmup_steps: int
    weight_decay: float = 1e-4
    seed: int = 0
    device: str = "auto"
    log_every: int = 10
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "filters", "log_every", "checkpoint_every"):
            self.check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("final_lr", "warmup_steps", "weight_decay", "seed"):
            self.check(name, 0 <= getattr(self, name) < math.inf, "at least 0")
        self.check("lr", 0 < self.lr < math.inf, "a number above 0")

    def check(self, name: str, valid: bool, expected: object) -> None:
        """Raise UsageError for the setting `name` unless it is `valid`."""
        check_setting(name, getattr(self, name), valid, expected)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a half cosine from `lr` to `final_lr`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * done)) / 2

    def make_optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        """An optimiser over all parameters; SGD has a momentum of 0.9 (published)."""
        if self.optimiser == "sgd":
            return torch.optim.SGD(
                network.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay
            )
        kind = torch.optim.Adam if self.optimiser == "adam" else torch.optim.AdamW
        return kind(network.parameters(), lr=self.lr, weight_decay=self.weight_decay)


def select_device(name: str) -> torch.device:
    """The device of that name; `auto` is the GPU where there is one. Raises UsageError for one that is not there."""
    try:
        device = (
            torch.device("cuda" if torch.cuda.is_available() else "cpu")
            if name == "auto"
            else torch.device(name)
        )
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"The device {name!r} cannot be used.",
            found=str(error).splitlines()[0],
            next_step="`supercl doctor` lists the devices; device = 'auto' takes what there is.",
        ) from error
    return device


def fit(
    run_path: Path,
    *,
    network: nn.Module,
    dataset: SliceDataset,
    compute_losses: ComputeLosses,
    config: LoopConfig,
    device: torch.device,
    order: SliceOrder | None = None,
    refresh: Refresh | None = None,
) -> None:
    """Train up to `config.steps` steps, from the last checkpoint of the run if there is one.

    `compute_losses` returns scalars by name, of which `loss` is minimised and the others are logged. The generator
    it gets is seeded by the step. `order`: which slices each step holds, over all ranks; None takes a random one.
    `refresh`: computes weak labels again; its own order is the one that counts, and what it found is logged for the
    step that begins with it. Under `torchrun`, all ranks step together, the logged losses are means over ranks, and
    rank 0 alone writes.

    Raises SuperCLError before the optimiser moves when a loss is not finite, and PreemptedError after a
    checkpoint when a process is told to stop (SIGTERM, SIGUSR1, Ctrl-C).
    """
    checkpoints, num_steps = run_path / "checkpoints", config.steps
    optimiser = config.make_optimiser(network)
    first_step = load_checkpoint(checkpoints, network, optimiser, device, refresh=refresh)
    if first_step >= num_steps:
        return
    writes = distributed.rank() == 0
    if writes:
        forget_metrics_after(run_path, first_step)
    distributed.barrier()
    if refresh is not None:
        order = refresh.order
    elif order is None:
        batch_size = config.batch_size * distributed.world_size()
        order = SliceOrder(slices=dataset.slices, batch_size=batch_size, seed=config.seed)
    loader = BatchLoader(
        dataset,
        order,
        device=device,
        first_step=first_step,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    generator = torch.Generator(device)
    network.train()
    with (
        closing(iter(loader)) as batches,
        _stop_requests() as stop_requested,
        progress("train", total=num_steps, unit="steps", done=first_step, shown=writes) as advance,
        (run_path / "metrics.jsonl").open("a", encoding="utf-8") as log,
    ):
        since, waited, steps_since = time.perf_counter(), 0.0, 0
        for step in range(first_step, num_steps):
            if refresh is not None and refresh.due(step):
                begun = time.perf_counter()
                entry = {"step": step + 1, **refresh(step), "seconds": time.perf_counter() - begun}
                loader.restart(refresh.order, step)
                since += entry["seconds"]
                if writes:
                    log.write(json.dumps(entry) + "\n")
            lr = config.learning_rate(step)
            for group in optimiser.param_groups:
                group["lr"] = lr
            generator.manual_seed(step_seed(config.seed, step, distributed.rank()))
            losses = compute_losses(next(batches), generator)
            values = {name: distributed.mean(value).item() for name, value in losses.items()}
            _check_finite(values, run_path, step)
            optimiser.zero_grad(set_to_none=True)
            losses["loss"].backward()
            optimiser.step()
            steps_since += 1
            done = step + 1
            if writes and (done % config.log_every == 0 or done == num_steps):
                seconds = time.perf_counter() - since
                entry = {
                    "step": done,
                    **values,
                    "lr": lr,
                    "samples_per_s": steps_since * config.batch_size * distributed.world_size() / seconds,
                    "data_wait_share": (loader.wait_s - waited) / seconds,
                    "seconds": seconds,
                }
                log.write(json.dumps(entry) + "\n")
                log.flush()
                since, waited, steps_since = time.perf_counter(), loader.wait_s, 0
            advance(note=f"loss {values['loss']:.4f}")
            stopping = distributed.any_rank(stop_requested(), device)
            if writes and (done % config.checkpoint_every == 0 or done == num_steps or stopping):
                save_checkpoint(checkpoints, done, network, optimiser, refresh=refresh)
            if stopping and done < num_steps:
                raise PreemptedError(
                    "Training was told to stop.",
                    where=run_path,
                    found=f"a checkpoint after step {done} of {num_steps}",
                    next_step="Run the same command again; it goes on from there.",
                )


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for everything random in one step of one process; neighbouring steps have unrelated ones."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def save_checkpoint(
    folder: Path,
    step: int,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    *,
    refresh: Refresh | None = None,
) -> None:
    """Write the state after `step` steps atomically, and drop all but the last checkpoints."""
    state = {"step": step, "network": network.state_dict(), "optimiser": optimiser.state_dict()}
    if refresh is not None:
        state["refresh"] = refresh.state_dict()
    with atomic_file(folder / f"step_{step:08d}.pt") as wip:
        torch.save(state, wip)
    for old in sorted(folder.glob("step_*.pt"))[:-KEPT_CHECKPOINTS]:
        old.unlink()


def load_checkpoint(
    folder: Path,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    device: torch.device,
    *,
    refresh: Refresh | None = None,
) -> int:
    """Restore the last checkpoint, if there is one; return the number of steps done.

    Raises SuperCLError for a file that is damaged or of another architecture.
    """
    files = sorted(folder.glob("step_*.pt"))
    if not files:
        return 0
    try:
        state = read_torch_file(files[-1], device)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        step, first_step = operator.index(state["step"]), 0
        if refresh is not None:
            refresh.load_state_dict(state["refresh"])
            first_step = refresh.order.first_step
        if not 0 <= first_step <= step:
            raise ValueError(f"step {step}, weak labels of step {first_step}")
        return step
    except Exception as error:  # a damaged file raises nearly anything
        reason = error.found if isinstance(error, SuperCLError) else f"{type(error).__name__}: {error}"
        raise SuperCLError(
            "The run's last checkpoint cannot be restored.",
            where=files[-1],
            expected="an undamaged checkpoint of the same network",
            found=str(reason).splitlines()[0][:300],
            next_step="Delete this file to go on from the checkpoint before it, or from the start.",
        ) from error


def _check_finite(values: dict[str, float], run_path: Path, step: int) -> None:
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        terms = [name for name in bad if name != "loss"] or list(bad)
        raise SuperCLError(
            f"The loss is not finite: {', '.join(terms)}.",
            where=f"{run_path}, step {step}",
            expected="finite values",
            found=", ".join(f"{name} = {value}" for name, value in values.items()),
            next_step="Lower the learning rate; the last checkpoint is from before this step.",
        )


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM, SIGUSR1 and Ctrl-C into a question that the loop asks after every step.

    A second Ctrl-C stops at once.
    """
    requested = False

    def request(*_: object) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, request) for number in _STOP_SIGNALS}
    except ValueError:  # not in the main thread: nobody sends it signals
        before = {}
    try:
        yield lambda: requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
