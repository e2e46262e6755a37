"""Descriptors of slices from an encoder: where its features differ from superpixel to superpixel, as one row a slice.

Weak labels are made of them, offline by `supercl weak-labels --descriptors` or on the device by `train.hierarchy`.
Called by `supercl describe`, and where training renews its weak labels from its own encoder.

Axes: B batch, C channels, Y rows, X columns of slices, padded with -1 (superpixels) or 0 (images) to multiples of the
encoder's last stride; G row or column of the grid on which a slice is read, the one of the cache's own ASP maps.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supercl_core import provenance
from supercl_core.cache.cases import case_id_problem
from supercl_core.cache.reader import Cache, open_cache
from supercl_core.cache.schema import ASP_GRID
from supercl_core.cache.weak_labels import INTENSITY, LINKED, grid_positions
from supercl_core.cache.writer import write_descriptors
from supercl_core.errors import SuperCLError, UsageError
from supercl_core.locks import check_lock, hold
from supercl_core.progress import progress
from train.data import adjacent_indices, normalisation_window, normalise_images
from train.models.backbones import UNET, build_encoder
from train.models.unet import Backbone
from train.models.weights import (
    ENCODER_PREFIX,
    WEIGHTS_NAME,
    check_same_architecture,
    load_encoder,
    read_metadata,
    read_weights,
)
from train.pairs import asp

BATCH_SIZE: Final = 16
"""Slices that go through the encoder together: larger batches were no faster on a CPU."""

UNET_STEM: Final = ENCODER_PREFIX + "contr_1_1.0.weight"
"""The first convolution of the published backbone: (filters, in_channels, 3, 3)."""

STEPS: Final = 2.0**26
"""Steps from 0 to the largest value of a map: finer than float32, and sums of up to 2^27 of them fit into float64."""


def store_descriptors(
    cache: Cache,
    source: Path,
    *,
    name: str | None = None,
    device: torch.device,
    batch_size: int,
) -> str:
    """Describe every slice of a cache with the encoder of `source`, and store the rows in the cache.

    `source`: the folder of a run or a file of weights, published ones too. `name`: of the descriptors, which replace
    older ones of that name; None takes that of the run or file. Returns the name. Descriptors that the cache has
    stay until the new ones are whole.

    Raises UsageError for an impossible name, or an encoder of another number of channels than the cache, SuperCLError
    for weights that hold no encoder, and CacheError where another process changes the cache.
    """
    name = _default_name(source) if name is None else name
    problem = case_id_problem(name)
    if name == INTENSITY:
        problem = "is that of the intensities"
    elif name.endswith(tuple(f"-{rule}" for rule in LINKED)):
        problem = "ends like that of labels"
    if problem:
        raise UsageError(
            f"The name {name!r} {problem}.",
            expected="another name for the descriptors",
            found=name,
            next_step="Give one with --name, such as --name pretrained.",
        )
    encoder, adjacent_slices = read_encoder(source, num_channels=cache.num_channels)
    weights_path = source / WEIGHTS_NAME if source.is_dir() else source
    with weights_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with hold(cache.path) as token:
        cache = open_cache(cache.path)
        values = describe(
            encoder.to(device),
            cache,
            adjacent_slices=adjacent_slices,
            device=device,
            batch_size=batch_size,
            shown=True,
        )
        check_lock(cache.path, token)
        write_descriptors(
            cache.path,
            name,
            values.cpu().numpy(),
            {
                "slices_digest": cache.slices_digest,
                "encoder": {
                    "source": str(source),
                    "digest": digest,
                    "backbone": read_metadata(source).get("backbone", UNET),
                    "filters": encoder.channels[0],
                    "in_channels": encoder.in_channels,
                },
                "provenance": provenance.record(),
            },
        )
    return name


def read_encoder(source: Path, *, num_channels: int) -> tuple[Backbone, int]:
    """The encoder of a run or of a file of weights, on the CPU, for images of `num_channels`.

    Its backbone is the one that the weights name, or the published one; its sizes are read from the shapes of its
    tensors. An encoder of one channel is adapted to images of several, as `load_encoder` does; any other keeps its
    number of channels. Returned with it is how many slices before and after each one it takes as channels: what the
    weights say, or 0.

    Raises SuperCLError where there are no weights, or none of a whole encoder, and what `build_encoder` raises.
    """
    metadata = read_metadata(source)
    adjacent_slices = metadata.get("adjacent_slices", "0")
    if re.fullmatch("[0-9]{1,4}", adjacent_slices) is None:
        raise _no_encoder(
            source,
            expected="adjacent_slices in the metadata: a number of slices",
            found=f"{adjacent_slices!r:.80}",
        )
    shapes = {
        name: tensor.shape for name, tensor in read_weights(source).items() if name.startswith(ENCODER_PREFIX)
    }
    backbone = metadata.get("backbone", UNET)
    if backbone == UNET:
        filters, in_channels = _unet_sizes(shapes, source)
    else:
        filters, in_channels = 0, _channels_of_images(metadata, shapes, source)
    with torch.device("meta"):  # the first tensor alone may promise more memory than there is
        expected = build_encoder(backbone, in_channels=in_channels, filters=filters).state_dict()
    check_same_architecture(
        {ENCODER_PREFIX + name: tensor.shape for name, tensor in expected.items()}, shapes, source
    )
    wanted = num_channels if in_channels == 1 else in_channels
    encoder = build_encoder(backbone, in_channels=wanted, filters=filters)
    load_encoder(nn.ModuleDict({"encoder": encoder}), source)
    return encoder, int(adjacent_slices)


@torch.no_grad()
def describe(
    encoder: Backbone,
    cache: Cache,
    case_ids: list[str] | None = None,
    *,
    adjacent_slices: int = 0,
    device: torch.device,
    batch_size: int = BATCH_SIZE,
    shown: bool = False,
) -> Tensor:
    """The descriptor of every slice: float32 (n, g * g), on the device, in the order of the cache's slices.

    The channel mean of the encoder's last feature map is brought to the pixels of the slice (bilinear), averaged over
    the slice's superpixels, and read where the cache's own ASP maps are read. Slices of any size go in whole, with
    `adjacent_slices` before and after each one as channels (`train.data.stack_adjacent`). Images of one channel are
    repeated for an encoder of several.

    `encoder`: on the device; of its feature maps the last is used. It runs in evaluation mode and has its former mode
    afterwards. `case_ids`: None takes every case. `batch_size` changes nothing but the rounding of the encoder itself.
    `shown`: with a progress bar.

    Raises UsageError for an encoder of another number of channels than the images have, and SuperCLError for features
    that are not finite.

    Source: SuperCL (IEEE TIP 2026), IGCP; reading on a grid is our choice.
    """
    in_channels, stride = encoder.in_channels, encoder.strides[-1]
    num_channels, num_together = cache.num_channels, 2 * adjacent_slices + 1
    if num_channels * num_together not in (1, in_channels):
        or_else = f" ({num_channels} in each of {num_together} slices)" if adjacent_slices else ", or of one"
        raise UsageError(
            "The encoder takes another number of channels than the images have.",
            where=cache.path,
            expected=f"an encoder of {num_channels * num_together} channels{or_else}",
            found=f"one of {in_channels}",
            next_step="Choose an encoder that was trained on such images.",
        )
    slices = cache.case_slices([row.id for row in cache.done] if case_ids is None else case_ids)
    descriptors = torch.empty(len(slices), ASP_GRID**2, device=device)
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with progress("describe", total=len(slices), unit="slices", shown=shown) as advance:
            for places in _batches(cache, slices, batch_size, stride):
                images_BCYX, superpixels_BYX, grid_BGG = _read(
                    cache, slices[places], adjacent_slices=adjacent_slices, stride=stride, device=device
                )
                features = encoder(images_BCYX.expand(-1, in_channels, -1, -1))[-1]
                maps_BYX = _averaged(features, superpixels_BYX)
                descriptors[places] = maps_BYX.flatten(1).gather(1, grid_BGG.flatten(1))
                advance(len(places))
    finally:
        for module, training in modes:
            module.training = training
    _check_finite(descriptors, cache, slices)
    return descriptors


def _unet_sizes(shapes: dict[str, torch.Size], source: Path) -> tuple[int, int]:
    """Filters and input channels of the published backbone."""
    stem = shapes.get(UNET_STEM, ())
    if len(stem) != 4 or 0 in stem:
        raise _no_encoder(
            source,
            expected=f"a tensor {UNET_STEM} of shape (filters, in_channels, 3, 3)",
            found=f"one of shape {tuple(stem)}" if stem else "none",
        )
    return stem[0], stem[1]


def _channels_of_images(metadata: dict[str, str], shapes: dict[str, torch.Size], source: Path) -> int:
    """Input channels of another backbone: those that the weights name, if one of their kernels has them."""
    named = metadata.get("in_channels", "none")
    for shape in shapes.values():
        if len(shape) == 4 and str(shape[1]) == named:
            return shape[1]
    raise _no_encoder(
        source, expected="in_channels in the metadata, and a kernel for images of them", found=named
    )


def _no_encoder(source: Path, *, expected: str, found: str) -> SuperCLError:
    return SuperCLError(
        "The weights hold no encoder of this project.",
        where=source,
        expected=expected,
        found=found,
        next_step="Give a run of `supercl pretrain` or `supercl finetune`, or a published checkpoint.",
    )


def _batches(cache: Cache, slices: np.ndarray, batch_size: int, stride: int) -> Iterator[list[int]]:
    """Positions in `slices` of what goes through the encoder together: slices of one padded size."""
    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, case in enumerate(cache.slice_case[slices]):
        by_size[_padded_size(cache.rows[case].shape, stride)].append(place)
    for places in by_size.values():
        for first in range(0, len(places), batch_size):
            yield places[first : first + batch_size]


def _padded_size(shape_CZYX: tuple[int, ...], stride: int) -> tuple[int, ...]:
    return tuple(-(-side // stride) * stride for side in shape_CZYX[2:])


def _read(
    cache: Cache, slices: np.ndarray, *, adjacent_slices: int, stride: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised images with adjacent slices, superpixels and, as flat positions int64 (B, g, g), where to read.

    All of `slices` are of one padded size.
    """
    cases = [cache.case(cache.rows[index].id) for index in cache.slice_case[slices]]
    size_YX = _padded_size(cases[0].row.shape, stride)
    num_together = 2 * adjacent_slices + 1
    images = np.zeros((len(slices), num_together * cache.num_channels, *size_YX), np.float32)
    superpixels = np.full((len(slices), *size_YX), -1, np.int32)
    grid = np.empty((len(slices), ASP_GRID, ASP_GRID), np.int64)
    depths = np.array([case.row.shape[1] for case in cases])
    z_AB = adjacent_indices(cache.slice_z[slices], depths, n=adjacent_slices)
    for item, (case, z_A) in enumerate(zip(cases, z_AB.T, strict=True)):
        height, width = case.row.shape[2:]
        together = [case.read("image", slice(z, z + 1))[0] for z in z_A]
        images[item, :, :height, :width] = np.concatenate(together)
        own_z = z_A[adjacent_slices]
        superpixels[item, :height, :width] = case.read("superpixels", slice(own_z, own_z + 1))[0]
        grid[item] = grid_positions(height)[:, None] * size_YX[1] + grid_positions(width)
    windows = np.stack([np.tile(normalisation_window(case), (num_together, 1)) for case in cases])
    on_device = [torch.from_numpy(array).to(device) for array in (images, windows, superpixels, grid)]
    images_BCYX, windows_BC4, superpixels_BYX, grid_BGG = on_device
    images_BCYX = normalise_images(images_BCYX, windows_BC4)
    return images_BCYX.masked_fill(superpixels_BYX[:, None] < 0, 0), superpixels_BYX, grid_BGG


