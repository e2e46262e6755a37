"""The import rule: preprocess -> supercl_core <- train, and what each part may load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PREPROCESS_ONLY = {"dask", "distributed", "numba", "skimage"}
TRAIN_ONLY = {"torch", "monai", "tensorboard", "safetensors"}

FORBIDDEN = {
    "preprocess": {"train", *TRAIN_ONLY},
    # MONAI loads scikit-image where it finds it.
    "train": {"preprocess", *PREPROCESS_ONLY - {"skimage"}},
    "supercl_core": {"preprocess", "train", *PREPROCESS_ONLY, *TRAIN_ONLY, "matplotlib"},
}
"""Top-level modules that must not be loaded by importing any module of a package."""

ASKED_FOR_IN_FUNCTIONS = {("supercl_core.doctor", "torch")}
"""Imports inside a function that the rule leaves to it: doctor asks torch for accelerators, where it is installed."""


def modules_of(package: str) -> dict[str, Path]:
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files
    names = [".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files]
    return {name.removesuffix(".__init__"): file for name, file in zip(names, files, strict=True)}


def imports_of(file: Path) -> set[str]:
    """Top-level names of every import of a file, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found.add((node.module or "").split(".")[0])
    return found


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_import_statement_breaks_the_rule(package: str) -> None:
    for name, file in modules_of(package).items():
        broken = {(name, module) for module in imports_of(file) & FORBIDDEN[package]}
        assert broken <= ASKED_FOR_IN_FUNCTIONS


@pytest.mark.parametrize("package", FORBIDDEN)
def test_importing_every_module_in_a_fresh_process_loads_nothing_forbidden(package: str) -> None:
    code = (
        "import importlib, json, sys\n"
        f"for name in {list(modules_of(package))!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    finished = python(code)
    assert finished.returncode == 0, finished.stderr
    loaded = set(json.loads(finished.stdout))
    assert package in loaded
    assert not loaded & FORBIDDEN[package]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_offer_what_they_list_each_time_they_are_asked(package: str) -> None:
    """A function offered under the name of a module of the package would give way to it after the first import."""
    finished = python(
        f"import {package} as package\n"
        "for _ in range(2):\n"
        "    for name in getattr(package, '__all__', ()): assert callable(getattr(package, name)), name\n"
        "try: package.nothing\n"
        "except AttributeError as error: print(error)"
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == f"module {package!r} has no attribute 'nothing'"


def test_the_command_line_loads_click_and_nothing_heavy() -> None:
    finished = python(
        "import sys\n"
        "from supercl_core.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'numpy', 'zarr', 'SimpleITK', 'rich', 'torch', 'dask', 'numba', 'skimage', 'preprocess', 'train'}), "
        "file=sys.stderr)"
    )
    assert finished.returncode == 0
    assert finished.stderr.strip() == "[]"


BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from supercl_core.cli import main
"""


@pytest.mark.parametrize(
    ("extra", "missing", "arguments"),
    [
        ("preprocess", PREPROCESS_ONLY, ["preprocess", "in", "out.zarr"]),
        ("preprocess", PREPROCESS_ONLY, ["weak-labels", "x.zarr"]),
        ("train", TRAIN_ONLY, ["pretrain", "x.zarr", "run"]),
        ("train", TRAIN_ONLY, ["evaluate", "run", "x.zarr"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_command_whose_half_is_missing_names_the_extra_to_install(
    extra: str, missing: set[str], arguments: list[str]
) -> None:
    finished = python(f"BLOCKED = {missing!r}\n{BLOCKER}\nmain({arguments!r})")
    assert finished.returncode == 1, finished.stderr
    assert f"`supercl {arguments[0]}` needs the extra {extra!r}" in finished.stderr
    assert f"pip install 'supercl[{extra}]'" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_commands_of_core_run_with_both_halves_missing(cache_path: Path) -> None:
    finished = python(
        f"BLOCKED = {PREPROCESS_ONLY | TRAIN_ONLY!r}\n{BLOCKER}\nmain(['inspect', {str(cache_path)!r}])"
    )
    assert finished.returncode == 0, finished.stderr
    assert "Task99_Tiny" in finished.stdout


def test_help_answers_in_under_half_a_second() -> None:
    command = Path(sys.executable).with_name("supercl")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        finished = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
        assert "Exit codes" in finished.stdout
    assert min(times) < 0.5, times
