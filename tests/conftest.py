"""What several test modules share: a tiny data set, its cache, a Dask scheduler and the command line in-process.

Caches of session scope are for reading only; a test that changes one takes `cache_copy`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import made_caches
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

SPACING_MM = (3.0, 0.9, 0.8)
"""Along z, y, x."""
TILTED = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)
"""Direction cosines of the tiny data set: 37 degrees about z."""

Cases = dict[str, tuple[np.ndarray, np.ndarray | None]]


def smooth_noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Blobs a few pixels wide in 0..1, float64, each slice of the last two axes rescaled by itself."""
    noise = np.random.default_rng(seed).normal(size=shape)
    noise = gaussian_filter(noise, (0,) * (len(shape) - 2) + (2, 2))
    low = noise.min(axis=(-2, -1), keepdims=True)
    span = noise.max(axis=(-2, -1), keepdims=True) - low
    return (noise - low) / np.where(span > 0, span, 1)


def write_volume_file(path: Path, array: np.ndarray, *, spacing_mm: tuple[float, ...] = SPACING_MM) -> Path:
    """Write a (z, y, x) or (c, z, y, x) volume; channels become the fourth axis of the file."""
    image = sitk.GetImageFromArray(array, isVector=False)
    if array.ndim == 3:
        image.SetDirection(TILTED)
        image.SetOrigin((-7.0, 12.5, 100.0))
    image.SetSpacing((*spacing_mm[::-1], *([1.0] * (array.ndim - 3))))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=True)
    return path


def write_msd_folder(
    path: Path,
    cases: Cases,
    *,
    class_names: tuple[str, ...] = ("background", "anterior", "posterior"),
    channel_names: tuple[str, ...] = ("MRI",),
) -> Path:
    """Write cases, each an image and a label map or None, in the layout of the Medical Segmentation Decathlon."""
    training, test = [], []
    (path / "imagesTr").mkdir(parents=True, exist_ok=True)
    for case_id, (image, label) in cases.items():
        folder = "imagesTs" if label is None else "imagesTr"
        write_volume_file(path / folder / f"{case_id}.nii.gz", image)
        if label is None:
            test.append(f"./imagesTs/{case_id}.nii.gz")
        else:
            write_volume_file(path / "labelsTr" / f"{case_id}.nii.gz", label)
            training.append({part: f"./{part}sTr/{case_id}.nii.gz" for part in ("image", "label")})
    declared = {
        "name": "Task99_Tiny",
        "modality": {str(index): name for index, name in enumerate(channel_names)},
        "labels": {str(index): name for index, name in enumerate(class_names)},
        "training": training,
        "test": test,
    }
    (path / "dataset.json").write_text(json.dumps(declared))
    return path


def tiny_cases() -> Cases:
    """Four cases of every storage type: int16 with a slice of zeros, float32, uint16 with an offset, unlabelled."""
    shape = (5, 24, 20)
    label = (smooth_noise(shape, 9) * 2.99).astype(np.uint8)
    integers = (smooth_noise(shape, 0) * 1000 - 200).astype(np.int16)
    integers[2] = 0
    empty_label = label.copy()
    empty_label[1] = 0
    fractions = (smooth_noise((6, 24, 20), 1) * 10 - 3).astype(np.float32)
    wide = np.rint(smooth_noise(shape, 2) * 60_000 - 100).astype(np.int32)
    return {
        "case_a": (integers, empty_label),
        "case_b": (fractions, np.concatenate([label, label[:1]])),
        "case_c": (wide, label),
        "case_d": ((smooth_noise((7, 18, 26), 3) * 400).astype(np.int16), None),
    }


@pytest.fixture(autouse=True)
def paths_as_before() -> Iterator[None]:
    """The command line keeps its processes out of the working folder; those of other tests may look there."""
    yield
    os.environ.pop("PYTHONSAFEPATH", None)


@pytest.fixture(scope="session")
def write_volume() -> Callable[..., Path]:
    return write_volume_file


@pytest.fixture(scope="session")
def write_msd() -> Callable[..., Path]:
    return write_msd_folder


@pytest.fixture(scope="session")
def texture() -> Callable[[tuple[int, ...], int], np.ndarray]:
    return smooth_noise


@pytest.fixture(scope="session")
def msd_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set: case_a, case_b and case_c with ground truth 0..2, case_d without."""
    return write_msd_folder(tmp_path_factory.mktemp("msd") / "Task99_Tiny", tiny_cases())


@pytest.fixture(scope="session")
def cache_path(msd_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the tiny data set, from a real run with one Dask worker process; for reading only."""
    from preprocess import run

    path = tmp_path_factory.mktemp("cache") / "tiny.zarr"
    result = run(msd_path, path, num_workers=1)
    assert (result.num_computed, result.failed) == (4, ())
    return path


@pytest.fixture
def cache_copy(cache_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny cache that a test may change."""
    return Path(shutil.copytree(cache_path, tmp_path / "copy.zarr"))


@pytest.fixture(scope="session")
def full_cache_path(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny cache with all that a cache may have: descriptors, named like its labels, too."""
    path = Path(shutil.copytree(cache_path, tmp_path_factory.mktemp("full") / "full.zarr"))
    made_caches.add_descriptors(path)
    return path


@pytest.fixture(scope="session")
def scheduler() -> Iterator[str]:
    """Address of a Dask scheduler with one worker thread in this process: no start-up for every run."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, memory_limit=0, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster.scheduler_address


@dataclass(frozen=True)
class Outcome:
    """What a command left on the screen."""

    code: int
    out: str
    err: str


@pytest.fixture
def supercl(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process: `supercl("inspect", path).code`."""
    from supercl_core.cli import main

    def call(*arguments: Any) -> Outcome:
        capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that ask for it are marked `real_data`."""
    if not os.environ.get("SUPERCL_DATA"):
        pytest.skip("SUPERCL_DATA is not set: no real data sets to test with")
    return Path(os.environ["SUPERCL_DATA"])
