"""Whole volumes through a fine-tuned network: from stored intensities to one class for each voxel.

Called by fine-tuning (validation cases), evaluation and prediction, so that all three segment alike. Where volumes come
from, and what becomes of the classes, is left to them.

Axes: C channel, Z slice, Y row, X column, B slices of a batch, K class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from supercl_core.errors import UsageError
from train.data import normalise_images, repeat_channels, stack_adjacent
from train.models.backbones import build_encoder
from train.models.unet import UNet
from train.models.weights import check_same_architecture, read_weights

PIXELS_AT_ONCE: Final = {"cpu": 2**16, "cuda": 2**21}
"""About so many pixels go through the network together: more take longer on a CPU, whose caches they leave."""

LARGEST_SHARE: Final = 0.99
"""Part of the voxels of a class that is in one component wherever the class is said to have only one."""

_AXES: Final = {"y": -2, "x": -1}


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """How a network that was trained is applied. Part of what a run is, so stored with it."""

    adjacent_slices: int = 0
    """Slices on each side that the network sees beside the one it segments."""
    mirror_axes: tuple[str, ...] = ()
    """Of `y` and `x`: probabilities are averaged over the slice and its images mirrored along each and along both."""
    largest_component: tuple[int, ...] = ()
    """Classes of which all but the largest 26-connected component becomes background."""
    precision: str = "float32"
    """Of convolutions and matrix products: float32, bfloat16, or float16 (on a CPU float32, which is far faster)."""

    @classmethod
    def from_run(cls, run: dict[str, Any]) -> InferenceSettings:
        """The settings that a fine-tuned run was made for; `run` is its run.json."""
        stored = run["inference"]
        return cls(
            adjacent_slices=stored["adjacent_slices"],
            mirror_axes=tuple(stored["mirror_axes"]),
            largest_component=tuple(stored["largest_component"]),
            precision=run["config"]["precision"],
        )


def check_finished(run: dict[str, Any], run_path: Path) -> None:
    """Raise UsageError unless `run` (run.json of `run_path`) is a fine-tuning run that came to its end."""
    if run["kind"] != "finetune" or run["status"] != "finished":
        raise UsageError(
            "Only a finished fine-tuning run can segment.",
            where=run_path,
            expected="kind finetune, status finished",
            found=f"kind {run['kind']}, status {run['status']}",
            next_step="Run `supercl finetune` to its end first.",
        )


def load_network(run: dict[str, Any], run_path: Path) -> UNet:
    """The trained network of a fine-tuned run, on the CPU, in evaluation mode and channels_last (the fastest layout).

    Raises SuperCLError where its weights are missing, or are not those of the model that run.json describes.
    """
    weights = read_weights(run_path)
    with torch.device("meta"):  # run.json may ask for more memory than there is
        expected = _untrained(run).state_dict()
    check_same_architecture(
        {name: tensor.shape for name, tensor in expected.items()},
        {name: tensor.shape for name, tensor in weights.items()},
        run_path,
    )
    network = _untrained(run)
    network.load_state_dict(weights)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    return network.eval()


@torch.inference_mode()
def segment(
    network: UNet,
    stored_CZYX: np.ndarray,
    window_C4: np.ndarray,
    *,
    settings: InferenceSettings,
    device: torch.device,
) -> np.ndarray:
    """Classes of every voxel of a volume, uint8 (z, y, x), slice by slice at the slices' own size.

    `stored_CZYX`: int16, uint16 or float32 in stored units, of a case `case.read("image", slice(None)).swapaxes(0, 1)`.
    `window_C4`: float32, what `train.data.normalisation_window` gives for the case. `network` is on `device`; it is
    applied in evaluation mode and left in the mode that it was in.

    Slices are normalised as in training, and padded with their mean to multiples of the network's last stride.
    """
    num_slices, height, width = stored_CZYX.shape[1:]
    window = torch.from_numpy(window_C4)[None].to(device)
    stride = network.encoder.strides[-1]
    padding = (0, -width % stride, 0, -height % stride)
    at_once = max(1, PIXELS_AT_ONCE.get(device.type, 2**16) // ((height + padding[3]) * (width + padding[1])))
    beside = settings.adjacent_slices
    classes_ZYX = np.empty((num_slices, height, width), np.uint8)
    was_training = network.training
    network.eval()
    try:
        for first in range(0, num_slices, at_once):
            last = min(first + at_once, num_slices)
            # Repeated beyond the ends here, so that a part of a volume gets the neighbours that it has in the whole.
            nearby = np.clip(np.arange(first - beside, last + beside), 0, num_slices - 1)
            stored_ZCYX = torch.from_numpy(stored_CZYX[:, nearby]).to(device).transpose(0, 1)
            images = stack_adjacent(normalise_images(stored_ZCYX, window), beside)
            images = images[beside : len(images) - beside]
            images = repeat_channels(images, network.encoder.in_channels)
            images = torch.nn.functional.pad(images, padding)
            scores = _scores(network, images, settings)
            classes = scores[..., :height, :width].argmax(dim=1)
            classes_ZYX[first:last] = classes.to(torch.uint8).cpu().numpy()
    finally:
        network.train(was_training)
    for index in settings.largest_component:
        _keep_largest(classes_ZYX, index)
    return classes_ZYX


def single_component_classes(truths: Iterable[np.ndarray], num_classes: int) -> tuple[int, ...]:
    """The classes that come in one piece: the rule of the largest component, learned on labelled cases.

    `truths`: the classes of each labelled case, integers (z, y, x) below `num_classes`. Returns each class from 1 on
    of which, in every case that has it, the largest 26-connected component holds at least LARGEST_SHARE of its voxels.
    A class that no case has is left out. Source: nnU-Net's post-processing, learned here from the labels alone.
    """
    seen, scattered = set[int](), set[int]()
    for truth_ZYX in truths:
        for index in range(1, num_classes):
            sizes = np.bincount(_components(truth_ZYX == index).ravel())[1:]
            if sizes.size:
                seen.add(index)
                if sizes.max() < LARGEST_SHARE * sizes.sum():
                    scattered.add(index)
    return tuple(sorted(seen - scattered))


def _untrained(run: dict[str, Any]) -> UNet:
    """The network that run.json describes, with random weights on PyTorch's default device."""
    model = run["model"]
    encoder = build_encoder(model["backbone"], in_channels=model["in_channels"], filters=model["filters"])
    return UNet(encoder, num_classes=len(run["cache"]["class_names"]))


