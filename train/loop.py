"""The one training loop, for pre-training and fine-tuning: steps, checkpoints, metrics, preemption.

Everything random is a function of (seed, step), and the learning rate of the step, so a checkpoint needs only the
step, the network and the optimiser, and a resumed run equals one that never stopped, bit by bit on the CPU.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from supercl_core.errors import PreemptedError, SuperCLError, UsageError
from supercl_core.files import atomic_file
from supercl_core.progress import progress
from train import distributed
from train.data import Batch, BatchLoader
from train.runs import forget_metrics_after

KEPT_CHECKPOINTS: Final = 2
"""The last checkpoints that stay on disk."""

OptimiserName = Literal["sgd", "adam", "adamw"]
ComputeLosses = Callable[[Batch, torch.Generator], dict[str, Tensor]]


def make_optimiser(
    name: OptimiserName, network: nn.Module, *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """An optimiser over all parameters; SGD has a momentum of 0.9 (published)."""
    parameters = network.parameters()
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(parameters, lr=lr, weight_decay=weight_decay)


def cosine_lr(step: int, *, num_steps: int, lr: float, final_lr: float, warmup_steps: int = 0) -> float:
    """The learning rate of a step: linear warm-up, then a half cosine from `lr` to `final_lr`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * done)) / 2


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
    optimiser: torch.optim.Optimizer,
    learning_rate: Callable[[int], float],
    make_loader: Callable[[int], BatchLoader],
    compute_losses: ComputeLosses,
    num_steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    log_every: int,
    checkpoint_every: int,
) -> None:
    """Train up to `num_steps` steps, from the last checkpoint of the run if there is one.

    `make_loader(first_step)` gives the stream of batches; `compute_losses` returns scalars by name, of which
    `loss` is minimised and the others are logged. The generator it gets is seeded by the step.

    `batch_size` is that of one process. Under `torchrun`, all ranks step together, the logged losses are means
    over ranks, and rank 0 alone writes.

    Raises SuperCLError before the optimiser moves when a loss is not finite, and PreemptedError after a
    checkpoint when a process is told to stop (SIGTERM, SIGUSR1).
    """
    checkpoints = run_path / "checkpoints"
    first_step = load_checkpoint(checkpoints, network, optimiser, device)
    if first_step >= num_steps:
        return
    writes = distributed.rank() == 0
    if writes:
        forget_metrics_after(run_path, first_step)
    distributed.barrier()
    loader = make_loader(first_step)
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
            lr = learning_rate(step)
            for group in optimiser.param_groups:
                group["lr"] = lr
            generator.manual_seed(step_seed(seed, step, distributed.rank()))
            losses = compute_losses(next(batches), generator)
            values = {name: distributed.mean(value).item() for name, value in losses.items()}
            _check_finite(values, run_path, step)
            optimiser.zero_grad(set_to_none=True)
            losses["loss"].backward()
            optimiser.step()
            steps_since += 1
            done = step + 1
            if writes and (done % log_every == 0 or done == num_steps):
                seconds = time.perf_counter() - since
                entry = {
                    "step": done,
                    **values,
                    "lr": lr,
                    "samples_per_s": steps_since * batch_size * distributed.world_size() / seconds,
                    "data_wait_share": (loader.wait_s - waited) / seconds,
                    "seconds": seconds,
                }
                log.write(json.dumps(entry) + "\n")
                log.flush()
                since, waited, steps_since = time.perf_counter(), loader.wait_s, 0
            advance(note=f"loss {values['loss']:.4f}")
            stopping = distributed.any_rank(stop_requested(), device)
            if writes and (done % checkpoint_every == 0 or done == num_steps or stopping):
                save_checkpoint(checkpoints, done, network, optimiser)
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


def save_checkpoint(folder: Path, step: int, network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Write the state after `step` steps atomically, and drop all but the last checkpoints."""
    state = {"step": step, "network": network.state_dict(), "optimiser": optimiser.state_dict()}
    with atomic_file(folder / f"step_{step:08d}.pt") as wip:
        torch.save(state, wip)
    for old in sorted(folder.glob("step_*.pt"))[:-KEPT_CHECKPOINTS]:
        old.unlink()


def load_checkpoint(
    folder: Path, network: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device
) -> int:
    """Restore the last checkpoint, if there is one; return the number of steps done.

    Raises SuperCLError for a file that is damaged or of another architecture.
    """
    files = sorted(folder.glob("step_*.pt"))
    if not files:
        return 0
    try:
        state: dict[str, Any] = torch.load(files[-1], map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
    except Exception as error:  # a damaged file raises nearly anything
        raise SuperCLError(
            "The run's last checkpoint cannot be restored.",
            where=files[-1],
            expected="an undamaged checkpoint of the same network",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            next_step="Delete this file to go on from the checkpoint before it, or from the start.",
        ) from error
    return int(state["step"])


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
    """Turn SIGTERM and SIGUSR1 into a question that the loop asks after every step."""
    requested = False

    def request(*_: object) -> None:
        nonlocal requested
        requested = True

    try:
        before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGUSR1)}
    except ValueError:  # not in the main thread: nobody sends it signals
        before = {}
    try:
        yield lambda: requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