def _averaged(features_BChw: Tensor, superpixels_BYX: Tensor) -> Tensor:
    """The channel mean of features, averaged over superpixels at full resolution: float32 (B, Y, X)."""
    mean = features_BChw.mean(dim=1, keepdim=True, dtype=torch.float32)
    pixels = F.interpolate(mean, superpixels_BYX.shape[-2:], mode="bilinear", align_corners=False).double()
    # In whole steps sums are exact, so the same in whichever order a GPU adds.
    step = pixels.abs().amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / STEPS
    num_superpixels = int(superpixels_BYX.max()) + 1
    maps = asp((pixels / step).round(), superpixels_BYX, num_superpixels=num_superpixels) * step
    return maps[:, 0].float()


def _check_finite(descriptors: Tensor, cache: Cache, slices: np.ndarray) -> None:
    bad = (~torch.isfinite(descriptors)).any(dim=1).cpu().numpy()
    if bad.any():
        first = slices[bad.argmax()]
        raise SuperCLError(
            "The encoder's features are not finite.",
            where=f"{cache.path}, case {cache.rows[cache.slice_case[first]].id}, slice {cache.slice_z[first]}",
            expected="finite numbers",
            found=f"NaN or infinities in {bad.sum():,} of {len(slices):,} slices, this one the first",
            next_step="Use another encoder, or an earlier state: the training of this one may have diverged.",
        )


def _default_name(source: Path) -> str:
    folder_or_file = (source.parent if source.name == WEIGHTS_NAME else source).resolve()
    return folder_or_file.name if folder_or_file.is_dir() else folder_or_file.stem
