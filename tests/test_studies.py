"""The studies of docs/results.md, made small: few cases, few steps, one seed, from data to page."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_road import real_cases

from train.study.declaration import read_study
from train.study.results import read_results

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "studies").glob("*.toml"))
TINY = ("seeds=[0]", "labelled=[2]", "pretrain.steps=2", "pretrain.batch_size=4", "pretrain.filters=4")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_declaration_compares_arms_of_one_budget(path):
    study = read_study(path)
    assert study.baseline == "scratch"
    assert len(study.seeds) >= 3
    shared = {
        name: getattr(study.pretrain, name) for name in ("steps", "batch_size", "filters", "patch_size")
    }
    for arm in study.arms.values():
        if arm.pretrain is not None:
            assert shared == {name: getattr(arm.pretrain, name) for name in shared}
    for by_count in study.recipes.values():
        assert len({dataclasses.replace(config, steps=1) for config in by_count.values()}) == 1


def test_settings_were_chosen_without_test_cases():
    chosen = {
        path.stem.removesuffix("-choices") for path in STUDIES if read_study(path).scored_on == "validation"
    }
    assert chosen == {path.stem for path in STUDIES if read_study(path).scored_on == "test"}


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "task", "num_cases", "options"),
    [("hippocampus", "Task04_Hippocampus", 6, ()), ("acdc", "ACDC", 8, ("FACTOR=4",))],
)
def test_a_study_runs_from_data_to_page(real_data, tmp_path, name, task, num_cases, options):
    data = real_cases(real_data / task, num_cases, tmp_path / "data")
    split: dict[str, Any] = {"labelled": {"2": [0, 1]}, "test": [3, 4]}
    if name == "acdc":
        split = {"labelled": {"2": [1, 2]}, "test": [3, 4]}  # patients
    (tmp_path / "split.json").write_text(json.dumps(split))
    declared = read_study(ROOT / "studies" / f"{name}.toml")
    short = [f"recipes.{recipe}.{key}" for recipe in declared.recipes for key in ("steps=2", "batch_size=4")]
    settings = " ".join([*TINY, *short])
    variables = (
        f"DATA={data}",
        f"SPLIT={tmp_path / 'split.json'}",
        f"OUT={tmp_path / 'out'}",
        f"SET={settings}",
    )
    command = ["make", f"study-{name}", *variables, f"BIN={Path(sys.executable).parent}", "READY=", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    results = read_results(tmp_path / "out" / name)
    assert {cell.status for cell in results.cells} == {"finished"}
    assert len(results.cells) == len(declared.arms) * len(declared.recipes)
    assert {row.arm for row in results.rows} == set(declared.arms)
    assert results.unit == ("voxel" if name == "acdc" else "mm")
    assert (tmp_path / "out" / f"{name}.html").stat().st_size > 50_000
    page = tmp_path / "results.md"
    parts = "".join(f"<!-- study {name} {recipe} -->\n<!-- end -->\n" for recipe in declared.recipes)
    page.write_text(f"before\n{parts}after\n")
    command = [sys.executable, "-m", "benchmarks.results", str(tmp_path / "out" / name), "--page", str(page)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    for recipe in declared.recipes:
        part = text.split(f"<!-- study {name} {recipe} -->\n")[1].split("<!-- end -->")[0]
        assert part.count("\n| 2 | ") == len(declared.arms)
