"""Synthetic labelled anatomy: the data set of the demo and of the tests.

Each case is drawn in a body-shaped coordinate frame: x from the patient's right (-1) to the left (+1), y from
front to back, both in half widths of the body, z from the lowest slice (0) to the highest (1). Organs are
ellipsoids in that frame, cut and joined; a case moves, scales and tilts each of them, bends the whole frame and
roughens the surfaces. As in a real abdomen, what a slice shows follows from its height. Stomach, bowel and
gallbladder look like the labelled organs and carry no label.

The command `supercl phantom` calls `write_phantom`; nothing is learned or read from outside.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from supercl_core.errors import UsageError
from supercl_core.files import replace_folder, wip_path, write_json

LABELS = {0: "background", 1: "liver", 2: "spleen", 3: "kidneys"}
"""Name of every value that a label volume holds."""

# All arithmetic is in float64: values are rounded to int16 at the end, and differences in the last bits of
# float32 (another thread count, another CPU) would show in some of them.
Field = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class PhantomCase:
    """One synthetic case, axes (z, y, x); x grows to the patient's left, y to the back, z upwards."""

    image: NDArray[np.int16]
    """Intensities, 0 or more, of no fixed scale, as in MRI."""
    label: NDArray[np.uint8]
    """Keys of `LABELS`, same shape as the image."""
    spacing_mm: tuple[float, float, float]
    """Distance between voxel centres along (z, y, x), in mm."""


def write_phantom(
    out_path: Path, *, num_cases: int = 24, seed: int = 0, on_case: Callable[[int], None] | None = None
) -> Path:
    """Write a data set of synthetic cases in the layout of the Medical Segmentation Decathlon.

    The same seed gives the same bytes in every image and label, however many cases are asked for.
    `on_case` is called with the index of each case once it is written. Everything is written to the sibling
    folder `out_path.wip`, which replaces what an interrupted run has left there and is renamed at the end.

    Returns `out_path`. Raises `UsageError` when `num_cases` is below 1, `seed` is negative, or `out_path` is
    anything but absent or an empty folder.
    """
    if num_cases < 1:
        raise UsageError(
            "The number of phantom cases is too small.",
            where="num_cases",
            expected="1 or more",
            found=num_cases,
            next_step="Ask for at least one case, for example --cases 24.",
        )
    if seed < 0:
        raise UsageError(
            "The seed is negative.",
            where="seed",
            expected="0 or more",
            found=seed,
            next_step="Choose another seed, for example --seed 0.",
        )
    if out_path.exists() and not (out_path.is_dir() and not any(out_path.iterdir())):
        raise UsageError(
            "The output path is taken.",
            where=out_path,
            expected="a path that does not exist, or an empty folder",
            found="a folder with files in it" if out_path.is_dir() else "a file",
            next_step="Name another folder, or remove this one first.",
        )

    wip = wip_path(out_path)
    shutil.rmtree(wip, ignore_errors=True)
    for folder in ("imagesTr", "labelsTr"):
        (wip / folder).mkdir(parents=True)

    training = []
    for index in range(num_cases):
        case = phantom_case(index, seed=seed)
        entry = {kind: f"./{kind}sTr/phantom_{index:03d}.nii.gz" for kind in ("image", "label")}
        _write_volume(wip / entry["image"], case.image, case.spacing_mm)
        _write_volume(wip / entry["label"], case.label, case.spacing_mm)
        training.append(entry)
        if on_case is not None:
            on_case(index)

    description = {
        "name": "Phantom",
        "description": "Synthetic abdominal anatomy with unlabelled look-alikes, a bias field and Rician noise",
        "licence": "CC0",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(value): name for value, name in LABELS.items()},
        "numTraining": num_cases,
        "numTest": 0,
        "training": training,
        "test": [],
    }
    write_json(wip / "dataset.json", description)
    replace_folder(wip, out_path)
    return out_path


