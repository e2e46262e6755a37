"""`supercl preprocess` from files to a complete cache, beside merely reading the same files with SimpleITK.

    python -m benchmarks.preprocess --data DIR [--quick]        (part of make bench)

DIR is a data set in the layout of the Medical Segmentation Decathlon, best with ground truth. From its slices the
script makes compressed NIfTI volumes of 512 x 512 int16 in a temporary folder: cubic enlargement, plus the noise
of the slice as it was acquired, without which they would compress as no scanner's images do. The few different
volumes lie there several times, as links. All is read from memory (page cache warm).

Every figure comes from a process of its own that is bound to its cores with all its children: `preprocess.run` with
one worker on one core and with two on two, SimpleITK on one. They take turns; medians are printed. What a run costs
before and after its cases (starting Dask, loading kernels, weak labels) is measured as the run on a single slice,
shown by itself, and taken off in `vs_reading`, `two_workers_speedup` and `slices_per_second`.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil  # type: ignore[import-untyped]
import SimpleITK as sitk
from scipy.ndimage import zoom

if not __package__:  # run by its path: beside it lies a script that has the name of a package
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.machine import as_text, conditions
from benchmarks.slic import noise_level
from preprocess.kernels.asp import superpixel_means
from preprocess.kernels.statistics import channel_statistics
from preprocess.pipeline import PreprocessConfig, process_case
from preprocess.runner import run
from preprocess.superpixels import slic_superpixels
from supercl_core.cache.cases import CaseRow
from supercl_core.cache.reader import open_cache
from supercl_core.cache.writer import create_cache, write_case
from supercl_core.errors import SuperCLError
from supercl_core.formats.case_files import read_image, read_label_map
from supercl_core.sources import CaseSource, discover

SIDE = 512
SLICES_PER_CASE = 40
DIFFERENT_CASES = 4
CONFIG = PreprocessConfig()


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="A data set in MSD layout.")
@click.option("--quick", is_flag=True, help="Fewer cases and rounds: under 90 seconds.")
@click.option("--part", hidden=True, help="Measure one part, in this process.")
def main(data: Path, quick: bool, part: str | None) -> None:
    """Print all figures for one data set."""
    if part is not None:
        print(json.dumps(PARTS[part](data)))
        return
    run_with = conditions(data, "numpy", "numba", "zarr", "distributed", "SimpleITK", quick=quick)
    print(as_text(run_with))
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = make_data(data, Path(folder), num_cases=16 if quick else 64)
            figures = measure(Path(folder), num_rounds=2 if quick else 5)
        except SuperCLError as error:
            sys.exit(f"error: {error.message()}")
    print(json.dumps({**run_with, **made, **figures}))


# ---------------------------------------------------------------- the data


def make_data(data: Path, folder: Path, *, num_cases: int) -> dict[str, Any]:
    """Write `volumes` and `single` (one slice), both in MSD layout, into `folder`; what they are like."""
    source = discover(data)
    cases = [case for case in source.cases if case.label_paths] or list(source.cases)
    different = cases[:: max(1, len(cases) // DIFFERENT_CASES)][:DIFFERENT_CASES]
    generator = np.random.default_rng(0)
    files: list[dict[str, Path]] = []
    for index, case in enumerate(different):
        files.append(_write_enlarged(case, folder / "originals" / str(index), generator))
    stored = sum(file["image"].stat().st_size for file in files)
    declared = {
        "name": "enlarged",
        "modality": {"0": "image"},
        "labels": dict(enumerate(source.class_names or ())),
    }
    for name, count in (("volumes", num_cases), ("single", 1)):
        training = []
        for index in range(count):
            parts = files[index % len(files)]
            entry = {}
            for part, file in parts.items():
                target = folder / name / f"{part}sTr" / f"case_{index:03}.nii.gz"
                target.parent.mkdir(parents=True, exist_ok=True)
                if name == "single":
                    sitk.WriteImage(sitk.ReadImage(str(file))[:, :, :1], str(target), useCompression=True)
                else:
                    target.hardlink_to(file)
                entry[part] = f"./{part}sTr/{target.name}"
            training.append(entry)
        key = (
            {"training": training}
            if "label" in files[0]
            else {"test": [entry["image"] for entry in training]}
        )
        (folder / name / "dataset.json").write_text(
            json.dumps({**declared, "training": [], "test": [], **key})
        )
    made = {
        "num_cases": num_cases,
        "num_slices": num_cases * SLICES_PER_CASE,
        "slice": f"{SIDE} x {SIDE} int16",
        "has_ground_truth": "label" in files[0],
        "compression_ratio": len(files) * SLICES_PER_CASE * SIDE * SIDE * 2 / stored,
    }
    print(as_text(made))
    return made


def _write_enlarged(case: CaseSource, folder: Path, generator: np.random.Generator) -> dict[str, Path]:
    """One volume of SLICES_PER_CASE slices, each with noise of its own, and its label map where there is one."""
    image_ZYX = read_image(case).array_CZYX[0].astype(np.float64)
    low, high = np.percentile(image_ZYX, (0, 99.9))
    image_ZYX = (image_ZYX - low) * max(1, 255 / max(high - low, 1e-9))  # at least 8 bits of grey values
    label = read_label_map(case)
    label_ZYX = None if label is None else label.array_CZYX[0]
    factors = [SIDE / size for size in image_ZYX.shape[1:]]
    levels = [noise_level(slice_YX) for slice_YX in image_ZYX]
    enlarged = [zoom(slice_YX, factors, order=3) for slice_YX in image_ZYX]
    order = [index % len(enlarged) for index in range(SLICES_PER_CASE)]
    noisy = [enlarged[z] + generator.normal(scale=levels[z], size=(SIDE, SIDE)) for z in order]
    folder.mkdir(parents=True)
    arrays = {"image": np.clip(np.rint(noisy), 0, 32767).astype(np.int16)}
    if label_ZYX is not None:
        labels = [zoom(slice_YX, factors, order=0) for slice_YX in label_ZYX]
        arrays["label"] = np.stack([labels[z] for z in order]).astype(np.uint8)
    files = {}
    for part, array in arrays.items():
        files[part] = folder / f"{part}.nii.gz"
        sitk.WriteImage(sitk.GetImageFromArray(array), str(files[part]), useCompression=True)
    return files


# ---------------------------------------------------------------- the measurements


def measure(folder: Path, *, num_rounds: int) -> dict[str, Any]:
    """Let all parts take turns, each in a process bound to its cores; medians and ratios, printed and returned."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    turns = {
        "reading": ("reading", "volumes", cores[:1]),
        "start_up": ("run_1", "single", cores[:1]),
        "one_worker": ("run_1", "volumes", cores[:1]),
    }
    if len(cores) > 1:
        turns |= {
            "start_up_2": ("run_2", "single", cores[:2]),
            "two_workers": ("run_2", "volumes", cores[:2]),
        }
    _in_process(
        "run_1", folder / "volumes", cores[:1]
    )  # compiles kernels, and touches memory for the first time
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
    for _ in range(num_rounds):
        for name, (part, data, on_cores) in turns.items():
            results[name].append(_in_process(part, folder / data, on_cores))
    stages = _in_process("stages", folder / "volumes", cores[:1])
    seconds = {
        name: statistics.median(result["seconds"] for result in found) for name, found in results.items()
    }
    largest_case_bytes = results["one_worker"][0]["largest_case_bytes"]
    peak = max(result["peak_memory_bytes"] for name in turns if name != "reading" for result in results[name])
    num_slices = results["one_worker"][0]["num_slices"]
    working = seconds["one_worker"] - seconds["start_up"]
    figures: dict[str, Any] = {
        "vs_reading": working / seconds["reading"],
        "vs_reading_with_start_up": seconds["one_worker"] / seconds["reading"],
        "two_workers_speedup": None,
        "slices_per_second": num_slices / working,
        "peak_memory_bytes": peak,
        "peak_memory_bound_bytes": 3 * largest_case_bytes + 500 * 10**6,
        "largest_case_bytes": largest_case_bytes,
        "seconds": seconds,
        **stages,
    }
    if "two_workers" in seconds:
        figures["two_workers_speedup"] = working / (seconds["two_workers"] - seconds["start_up_2"])
    for name, value in seconds.items():
        print(f"{name:12} {value:8.2f} s   (median of {num_rounds})")
    for key, value in figures.items():
        if key != "seconds":
            print(f"{key:26} {value}")
    return figures


