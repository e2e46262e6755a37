"""Views: what each group of changes may and may not do, read off images whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from supercl_core.errors import UsageError
from train.augment import AugmentConfig, geometric_view, intensity_view, pretrain_views

IDENTITY = AugmentConfig(
    p_brightness=0.0, p_contrast=0.0, p_blur=0.0, mirror_axes=(), p_geometric=0.0, crop=(1.0, 1.0)
)
EVERYTHING = AugmentConfig(p_noise=1.0, p_clipped_contrast=1.0, p_low_resolution=1.0, p_gamma=1.0)
INTENSITY_CHANCES = [name for name in vars(IDENTITY) if name.startswith("p_") and name != "p_geometric"]
RIGID = replace(IDENTITY, p_geometric=1.0, scale=(1.0, 1.0), elastic_amplitude=0.0)
SHAPES = [(1, 1, 16, 16), (3, 4, 24, 40), (2, 1, 33, 17), (2, 3, 1, 8)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def source_offsets(config: AugmentConfig, *, batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where each output pixel was read, in pixels from the centre (b, 2, y, x), and whether that is inside.

    Linear ramps are resampled without error, so they tell their own source position.
    """
    y = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    ramps = torch.stack((*torch.meshgrid(y, x, indexing="ij"), torch.ones(height, width)))
    moved = geometric_view(ramps.expand(batch, -1, -1, -1), generator(), config=config)
    return moved[:, :2], (moved[:, 2] - 1).abs() < 1e-9


