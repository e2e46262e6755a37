"""Random views of a batch of slices: intensity changes, and one geometric resampling.

Pre-training takes four views of a slice (`pretrain_views`); fine-tuning takes `geometric_view` of images
and labels together. Both training loops call this on batches that are on their device already, normalised
and cropped by `train.data`. Nothing here loops over the batch, waits for the device, or draws a number
from anything but the generator passed in. Call it outside autocast, and before a single channel is repeated
for a model of four: the repeats would only cost time.

Of several training processes each holds a part of the global batch: every `num_ranks`-th sample, from `rank` on. With
`part` = (rank, num_ranks) and equal generators, each sample gets the parameters that it has in the whole batch on one
process.

Axes: B sample, C channel, Y row, X column. Geometry is computed in pixels about the image's centre, so that
a rotation stays a rotation on images that are not square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from supercl_core.errors import UsageError

Part = tuple[int, int]
"""Rank and number of ranks of the processes that share a global batch."""

WHOLE: Final[Part] = (0, 1)
"""A batch that is no part of another."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What the views may change, and how much.

    A pair is the range (low, high) of a value drawn uniformly for each sample. 0.67 and the scale are
    published (SuperCL, IEEE TIP 2026), the other values are our choice. Published fine-tuning has no random
    crop: `AugmentConfig(crop=(1.0, 1.0))`.
    """

    p_brightness: float = 0.5
    """Chance that a sample's brightness changes."""
    p_contrast: float = 0.5
    """Chance that a sample's contrast changes."""
    p_blur: float = 0.5
    """Chance that a sample is blurred."""
    brightness: tuple[float, float] = (-0.3, 0.3)
    """Added to the intensities, in standard deviations of the case."""
    contrast: tuple[float, float] = (0.7, 1.3)
    """Factor on the intensities, which are centred on the mean of the case."""
    blur_sigma: tuple[float, float] = (0.5, 1.5)
    """Standard deviation of the Gaussian blur, in pixels."""
    mirror_axes: tuple[str, ...] = ("y", "x")
    """Axes, of "y" and "x", along which a sample is mirrored with chance one half each."""
    p_geometric: float = 0.67
    """Chance of elastic deformation, rotation and scaling, all three together; otherwise a random crop."""
    rotation_degrees: tuple[float, float] = (-30.0, 30.0)
    """Angle of the rotation about the centre."""
    scale: tuple[float, float] = (0.7, 1.3)
    """Magnification: above 1 structures grow."""
    elastic_amplitude: float = 0.06
    """Largest displacement of a control point along each axis, as a fraction of the shorter image side."""
    elastic_grid: int = 5
    """Control points of the elastic deformation along each axis; bicubic in between."""
    crop: tuple[float, float] = (0.7, 1.0)
    """Sides of the random crop, as a fraction of the image's; it is zoomed back to the image's size."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for the first setting outside its bounds."""
        for name in ("p_brightness", "p_contrast", "p_blur", "p_geometric"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a probability between 0 and 1")
        for name, (least, most) in _RANGE_BOUNDS.items():
            low, high = getattr(self, name)
            self._check(name, least <= low <= high <= most, f"(low, high), {least} <= low <= high <= {most}")
        self._check("mirror_axes", set(self.mirror_axes) <= {"y", "x"}, 'any of "y" and "x"')
        self._check("elastic_grid", self.elastic_grid >= 2, "at least 2 control points")
        # From this on neighbouring control points can change places, and the image folds over itself.
        limit = 0.5 / (self.elastic_grid - 1)
        self._check(
            "elastic_amplitude", 0 <= self.elastic_amplitude < limit, f"at least 0, below {limit:.4g}"
        )

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise UsageError(
                "An augmentation setting is out of bounds.",
                where=name,
                expected=expected,
                found=getattr(self, name),
                next_step=f"Change {name} in the configuration.",
            )


# Factors and widths stop short of 0, where an image would vanish or a division fail.
_RANGE_BOUNDS = {
    "brightness": (-10.0, 10.0),
    "contrast": (0.01, 100.0),
    "blur_sigma": (0.01, 100.0),
    "rotation_degrees": (-360.0, 360.0),
    "scale": (0.01, 100.0),
    "crop": (0.01, 1.0),
}


class Views(NamedTuple):
    """The four views of a batch of slices, each float (b, c, y, x).

    `x1` and `x2` share the slices' superpixel map (L_intra, ILCP); `x3` and `x4` do not (L_ins, L_inter).
    """

    x1: Tensor
    x2: Tensor
    x3: Tensor
    x4: Tensor


def pretrain_views(
    images_BCYX: Tensor, generator: torch.Generator, *, config: AugmentConfig, part: Part = WHOLE
) -> Views:
    """Make the four views of pre-training: x1, x2 differ in intensity; x3 = T(x1) and x4 = T'(x2).

    Arguments as in `geometric_view`. Source: SuperCL (IEEE TIP 2026), with x3 and x4 resampled once instead of in
    several steps.
    """
    x1 = intensity_view(images_BCYX, generator, config=config, part=part)
    x2 = intensity_view(images_BCYX, generator, config=config, part=part)
    x3 = geometric_view(x1, generator, config=config, part=part)
    x4 = geometric_view(x2, generator, config=config, part=part)
    return Views(x1, x2, x3, x4)


def intensity_view(
    images_BCYX: Tensor, generator: torch.Generator, *, config: AugmentConfig, part: Part = WHOLE
) -> Tensor:
    """Change brightness, contrast and sharpness of each sample, and move nothing.

    `images_BCYX`: float32 or float64 (b, c, y, x), finite, normalised to zero mean and unit variance over
    the case. `generator`: on the images' device. Returns the same shape and dtype. All channels of a sample
    get the same change. Our choice of parameters; the group of changes is SuperCL's.
    """
    height, width = images_BCYX.shape[2:]
    draw = _Draw(images_BCYX, generator, part)
    brightness = torch.where(draw.chance(config.p_brightness), draw.uniform(*config.brightness), 0.0)
    contrast = torch.where(draw.chance(config.p_contrast), draw.uniform(*config.contrast), 1.0)
    # A sigma this small makes the blur the identity, exactly: every other weight underflows to 0.
    sigma = torch.where(draw.chance(config.p_blur), draw.uniform(*config.blur_sigma), 0.01)

    blurred_BCYX = _blur_matrix(height, sigma) @ images_BCYX @ _blur_matrix(width, sigma).mT
    return blurred_BCYX * contrast.view(-1, 1, 1, 1) + brightness.view(-1, 1, 1, 1)


@overload
def geometric_view(
    images_BCYX: Tensor,
    generator: torch.Generator,
    *,
    config: AugmentConfig,
    labels_BYX: None = None,
    part: Part = WHOLE,
) -> Tensor: ...


@overload
def geometric_view(
    images_BCYX: Tensor,
    generator: torch.Generator,
    *,
    config: AugmentConfig,
    labels_BYX: Tensor,
    part: Part = WHOLE,
) -> tuple[Tensor, Tensor]: ...


def geometric_view(
    images_BCYX: Tensor,
    generator: torch.Generator,
    *,
    config: AugmentConfig,
    labels_BYX: Tensor | None = None,
    part: Part = WHOLE,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mirror and deform (or crop) each sample, in one resampling; labels follow their images.

    `images_BCYX`: float32 or float64 (b, c, y, x), normalised to zero mean; any height and width, kept.
    `labels_BYX`: integers (b, y, x), ids below 2**24. `generator`: on the images' device. `part`: rank and number of
    ranks, where the images are a part of a global batch.

    Returns images of the same shape and dtype, bilinear; with labels, the pair (images, labels), the labels
    of the same dtype and by nearest neighbour, so that no new id appears. What comes from outside the image
    is 0: the mean intensity in the images, background in the labels. Where nothing is drawn to change, the
    images are the input within rounding (positions are exact to 1e-4 of a pixel) and the labels are equal.

    Source: SuperCL (IEEE TIP 2026) for the choice and chances of the changes; the elastic field is ours.
    """
    height, width = images_BCYX.shape[2:]
    grid_BYX2 = _sampling_grid(height, width, _Draw(images_BCYX, generator, part), config)
    moved_BCYX = grid_sample(images_BCYX, grid_BYX2, mode="bilinear", align_corners=False)
    if labels_BYX is None:
        return moved_BCYX
    # grid_sample takes no integers; floats of the images' precision hold the ids exactly.
    labels_B1YX = labels_BYX[:, None].to(grid_BYX2.dtype)
    moved_labels_B1YX = grid_sample(labels_B1YX, grid_BYX2, mode="nearest", align_corners=False)
    return moved_BCYX, moved_labels_B1YX[:, 0].to(labels_BYX.dtype)


def _sampling_grid(height: int, width: int, draw: _Draw, config: AugmentConfig) -> Tensor:
    """Where each output pixel is read: (b, y, x, 2) in grid_sample's units, last axis (x, y)."""
    # Everything is drawn for every sample and selected after, so that a sample's parameters do not depend
    # on what was decided for the others.
    deformed = draw.chance(config.p_geometric)
    angle = torch.where(deformed, torch.deg2rad(draw.uniform(*config.rotation_degrees)), 0.0)
    crop = draw.uniform(*config.crop)
    zoom = torch.where(deformed, 1 / draw.uniform(*config.scale), crop)
    amplitude = torch.where(deformed, config.elastic_amplitude * min(height, width), 0.0)
    elastic = draw.uniform(-1.0, 1.0, 2, config.elastic_grid, config.elastic_grid)
    elastic_B2YX = amplitude.view(-1, 1, 1, 1) * interpolate(
        elastic, size=(height, width), mode="bicubic", align_corners=True
    )

    freedom = torch.where(deformed, 0.0, 1 / crop - 1)
    y = _offsets(height, freedom, "y" in config.mirror_axes, draw)[:, :, None]
    x = _offsets(width, freedom, "x" in config.mirror_axes, draw)[:, None, :]
    cos, sin = (zoom * angle.cos()).view(-1, 1, 1), (zoom * angle.sin()).view(-1, 1, 1)
    source_y = cos * y - sin * x + elastic_B2YX[:, 0]
    source_x = sin * y + cos * x + elastic_B2YX[:, 1]
    # With align_corners=False, -1 and 1 are the outer edges of the image.
    return torch.stack((source_x * (2 / width), source_y * (2 / height)), dim=-1)


def _offsets(size: int, freedom: Tensor, mirror: bool, draw: _Draw) -> Tensor:
    """Pixel positions along an axis from the image's centre, perhaps mirrored, then shifted: (b, size).

    `freedom` (b): the largest shift, as a fraction of the distance between the centre and the outermost
    pixel centres; these stay inside the image after a crop's zoom, so nothing from outside mixes in.
    """
    furthest = (size - 1) / 2
    centres = torch.arange(size, device=freedom.device, dtype=freedom.dtype) - furthest
    sign = torch.where(draw.chance(0.5 if mirror else 0.0), -1.0, 1.0)
    shift = freedom * furthest * draw.uniform(-1.0, 1.0)
    return sign[:, None] * centres + shift[:, None]


def _blur_matrix(size: int, sigma: Tensor) -> Tensor:
    """Gaussian blur along an axis as a matrix (b, 1, size, size), its rows summing to 1.

    The image's edge needs no padding so, and each sample has a sigma of its own without a kernel cut off
    somewhere.
    """
    position = torch.arange(size, device=sigma.device, dtype=sigma.dtype)
    distance = position[:, None] - position
    return torch.softmax(-0.5 * (distance / sigma.view(-1, 1, 1, 1)) ** 2, dim=-1)


class _Draw(NamedTuple):
    """Random parameters for each sample of a batch, on its device and of its dtype."""

    like: Tensor
    generator: torch.Generator
    part: Part

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        rank, num_ranks = self.part
        size = (len(self.like) * num_ranks, *shape)
        unit = torch.rand(size, generator=self.generator, device=self.like.device, dtype=self.like.dtype)
        return low + (high - low) * unit[rank::num_ranks]

    def chance(self, probability: float) -> Tensor:
        return self.uniform(0.0, 1.0) < probability
