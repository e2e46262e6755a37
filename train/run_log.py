"""What a run says while it trains: metrics.jsonl, TensorBoard, and the line on the terminal. Called by `train.loop`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from supercl_core.messages import note
from train.runs import forget_metrics_after

MUCH_WAITING: Final = 0.1
"""Share of the time that waits for data from which on a run says what to do about it."""

COLLAPSED: Final = 0.999
"""Mean cosine similarity of the instance embeddings above which they are all alike. Untrained ones come near."""

COLLAPSED_ENTRIES: Final = 10
"""So many entries in a row with collapsed embeddings are followed by a note."""

Log = Callable[[dict[str, Any]], None]


@contextmanager
def run_log(run_path: Path, *, first_step: int, writes: bool = True) -> Iterator[Log]:
    """A function that writes an entry of numbers, `step` among them, to RUN/metrics.jsonl and RUN/tensorboard.

    What an earlier start logged after `first_step` is forgotten in both: those steps are done again. Numbers that are
    not finite are left out. The first entry that says of much waiting for data, in `data_wait_share`, or of collapsed
    embeddings, in `similarity`, is followed by a note what to do. Of several processes in step, only one `writes`.
    Without the package tensorboard there is a note, and metrics.jsonl alone.
    """
    if not writes:
        yield lambda entry: None
        return
    forget_metrics_after(run_path, first_step)
    with ExitStack() as stack:
        lines = stack.enter_context((run_path / "metrics.jsonl").open("a", encoding="utf-8"))
        board = _tensorboard(run_path / "tensorboard", first_step)
        if board is not None:
            stack.callback(board.close)
        warm = waiting_said = False
        num_collapsed = 0

        def log(entry: dict[str, Any]) -> None:
            nonlocal warm, waiting_said, num_collapsed
            entry = {name: value for name, value in entry.items() if math.isfinite(value)}
            lines.write(json.dumps(entry) + "\n")
            lines.flush()
            if board is not None:
                for name in entry.keys() - {"step", "seconds"}:
                    board.add_scalar(name, entry[name], entry["step"])
                board.flush()
            share = entry.get("data_wait_share")
            if warm and not waiting_said and share is not None and share > MUCH_WAITING:
                waiting_said = True
                note(
                    f"{share:.0%} of the time goes into waiting for data. Keep the cache on a disk of this machine, "
                    "with memory left to hold it, and give each process several CPU cores."
                )
            num_collapsed = num_collapsed + 1 if entry.get("similarity", 0.0) > COLLAPSED else 0
            if num_collapsed == COLLAPSED_ENTRIES:
                note(
                    f"the embeddings have collapsed by step {entry['step']}: all slices look alike to the encoder "
                    "(mean cosine similarity above 0.999), so it learns nothing more. Start anew with a lower lr."
                )
            warm = warm or share is not None  # the first steps of a process wait for the first batches

        yield log


def live_line(values: dict[str, float], last_entry: dict[str, Any]) -> str:
    """The terms of the loss in `values` under short names, and throughput, waiting and memory of the last entry.

    Example:
        "ins 1.23 intra 0.57 inter 2.35 312/s wait 1% 12.1GB"
    """
    terms = [name for name in values if name.startswith("loss_")] or ["loss"]
    parts = [f"{name.removeprefix('loss_')} {values[name]:.2f}" for name in terms]
    if last_entry:
        parts += [f"{last_entry['samples_per_s']:.3g}/s", f"wait {last_entry['data_wait_share']:.0%}"]
    if "memory_bytes" in last_entry:
        parts.append(f"{last_entry['memory_bytes'] / 1e9:.1f}GB")
    return " ".join(parts)


def _tensorboard(folder: Path, first_step: int) -> Any:
    """A TensorBoard writer, or None where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        note("no TensorBoard log: pip install tensorboard")
        return None
    return SummaryWriter(folder, purge_step=first_step + 1)