def linear_part(offsets_B2YX: Tensor) -> Tensor:
    """The 2 x 2 matrix (b, 2, 2) from output to source position, taken at the centre."""
    _, _, height, width = offsets_B2YX.shape
    y, x = height // 2, width // 2
    along_y = offsets_B2YX[:, :, y + 1, x] - offsets_B2YX[:, :, y, x]
    along_x = offsets_B2YX[:, :, y, x + 1] - offsets_B2YX[:, :, y, x]
    return torch.stack((along_y, along_x), dim=-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_settings_without_change_return_the_input(shape: tuple[int, ...]) -> None:
    images, labels = noise(*shape), torch.randint(0, 300, (shape[0], *shape[2:]))
    assert torch.equal(intensity_view(images, generator(), config=IDENTITY), images)
    moved, moved_labels = geometric_view(images, generator(), config=IDENTITY, labels_BYX=labels)
    torch.testing.assert_close(moved, images, rtol=0, atol=1e-4)
    assert torch.equal(moved_labels, labels)


@pytest.mark.parametrize("shape", SHAPES)
def test_views_keep_shape_and_dtype_and_stay_finite(shape: tuple[int, ...]) -> None:
    for images in (noise(*shape), torch.zeros(shape), torch.full(shape, 3.0, dtype=torch.float64)):
        for view in pretrain_views(images, generator(), config=EVERYTHING):
            assert view.shape == images.shape
            assert view.dtype == images.dtype
            assert view.isfinite().all()


def test_the_generator_alone_decides() -> None:
    images, config = noise(4, 2, 24, 32), AugmentConfig()
    first, again, other = (pretrain_views(images, generator(seed), config=config) for seed in (1, 1, 2))
    for view, same, different in zip(first, again, other, strict=True):
        assert torch.equal(view, same)
        assert not torch.allclose(view, different)


def test_four_views_of_one_slice_all_differ() -> None:
    config = AugmentConfig(p_brightness=1.0, p_contrast=1.0)
    views = pretrain_views(noise(8, 1, 32, 32), generator(), config=config)
    for i in range(4):
        for j in range(i):
            assert (views[i] - views[j]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_x3_and_x4_are_moved_from_x1_and_x2() -> None:
    config = replace(IDENTITY, p_brightness=1.0)
    x1, x2, x3, x4 = pretrain_views(noise(3, 1, 16, 16), generator(), config=config)
    torch.testing.assert_close(x3, x1, rtol=0, atol=1e-4)
    torch.testing.assert_close(x4, x2, rtol=0, atol=1e-4)


def test_each_sample_gets_its_own_parameters() -> None:
    images = noise(1, 1, 24, 24).expand(8, -1, -1, -1)
    config = AugmentConfig(p_brightness=1.0)
    for view in (intensity_view, geometric_view):
        samples = view(images, generator(), config=config)
        distances = torch.cdist(samples.flatten(1), samples.flatten(1))
        assert (distances + 100 * torch.eye(8)).min() > 1e-2


# Intensity


def test_brightness_and_contrast_are_one_affine_change_of_each_sample() -> None:
    config = AugmentConfig(p_brightness=1.0, p_contrast=1.0, p_blur=0.0)
    images = noise(64, 2, 16, 16).double()
    view = intensity_view(images, generator(), config=config)
    for before, after in zip(images.numpy(), view.numpy(), strict=True):
        contrast, brightness = np.polyfit(before.ravel(), after.ravel(), 1)
        np.testing.assert_allclose(after, contrast * before + brightness, atol=1e-9)
        assert config.contrast[0] <= contrast <= config.contrast[1]
        assert config.brightness[0] <= brightness <= config.brightness[1]


def test_intensity_changes_happen_as_often_as_told() -> None:
    config = replace(IDENTITY, p_brightness=0.25, brightness=(1.0, 1.0))
    changed = intensity_view(torch.zeros(4000, 1, 1, 1), generator(), config=config).mean()
    assert changed == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("sigma", [0.5, 1.3, 3.0])
def test_blur_agrees_with_scipy_away_from_the_edge(sigma: float) -> None:
    images = torch.nn.functional.pad(noise(2, 2, 20, 9).double(), [30] * 4)
    config = replace(IDENTITY, p_blur=1.0, blur_sigma=(sigma, sigma))
    expected = ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="constant", truncate=10)
    np.testing.assert_allclose(intensity_view(images, generator(), config=config), expected, atol=1e-8)


def test_blur_keeps_a_point_in_place() -> None:
    config = replace(IDENTITY, p_blur=1.0)
    points = torch.zeros(4, 1, 20, 30)
    points[:, 0, 6, 21] = 1.0
    blurred = intensity_view(points, generator(), config=config)
    assert blurred.flatten(1).argmax(dim=1).tolist() == [6 * 30 + 21] * 4
    assert blurred.amax(dim=(1, 2, 3)).unique().numel() == 4


def test_changes_of_chance_0_draw_nothing() -> None:
    random = generator()
    before = random.get_state()
    intensity_view(noise(2, 1, 8, 8), random, config=IDENTITY)
    assert torch.equal(random.get_state(), before)


@pytest.mark.parametrize("name", INTENSITY_CHANCES)
def test_samples_that_a_change_passes_over_are_the_input(name: str) -> None:
    images = noise(400, 2, 7, 9)
    view = intensity_view(images, generator(), config=replace(IDENTITY, **{name: 0.3}))
    kept = (view == images).flatten(1).all(dim=1)
    assert kept.double().mean() == pytest.approx(0.7, abs=0.08)
    assert (view - images)[~kept].abs().flatten(1).amax(dim=1).median() > 1e-2


@pytest.mark.parametrize("name", ["p_blur", "p_clipped_contrast", "p_low_resolution", "p_gamma"])
def test_a_constant_image_stays_as_it_is(name: str) -> None:
    for value in (0.0, 2.5):
        images = torch.full((4, 2, 20, 30), value)
        view = intensity_view(images, generator(), config=replace(IDENTITY, **{name: 1.0}))
        torch.testing.assert_close(view, images)


@pytest.mark.parametrize("name", [name for name in INTENSITY_CHANCES if name != "p_noise"])
def test_all_channels_get_the_same_change(name: str) -> None:
    images = noise(6, 1, 12, 10).expand(-1, 3, -1, -1)
    view = intensity_view(images, generator(), config=replace(IDENTITY, **{name: 1.0}))
    torch.testing.assert_close(view, view[:, :1].expand(-1, 3, -1, -1), rtol=0, atol=1e-6)


def test_noise_is_white_and_each_sample_has_a_strength_of_its_own() -> None:
    config = replace(IDENTITY, p_noise=1.0, noise_sigma=(0.2, 0.6))
    images = noise(300, 2, 40, 30).double()
    added = intensity_view(images, generator(), config=config) - images
    sigma = added.std(dim=(1, 2, 3))
    assert 0.19 < sigma.min() < 0.22
    assert 0.58 < sigma.max() < 0.63
    unit = added / sigma.view(-1, 1, 1, 1)
    assert unit.mean().abs() < 0.01
    assert (unit**4).mean() == pytest.approx(3.0, abs=0.05)  # a Gaussian's
    for neighbour in (unit.flip(1), unit.roll(1, dims=2), unit.roll(1, dims=3), unit.roll(1, dims=0)):
        assert (unit * neighbour).mean().abs() < 0.01


@pytest.mark.parametrize("factor", [0.6, 1.7])
def test_clipped_contrast_by_hand(factor: float) -> None:
    config = replace(IDENTITY, p_clipped_contrast=1.0, clipped_contrast=(factor, factor))
    images = noise(5, 2, 9, 11).double() + torch.arange(5).view(-1, 1, 1, 1)
    for before, after in zip(
        images.numpy(), intensity_view(images, generator(), config=config).numpy(), strict=True
    ):
        expected = np.clip((before - before.mean()) * factor + before.mean(), before.min(), before.max())
        np.testing.assert_allclose(after, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("share", "kept"), [(0.01, (1, 1)), (0.3, (11, 15)), (0.5, (18, 25)), (0.6, (22, 30)), (0.97, (36, 48))]
)
def test_low_resolution_is_nearest_down_and_linear_up(share: float, kept: tuple[int, int]) -> None:
    config = replace(IDENTITY, p_low_resolution=1.0, low_resolution=(share, share))
    images = noise(2, 2, 37, 50).double()
    low = torch.nn.functional.interpolate(images, kept, mode="nearest-exact")
    expected = torch.nn.functional.interpolate(low, (37, 50), mode="bilinear", align_corners=False)
    torch.testing.assert_close(intensity_view(images, generator(), config=config), expected)


def test_low_resolution_by_hand() -> None:
    # Of 8 pixels 4 are kept, one of each pair; linear interpolation between them is at quarters.
    config = replace(IDENTITY, p_low_resolution=1.0, low_resolution=(0.5, 0.5))
    row = torch.tensor([9.0, 0.0, 9.0, 4.0, 9.0, 8.0, 9.0, 4.0])
    view = intensity_view(row.expand(1, 1, 6, 8), generator(), config=config)
    expected = torch.tensor([0.0, 1.0, 3.0, 5.0, 7.0, 7.0, 5.0, 4.0])
    torch.testing.assert_close(view, expected.expand(1, 1, 6, 8))


def test_each_sample_has_a_resolution_of_its_own() -> None:
    image = noise(1, 1, 20, 20)
    config = replace(IDENTITY, p_low_resolution=1.0, low_resolution=(0.25, 0.75))
    view = intensity_view(image.expand(200, -1, -1, -1), generator(), config=config)
    sizes = range(5, 16)
    one_of_each = torch.cat(
        [
            intensity_view(image, generator(), config=replace(config, low_resolution=(size / 20, size / 20)))
            for size in sizes
        ]
    )
    same = (view - one_of_each[:, 0]).abs().amax(dim=(2, 3)) < 1e-5
    assert (same.sum(dim=1) == 1).all()
    assert same.any(dim=0).all()


@pytest.mark.parametrize("exponent", [0.7, 1.5, 3.0])
@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_by_hand(exponent: float, inverted: bool) -> None:
    config = replace(
        IDENTITY, p_gamma=1.0, gamma=(exponent, exponent), gamma_inverted=1.0 if inverted else 0.0
    )
    images = noise(4, 2, 13, 8).double()
    for before, after in zip(
        images.numpy(), intensity_view(images, generator(), config=config).numpy(), strict=True
    ):
        unit = (before - before.min()) / (before.max() - before.min())
        curved = 1 - (1 - unit) ** exponent if inverted else unit**exponent
        expected = (curved - curved.mean()) / curved.std() * before.std() + before.mean()
        np.testing.assert_allclose(after, expected, atol=1e-10)


def test_gamma_keeps_mean_spread_and_order_of_the_intensities() -> None:
    images = noise(50, 3, 12, 10) * torch.rand(50, 1, 1, 1, generator=generator(1)) + 0.5
    config = replace(IDENTITY, p_gamma=1.0, gamma=(0.3, 4.0), gamma_inverted=0.5)
    view = intensity_view(images, generator(), config=config)
    torch.testing.assert_close(view.mean(dim=(1, 2, 3)), images.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(view.std(dim=(1, 2, 3)), images.std(dim=(1, 2, 3)), rtol=1e-4, atol=0)
    order = images.flatten(1).argsort(dim=1)
    assert (view.flatten(1).gather(1, order).diff(dim=1) >= -1e-6).all()


def test_the_negative_is_corrected_as_often_as_told() -> None:
    ramp = torch.linspace(-1, 1, 101).expand(3000, 1, 1, -1)
    config = replace(IDENTITY, p_gamma=1.0, gamma=(2.0, 2.0), gamma_inverted=0.25)
    view = intensity_view(ramp, generator(), config=config)
    # A square bends upwards, that of the negative downwards.
    inverted = view[..., 0] + view[..., -1] < 2 * view[..., 50]
    assert inverted.double().mean() == pytest.approx(0.25, abs=0.03)


# Geometry


def test_mirroring_is_exact_and_uses_every_combination_of_axes() -> None:
    config = replace(IDENTITY, mirror_axes=("y", "x"))
    images, labels = noise(40, 2, 12, 18), torch.randint(0, 9, (40, 12, 18), dtype=torch.uint8)
    moved, moved_labels = geometric_view(images, generator(), config=config, labels_BYX=labels)
    found = set()
    for image, after, label, label_after in zip(images, moved, labels, moved_labels, strict=True):
        (axes,) = (
            axes
            for axes in ((), (-2,), (-1,), (-2, -1))
            if torch.allclose(image.flip(axes), after, atol=1e-4)
        )
        assert torch.equal(label.flip(axes), label_after)
        found.add(axes)
    assert len(found) == 4


@pytest.mark.parametrize(("axis", "flipped"), [("y", -2), ("x", -1)])
def test_mirroring_along_one_axis_leaves_the_other(axis: str, flipped: int) -> None:
    images = noise(20, 1, 8, 8)
    moved = geometric_view(images, generator(), config=replace(IDENTITY, mirror_axes=(axis,)))
    same = torch.isclose(moved, images, atol=1e-4).all(dim=(1, 2, 3))
    mirrored = torch.isclose(moved, images.flip(flipped), atol=1e-4).all(dim=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert same.any()
    assert mirrored.any()


def test_a_quarter_turn_of_a_square_is_rot90() -> None:
    images, labels = noise(3, 2, 21, 21), torch.randint(0, 1000, (3, 21, 21))
    config = replace(RIGID, rotation_degrees=(90.0, 90.0))
    moved, moved_labels = geometric_view(images, generator(), config=config, labels_BYX=labels)
    torch.testing.assert_close(moved, images.rot90(-1, dims=(-2, -1)), rtol=0, atol=1e-4)
    assert torch.equal(moved_labels, labels.rot90(-1, dims=(-2, -1)))


@pytest.mark.parametrize("degrees", [90.0, 37.0])
def test_a_disc_on_an_image_that_is_not_square_stays_a_disc(degrees: float) -> None:
    y, x = torch.meshgrid(torch.arange(30.0) - 14.5, torch.arange(64.0) - 31.5, indexing="ij")
    disc = torch.sigmoid(8 - torch.hypot(y, x))[None, None]
    moved = geometric_view(disc, generator(), config=replace(RIGID, rotation_degrees=(degrees, degrees)))
    torch.testing.assert_close(moved, disc, rtol=0, atol=0.04)


def test_rotation_and_scaling_keep_angles_on_an_image_that_is_not_square() -> None:
    config = replace(RIGID, rotation_degrees=(-40.0, 25.0), scale=(0.7, 1.3), crop=(0.5, 0.9))
    offsets, _ = source_offsets(config, batch=200, height=31, width=63)
    assert offsets[:, :, 15, 31].abs().max() < 1e-9
    matrix = linear_part(offsets)
    zoom = torch.linalg.det(matrix).sqrt()
    rotation = matrix / zoom.view(-1, 1, 1)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(2).double().expand(200, -1, -1))
    degrees = torch.rad2deg(torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0]))
    for value, (low, high) in ((1 / zoom, config.scale), (degrees, config.rotation_degrees)):
        margin = 0.05 * (high - low)
        assert low - 1e-9 <= value.min() < low + margin
        assert high - margin < value.max() <= high + 1e-9


