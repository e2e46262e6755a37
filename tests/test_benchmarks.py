"""Benchmarks in their quick form on a phantom: they end, and their last line has the keys that others read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def test_verify_prints_rates(phantom: Path) -> None:
    values = last_line(run_benchmark("verify", "--data", phantom, "--quick"))
    for name in ("native", "enlarged"):
        for turn in ("reading", "one_process", "all_cores"):
            assert values[name][f"{turn}_warm_gb_per_s"] > 0


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
