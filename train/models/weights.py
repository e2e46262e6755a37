"""Weights in and out: reading checkpoints, moving what was pre-trained into another network, writing safetensors.

Reads what this project writes and the published checkpoints, and never runs code from a file. Resuming a
run, with optimiser and random state, is left to `train.loop`.
"""

from __future__ import annotations

import pickle
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from supercl_core.errors import SuperCLError
from supercl_core.files import atomic_file
from train.models.unet import UNet

WEIGHTS_NAME = "weights.safetensors"
ENCODER_PREFIX = "encoder."
DECODER_PREFIX = "decoder."
NUM_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of every tensor of a checkpoint, and of every tensor of the network that it went into."""

    source: str
    """Path of the weights, as given."""
    loaded: tuple[str, ...]
    """Tensors copied as they are."""
    adapted: tuple[str, ...]
    """Tensors copied after a change of the number of input channels."""
    skipped: tuple[str, ...]
    """Tensors of the file that were left."""
    fresh: tuple[str, ...]
    """Tensors of the network that kept their initial values."""

    def summary(self) -> str:
        """A few lines for logs: the source, and how many tensors of which part of the network became what."""
        lines = {
            "tensors loaded": _counts(self.loaded),
            "tensors adapted to the input channels": ", ".join(self.adapted),
            "tensors left in the file": _counts(self.skipped),
            "tensors with initial values": _counts(self.fresh),
        }
        return "\n".join(
            [f"weights: {self.source}", *(f"  {key}: {value}" for key, value in lines.items() if value)]
        )

    def as_dict(self) -> dict[str, object]:
        """The fields by name, for JSON."""
        return asdict(self)


def load_pretrained(network: UNet, path: Path | str) -> LoadReport:
    """Copy what was pre-trained into a network for segmentation: the encoder, and the decoder as far as it was.

    As `load_encoder`, and besides it copies the decoder's blocks of a checkpoint that has some and no `decoder.head`:
    whole levels, from the coarsest map on. A decoder with a head belongs to the task that it was trained for, and is
    left.
    """
    weights = read_weights(path)
    found = {name for name in weights if name.startswith(DECODER_PREFIX)}
    if any(name.startswith(f"{DECODER_PREFIX}head.") for name in found):
        found = set()
    expected: set[str] = set()
    for level in network.decoder.levels:
        if found <= expected:
            break
        for name in network.decoder.block_names(level):
            block = network.decoder.get_submodule(name)
            expected.update(block.state_dict(prefix=f"{DECODER_PREFIX}{name}."))
    return _transfer(network, weights, path, found | expected)


def load_encoder(network: nn.Module, path: Path | str) -> LoadReport:
    """Copy the encoder of a checkpoint into the `encoder` of a network of any kind.

    `path` is anything that `read_weights` reads. Only tensors named `encoder.*` are copied, and all of the
    network's must be there. Where exactly one side is made for a single input channel, the convolution of the
    image (in some encoders several) is adapted (our choice): one channel becomes C by repeating the kernel
    divided by C, which keeps the response to an image repeated C times; C become one by summing.

    Returns the LoadReport. Raises SuperCLError, and leaves the network as it was, where tensors are missing,
    are unknown to the network or have another shape.
    """
    return _transfer(network, read_weights(path), path, set())


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Read named tensors, on the CPU.

    `path` is a safetensors file, a file of `torch.save` (a state dict, alone or as `{"net": state dict}`,
    the names with or without `module.` in front), or the folder of a run, whose `weights.safetensors` is
    read. Raises SuperCLError where there is no such file, where it holds no weights, and where it is a pickle
    with anything but tensors in it.
    """
    path = _weights_file(path)
    if path.suffix == ".safetensors":
        with _reading_safetensors(path):
            return safetensors.torch.load_file(path)
    payload = read_torch_file(path, "cpu")
    weights = payload.get("net", payload) if isinstance(payload, dict) else None
    if not isinstance(weights, dict) or not weights or not all(map(_is_plain, weights.values())):
        raise _no_checkpoint(path, "a torch file with something else in it")
    return {str(name).removeprefix("module."): tensor for name, tensor in weights.items()}


