"""The whole road through the real command line, on a phantom and on real cases of both data sets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk

from supercl_core.cache.reader import open_cache

TINY = ("--set", "filters=4", "--set", "batch_size=4", "--set", "log_every=2", "--set", "device=cpu")


def real_cases(task_path: Path, num_cases: int, target: Path) -> Path:
    """The first labelled cases of a Decathlon task, linked into a folder of their own."""
    declared = json.loads((task_path / "dataset.json").read_text())
    declared["training"] = declared["training"][:num_cases]
    for entry in declared["training"]:
        for file in entry.values():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (target / file).symlink_to(task_path / file)
    (target / "dataset.json").write_text(json.dumps(declared))
    return target


def walk(
    supercl: Callable[..., Any], data_path: Path, out: Path, *preprocess_options: object
) -> dict[str, Any]:
    """Preprocess, pre-train, fine-tune, evaluate and report; return the evaluation."""
    cache, split = out / "cache.zarr", out / "split.json"
    steps = ("--set", "steps=4", *TINY)
    for command in (
        ("preprocess", data_path, cache, *preprocess_options),
        ("split", cache, split),
        ("pretrain", cache, out / "pretrain", "--split", split, *steps),
        (
            "finetune",
            cache,
            out / "run",
            "--init",
            out / "pretrain",
            "--split",
            split,
            "--labelled",
            2,
            *steps,
        ),
        ("evaluate", out / "run", cache),
        ("report", out / "run", out / "pretrain", "-o", out / "report.html"),
    ):
        outcome = supercl(*command)
        assert outcome.code == 0, outcome.err
    assert (out / "report.html").stat().st_size > 50_000
    run = json.loads((out / "run" / "run.json").read_text())
    opened = open_cache(cache)
    for case_id in run["cases"]["test"]:
        source = sitk.ReadImage(str(data_path / opened.case(case_id).row.source))
        prediction = sitk.ReadImage(str(out / "run" / "predictions" / f"{case_id}.nii.gz"))
        assert prediction.GetSize() == source.GetSize()
        assert prediction.GetSpacing() == pytest.approx(source.GetSpacing())
        assert prediction.GetDirection() == pytest.approx(source.GetDirection())
    pretrained_on = json.loads((out / "pretrain" / "run.json").read_text())["cases"]["train"]
    assert not {*pretrained_on} & {*run["cases"]["test"]}
    return json.loads((out / "run" / "evaluation.json").read_text())


def test_road_on_a_phantom(supercl: Callable[..., Any], scheduler: str, tmp_path: Path) -> None:
    assert supercl("phantom", tmp_path / "phantom", "--cases", 4).code == 0
    evaluation = walk(supercl, tmp_path / "phantom", tmp_path, "--scheduler", scheduler)
    assert evaluation["unit"] == "mm"
    assert {row["class"] for row in evaluation["rows"]} == {"liver", "spleen", "kidneys"}


@pytest.mark.slow
@pytest.mark.real_data
def test_road_on_hippocampus_cases(supercl: Callable[..., Any], real_data: Path, tmp_path: Path) -> None:
    data_path = real_cases(real_data / "Task04_Hippocampus", 8, tmp_path / "data")
    evaluation = walk(supercl, data_path, tmp_path, "--workers", 2)
    assert evaluation["unit"] == "mm"
    assert {row["class"] for row in evaluation["rows"]} == {"Anterior", "Posterior"}


@pytest.mark.slow
@pytest.mark.real_data
def test_road_on_acdc_cases_counts_in_voxels(
    supercl: Callable[..., Any], real_data: Path, tmp_path: Path
) -> None:
    data_path = real_cases(real_data / "ACDC", 6, tmp_path / "data")
    evaluation = walk(supercl, data_path, tmp_path, "--workers", 2, "--set", "spacing=unknown")
    assert evaluation["unit"] == "voxel"
    assert {row["class"] for row in evaluation["rows"]} == {"RV", "Myo", "LV"}
