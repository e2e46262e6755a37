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

from collections.abc import Callable
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

    A pair is the range (low, high) of a value drawn uniformly for each sample. A change of chance 0 costs nothing.
    0.67 and the scale are published (SuperCL, IEEE TIP 2026), the other values are our choice. Published fine-tuning
    has no random crop: `AugmentConfig(crop=(1.0, 1.0))`. Noise, clipped contrast, low resolution and gamma are not
    part of the published views; they are those of nnU-Net (Nature Methods 2021).
    """

    p_brightness: float = 0.5
    """Chance that a sample's brightness changes."""
    p_contrast: float = 0.5
    """Chance that a sample's contrast changes."""
    p_blur: float = 0.5
    """Chance that a sample is blurred."""
    p_noise: float = 0.0
    """Chance that a sample gets Gaussian noise, independent for each pixel and channel."""
    p_clipped_contrast: float = 0.0
    """Chance that a sample's contrast about its own mean changes, its range staying as it is."""
    p_low_resolution: float = 0.0
    """Chance that a sample looks as if taken at a lower resolution."""
    p_gamma: float = 0.0
    """Chance of a gamma correction between a sample's smallest and largest intensity; mean and spread stay."""
    brightness: tuple[float, float] = (-0.3, 0.3)
    """Added to the intensities, in standard deviations of the case."""
    contrast: tuple[float, float] = (0.7, 1.3)
    """Factor on the intensities, which are centred on the mean of the case."""
    blur_sigma: tuple[float, float] = (0.5, 1.5)
    """Standard deviation of the Gaussian blur, in pixels."""
    noise_sigma: tuple[float, float] = (0.0, 0.1)
    """Standard deviation of the noise, in standard deviations of the case."""
    clipped_contrast: tuple[float, float] = (0.75, 1.25)
    """Factor on the differences from the sample's mean; what leaves the sample's range is clipped."""
    low_resolution: tuple[float, float] = (0.5, 1.0)
    """Share of the rows, and of the columns, that is kept; those in between are interpolated."""
    gamma: tuple[float, float] = (0.7, 1.5)
    """Exponent of the gamma correction: above 1 bright structures gain contrast and dark ones lose it."""
    gamma_inverted: float = 0.25
    """Share of the gamma corrections that are made on the negative, where bright and dark change places."""
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
        for name in _CHANCES:
            self._check(name, 0 <= getattr(self, name) <= 1, "a probability between 0 and 1")
        for name, (least, most) in _RANGE_BOUNDS.items():
            low, high = getattr(self, name)
            self._check(name, least <= low <= high <= most, f"(low, high), {least} <= low <= high <= {most}")
        self._check(
            "mirror_axes",
            self.mirror_axes in ((), ("y",), ("x",), ("y", "x"), ("x", "y")),
            'any of "y" and "x"',
        )
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


_CHANCES = (
    "p_brightness",
    "p_contrast",
    "p_blur",
    "p_noise",
    "p_clipped_contrast",
    "p_low_resolution",
    "p_gamma",
    "gamma_inverted",
    "p_geometric",
)
_LEAST_SPREAD = 1e-7
"""Of intensities, in place of 0 where an image is constant."""
# Factors and widths stop short of 0, where an image would vanish or a division fail.
_RANGE_BOUNDS = {
    "brightness": (-10.0, 10.0),
    "contrast": (0.01, 100.0),
    "blur_sigma": (0.01, 100.0),
    "noise_sigma": (0.0, 10.0),
    "clipped_contrast": (0.01, 100.0),
    "low_resolution": (0.01, 1.0),
    "gamma": (0.01, 100.0),
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
    """Change intensity, sharpness and noise of each sample, and move nothing.

    `images_BCYX`: float32 or float64 (b, c, y, x), finite, normalised to zero mean and unit variance over
    the case. `generator`: on the images' device. Returns the same shape and dtype. All channels of a sample
    get the same change, but for the noise. Our choice of parameters; brightness, contrast and blur are SuperCL's,
    the other changes and the order are nnU-Net's.
    """
    draw = _Draw(images_BCYX, generator, part)
    changes = (
        (config.p_noise, _noise),
        (config.p_blur, _blur),
        (config.p_contrast, _contrast),
        (config.p_brightness, _brightness),
        (config.p_clipped_contrast, _clipped_contrast),
        (config.p_low_resolution, _low_resolution),
        (config.p_gamma, _gamma),
    )
    for chance, change in changes:
        if chance > 0:
            images_BCYX = change(images_BCYX, draw.chance(chance), draw, config)
    return images_BCYX


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


# The intensity changes: each takes images (b, c, y, x) and which samples are to change, bool (b), and draws how much
# for all samples, so that a sample's parameters do not depend on what was decided for the others.


def _noise(images_BCYX: Tensor, chosen: Tensor, draw: _Draw, config: AugmentConfig) -> Tensor:
    sigma = torch.where(chosen, draw.uniform(*config.noise_sigma), 0.0)
    return torch.addcmul(images_BCYX, draw.normal(), _per_sample(sigma))


def _blur(images_BCYX: Tensor, chosen: Tensor, draw: _Draw, config: AugmentConfig) -> Tensor:
    # A sigma this small makes the blur the identity, exactly: every other weight underflows to 0.
    sigma = torch.where(chosen, draw.uniform(*config.blur_sigma), 0.01)
    height, width = images_BCYX.shape[2:]
    return _blur_matrix(height, sigma) @ images_BCYX @ _blur_matrix(width, sigma).mT


def _contrast(images_BCYX: Tensor, chosen: Tensor, draw: _Draw, config: AugmentConfig) -> Tensor:
    return images_BCYX * _per_sample(torch.where(chosen, draw.uniform(*config.contrast), 1.0))


def _brightness(images_BCYX: Tensor, chosen: Tensor, draw: _Draw, config: AugmentConfig) -> Tensor:
    return images_BCYX + _per_sample(torch.where(chosen, draw.uniform(*config.brightness), 0.0))


def _clipped_contrast(images_BCYX: Tensor, chosen: Tensor, draw: _Draw, config: AugmentConfig) -> Tensor:
    factor = _per_sample(torch.where(chosen, draw.uniform(*config.clipped_contrast), 1.0))
    low, high = _range(images_BCYX)
    mean = images_BCYX.mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, images_BCYX, factor).clamp(low, high)


