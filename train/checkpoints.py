"""The full state of a run on disk: written atomically, the last ones kept, and restored.

State is the step, the network, the optimiser, the scale of float16's gradients, the average of the weights, and weak
labels that were computed while training. The learning rate, the generators and the position in the order of slices
are functions of (seed, step), so they need none. Called by `train.loop`.
"""

from __future__ import annotations

import io
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from supercl_core.errors import SuperCLError
from supercl_core.files import atomic_file
from train.averaging import WeightAverage
from train.models.weights import read_torch_file
from train.refresh import Refresh


@dataclass(frozen=True, kw_only=True)
class State:
    """What a step changes."""

    network: nn.Module
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Without effect but for float16."""
    refresh: Refresh | None = None
    average: WeightAverage[Any] | None = None


def save_checkpoint(folder: Path, step: int, state: State, *, keep: int) -> None:
    """Write the state after `step` steps atomically, and drop all but the last `keep` checkpoints."""
    parts = {"step": step, **{name: part.state_dict() for name, part in _parts(state)}}
    content = (
        io.BytesIO()
    )  # writing to a full disk itself, torch raises a RuntimeError that says nothing of it
    torch.save(parts, content)
    with atomic_file(folder / f"step_{step:08d}.pt") as wip:
        wip.write_bytes(content.getbuffer())
    for old in sorted(folder.glob("step_*.pt"))[:-keep]:
        old.unlink()


def load_checkpoint(folder: Path, state: State, device: torch.device) -> int:
    """Restore the last checkpoint, if there is one; return the number of steps done.

    Raises SuperCLError for a file that is damaged or of another architecture.
    """
    files = sorted(folder.glob("step_*.pt"))
    if not files:
        return 0
    try:
        stored = read_torch_file(files[-1], device)
        for name, part in _parts(state):
            part.load_state_dict(stored[name])
        step = operator.index(stored["step"])
        first_step = 0 if state.refresh is None else state.refresh.order.first_step
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


def _parts(state: State) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in vars(state).items() if part is not None]