def phantom_case(index: int, *, seed: int) -> PhantomCase:
    """Draw case `index` of the data set with this seed; it depends on nothing else.

    `index` and `seed` are 0 or more. The image has 14-24 slices of 84-104 columns and 72-104 rows, with about
    1.0-1.6 mm in plane and 2.9-6.0 mm between slices. Every organ of `LABELS` occurs in it, none in all of
    its slices. The anatomy and all its ranges are our choice.
    """
    rng = np.random.default_rng([seed, index])
    num_columns = int(rng.integers(84, 105))
    num_rows = round(num_columns * rng.uniform(0.86, 1.0))
    num_slices = int(rng.integers(14, 25))
    shape = (num_slices, num_rows, num_columns)

    half_width_mm = rng.uniform(48, 58)
    in_plane_mm = round(half_width_mm / (num_columns * rng.uniform(0.43, 0.47)), 2)
    between_mm = round(1.45 * half_width_mm / num_slices, 2)

    canvas = _Canvas(rng, _body_frame(rng, shape, in_plane_mm / half_width_mm))
    cavity = _paint_wall(canvas)
    _paint_back(canvas)
    _paint_gut(canvas, cavity)
    _paint_organs(canvas, cavity)
    _paint_vessels(canvas)
    return PhantomCase(
        image=_acquire(rng, canvas.tissue),
        label=canvas.label,
        spacing_mm=(between_mm, in_plane_mm, in_plane_mm),
    )


@dataclass(frozen=True)
class _Ellipsoid:
    """An ellipsoid in the body frame: centre and radii along (x, y, z), turned by `tilt` radians in plane."""

    center: tuple[float, float, float]
    radii: tuple[float, float, float]
    tilt: float = 0.0

    def varied(self, rng: np.random.Generator) -> _Ellipsoid:
        """The same structure in another patient: moved, scaled and tilted a little."""
        center = np.add(self.center, rng.normal(0, (0.04, 0.03, 0.03)))
        radii = np.multiply(self.radii, np.exp(rng.normal(0, 0.1, size=3)))
        return _Ellipsoid(tuple(center), tuple(radii), self.tilt + rng.normal(0, 0.15))

    def depth(self, frame: Field) -> Field:
        """1 in the centre, 0 on the surface, negative outside, (z, y, x), over a frame (3, z, y, x)."""
        x, y, z = (axis - middle for axis, middle in zip(frame, self.center, strict=True))
        cos, sin = np.cos(self.tilt), np.sin(self.tilt)
        along_x, along_y, along_z = self.radii
        return 1 - np.sqrt(
            ((cos * x + sin * y) / along_x) ** 2 + ((cos * y - sin * x) / along_y) ** 2 + (z / along_z) ** 2
        )


def _body_frame(rng: np.random.Generator, shape: tuple[int, int, int], pixel: float) -> Field:
    """Bent coordinates (x, y, z) of every voxel, shape (3, z, y, x); `pixel` is in half widths."""
    num_slices, num_rows, num_columns = shape
    z = (np.arange(num_slices) + 0.5) / num_slices * rng.uniform(0.92, 1.04) + rng.uniform(-0.04, 0.04)
    y = (np.arange(num_rows) - (num_rows - 1) / 2) * pixel + rng.uniform(-0.03, 0.03)
    x = (np.arange(num_columns) - (num_columns - 1) / 2) * pixel + rng.uniform(-0.03, 0.03)
    straight = np.stack(np.meshgrid(z, y, x, indexing="ij")[::-1])
    bend = np.stack([_smooth_field(rng, shape, num_knots=5) for _ in range(3)])
    return straight + np.reshape([0.04, 0.04, 0.03], (3, 1, 1, 1)) * bend


class _Canvas:
    """A case in the making: structures are painted one over the other, each with signal, texture and label."""

    def __init__(self, rng: np.random.Generator, frame: Field) -> None:
        self.rng = rng
        self.frame = frame
        self.shape = frame.shape[1:]
        self.tissue = np.zeros(self.shape)
        """Signal (z, y, x), 0 (air) to about 1 (fat, fluid)."""
        self.label = np.zeros(self.shape, np.uint8)
        """Keys of `LABELS`, (z, y, x)."""

    def smooth_field(self, num_knots: int) -> Field:
        return _smooth_field(self.rng, self.shape, num_knots=num_knots)

    def rough(self, depth: Field, amount: float = 0.1) -> Mask:
        """Where `depth` is positive, with an uneven surface."""
        return depth + amount * self.smooth_field(9) > 0

    def inside(self, *parts: _Ellipsoid) -> Mask:
        """The union of the ellipsoids, each varied and with an uneven surface."""
        return np.logical_or.reduce([self.rough(part.varied(self.rng).depth(self.frame)) for part in parts])

    def fill(
        self, where: Mask, mean: float, *, grain: float = 0.0, size: float = 1.0, value: int = 0
    ) -> None:
        """Paint a tissue; its texture has standard deviation `grain` and is as coarse as `size` pixels."""
        signal = np.full(self.shape, mean + self.rng.normal(0, 0.04))
        if grain:
            texture = gaussian_filter(self.rng.standard_normal(self.shape), (size / 3, size, size))
            signal += grain * texture / texture.std()
        self.tissue[where] = signal[where]
        self.label[where] = value