def read_metadata(path: Path | str) -> dict[str, str]:
    """What a file of weights says of its network: `backbone`, `in_channels` and `filters` where this project wrote it.

    `path` is anything that `read_weights` reads; files of `torch.save` say nothing. Raises SuperCLError where there
    is no such file, and where it is no safetensors file by that name.
    """
    path = _weights_file(path)
    if path.suffix != ".safetensors":
        return {}
    with _reading_safetensors(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


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
    """Raise SuperCLError unless the tensors `found` in the weights `path` have the `expected` names and shapes."""
    names = dict.fromkeys([*expected, *found])
    differing = [name for name in names if expected.get(name) != found.get(name)]
    if not differing:
        return
    named = differing[:NUM_NAMED]
    more = f", and {len(differing) - NUM_NAMED} more" if len(differing) > NUM_NAMED else ""

    def shapes(side: Mapping[str, torch.Size]) -> str:
        return ", ".join(f"{name} {tuple(side[name]) if name in side else 'absent'}" for name in named) + more

    backbone = read_metadata(path).get("backbone")
    called = f" of backbone {backbone}" if backbone else ""
    raise SuperCLError(
        f"The checkpoint{called} is of another architecture: {len(differing)} tensors differ.",
        where=path,
        expected=shapes(expected),
        found=shapes(found),
        next_step="Give the network the checkpoint's backbone, filters and input channels, or choose another file.",
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


def _transfer(
    network: nn.Module, weights: Mapping[str, Tensor], path: Path | str, decoder: Set[str]
) -> LoadReport:
    """Copy the encoder, and what `decoder` names, into the network; both sides must have all of it."""
    state = network.state_dict()

    def is_moved(name: str) -> bool:
        return name.startswith(ENCODER_PREFIX) or name in decoder

    expected = {name: tensor.shape for name, tensor in state.items() if is_moved(name)}
    found = {name: tensor for name, tensor in weights.items() if is_moved(name)}
    adapted = [
        name
        for name in found
        if name in expected
        and name.startswith(ENCODER_PREFIX)
        and _only_channels_differ(found[name].shape, expected[name])
    ]
    for name in adapted:
        found[name] = _with_channels(found[name], expected[name][1])

    check_same_architecture(expected, {name: tensor.shape for name, tensor in found.items()}, path)
    network.load_state_dict(found, strict=False)
    return LoadReport(
        source=str(path),
        loaded=tuple(name for name in expected if name not in adapted),
        adapted=tuple(adapted),
        skipped=tuple(name for name in weights if name not in found),
        fresh=tuple(name for name in state if name not in found),
    )


def _counts(names: Iterable[str]) -> str:
    """How many tensors are of which part of a network."""
    parts = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{count} of {part}" for part, count in parts.items())


def _weights_file(path: Path | str) -> Path:
    """The file that is meant by the path of a file or of a run's folder."""
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if not path.is_file():
        raise SuperCLError(
            "There are no weights here.",
            where=path,
            next_step="Give a .safetensors file, a torch checkpoint, the folder of a finished run, or `scratch`.",
        )
    return path


@contextmanager
def _reading_safetensors(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise _no_checkpoint(path, f"no safetensors file ({error!s:.200})") from error


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


def _only_channels_differ(found: torch.Size, expected: torch.Size) -> bool:
    """Whether two kernels differ in their input channels alone, of which one has a single one.

    In two encoders of the same architecture that are so only those that see the image.
    """
    return (
        len(found) == len(expected) == 4
        and (found[0], *found[2:]) == (expected[0], *expected[2:])
        and min(found[1], expected[1]) == 1 < max(found[1], expected[1])
    )


def _with_channels(weight: Tensor, num_channels: int) -> Tensor:
    """A kernel of one input channel made one of several, or the other way round."""
    if num_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, num_channels, 1, 1) / num_channels