def _low_resolution(images_BCYX: Tensor, chosen: Tensor, draw: _Draw, config: AugmentConfig) -> Tensor:
    share = torch.where(chosen, draw.uniform(*config.low_resolution), 1.0)
    height, width = images_BCYX.shape[2:]
    return _thinning_matrix(height, share) @ images_BCYX @ _thinning_matrix(width, share).mT


def _gamma(images_BCYX: Tensor, chosen: Tensor, draw: _Draw, config: AugmentConfig) -> Tensor:
    exponent = _per_sample(draw.uniform(*config.gamma))
    inverted = _per_sample(draw.chance(config.gamma_inverted))
    low, high = _range(images_BCYX)
    from_end = torch.where(inverted, high - images_BCYX, images_BCYX - low)
    curved = (from_end / (high - low).clamp(min=_LEAST_SPREAD)) ** exponent
    mean, _, spread = _statistics(images_BCYX)
    _, centred, curved_spread = _statistics(curved)
    factor = spread / curved_spread.clamp(min=_LEAST_SPREAD)
    changed = centred * torch.where(inverted, -factor, factor) + mean
    return torch.where(_per_sample(chosen), changed, images_BCYX)


def _per_sample(values_B: Tensor) -> Tensor:
    return values_B.view(-1, 1, 1, 1)


def _range(images_BCYX: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest intensity of each sample, over its channels: (b, 1, 1, 1) each."""
    return images_BCYX.amin(dim=(1, 2, 3), keepdim=True), images_BCYX.amax(dim=(1, 2, 3), keepdim=True)


def _statistics(images_BCYX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (b, 1, 1, 1), distance from the mean (b, c, y, x) and standard deviation (b, 1, 1, 1) of each sample."""
    mean = images_BCYX.mean(dim=(1, 2, 3), keepdim=True)
    centred = images_BCYX - mean
    # A fifth of the time that torch.std_mean takes on a CPU.
    return mean, centred, centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def _blur_matrix(size: int, sigma: Tensor) -> Tensor:
    """Gaussian blur along an axis as a matrix (b, 1, size, size), its rows summing to 1.

    The image's edge needs no padding so, and each sample has a sigma of its own without a kernel cut off
    somewhere.
    """
    position = torch.arange(size, device=sigma.device, dtype=sigma.dtype)
    distance = position[:, None] - position
    return torch.softmax(-0.5 * (distance / _per_sample(sigma)) ** 2, dim=-1)


def _thinning_matrix(size: int, share: Tensor) -> Tensor:
    """Keeping a share of the pixels along an axis, and interpolating the others, as a matrix (b, 1, size, size).

    Those kept are the nearest to evenly spread positions. Positions are exact, as integers, so that a share of 1
    changes nothing.
    """
    num_kept = (size * share).round().long().clamp(min=1)[:, None]
    # Where the centre of each pixel is among those kept, in units of 1 / (2 * size).
    position = ((2 * torch.arange(size, device=share.device) + 1) * num_kept - size).clamp(min=0)
    before = position // (2 * size)
    after = torch.minimum(before + 1, num_kept - 1)
    weight = (position % (2 * size)).to(share.dtype) / (2 * size)
    matrix = share.new_zeros(len(share), size, size)
    for kept, part in ((before, 1 - weight), (after, weight)):
        source = (2 * kept + 1) * size // (2 * num_kept)
        matrix.scatter_add_(2, source[..., None], part[..., None])
    return matrix[:, None]


class _Draw(NamedTuple):
    """Random parameters for each sample of a batch, on its device and of its dtype."""

    like: Tensor
    generator: torch.Generator
    part: Part

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * self._own(torch.rand, shape)

    def chance(self, probability: float) -> Tensor:
        return self.uniform(0.0, 1.0) < probability

    def normal(self) -> Tensor:
        """A standard normal number for each pixel and channel."""
        return self._own(torch.randn, self.like.shape[1:])

    def _own(self, numbers: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        """This part's samples of what is drawn for the whole batch."""
        rank, num_ranks = self.part
        size = (len(self.like) * num_ranks, *shape)
        drawn = numbers(size, generator=self.generator, device=self.like.device, dtype=self.like.dtype)
        return drawn[rank::num_ranks]