def _paint_wall(canvas: _Canvas) -> Mask:
    """Skin fat, the muscles of the wall, ribs that run obliquely through them; returns the cavity within."""
    x, y, z = canvas.frame
    depth = 1 - (np.abs(x) ** 2.3 + np.abs(y / 0.76) ** 2.3) ** (1 / 2.3)
    fat = 0.09 * np.exp(canvas.rng.normal(0, 0.25))
    cavity = depth > fat + 0.08
    angle = np.arctan2(y, x)
    ribs = (np.cos(11 * angle + 26 * z * np.sign(x)) > 0.55) & (z > 0.35) & (np.abs(angle + np.pi / 2) > 0.6)

    canvas.fill(depth > 0, 0.82, grain=0.03, size=2)
    canvas.fill(depth > fat, 0.30, grain=0.03)
    canvas.fill(ribs & (depth > fat + 0.02) & (depth < fat + 0.07), 0.14)
    canvas.fill(cavity, 0.70, grain=0.06, size=3)
    return cavity


def _paint_back(canvas: _Canvas) -> None:
    """Muscles beside the spine, vertebrae with discs between them, and the spinal canal."""
    for side in (-1, 1):
        erector = _Ellipsoid((side * 0.24, 0.52, 0.5), (0.21, 0.15, 2.0), -0.3 * side)
        psoas = _Ellipsoid((side * 0.23, 0.30, 0.0), (0.10, 0.12, 0.5), 0.4 * side)
        canvas.fill(canvas.inside(erector), 0.30, grain=0.04)
        canvas.fill(canvas.inside(psoas), 0.32, grain=0.04)
    body = _Ellipsoid((0.0, 0.36, 0.5), (0.16, 0.14, 3.0))
    process = _Ellipsoid((0.0, 0.60, 0.5), (0.05, 0.12, 3.0))
    spine = canvas.inside(body, process)
    discs = np.cos(2 * np.pi * (3.5 * canvas.frame[2] + canvas.rng.uniform())) > 0.75
    canvas.fill(spine, 0.52, grain=0.05)
    canvas.fill(spine & discs, 0.25)
    canvas.fill(canvas.inside(_Ellipsoid((0.0, 0.53, 0.5), (0.06, 0.05, 3.0))), 0.92)


def _paint_gut(canvas: _Canvas, cavity: Mask) -> None:
    """Bowel and stomach, walls like an organ around changing contents."""
    rng = canvas.rng
    for _ in range(int(rng.integers(9, 14))):
        loop = _Ellipsoid(
            (rng.uniform(-0.6, 0.6), rng.uniform(-0.42, 0.08), rng.uniform(-0.05, 0.42)),
            (rng.uniform(0.10, 0.22), rng.uniform(0.09, 0.15), rng.uniform(0.08, 0.2)),
            rng.uniform(-1.5, 1.5),
        )
        depth = loop.depth(canvas.frame)
        canvas.fill(cavity & canvas.rough(depth), 0.46, grain=0.05)
        canvas.fill(cavity & canvas.rough(depth - 0.45), rng.uniform(0.2, 0.65), grain=0.08, size=2)
    stomach = _Ellipsoid((0.32, -0.24, 0.72), (0.34, 0.24, 0.30), 0.5).varied(rng)
    depth = stomach.depth(canvas.frame)
    canvas.fill(cavity & canvas.rough(depth), 0.45, grain=0.04)
    canvas.fill(cavity & canvas.rough(depth - 0.2), rng.uniform(0.3, 0.6), grain=0.09, size=3)


