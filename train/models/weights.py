"""Weights in and out: reading checkpoints, moving an encoder into another network, writing safetensors.

Reads what this project writes and the published checkpoints, and never runs code from a file. Resuming a
run, with optimiser and random state, is left to `train.loop`.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from supercl_core.errors import SuperCLError
from supercl_core.files import atomic_file

WEIGHTS_NAME = "weights.safetensors"
ENCODER_PREFIX = "encoder."
STEM_NAME = "encoder.contr_1_1.0.weight"
NUM_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of every tensor of a checkpoint whose encoder was transferred."""

    source: str
    """Path of the weights, as given."""
    loaded: tuple[str, ...]
    """Tensors copied as they are."""
    adapted: tuple[str, ...]
    """Tensors copied after a change of the number of input channels."""
    skipped: tuple[str, ...]
    """Tensors of the file outside the encoder, which were left."""

    def summary(self) -> str:
        """One paragraph for logs and reports."""
        adapted = f", {len(self.adapted)} of them adapted ({', '.join(self.adapted)})" if self.adapted else ""
        skipped = f"; {len(self.skipped)} outside the encoder left" if self.skipped else ""
        return (
            f"Encoder loaded from {self.source}: {len(self.loaded) + len(self.adapted)} tensors"
            f"{adapted}{skipped}."
        )

    def as_dict(self) -> dict[str, object]:
        """The fields by name, for JSON."""
        return asdict(self)


def load_encoder(network: nn.Module, path: Path | str) -> LoadReport:
    """Copy the encoder of a checkpoint into the `encoder` of a network.

    `path` is anything that `read_weights` reads. Only tensors named `encoder.*` are copied, and all of the
    network's must be there. Where exactly one side has a single input channel, the first convolution is
    adapted (our choice): one channel becomes C by repeating the kernel divided by C, which keeps the
    response to an image repeated C times; C become one by summing.

    Returns the LoadReport. Raises SuperCLError, and leaves the network as it was, where tensors are missing,
    are unknown to the network or have another shape.
    """
    weights = read_weights(path)
    encoder = network.get_submodule("encoder")
    expected = {ENCODER_PREFIX + name: tensor.shape for name, tensor in encoder.state_dict().items()}
    found = {name: tensor for name, tensor in weights.items() if name.startswith(ENCODER_PREFIX)}

    adapted: list[str] = []
    if STEM_NAME in expected and STEM_NAME in found:
        stem = _adapt_stem(found[STEM_NAME], expected[STEM_NAME])
        if stem is not found[STEM_NAME]:
            found[STEM_NAME] = stem
            adapted.append(STEM_NAME)

    check_same_architecture(expected, {name: tensor.shape for name, tensor in found.items()}, path)
    encoder.load_state_dict({name.removeprefix(ENCODER_PREFIX): tensor for name, tensor in found.items()})
    return LoadReport(
        source=str(path),
        loaded=tuple(name for name in found if name not in adapted),
        adapted=tuple(adapted),
        skipped=tuple(name for name in weights if name not in found),
    )


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Read named tensors, on the CPU.

    `path` is a safetensors file, a file of `torch.save` (a state dict, alone or as `{"net": state dict}`,
    the names with or without `module.` in front), or the folder of a run, whose `weights.safetensors` is
    read. Raises SuperCLError where there is no such file, where it holds no weights, and where it is a pickle
    with anything but tensors in it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if not path.is_file():
        raise SuperCLError(
            "There are no weights here.",
            where=path,
            next_step="Give a .safetensors file, a torch checkpoint, the folder of a finished run, or `scratch`.",
        )
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise _no_checkpoint(path, f"no safetensors file ({error!s:.200})") from error

    payload = read_torch_file(path, "cpu")
    weights = payload.get("net", payload) if isinstance(payload, dict) else None
    if not isinstance(weights, dict) or not weights or not all(map(_is_plain, weights.values())):
        raise _no_checkpoint(path, "a torch file with something else in it")
    return {str(name).removeprefix("module."): tensor for name, tensor in weights.items()}


def save_weights(network: nn.Module, path: Path | str, metadata: Mapping[str, str]) -> None:
    """Write a network's state dict as safetensors, with `metadata` in the header.

    The file appears whole or not at all.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with atomic_file(Path(path)) as wip_path:
        wip_path.write_bytes(safetensors.torch.save(tensors, dict(metadata)))


def check_same_architecture(
    expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size], path: Path | str
) -> None:
    """Raise SuperCLError unless the tensors `found` in the file `path` have the `expected` names and shapes."""
    names = dict.fromkeys([*expected, *found])
    differing = [name for name in names if expected.get(name) != found.get(name)]
    if not differing:
        return
    named = differing[:NUM_NAMED]
    more = f", and {len(differing) - NUM_NAMED} more" if len(differing) > NUM_NAMED else ""

    def shapes(side: Mapping[str, torch.Size]) -> str:
        return ", ".join(f"{name} {tuple(side[name]) if name in side else 'absent'}" for name in named) + more

    raise SuperCLError(
        f"The checkpoint is of another architecture: {len(differing)} tensors differ.",
        where=path,
        expected=shapes(expected),
        found=shapes(found),
        next_step="Give the network the checkpoint's filters and input channels, or choose another file.",
    )


def read_torch_file(path: Path, device: torch.device | str) -> Any:
    """What a file of `torch.save` holds: tensors, on the `device`, and plain values.

    Raises SuperCLError where it is no such file, and where it is a pickle with anything else in it.
    """
    try:
        with warnings.catch_warnings():
            # torch warns of foreign pickle protocols before it refuses them; the refusal says enough.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # Bytes that are no checkpoint raise nearly anything, KeyError included.
        if isinstance(error, OSError):
            found = error.strerror or "an error of the system"
        elif isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            found = "a pickle with other objects than tensors, which could run code when read"
        else:
            found = "no torch file"
        raise _no_checkpoint(path, found) from error


def _is_plain(value: object) -> bool:
    """Whether a value of a torch file is a tensor of real numbers that are all in the file."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex())
        # A view may repeat a few numbers to any size, for which no memory would be enough.
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _no_checkpoint(path: Path, found: str) -> SuperCLError:
    return SuperCLError(
        "The file holds no weights that can be read safely.",
        where=path,
        expected='a safetensors file, or torch.save of a state dict, alone or as {"net": state dict}',
        found=found,
        next_step="Check the path; save foreign checkpoints again as a plain state dict.",
    )


def _adapt_stem(weight: Tensor, expected: torch.Size) -> Tensor:
    """The first convolution's weight with the expected number of input channels, where one side has one."""
    if weight.ndim == 4 and weight.shape[1] != expected[1]:
        if expected[1] == 1:
            return weight.sum(dim=1, keepdim=True)
        if weight.shape[1] == 1:
            return weight.repeat(1, expected[1], 1, 1) / expected[1]
    return weight
