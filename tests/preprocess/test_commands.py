"""The commands of the offline half, through the command line: results, refusals, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_layouts
import numpy as np
import pytest

from supercl_core.cache.reader import open_cache


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_phantom_preprocess_and_weak_labels_follow_each_other(
    tmp_path: Path, scheduler: str, supercl: Callable[..., Any]
) -> None:
    data, cache = tmp_path / "phantom", tmp_path / "phantom.zarr"
    outcome = supercl("phantom", data, "--cases", "1", "--seed", "3")
    assert (outcome.code, outcome.out) == (0, f"{data}: 1 cases\n")
    assert "phantom: 1/1 cases" in outcome.err
    outcome = supercl("preprocess", data, cache, "--scheduler", scheduler, "--set", "n_segments=20")
    assert outcome.code == 0
    assert outcome.out == f"{cache}: 1 cases computed, 0 kept from before, 0 failed\n"
    assert "preprocess: 1/1 cases" in outcome.err
    before = open_cache(cache).weak_labels()
    outcome = supercl("weak-labels", cache)
    assert outcome.code == 0
    counts = " > ".join(str(count) for count in before.num_components)
    size = before.ccl.shape[1]
    assert outcome.out == f"{cache}: weak labels 'intensity' of {size} slices: {counts} components\n"
    np.testing.assert_array_equal(open_cache(cache).weak_labels().ccl, before.ccl)


def test_settings_come_from_a_file_and_from_the_command_line(
    msd_path: Path, tmp_path: Path, scheduler: str, supercl: Callable[..., Any]
) -> None:
    (tmp_path / "x.toml").write_text("n_segments = 9\ncompactness = 20.0\n")
    outcome = supercl(
        *("preprocess", msd_path, tmp_path / "out.zarr", "--scheduler", scheduler),
        *("--config", tmp_path / "x.toml", "--set", "n_segments=12", "--set", "spacing=unknown"),
        *("--slic", "skimage", "--set", "foreground_above=-3.5"),
    )
    assert outcome.code == 0
    assert open_cache(tmp_path / "out.zarr").attributes["config"] == {
        "slic": "skimage",
        "n_segments": 12,
        "compactness": 20.0,
        "foreground_above": -3.5,
        "image_dtype": "source",
        "spacing": "unknown",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "n_segment=5"], "Did you mean 'n_segments'?"),
        (["--set", "n_segments=0"], "n_segments is out of range"),
        (["--set", "n_segments=many"], "'n_segments' has a value of the wrong type"),
        (["--set", "image_dtype=int8"], "'source' or 'int16'"),
        (["--slic", "best"], "'best' is not one of"),
        (["--slic", "exact", "--set", "foreground_above=0"], "slic = exact takes no foreground"),
        (["--config", "none.toml"], "settings file cannot be read"),
        (["--workers", "2", "--scheduler", "tcp://x:1"], "--scheduler and --slurm exclude each other"),
        (["--slurm", "x.toml", "--scheduler", "tcp://x:1"], "--scheduler and --slurm exclude each other"),
        (["--slurm", "none.toml"], "settings file cannot be read"),
    ],
)
def test_settings_that_make_no_sense_are_code_2_and_write_nothing(
    arguments: list[str], message: str, msd_path: Path, tmp_path: Path, supercl: Callable[..., Any]
) -> None:
    outcome = supercl("preprocess", msd_path, tmp_path / "out.zarr", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("prepare", "what", "found"),
    [
        (lambda path: None, "The input folder does not exist.", "nothing"),
        (lambda path: path.touch(), "The input folder does not exist.", "a file"),
        (lambda path: path.mkdir(), "The input folder holds no volume in a known layout.", "an empty folder"),
    ],
)
def test_input_without_volumes_is_code_1_and_writes_nothing(
    prepare: Callable[[Path], None], what: str, found: str, tmp_path: Path, supercl: Callable[..., Any]
) -> None:
    prepare(tmp_path / "in")
    before = names(tmp_path)
    outcome = supercl("preprocess", tmp_path / "in", tmp_path / "out.zarr")
    assert (outcome.code, outcome.out) == (1, "")
    assert f"error: {what}\n  where:    {tmp_path / 'in'}\n  expected: " in outcome.err
    assert f"  found:    {found}\n  next:     " in outcome.err
    assert names(tmp_path) == before


def test_a_broken_dataset_json_is_code_1(tmp_path: Path, supercl: Callable[..., Any]) -> None:
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "dataset.json").write_text('{"labels": ')
    outcome = supercl("preprocess", tmp_path, tmp_path / "out.zarr")
    assert outcome.code == 1
    assert f"where:    {tmp_path / 'dataset.json'}" in outcome.err
    assert "found:    JSONDecodeError" in outcome.err
    assert names(tmp_path) == ["dataset.json", "imagesTr"]


def fill(path: Path) -> None:
    path.mkdir()
    (path / "photos.txt").write_text("mine")


@pytest.mark.parametrize("prepare", [fill, lambda path: path.write_text("mine")], ids=["folder", "file"])
def test_other_things_at_the_path_of_the_cache_are_refused_and_left_alone(
    prepare: Callable[[Path], Any], msd_path: Path, tmp_path: Path, supercl: Callable[..., Any]
) -> None:
    prepare(tmp_path / "mine")
    outcome = supercl("preprocess", msd_path, tmp_path / "mine")
    assert outcome.code == 4
    assert "error: Something else lies where the cache is to be." in outcome.err
    kept = tmp_path / "mine"
    assert ((kept / "photos.txt") if kept.is_dir() else kept).read_text() == "mine"
    assert names(tmp_path) == ["mine"]


def test_an_empty_folder_at_the_path_of_the_cache_is_used(
    write_msd: Callable[..., Path], tmp_path: Path, scheduler: str, supercl: Callable[..., Any]
) -> None:
    source = write_msd(tmp_path / "in", {"one": (np.arange(128, dtype=np.int16).reshape(2, 8, 8), None)})
    (tmp_path / "out.zarr").mkdir()
    outcome = supercl("preprocess", source, tmp_path / "out.zarr", "--scheduler", scheduler)
    assert outcome.code == 0
    assert names(tmp_path) == ["in", "out.zarr"]


def test_a_cache_of_another_schema_version_is_code_4(
    msd_path: Path, cache_copy: Path, supercl: Callable[..., Any]
) -> None:
    content = json.loads((cache_copy / "zarr.json").read_text())
    content["attributes"]["supercl"]["schema_version"] = 0
    (cache_copy / "zarr.json").write_text(json.dumps(content))
    outcome = supercl("preprocess", msd_path, cache_copy)
    assert outcome.code == 4
    assert "expected: version 2\n  found:    version 0" in outcome.err


def test_phantom_leaves_a_folder_with_other_things_alone(tmp_path: Path, supercl: Callable[..., Any]) -> None:
    fill(tmp_path / "mine")
    outcome = supercl("phantom", tmp_path / "mine", "--cases", "1")
    assert (outcome.code, outcome.out) == (2, "")
    assert f"error: The output path is taken.\n  where:    {tmp_path / 'mine'}" in outcome.err
    assert names(tmp_path / "mine") == ["photos.txt"]
    assert names(tmp_path) == ["mine"]


@pytest.mark.slow
def test_worker_processes_run_no_module_of_the_working_folder(tmp_path: Path) -> None:
    data, script = tmp_path / "data", tmp_path / "supercl.py"
    made_layouts.write_nifti(data / "a.nii.gz", np.zeros((1, 16, 16), np.int16))
    (data / "multiprocessing.py").write_text("open('was_run', 'w')")
    script.write_text("from supercl_core.cli import main\nif __name__ == '__main__':\n    main()\n")
    finished = subprocess.run(
        [sys.executable, script, "preprocess", data, tmp_path / "out.zarr", "--workers", "1"],
        cwd=data,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=False,
    )
    assert names(data) == ["a.nii.gz", "multiprocessing.py"]
    assert finished.returncode == 0


def test_a_dry_run_prints_what_a_run_would_take_and_writes_nothing(
    msd_path: Path, tmp_path: Path, scheduler: str, supercl: Callable[..., Any]
) -> None:
    cache_path = tmp_path / "out.zarr"
    outcome = supercl("preprocess", msd_path, cache_path, "--dry-run", "--workers", 3)
    assert outcome.code == 0
    for line in ("Task99_Tiny", "4 to compute, 0 kept", "with 3 workers", "are free", "for each worker"):
        assert line in outcome.out
    on_scheduler = supercl("preprocess", msd_path, cache_path, "--dry-run", "--scheduler", scheduler)
    assert on_scheduler.code == 0
    assert "wall time" in on_scheduler.out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_for_slurm_prints_the_job_script(
    msd_path: Path, tmp_path: Path, supercl: Callable[..., Any]
) -> None:
    (tmp_path / "slurm.toml").write_text(
        'maximum_jobs = 5\ncores = 4\nmemory = "8GB"\nqueue = "long"\nwalltime = "02:00:00"\n'
    )
    outcome = supercl(
        *("preprocess", msd_path, tmp_path / "out.zarr", "--dry-run", "--slurm", tmp_path / "slurm.toml")
    )
    assert outcome.code == 0
    assert "with 10 workers" in outcome.out  # two processes in each of five jobs
    assert "#SBATCH -p long" in outcome.out
    assert "#SBATCH -t 02:00:00" in outcome.out
    assert "tcp://SCHEDULER:PORT" in outcome.out


def test_a_dry_run_of_a_finished_cache_has_nothing_to_do(
    msd_path: Path, cache_path: Path, supercl: Callable[..., Any]
) -> None:
    outcome = supercl("preprocess", msd_path, cache_path, "--dry-run")
    assert outcome.code == 0
    assert "nothing to do; 4 cases kept" in outcome.out


def test_a_layout_can_be_named_and_repair_keeps_to_it(
    tmp_path: Path, scheduler: str, supercl: Callable[..., Any]
) -> None:
    """A folder of volumes and arrays is taken for neither until one is named."""
    (tmp_path / "in").mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        np.save(
            tmp_path / f"in/{name}.npy", np.random.default_rng(seed).integers(0, 99, (2, 30, 30), np.uint8)
        )
    (tmp_path / "in/scan.nii.gz").touch()
    cache = tmp_path / "out.zarr"
    outcome = supercl("preprocess", tmp_path / "in", cache, "--scheduler", scheduler)
    assert outcome.code == 1
    assert "take those of one: --layout arrays or --layout plain" in outcome.err
    outcome = supercl("preprocess", tmp_path / "in", cache, "--scheduler", scheduler, "--layout", "arrays")
    assert (outcome.code, outcome.out) == (0, f"{cache}: 2 cases computed, 0 kept from before, 0 failed\n")
    assert open_cache(cache).rows[0].spacing_mm is None
    (cache / "cases/b/asp/c/0/0/0").unlink()
    outcome = supercl("repair", cache, "--workers", 1)
    assert (outcome.code, outcome.out.splitlines()[-1]) == (0, f"{cache}: 1 cases computed again")
    outcome = supercl("preprocess", tmp_path / "in", cache, "--dry-run", "--layout", "dicomm")
    assert (outcome.code, "There is no such layout" in outcome.err) == (2, True)


@pytest.mark.parametrize(
    ("layout", "left_out", "following"),
    [
        ("acdc", ["2 files such as training/patient001/patient001_4d.nii.gz (all frames"], ""),
        ("isic2018", ["(part of another task"], " --set instance_rule=view"),
    ],
)
def test_what_is_left_out_is_said_once_and_what_comes_next(
    layout: str,
    left_out: list[str],
    following: str,
    tmp_path: Path,
    scheduler: str,
    supercl: Callable[..., Any],
) -> None:
    data, cache = tmp_path / "data", tmp_path / "out.zarr"
    made_layouts.write(layout, data, 2)
    for more in (("--dry-run",), ("--scheduler", scheduler)):
        outcome = supercl("preprocess", data, cache, *more)
        assert outcome.code == 0
        assert outcome.err.count("note: left out") == len(left_out)
        assert all(text in outcome.err for text in left_out)
    assert outcome.err.endswith(f"next: supercl split {cache} FILE\n")
    outcome = supercl("split", cache, tmp_path / "split.json")
    assert outcome.err == f"next: supercl pretrain {cache} RUN --split {tmp_path}/split.json{following}\n"


def test_without_ground_truth_pretraining_comes_next(
    tmp_path: Path, scheduler: str, supercl: Callable[..., Any]
) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        np.save(tmp_path / f"in/{name}.npy", np.arange(1800, dtype=np.uint16).reshape(2, 30, 30))
    outcome = supercl("preprocess", tmp_path / "in", tmp_path / "out.zarr", "--scheduler", scheduler)
    assert outcome.err.endswith(f"next: supercl pretrain {tmp_path}/out.zarr RUN\n")


# ---- what machines read


def test_json_of_a_dry_run_of_a_run_and_of_a_repair(
    msd_path: Path, tmp_path: Path, supercl: Callable[..., Any], scheduler: str
) -> None:
    data, cache = tmp_path / "data", tmp_path / "out.zarr"
    shutil.copytree(msd_path, data)
    (data / "imagesTs" / "case_d.nii.gz").write_text("no volume")
    outcome = supercl("preprocess", data, cache, "--dry-run", "--json", "--workers", 2)
    assert "note: cannot be read: case_d: The file's content is not what its name says" in outcome.err
    dry = json.loads(outcome.out)
    assert (dry["num_cases"], dry["num_slices"], dry["num_kept"], dry["num_failed"]) == (3, 16, 0, 1)
    assert (dry["num_workers"], dry["wall_s"] > 0) == (2, True)
    assert dry["worker_bytes"] == 3 * dry["largest_case_bytes"] + 500_000_000

    outcome = supercl("preprocess", data, cache, "--scheduler", scheduler, "--json")
    assert outcome.code == 3
    done = json.loads(outcome.out)
    assert (done["cache_path"], done["num_computed"], done["num_kept"]) == (str(cache), 3, 0)
    assert [failed["case"] for failed in done["failed"]] == ["case_d"]
    assert "content is not what its name says" in done["failed"][0]["reason"]
    again = supercl("preprocess", data, cache, "--dry-run", "--json", "--workers", 2)
    assert json.loads(again.out) == {"num_kept": 3, "num_failed": 1, "num_workers": 2}

    sound = json.loads(supercl("repair", cache, "--json", "--workers", 1).out)
    assert (sound["found"]["num_cases"], sound["found"]["damages"], sound["mended"]) == (3, [], None)