def _scores(network: UNet, images_BCYX: Tensor, settings: InferenceSettings) -> Tensor:
    """What grows with the probability of each class, float32 (b, k, y, x)."""
    device = images_BCYX.device
    dtype: torch.dtype = getattr(torch, settings.precision)
    if dtype == torch.float16 and device.type == "cpu":
        dtype = torch.float32
    axes = [_AXES[name] for name in settings.mirror_axes]
    flips = [[axis for bit, axis in enumerate(axes) if number >> bit & 1] for number in range(2 ** len(axes))]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = [network(images_BCYX.flip(flip)).flip(flip).float() for flip in flips]
    if len(logits) == 1:
        return logits[0]
    return torch.stack([part.softmax(dim=1) for part in logits]).sum(dim=0)


def _keep_largest(classes_ZYX: np.ndarray, index: int) -> None:
    """Make background, in place, of all but the largest component of a class; of several as large, the first stays."""
    components = _components(classes_ZYX == index)
    sizes = np.bincount(components.ravel())[1:]
    if len(sizes) > 1:
        classes_ZYX[(components > 0) & (components != 1 + sizes.argmax())] = 0


def _components(mask_ZYX: np.ndarray) -> np.ndarray:
    """26-connected components of a mask, numbered from 1; 0 outside."""
    from scipy import ndimage

    components, _ = ndimage.label(mask_ZYX, structure=np.ones((3, 3, 3)))
    return components
