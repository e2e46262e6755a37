"""What the benchmarks of training share: the device's name, and calls that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def device_name(device: torch.device) -> str:
    """The model of a GPU, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def median_ms(
    turns: Mapping[str, Callable[[], object]], *, num_rounds: int, warm_up: int, device: torch.device
) -> dict[str, float]:
    """Milliseconds that each of the calls takes, which take turns; the first `warm_up` rounds are left out."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(warm_up + num_rounds):
        for name, call in turns.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values[warm_up:]) for name, values in seconds.items()}
