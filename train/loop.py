"""The one training loop, for pre-training and fine-tuning: steps, metrics, preemption, checkpoints at their times.

Everything random is a function of (seed, step), and the learning rate of the step, so a checkpoint needs little
(`train.checkpoints`), and a resumed run equals one that never stopped, bit by bit on the CPU. How the network is placed
and called is left to `train.device`, what is written to `train.run_log`. Called by pre-training and fine-tuning.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from supercl_core.config import check_setting
from supercl_core.errors import PreemptedError, SuperCLError, storage_error
from supercl_core.progress import progress
from train import distributed
from train.averaging import WeightAverage
from train.checkpoints import State, load_checkpoint, save_checkpoint
from train.data import Batch, SliceDataset
from train.device import peak_memory
from train.loading import BatchLoader
from train.models.backbones import UNET
from train.refresh import Refresh
from train.run_log import live_line, run_log
from train.sampling import SliceOrder
from train.stopping import stop_requests

MOST_SKIPPED: Final = 50
"""Steps in a row that float16 may skip because its gradients overflow; finding a scale takes about 16."""

OptimiserName = Literal["sgd", "adam", "adamw"]
ComputeLosses = Callable[[Batch, torch.Generator], dict[str, Tensor]]


class Schedule(NamedTuple):
    """A learning rate over the steps: linear warm-up, then a half cosine from `highest` to `final`."""

    highest: float
    final: float
    warmup_steps: int
    steps: int

    def __call__(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup_steps:
            return self.highest * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final + (self.highest - self.final) * (1 + math.cos(math.pi * done)) / 2


class Validation(Protocol):
    """Scores of the network while it trains, on cases that it does not train on."""

    def due(self, done: int) -> bool:
        """Whether to score after `done` steps."""

    def __call__(self, done: int) -> dict[str, float]:
        """The scores by name."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The settings that pre-training and fine-tuning share; each adds its own."""

    steps: int
    """Optimiser steps. An epoch is slices / batch_size steps, or a few more where batches hold groups."""
    epochs: int | None = None
    """Passes over all slices, in place of `steps`."""
    batch_size: int
    """Slices a step and process."""
    patch_size: tuple[int, int] | None = None
    """Rows and columns of a crop, multiples of 16; None takes the cache's median slice size."""
    backbone: str = "unet"
    """The encoder: `unet` (published), `smp:NAME` or `monai:NAME`; fine-tuning needs that of its weights."""
    filters: int = 32
    """Channels of the network's first level (f0); fine-tuning needs those of its encoder."""
    in_channels: int | None = None
    """Input channels of the network; None takes the cache's. Single-channel images are repeated."""
    adjacent_slices: int = 0
    """Slices before and behind each one that are further channels of its image (2.5-D). Fine-tune with the number of
    pre-training; the first kernel of an encoder of single slices is adapted."""
    optimiser: OptimiserName = "adamw"
    """adamw, adam, or sgd with a momentum of 0.9 (published)."""
    lr: float
    """Highest learning rate, after the warm-up."""
    final_lr: float
    """Learning rate at the end of a half cosine."""
    warmup_steps: int
    """Steps over which the learning rate rises to its highest."""
    weight_decay: float = 1e-4
    """Of all parameters; decoupled from the gradient with adamw."""
    clip_norm: float = 0.0
    """Gradients of a larger norm are scaled down to this one; 0 leaves all as they are."""
    seed: int = 0
    """Of all that is random: initial weights, order of slices, crops and views."""
    device: str = "auto"
    """Such as cpu or cuda:1; `auto` takes a GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of convolutions and matrix products (autocast); `auto` takes bfloat16 where the device has units for it, else
    float32. float16 scales the loss."""
    channels_last: bool = True
    """Whether images and features lie in memory with their channels last, which most devices compute faster."""
    compile: bool = False
    """Whether the network is compiled (torch.compile): minutes at the start, for faster steps on some devices."""
    log_every: int = 10
    """Steps from one line of metrics.jsonl to the next."""
    checkpoint_every: int = 500
    """Steps from one checkpoint to the next."""
    keep_checkpoints: int = 2
    """The last checkpoints that stay on disk."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "filters", "log_every", "checkpoint_every", "keep_checkpoints"):
            self.check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("final_lr", "warmup_steps", "weight_decay", "clip_norm", "seed", "adjacent_slices"):
            self.check(name, 0 <= getattr(self, name) < math.inf, "at least 0")
        self.check("in_channels", self.in_channels is None or self.in_channels >= 1, "at least 1")
        self.check("lr", 0 < self.lr < math.inf, "a number above 0")
        self.check("epochs", self.epochs is None or self.epochs >= 1, "at least 1")
        default = self.steps == type(self).__dataclass_fields__["steps"].default
        self.check("steps", self.epochs is None or default, "no epochs (--set epochs=none), or the default")
        known = self.backbone == UNET or self.filters == LoopConfig.filters
        self.check("filters", known, "the default: only the width of backbone = 'unet' can be set")

    def check(self, name: str, valid: bool, expected: object) -> None:
        """Raise UsageError for the setting `name` unless it is `valid`."""
        check_setting(name, getattr(self, name), valid, expected)

    def in_steps(self, steps_per_epoch: int) -> Self:
        """The same settings with a budget in steps, as a run stores them."""
        return (
            self if self.epochs is None else replace(self, epochs=None, steps=self.epochs * steps_per_epoch)
        )

    def schedules(self) -> dict[str, Schedule]:
        """The learning rates of the parameters whose names begin with a key, those of "" for all others."""
        return {"": Schedule(self.lr, self.final_lr, self.warmup_steps, self.steps)}

    def make_optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        """An optimiser over all parameters, a group for each of `schedules`; SGD has a momentum of 0.9 (published)."""
        groups: dict[str, list[nn.Parameter]] = {key: [] for key in self.schedules()}
        for name, parameter in network.named_parameters():
            groups[next((key for key in groups if key and name.startswith(key)), "")].append(parameter)
        parameters = [{"params": members, "key": key} for key, members in groups.items() if members]
        # A fused SGD whose first step is skipped, as float16 does, goes on from uninitialised memory (torch 2.13).
        fused = self.precision != "float16"
        shared: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": fused}
        if self.optimiser == "sgd":
            return torch.optim.SGD(parameters, momentum=0.9, **shared)
        kind = torch.optim.Adam if self.optimiser == "adam" else torch.optim.AdamW
        return kind(parameters, **shared)


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
    average: WeightAverage[Any] | None = None,
    validation: Validation | None = None,
) -> None:
    """Train up to `config.steps` steps, from the last checkpoint of the run if there is one.

    `compute_losses` returns scalars by name, of which `loss` is minimised and the others are logged. The generator it
    gets is seeded by the step, alike in all processes. `order`: which slices each step holds, over all processes;
    None takes a random one. `refresh`: computes weak labels again; its own order is the one that counts, and what it
    found is logged for the step that begins with it. `average` follows the weights. What `validation` finds is logged
    with the step after which it was due, before a checkpoint of that step. `config.precision` is a resolved one.
    Several processes step together, the logged losses are means over them, and rank 0 alone writes.

    Raises SuperCLError before the optimiser moves when a loss or the gradient is not finite. float16 skips steps
    whose gradient overflows, at most 50 in a row. Raises PreemptedError after a checkpoint when a process is told to
    stop (SIGTERM, SIGUSR1, Ctrl-C). An error in reading slices is raised after a checkpoint of the steps done.
    """
    checkpoints, num_steps = run_path / "checkpoints", config.steps
    world_size, writes = distributed.world_size(), distributed.rank() == 0
    optimiser, schedules = config.make_optimiser(network), config.schedules()
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    state = State(network=network, optimiser=optimiser, scaler=scaler, refresh=refresh, average=average)
    first_step = saved_step = load_checkpoint(checkpoints, state, device)
    if distributed.any_rank(first_step != distributed.of_rank_0(torch.tensor(first_step))):
        raise SuperCLError(
            "The processes see different checkpoints of the run.",
            where=checkpoints,
            next_step="Run the same command again in a minute: a network file system may show new files late.",
        )
    if first_step >= num_steps:
        return
    if refresh is not None:
        order = refresh.order
    elif order is None:
        batch_size = config.batch_size * world_size
        order = SliceOrder(slices=dataset.slices, batch_size=batch_size, seed=config.seed)

    def save(step: int) -> None:
        nonlocal saved_step
        if writes and step > saved_step:
            save_checkpoint(checkpoints, step, state, keep=config.keep_checkpoints)
            saved_step = step
        distributed.barrier()  # a launcher may end all processes when one has left

    generator = torch.Generator(device)
    network.train()
    with (
        stop_requests() as stop_requested,
        closing(
            iter(
                loader := BatchLoader(
                    dataset,
                    order,
                    device=device,
                    first_step=first_step,
                    rank=distributed.rank(),
                    world_size=world_size,
                    stop_requested=stop_requested,
                )
            )
        ) as batches,
        progress("train", total=num_steps, unit="steps", done=first_step, shown=writes) as advance,
        run_log(run_path, first_step=first_step, writes=writes) as log,
    ):
        since, waited, steps_since, skipped = time.perf_counter(), 0.0, 0, 0
        last_entry: dict[str, Any] = {}
        for step in range(first_step, num_steps):
            if refresh is not None and refresh.due(step):
                save(step)  # it reads the whole cache
                begun = time.perf_counter()
                found = refresh(step)
                loader.restart(refresh.order, step)
                seconds = time.perf_counter() - begun
                since += seconds
                log({"step": step + 1, **found, "seconds": seconds})
            failure = None
            try:
                batch = next(batches)
            except Exception as error:
                failure = error
            if distributed.any_rank(stop_requested()):
                save(step)
                raise PreemptedError(
                    "Training was told to stop.",
                    where=run_path,
                    found=f"a checkpoint after step {step} of {num_steps}",
                    next_step="Run the same command again; it goes on from there.",
                )
            if distributed.any_rank(failure is not None):
                save(step)
                raise _reading_error(failure, run_path, step) from failure

            for group in optimiser.param_groups:
                group["lr"] = schedules[group["key"]](step)
            generator.manual_seed(step_seed(config.seed, step))
            # Layers that draw, such as the stochastic depth of some backbones, know no generator but the global one.
            torch.manual_seed(step_seed(config.seed, step) + distributed.rank())
            losses = compute_losses(batch, generator)
            optimiser.zero_grad(set_to_none=True)
            scaler.scale(losses["loss"]).backward()
            scaler.unscale_(optimiser)
            grad_norm = nn.utils.get_total_norm(
                [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
            )
            if config.clip_norm:
                nn.utils.clip_grads_with_norm_(network.parameters(), config.clip_norm, grad_norm)
            values = _read_back({**losses, "grad_norm": grad_norm})
            overflows = scaler.is_enabled() and not math.isfinite(values["grad_norm"])
            skipped = skipped + 1 if overflows else 0
            _check_finite(values, run_path, step, may_overflow=0 < skipped <= MOST_SKIPPED)
            scaler.step(optimiser)
            scaler.update()
            if average is not None:
                average.update(network, step)

            done, steps_since = step + 1, steps_since + 1
            if done % config.log_every == 0 or done == num_steps:
                seconds = time.perf_counter() - since
                entry = {
                    "step": done,
                    **values,
                    "lr": schedules[""](step),
                    "samples_per_s": steps_since * config.batch_size * world_size / seconds,
                    "data_wait_share": (loader.wait_s - waited) / seconds,
                    "seconds": seconds,
                    **peak_memory(device),
                }
                log(entry)
                since, waited, steps_since, last_entry = time.perf_counter(), loader.wait_s, 0, entry
            advance(note=live_line(values, last_entry))
            if validation is not None and validation.due(done):
                begun = time.perf_counter()
                log({"step": done, **validation(done)})
                network.train()
                since += time.perf_counter() - begun
            if done % config.checkpoint_every == 0 or done == num_steps:
                save(done)


def _read_back(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Means over all processes by name, in one transfer."""
    stacked = torch.stack([value.detach().float() for value in scalars.values()])
    return dict(zip(scalars, distributed.mean(stacked).tolist(), strict=True))