def test_elastic_deformation_is_bounded_and_never_folds() -> None:
    config = replace(RIGID, rotation_degrees=(0.0, 0.0), elastic_amplitude=0.06)
    offsets, inside = source_offsets(config, batch=100, height=48, width=72)
    still, _ = source_offsets(IDENTITY, batch=100, height=48, width=72)
    moved = (offsets - still).abs().amax(dim=1)[inside]
    # Bicubic interpolation overshoots its control points by less than 1.5.
    assert 0.9 * 0.06 * 48 < moved.max() < 1.5 * 0.06 * 48
    along_y, along_x = offsets.diff(dim=2)[..., :-1], offsets.diff(dim=3)[:, :, :-1]
    area = along_y[:, 0] * along_x[:, 1] - along_y[:, 1] * along_x[:, 0]
    whole = inside[:, :-1, :-1] & inside[:, 1:, :-1] & inside[:, :-1, 1:]
    assert area[whole].min() > 0


def test_a_crop_lies_inside_the_image_and_fills_the_view() -> None:
    config = replace(IDENTITY, crop=(0.5, 0.9))
    offsets, inside = source_offsets(config, batch=200, height=30, width=50)
    assert inside.all()
    sides = linear_part(offsets)
    torch.testing.assert_close(sides, sides[:, :1, :1] * torch.eye(2).double())
    assert 0.5 <= sides[:, 0, 0].min() < 0.52
    assert 0.88 < sides[:, 0, 0].max() <= 0.9


