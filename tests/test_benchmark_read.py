"""`benchmarks/read.py` in its quick form: it ends, and its last line has the keys that others read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_benchmarks import last_line, run_benchmark

TIMES = (
    *("mmap_vs_memcpy", "mmap_vs_zarr", "mmap_vs_tensorstore", "mmap_vs_npy", "mmap_cold_vs_npy"),
    *("mmap_slices_per_second", "mmap_cold_slices_per_second", "open_10000_cases_s", "help_s"),
)


@pytest.mark.slow
def test_of_a_made_cache_it_prints_what_others_read() -> None:
    values = last_line(run_benchmark("read", "--quick"))
    assert min(values[name] for name in TIMES) > 0
    assert values["mmap_vs_zarr"] > 1
    assert (values["num_slices"], values["slice_bytes"]) == (64, 512 * 512 * 3)
    assert values["arrays_equal_zarr"] == values["arrays"] == 4 * 3
    assert {"processor", "cores", "numpy", "zarr", "tensorstore", "quick"} <= set(values)


@pytest.mark.slow
def test_of_an_existing_cache_it_reads_the_cases_of_the_commonest_slice_size(tmp_path: Path) -> None:
    from made_caches import write_cache

    random = np.random.default_rng(0)
    cases = {
        f"case_{index}": {
            "image": random.integers(0, 100, (2, 3, side, 24)).astype(np.int16),
            "superpixels": random.integers(0, 9, (3, side, 24)).astype(np.uint8),
            "ground_truth": np.zeros((3, side, 24), np.uint8),
        }
        for index, side in enumerate((20, 30, 20))
    }
    path = write_cache(tmp_path / "c.zarr", cases, name="c", channel_names=("1", "2"), class_names=("b",))
    values = last_line(run_benchmark("read", "--cache", path, "--quick"))
    assert (values["num_slices"], values["slice_bytes"]) == (6, 20 * 24 * (2 * 2 + 1))
    assert values["arrays_equal_zarr"] == values["arrays"] == 3 * 4


def test_without_a_cache_it_says_so(tmp_path: Path) -> None:
    finished = run_benchmark("read", "--cache", tmp_path / "none.zarr")
    assert finished.returncode == 1
    assert "error: There is no cache here." in finished.stderr