def step_seed(seed: int, step: int) -> int:
    """A seed for everything random in one step; neighbouring steps have unrelated ones."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def _check_finite(values: dict[str, float], run_path: Path, step: int, *, may_overflow: bool) -> None:
    """Raise SuperCLError for a loss that is not finite, and unless it `may_overflow` for such a gradient."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if not bad or (bad == ["grad_norm"] and may_overflow):
        return
    terms = [name for name in bad if name not in ("loss", "grad_norm")] or bad[:1]
    raise SuperCLError(
        "The gradient is not finite."
        if terms == ["grad_norm"]
        else f"The loss is not finite: {', '.join(terms)}.",
        where=f"{run_path}, step {step}",
        expected="finite values",
        found=", ".join(f"{name} = {value}" for name, value in values.items()),
        next_step="Lower the learning rate; the last checkpoint is from before this step.",
    )


def _reading_error(failure: Exception | None, run_path: Path, step: int) -> Exception:
    """What to raise after a checkpoint when this process, or another (None), could not read its slices."""
    if failure is None:
        failure = SuperCLError(
            "Another process could not read its slices.",
            where=run_path,
            next_step="See the error of that process.",
        )
    if isinstance(failure, OSError):
        failure = storage_error(failure)
    if isinstance(failure, SuperCLError) and step:
        return failure.with_saved(f"the run can go on after step {step}: run the same command again")
    return failure