def test_crops_reach_all_four_edges() -> None:
    offsets, _ = source_offsets(replace(IDENTITY, crop=(0.5, 0.5)), batch=200, height=30, width=50)
    for axis, half in ((0, 14.5), (1, 24.5)):
        assert -half <= offsets[:, axis].min() < 1 - half
        assert half - 1 < offsets[:, axis].max() <= half


def test_deformed_and_cropped_samples_come_in_the_published_proportion() -> None:
    # A scale of 2 marks the deformed samples, a crop of 0.8 the others.
    config = AugmentConfig(
        mirror_axes=(), rotation_degrees=(0.0, 0.0), scale=(2.0, 2.0), elastic_amplitude=0.0, crop=(0.8, 0.8)
    )
    offsets, _ = source_offsets(config, batch=3000, height=5, width=5)
    zoom = linear_part(offsets)[:, 0, 0]
    deformed = torch.isclose(zoom, torch.tensor(0.5).double())
    torch.testing.assert_close(zoom[~deformed], torch.tensor(0.8).double().expand(int((~deformed).sum())))
    assert deformed.double().mean() == pytest.approx(0.67, abs=0.03)


def test_outside_is_zero_in_images_and_labels() -> None:
    config = replace(RIGID, rotation_degrees=(0.0, 0.0), scale=(0.5, 0.5))
    images, labels = torch.ones(1, 1, 16, 24), torch.full((1, 16, 24), 3)
    moved, moved_labels = geometric_view(images, generator(), config=config, labels_BYX=labels)
    expected = torch.zeros(16, 24)
    expected[4:12, 6:18] = 1.0
    torch.testing.assert_close(moved[0, 0], expected, rtol=0, atol=0.5)
    assert torch.equal(moved_labels[0], 3 * expected.long())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_follow_their_images_and_keep_their_ids(dtype: torch.dtype) -> None:
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    blobs = torch.stack([torch.hypot(y - 44, 0.7 * (x - 60)) < 26, torch.hypot(y - 40, x - 70) < 14])
    ids = {torch.uint8: (100, 255), torch.int32: (70_000, 3), torch.int64: (2**24 - 1, 5)}[dtype]
    labels = torch.zeros(96, 128, dtype=dtype)
    for blob, value in zip(blobs, ids, strict=True):
        labels[blob] = value
    drawn = torch.stack([labels == value for value in ids]).float()
    moved, moved_labels = geometric_view(
        drawn.expand(16, -1, -1, -1),
        generator(),
        config=AugmentConfig(),
        labels_BYX=labels.expand(16, -1, -1),
    )
    assert moved_labels.dtype == dtype
    assert set(moved_labels.unique().tolist()) == {0, *ids}
    for channel, value in enumerate(ids):
        a, b = moved[:, channel] > 0.5, moved_labels == value
        dsc = 2 * (a & b).sum(dim=(1, 2)) / (a.sum(dim=(1, 2)) + b.sum(dim=(1, 2)))
        assert dsc.min() > 0.95


