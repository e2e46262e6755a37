"""Where and in which precision a network computes. Called by everything that runs one.

Weights, optimiser and losses are float32 throughout; the precision is that of convolutions and matrix products inside
the network. Several processes are left to `train.distributed`, the steps to `train.loop`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

from supercl_core.errors import SuperCLError, UsageError
from supercl_core.memory import keep_freed_memory
from train import distributed
from train.models.backbones import UNET

if TYPE_CHECKING:
    from train.loop import LoopConfig

Precision = Literal["float32", "bfloat16", "float16"]

_BFLOAT16_UNITS: Final = {"avx512_bf16", "amx_bf16", "bf16"}
"""Instructions of x86 and ARM that multiply bfloat16, under the names of both torch and Linux."""


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


def resolve_precision(name: Literal["auto"] | Precision, device: torch.device) -> Precision:
    """The precision of that name; `auto` is bfloat16 where the device has units for it, else float32.

    Raises UsageError for float16 on a CPU, where it was measured to be 20 times slower than float32.
    """
    if name == "float16" and device.type == "cpu":
        raise UsageError(
            "float16 is far slower than float32 on a CPU.",
            where="precision",
            expected="auto, bfloat16 or float32",
            found=name,
            next_step="precision = 'auto' takes the fastest that the device has.",
        )
    if name != "auto":
        return name
    return "bfloat16" if _has_bfloat16_units(device) else "float32"


def prepare(network: nn.Module, *, config: LoopConfig, device: torch.device) -> Callable[..., Any]:
    """The network on `device`, as something to call in training with the settings of `config`.

    `network` itself stays the plain module: its state_dict has the plain names, and what is done here happens inside
    it (memory format, compiled code, batch statistics over all processes on GPUs) or around it (gradients averaged
    over all processes, autocast). What is called makes images (B, C, y, x) channels_last where that is set, and hands
    everything on to `network.forward`. Outputs have the precision of the layer that they come from.

    `config.precision` is a resolved one. Raises SuperCLError where `config.compile` is set and no compiler works.
    """
    assert config.precision != "auto"
    network.to(device)
    if device.type == "cpu":
        # Activations are freed after every step; what that saves is in benchmarks/step.py.
        keep_freed_memory()
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    if config.compile:
        _check_compiler(device)
        network.compile()
    # Encoders of libraries may have layers behind the feature maps that are used.
    called = distributed.parallel(network, device, uses_all=config.backbone == UNET)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.precision]

    def call(*inputs: Any, **options: Any) -> Any:
        if config.channels_last:
            inputs = tuple(_channels_last(value) for value in inputs)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return called(*inputs, **options)

    return call


def peak_memory(device: torch.device) -> dict[str, int]:
    """`memory_bytes`: the most that tensors took of a GPU since the last call; nothing on other devices."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"memory_bytes": peak}


def _channels_last(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _has_bfloat16_units(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        return any(torch.cpu.get_capabilities().get(name) for name in _BFLOAT16_UNITS)
    described = Path("/proc/cpuinfo")  # for a torch that does not tell
    return described.is_file() and not _BFLOAT16_UNITS.isdisjoint(described.read_text().split())


def _check_compiler(device: torch.device) -> None:
    """Compile something small, so that a missing compiler is named before the first step."""
    try:
        torch.compile(lambda tensor: tensor + 1)(torch.zeros(1, device=device))
    except Exception as error:  # whatever the compiler lacks, in many classes
        raise SuperCLError(
            "The network cannot be compiled here.",
            where="compile",
            expected="a working C++ compiler, on GPUs also Triton",
            found=str(error).splitlines()[0][:300],
            next_step="Install one (such as g++), or leave compile = false.",
        ) from error