def _paint_organs(canvas: _Canvas, cavity: Mask) -> None:
    """Lungs, then the labelled organs that rise into them: spleen, kidneys, liver; last the gallbladder."""
    rng = canvas.rng
    for side in (-1, 1):
        canvas.fill(cavity & canvas.inside(_Ellipsoid((side * 0.52, 0.20, 1.10), (0.42, 0.52, 0.30))), 0.06)

    hollow = _Ellipsoid((0.33, 0.06, 0.72), (0.26, 0.30, 0.7)).varied(rng).depth(canvas.frame)
    spleen = canvas.inside(_Ellipsoid((0.62, 0.14, 0.68), (0.28, 0.42, 0.30), -0.35)) & (hollow < 0)
    canvas.fill(cavity & spleen, 0.50, grain=0.05, value=2)

    for side in (-1, 1):
        usual = _Ellipsoid((side * 0.47, 0.32, 0.33 + 0.04 * side), (0.18, 0.23, 0.29), -0.5 * side)
        kidney = usual.varied(rng)
        x, y, z = kidney.center
        hilum = _Ellipsoid((x - side * 0.18, y - 0.05, z), (0.10, 0.07, 0.14))
        depth = np.minimum(kidney.depth(canvas.frame), -hilum.depth(canvas.frame))
        canvas.fill(cavity & canvas.rough(depth), 0.55, grain=0.03, value=3)
        canvas.fill(cavity & canvas.rough(depth - 0.35), 0.42, grain=0.05, size=1.5, value=3)

    right_lobe = _Ellipsoid((-0.45, 0.0, 0.80), (0.50, 0.56, 0.62))
    left_lobe = _Ellipsoid((-0.02, -0.30, 0.80), (0.46, 0.26, 0.34), -0.15)
    x, y, z = canvas.frame
    above_lower_surface = z - 0.42 + 0.55 * (x + 0.45) - 0.35 * y + rng.normal(0, 0.04)
    liver = cavity & canvas.inside(right_lobe, left_lobe) & canvas.rough(above_lower_surface, 0.04)
    # Two smooth fields vanish together along lines: the branches of a vessel tree.
    vessels = np.abs(canvas.smooth_field(11)) + np.abs(canvas.smooth_field(11)) < 0.3
    canvas.fill(liver, 0.45, grain=0.04, size=0.7, value=1)
    canvas.fill(liver & vessels, 0.33, value=1)
    canvas.fill(
        cavity & canvas.inside(_Ellipsoid((-0.30, -0.22, 0.42), (0.11, 0.10, 0.13))), 0.55, grain=0.02
    )


def _paint_vessels(canvas: _Canvas) -> None:
    """Vena cava and aorta, side by side along the whole height."""
    x, y, z = canvas.frame
    wander = 0.03 * np.sin(2 * np.pi * z + canvas.rng.uniform(0, 2 * np.pi))
    straightened = np.stack([x - wander, y, z])
    cava = _Ellipsoid((-0.13, 0.14, 0.5), (0.095, 0.065, 3.0))
    aorta = _Ellipsoid((0.06, 0.17, 0.5), (0.07, 0.07, 3.0))
    for vessel in (cava, aorta):
        canvas.fill(canvas.rough(vessel.varied(canvas.rng).depth(straightened)), 0.25)


def _acquire(rng: np.random.Generator, tissue: Field) -> NDArray[np.int16]:
    """What a scanner makes of the tissue: contrast, blur, bias field, Rician noise and its own scale."""
    signal = np.clip(tissue, 0, None) ** rng.uniform(0.8, 1.25)
    signal = gaussian_filter(signal, (0.3, 0.6, 0.6))
    signal *= np.exp(0.2 * _smooth_field(rng, tissue.shape, num_knots=3))
    noise = rng.uniform(0.02, 0.04)
    real, imaginary = rng.normal(0, noise, size=(2, *tissue.shape))
    return np.round(np.hypot(signal + real, imaginary) * rng.uniform(400, 1600)).astype(np.int16)


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...], *, num_knots: int) -> Field:
    """A smooth random field of mean 0 and standard deviation 1: Gaussian bumps on a grid of knots."""
    field = rng.standard_normal((num_knots,) * len(shape))
    knots = np.linspace(0, 1, num_knots)
    for size in shape:
        distance = (np.linspace(0, 1, size)[:, None] - knots) * (num_knots - 1)
        field = np.tensordot(field, np.exp(-0.5 * (distance / 0.7) ** 2), axes=(0, 1))
    return (field - field.mean()) / field.std()


def _write_volume(path: Path, array: NDArray[np.generic], spacing_mm: tuple[float, float, float]) -> None:
    """Write a (z, y, x) volume."""
    volume = sitk.GetImageFromArray(array)
    volume.SetSpacing(spacing_mm[::-1])
    sitk.WriteImage(volume, path)
