"""Weights in and out: reading checkpoints, moving what was pre-trained into another network, writing safetensors.

Reads what this project writes, the published checkpoints and those of other libraries, and never runs code from a file.
Resuming a run, with optimiser and random state, is left to `train.loop`, writing for other libraries to `train.export`.
"""

from __future__ import annotations

import pickle
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from supercl_core.errors import SuperCLError
from supercl_core.files import atomic_file
from train.models.foreign import encoder_tensors
from train.models.unet import UNet

WEIGHTS_NAME = "weights.safetensors"
ENCODER_PREFIX = "encoder."
DECODER_PREFIX = "decoder."
NUM_NAMED = 3

WRAPPERS = ("net", "state_dict", "model", "model_state_dict")
"""Keys under which files of `torch.save` have a state dict: the published one, then those that others use."""

COUNTER = "num_batches_tracked"
"""Of a batch norm, which nothing here reads and old files lack."""


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


def load_pretrained(network: UNet, path: Path | str) -> LoadReport:
    """Copy what was pre-trained into a network for segmentation: the encoder, and the decoder as far as it was.

    As `load_encoder`, and besides it copies the decoder's blocks of a checkpoint that has some and no `decoder.head`:
    whole levels, from the coarsest map on. A decoder with a head belongs to the task that it was trained for, and is
    left.
    """
    weights = read_weights(path)
    found = {name for name in weights if name.startswith(DECODER_PREFIX)}
    has_head = any(name.startswith(f"{DECODER_PREFIX}head.") for name in found)
    if has_head or not _is_ours(network, weights):
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

    `path` is anything that `read_weights` reads. Only tensors named `encoder.*` are copied, and all of the network's
    must be there. In a file of another library those that `train.models.foreign` finds are meant; what else it holds,
    such as a classifier, is left. Where exactly one side is made for a single input channel, the convolution of the
    image (in some encoders several) is adapted (our choice): one channel becomes C by repeating the kernel divided by
    C, which keeps the response to an image repeated C times; C become one by summing.

    Returns the LoadReport. Raises SuperCLError, and leaves the network as it was, where tensors are missing,
    are unknown to the network, have another shape, or hold numbers that cannot be weights.
    """
    return _transfer(network, read_weights(path), path, set())


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Read named tensors, on the CPU.

    `path` is a safetensors file, a file of `torch.save` (a state dict, alone or as `{"net": state dict}` or under
    another of WRAPPERS, the names with or without `module.` in front), or the folder of a run, whose
    `weights.safetensors` is read. Raises SuperCLError where there is no such file, where it holds no weights, and where
    it is a pickle with anything but tensors in it.
    """
    path = _weights_file(path)
    if path.suffix == ".safetensors":
        with _reading_safetensors(path):
            payload: Any = safetensors.torch.load_file(path)
    else:
        payload = read_torch_file(path, "cpu")
    weights = payload
    if isinstance(payload, dict):
        weights = next((payload[key] for key in WRAPPERS if isinstance(payload.get(key), dict)), payload)
    if not isinstance(weights, dict) or not weights or not all(map(_is_plain, weights.values())):
        entries = [f"{key!s:.40}" for key in payload] if isinstance(payload, dict) else []
        raise _no_checkpoint(path, f"something else in it: {', '.join(entries[:5]) or 'no named tensors'}")
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
    """Write a network's state dict as `save_tensors` does."""
    save_tensors(network.state_dict(), path, metadata)


def save_tensors(state: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, str]) -> None:
    """Write tensors by name as safetensors, with `metadata` in the header; the file appears whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
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
        next_step="Set the checkpoint's backbone (such as backbone='smp:resnet18'), filters and input channels.",
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

    def is_encoders(name: str) -> bool:
        return name.startswith(ENCODER_PREFIX)

    def is_moved(name: str) -> bool:
        return name in decoder or is_encoders(name)

    # Our names, and those of the file.
    moved = {name: name for name in weights if is_moved(name)}
    if not _is_ours(network, weights):
        moved = encoder_tensors(weights, _encoder_names(network))
    found = {name: weights[theirs] for name, theirs in moved.items()}
    expected = {
        name: tensor.shape
        for name, tensor in state.items()
        if is_moved(name) and not (is_encoders(name) and name.endswith(COUNTER) and name not in found)
    }
    adapted = [
        name
        for name in found
        if name in expected and is_encoders(name) and only_channels_differ(found[name].shape, expected[name])
    ]
    for name in adapted:
        found[name] = with_channels(found[name].double(), expected[name][1])

    check_same_architecture(expected, {name: tensor.shape for name, tensor in found.items()}, path)
    _check_numbers(
        {moved[name]: tensor for name, tensor in found.items() if state[name].is_floating_point()}, path
    )
    network.load_state_dict(found, strict=False)
    taken = set(moved.values())
    return LoadReport(
        source=str(path),
        loaded=tuple(name for name in expected if name not in adapted),
        adapted=tuple(adapted),
        skipped=tuple(name for name in weights if name not in taken),
        fresh=tuple(name for name in state if name not in found),
    )


def _check_numbers(weights: Mapping[str, Tensor], path: Path | str) -> None:
    """Raise SuperCLError unless all are finite floating-point numbers, also as float32."""
    bad = [
        name
        for name, tensor in weights.items()
        if not (tensor.is_floating_point() and tensor.float().isfinite().all())
    ]
    if bad:
        more = f", and {len(bad) - NUM_NAMED} more" if len(bad) > NUM_NAMED else ""
        raise SuperCLError(
            "The checkpoint holds numbers that cannot be weights.",
            where=path,
            expected="finite floating-point numbers",
            found=f"NaN, infinities or integers in {', '.join(bad[:NUM_NAMED])}{more}",
            next_step="Use an earlier checkpoint if its training diverged, or one that is not quantised.",
        )


def _encoder_names(network: nn.Module) -> list[str]:
    return [name for name in network.state_dict() if name.startswith(ENCODER_PREFIX)]


def _is_ours(network: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether a file names an encoder as the network does, and not as another library."""
    return any(name in weights for name in _encoder_names(network))


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
    """Whether a value of a file is a tensor of real numbers that are all in the file."""
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


def only_channels_differ(found: torch.Size, expected: torch.Size) -> bool:
    """Whether two kernels differ in their input channels alone, of which one has a single one.

    In two encoders of the same architecture that are so only those that see the image.
    """
    return (
        len(found) == len(expected) == 4
        and (found[0], *found[2:]) == (expected[0], *expected[2:])
        and min(found[1], expected[1]) == 1 < max(found[1], expected[1])
    )


def with_channels(weight: Tensor, num_channels: int) -> Tensor:
    """A kernel of one input channel made one of several, or the other way round."""
    if num_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, num_channels, 1, 1) / num_channels