def test_labels_do_not_change_what_happens_to_the_images() -> None:
    images, config = noise(4, 1, 20, 20), AugmentConfig()
    alone = geometric_view(images, generator(), config=config)
    labels = torch.ones(4, 20, 20, dtype=torch.uint8)
    together, _ = geometric_view(images, generator(), config=config, labels_BYX=labels)
    assert torch.equal(alone, together)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("p_geometric", 1.2),
        ("p_blur", math.nan),
        ("scale", (1.3, 0.7)),
        ("scale", (0.0, 1.0)),
        ("blur_sigma", (0.0, 1.0)),
        ("crop", (0.5, 1.1)),
        ("mirror_axes", ("z",)),
        ("mirror_axes", ("y", "y")),
        ("p_noise", 1.1),
        ("p_clipped_contrast", -0.1),
        ("p_low_resolution", 2.0),
        ("p_gamma", math.nan),
        ("gamma_inverted", 1.5),
        ("noise_sigma", (-0.1, 0.1)),
        ("clipped_contrast", (0.0, 1.0)),
        ("low_resolution", (0.5, 1.1)),
        ("gamma", (1.5, 0.7)),
        ("elastic_grid", 1),
        ("elastic_amplitude", 0.125),
    ],
)
def test_settings_out_of_bounds_are_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(UsageError, match=setting):
        AugmentConfig(**{setting: value})


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_parts_of_a_batch_get_the_views_of_the_whole(num_ranks: int) -> None:
    images, config = noise(6, 2, 20, 24), EVERYTHING
    whole = pretrain_views(images, generator(), config=config)
    for rank in range(num_ranks):
        own = pretrain_views(images[rank::num_ranks], generator(), config=config, part=(rank, num_ranks))
        for name, view in own._asdict().items():
            torch.testing.assert_close(
                view, getattr(whole, name)[rank::num_ranks], rtol=0, atol=1e-6, msg=name
            )