def _in_process(part: str, data: Path, cores: list[int]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.preprocess", "--data", str(data), "--part", part]

    def bind() -> None:
        if cores:
            os.sched_setaffinity(0, cores)

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}
    finished = subprocess.run(
        command, env=environment, preexec_fn=bind, stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def read_files(data: Path) -> dict[str, Any]:
    """Read every file with SimpleITK, and do nothing with it."""
    files = [str(path) for case in discover(data).cases for path in case.paths]
    sitk.ReadImage(files[0])
    start = time.perf_counter()
    for file in files:
        sitk.ReadImage(file)
    return {"seconds": time.perf_counter() - start}


def run_preprocessing(data: Path, num_workers: int) -> dict[str, Any]:
    """Preprocess into a new cache with Dask; the time, the memory of the largest worker, and the largest case."""
    with tempfile.TemporaryDirectory(dir=data.parent) as folder:
        ended = threading.Event()
        peaks = [0]
        watch = threading.Thread(target=_watch_memory, args=(ended, peaks))
        watch.start()
        start = time.perf_counter()
        try:
            result = run(data, Path(folder) / "cache.zarr", config=CONFIG, num_workers=num_workers)
            seconds = time.perf_counter() - start
        finally:
            ended.set()
            watch.join()
        if result.failed:
            raise AssertionError(result.failed[0].reason)
        cache = open_cache(result.cache_path)
        case_bytes = [
            sum(
                file.stat().st_size
                for file in (cache.path / "cases" / row.id).rglob("c/**/*")
                if file.is_file()
            )
            for row in cache.done
        ]
        return {
            "seconds": seconds,
            "peak_memory_bytes": max(peaks),
            "largest_case_bytes": max(case_bytes),
            "num_slices": cache.num_slices,
        }


def _watch_memory(ended: threading.Event, peaks: list[int]) -> None:
    """Append the peak resident memory of every child process until `ended`; where only Linux tells it, what it is."""
    while not ended.wait(0.2):
        for process in psutil.Process().children(recursive=True):
            try:
                status = Path(f"/proc/{process.pid}/status")
                lines = status.read_text().splitlines() if status.exists() else []
                peak = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
                peaks.append(peak[0] if peak else process.memory_info().rss)
            except (OSError, psutil.Error):
                continue  # it has just ended


def time_stages(data: Path) -> dict[str, Any]:
    """Milliseconds per slice of every stage of one case, and the kernels of one pass against a memcpy."""
    case = discover(data).cases[0]
    image, label = read_image(case), read_label_map(case)
    num_classes = 0 if label is None else int(label.array_CZYX.max()) + 1
    computed = process_case(image, label, config=CONFIG, num_channels=1, num_classes=num_classes)
    volume_ZYX, superpixels_ZYX = computed.arrays["image"][0], computed.arrays["superpixels"]
    copied_ZYX, copied_ids_ZYX = volume_ZYX.copy(), superpixels_ZYX.copy()

    def copy_by_slices() -> None:
        for z in range(len(volume_ZYX)):
            copied_ZYX[z] = volume_ZYX[z]
            copied_ids_ZYX[z] = superpixels_ZYX[z]

    settings: dict[str, Any] = {"n_segments": CONFIG.n_segments, "compactness": CONFIG.compactness}
    with tempfile.TemporaryDirectory(dir=data.parent) as folder:
        cache_path = Path(folder) / "cache.zarr"
        create_cache(
            cache_path, {"channel_names": ["MRI"], "class_names": list(map(str, range(num_classes)))}
        )
        row = CaseRow(id="case", **computed.row)
        stages: dict[str, Callable[[], object]] = {
            "read": lambda: [read_image(case), read_label_map(case)],
            "slic": lambda: [slic_superpixels(slice_YX[None], **settings) for slice_YX in volume_ZYX],
            "asp": lambda: [
                superpixel_means(volume_ZYX[z], superpixels_ZYX[z], row.num_superpixels)
                for z in range(len(volume_ZYX))
            ],
            "asp_memcpy": copy_by_slices,
            "statistics": lambda: channel_statistics(volume_ZYX),
            "statistics_memcpy": lambda: np.copyto(copied_ZYX, volume_ZYX),
            "write": lambda: write_case(cache_path, row, computed.arrays, attributes=computed.attributes),
        }
        times: dict[str, list[float]] = {name: [] for name in stages}
        for _ in range(9):
            for name, stage in stages.items():
                start = time.perf_counter()
                stage()
                times[name].append((time.perf_counter() - start) / len(volume_ZYX) * 1000)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "asp_vs_memcpy": medians["asp"] / medians["asp_memcpy"],
        "statistics_vs_memcpy": medians["statistics"] / medians["statistics_memcpy"],
        "ms_per_slice": medians,
    }


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "reading": read_files,
    "run_1": lambda data: run_preprocessing(data, 1),
    "run_2": lambda data: run_preprocessing(data, 2),
    "stages": time_stages,
}


if __name__ == "__main__":
    main()
