"""Benchmarks in their quick form on a phantom: they end, and their last line has the keys that others read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from preprocess.phantom import write_phantom

    path = tmp_path_factory.mktemp("benchmarks") / "phantom"
    write_phantom(path, num_cases=2)
    return path


def run_benchmark(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)


def last_line(finished: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert finished.returncode == 0, finished.stderr
    values: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return values


@pytest.mark.slow
def test_slic_prints_speed_and_quality(phantom: Path) -> None:
    values = last_line(run_benchmark("slic", "--data", phantom, "--quick"))
    for key in (
        *(
            "fast_vs_skimage_512",
            "fast_vs_skimage_256",
            "fast_vs_skimage_native",
            "fast_vs_skimage_512_noise",
        ),
        *("fast_vs_opencv_512", "exact_vs_skimage_512"),
    ):
        assert values[key] > 0
    assert 0.999 <= values["exact_agreement"] <= 1
    for metric in ("asa", "boundary_recall", "undersegmentation", "explained_variance"):
        low, high = values[f"{metric}_difference_ci"]
        assert low <= values[f"{metric}_difference"] <= high
    hours = values["median_ms"]["512"]["fast"] / 1000 * 17_525 / 3600
    assert values["cpu_hours_17525_slices_512"] == pytest.approx(hours)
    assert values["published_cpu_hours"] == 153
    assert (values["num_cases"], values["num_slices"], values["num_slices_timed"]) == (2, 4, 2)
    assert {"processor", "cores", "numpy", "numba", "scikit-image", "opencv", "SimpleITK"} <= set(values)


def test_slic_without_a_data_set_says_so(tmp_path: Path) -> None:
    finished = run_benchmark("slic", "--data", tmp_path / "none", "--quick")
    assert finished.returncode == 1
    assert "error: The input folder does not exist." in finished.stderr


def test_slic_matches_ids_one_to_one() -> None:
    from benchmarks.slic import matched_pixels

    labels = np.array([[0, 0, 0, 0, 0], [1, 1, 1, 2, 2]])
    assert matched_pixels(labels, 40 - 3 * labels) == 10
    # 0 with 7 and 1 with 9 agree on 2 + 3 pixels; 0 with 9 on 3, and 7 then has no pixel of 1 or 2.
    reference = np.array([[9, 9, 9, 7, 7], [9, 9, 9, 9, 9]])
    assert matched_pixels(labels, reference) == 5


def test_slic_finds_the_noise_that_a_slice_has() -> None:
    from benchmarks.slic import noise_level

    ramp = np.add.outer(np.arange(300.0), 5 * np.arange(200.0))
    noise = np.random.default_rng(0).normal(scale=4.0, size=ramp.shape)
    assert noise_level(ramp) == pytest.approx(0, abs=1e-9)
    assert noise_level(ramp + noise) == pytest.approx(4.0, rel=0.02)


@pytest.mark.slow
def test_verify_prints_rates(phantom: Path) -> None:
    values = last_line(run_benchmark("verify", "--data", phantom, "--quick"))
    for name in ("native", "enlarged"):
        for turn in ("reading", "one_process", "all_cores"):
            assert values[name][f"{turn}_warm_gb_per_s"] > 0


@pytest.mark.slow
def test_forms_prints_sizes_and_rates(phantom: Path) -> None:
    values = last_line(run_benchmark("forms", "--data", phantom, "--quick"))
    figures = values["caches"]["phantom"]
    assert 0 < figures["archive_bytes"] < figures["cache_bytes"]
    assert min(figures["mb_per_s"].values()) > 0


@pytest.mark.slow
def test_weak_labels_prints_what_others_read(phantom: Path) -> None:
    values = last_line(run_benchmark("weak_labels", "--data", phantom, "--quick"))
    for key in ("exact_40k_seconds", "exact_40k_peak_bytes", "union_find_10m_seconds"):
        assert values[key] > 0
    assert 0.9 <= values["approximate_real_recall"] <= 1
    assert 0 < values["cached_pairs_share_of_step"] < 0.1
    assert "approximate_1m_recall" not in values
    assert values["quick"]


@pytest.mark.parametrize("shape", [(50, 100), (64, 64), (90, 40)])
def test_the_published_dataset_gives_two_views_and_superpixels_of_each(shape: tuple[int, int]) -> None:
    from benchmarks.published import PublishedDataset

    slices = [conftest.smooth_noise(shape, seed).astype(np.float32) for seed in range(4)]
    dataset = PublishedDataset(slices, side=64)
    assert len(dataset) == 4
    items = [dataset[index] for index in range(4)]
    for item in items:
        assert (item["views"].shape, item["views"].dtype) == ((2, 1, 64, 64), np.float32)
        assert item["superpixels"].shape == (2, 64, 64)
        assert all(30 <= len(np.unique(ids)) <= 150 for ids in item["superpixels"])
    assert any((item["views"][0] != item["views"][1]).any() for item in items)
    assert any((item["superpixels"][0] != item["superpixels"][1]).any() for item in items)


@pytest.mark.parametrize(("side", "filters", "slices"), [(64, 4, 6), (512, 1, 4)])
def test_the_published_step_restated_is_our_preset_published(side: int, filters: int, slices: int) -> None:
    """On a small map, where ILCP takes every pixel, and on one of 32 x 32, where it takes two columns."""
    import torch

    from benchmarks.published import published_losses
    from train.augment import AugmentConfig
    from train.data import Batch
    from train.methods import PRESETS, PretrainConfig
    from train.models.backbones import build_encoder
    from train.models.unet import PretrainNet
    from train.pretraining import PretrainLosses

    random = torch.Generator().manual_seed(0)
    cells = side // 16
    # Slices and superpixels of two kinds, and views far apart: so links go to other slices too.
    kind = torch.arange(slices) % 2
    noise = torch.randn(slices, 1, side, side, generator=random)
    superpixels = (torch.rand(2, cells, cells, generator=random) ** 2 * 10).to(torch.int16)
    batch = Batch(
        image_BCYX=noise[kind] + 0.1 * noise,
        superpixels_Bhw=superpixels[kind],
        ground_truth_BYX=None,
        positions_B=torch.rand(slices, generator=random),
        slices_B=torch.arange(slices),
    )
    augment = AugmentConfig(brightness=(-3.0, 3.0), contrast=(0.1, 3.0))
    config = PretrainConfig(**PRESETS["published"], augment=augment)
    torch.manual_seed(0)
    network = PretrainNet(build_encoder("unet", in_channels=1, filters=filters), projection=0)
    seen: list[torch.Tensor] = []

    def recorded(local: torch.Tensor, whole: torch.Tensor, *, passes: int) -> Any:
        seen.extend((*local.chunk(2), *whole.chunk(2)))
        return network(local, whole, passes=passes)

    compute = PretrainLosses(recorded, config=config, in_channels=1, ccl=None, num_superpixels=10)
    ours = compute(batch, torch.Generator().manual_seed(1))
    our_gradients = torch.autograd.grad(ours["loss"], list(network.parameters()))
    published = published_losses(network, tuple(seen), batch.superpixels_Bhw, batch.positions_B)
    gradients = torch.autograd.grad(published["loss"], list(network.parameters()))
    assert -1 <= ours.pop("similarity") <= 1  # for the log: no part of the loss
    assert ours.keys() == published.keys()
    for name, value in ours.items():
        torch.testing.assert_close(published[name], value, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(gradients, our_gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_input_prints_batches_per_second() -> None:
    values = last_line(run_benchmark("input", "--quick"))
    ratio = values["batches_per_second"] / values["published_batches_per_second"]
    assert values["vs_published"] == pytest.approx(ratio)
    assert ratio > 1
    assert (values["side"], values["batch_size"], values["rounds"], values["quick"]) == (128, 4, 1, True)
    assert {"processor", "cores", "torch", "scikit-image"} <= set(values)


@pytest.mark.slow
def test_step_prints_times_memory_and_the_wait_for_data() -> None:
    values = last_line(run_benchmark("step", "--quick", "--device", "cpu"))
    ways = {"published", "published_memory_kept", "published_mixed", "ours_float32", "ours"}
    for key in ("step_ms", "peak_memory_bytes"):
        assert values[key].keys() == ways
        assert min(values[key].values()) > 0
    step_ms, memory = values["step_ms"], values["peak_memory_bytes"]
    for key, ratio in {
        "vs_published": step_ms["published"] / step_ms["ours_float32"],
        "vs_published_best": step_ms["published"] / step_ms["ours"],
        "vs_published_memory_kept": step_ms["published_memory_kept"] / step_ms["ours_float32"],
        "vs_published_mixed": step_ms["published_mixed"] / step_ms["ours"],
        "slices_per_second": 4000 / step_ms["ours"],
        "peak_memory_vs_published": memory["ours"] / memory["published"],
    }.items():
        assert values[key] == pytest.approx(ratio)
    assert 0 < values["data_wait_share"] < 1
    for key, value in {"device": "cpu", "side": 64, "filters": 8, "batch_size": 4, "rounds": 2}.items():
        assert values[key] == value
    assert {"processor", "cores", "torch", "threads", "precision", "compile", "quick"} <= set(values)
