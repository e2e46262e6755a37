"""README.md and docs/: commands are understood, programs run, links lead somewhere, messages are the real ones.

Every command in a block is held against the parser of the program it calls. Then the pages are run from top to bottom,
programs in Python too, each in a folder that the README's own road has left, on synthetic anatomy and with networks
so small that only seconds pass. What needs a cluster, a container or a GPU is only parsed. `make demo` runs too.
Run elsewhere: docs/export.md by tests/train/export/test_docs.py, docs/slurm by tests/test_slurm_scripts.py, and
cache_schema.md by tests/supercl_core/cache/test_recipes.py.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

import click
import made_layouts
import pytest
from command_lines import MAKEFILE, REPOSITORY, check, commands, made

from supercl_core import cli
from supercl_core.cache.reader import open_cache

DOCS = REPOSITORY / "docs"
README = REPOSITORY / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
TEXT_PAGES = [*PAGES, REPOSITORY / "cache_schema.md"]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]

TINY = ("filters=4", "batch_size=4", "patch_size=[32,32]", "device=cpu", "precision=float32")
TINY_TRAINING = [f"--set={setting}" for setting in ("epochs=none", "steps=2", *TINY)]
CHEAP = {
    "phantom": ["--cases", "8"],
    "pretrain": TINY_TRAINING,
    "finetune": TINY_TRAINING,
    "study": ["--set=seeds=[0]", "--jobs=1"],
}
"""What is added to commands that run."""

CHEAP_TEXT = {
    r"(?m)^steps = .*$": "steps = 2\nfilters = 4\nbatch_size = 4\npatch_size = [32, 32]",
    r"\bsteps=\d[\d_]*": "steps=2",
    r"(Pretrain|Finetune)Config\(": r'\1Config(filters=4, batch_size=4, patch_size=(32, 32), device="cpu", ',
    r"filters=32": "filters=4",
    r"num_workers=8": "num_workers=1",
}
"""What is replaced in programs and files that are read by commands that run."""

EXIT_CODES = {"doctor": {0, 1}}
"""But for 0: this machine may have a problem."""

RUN_ELSEWHERE = {DOCS / "export.md", DOCS / "slurm" / "README.md"}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [Block(*one) for one in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_command_in_a_block_is_understood(page: Path) -> None:
    for block in blocks(page):
        if block.language == "sh":
            for words in commands(block.text):
                check(words)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)


@pytest.mark.parametrize(
    "wrong",
    [
        "supercl preprocess in out.zarr --sheduler x",
        "make preprocess INPUT=Task02_Heart",
        "make preprocess INPUT=in CACHE=out.zarr WORKER=8",
        "make pretain CACHE=heart.zarr RUN=runs/pretrain",
        "kubectl apply -f deploy/kubernetes/nothing.yaml",
        "unknown --option",
    ],
)
def test_a_wrong_command_would_be_noticed(wrong: str) -> None:
    with pytest.raises((click.UsageError, subprocess.CalledProcessError, AssertionError)):
        for words in commands(wrong):
            check(words)


@pytest.mark.parametrize("page", TEXT_PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_and_options_within_the_text_exist(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    context = click.Context(cli.supercl)
    for code in re.findall(r"`([^`]+)`", prose):
        words = code.split()
        if words[:1] == ["make"] and len(words) > 1:
            assert re.search(rf"^{words[1]}:", MAKEFILE, re.M), code
        if words[:1] != ["supercl"] or len(words) == 1:
            continue
        name = next((word for word in words[1:] if word[0] != "-"), "COMMAND")
        if name == "COMMAND":
            continue
        command = cli.supercl.get_command(context, name)
        assert command is not None, code
        taken = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in words[2:] if word.startswith("--")} <= taken, code
    for extras in re.findall(r"'?(?:supercl|\.)\[([a-z0-9,]+)\]", page.read_text(encoding="utf-8")):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), extras


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXT_PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"[\w/-]+\.md", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    own = {str(page.relative_to(DOCS)) for page in PAGES if page != README}
    assert set(listed) == own | {"index.md", "cache_schema.md", "CHANGELOG.md"}
    assert len(listed) == len(set(listed))


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="no mkdocs (pip install mkdocs)")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    index = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert 'href="inputs/"' in index
    assert 'href="cache_schema/"' in index


def messages() -> set[str]:
    """All texts in the code, with `...` for what varies and without full stops at the end."""
    found = set()
    for package in ("supercl_core", "preprocess", "train"):
        for file in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value.rstrip(". "))
                elif isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                    found.add("".join(map(str, parts)).replace("... ...", "...").rstrip(". "))
    return found


def test_troubleshooting_has_the_messages_as_they_are() -> None:
    listed = re.findall(
        r"^\| `+ ?(.+?) ?`+ \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M
    )
    assert len(listed) > 30
    assert {text.rstrip(". ") for text in listed} <= messages()


def call(arguments: list[str], scheduler: str) -> None:
    """Run a command of ours in this process, made cheap: on one worker, with a network that learns nothing."""
    name = next(word for word in arguments if word[0] != "-")
    if "--slurm" in arguments and "--dry-run" not in arguments:
        return
    words = list(arguments)
    if name in ("preprocess", "weak-labels") and "--dry-run" not in words:
        for option in {"--workers", "--scheduler"} & {*words}:
            del words[words.index(option) : words.index(option) + 2]
        words += ["--scheduler", scheduler]
    code = 0
    try:
        cli.main([*words, *CHEAP.get(name, [])])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    assert code in EXIT_CODES.get(name, {0}), words


def run(page: Path, scheduler: str) -> None:
    """Run the commands and programs of a page in the working folder, in their order."""
    names: dict[str, object] = {"__name__": "__main__"}
    for language, text in blocks(page):
        for pattern, cheap in CHEAP_TEXT.items():
            text = re.sub(pattern, cheap, text) if language != "sh" else text
        if language == "sh":
            for words in commands(text):
                for program, *arguments in made(words[1:]) if words[0] == "make" else [words]:
                    if program == "torchrun":  # one process does
                        program, *arguments = arguments[arguments.index("--no-python") + 1 :]
                    if Path(program).name == "supercl" and arguments:
                        call(arguments, scheduler)
        elif language == "toml":
            Path(re.findall(r"\A# (\S+\.toml)$", text, re.M)[0]).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, str(page), "exec"), names)


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory, scheduler: str) -> Path:
    """A folder in which the README was followed, with phantoms under the names of the Decathlon's Task02_Heart."""
    folder = tmp_path_factory.mktemp("road")
    with contextlib.chdir(folder):
        call(["phantom", "Task02_Heart"], scheduler)
        for file in [*Path("Task02_Heart").glob("*/*.nii.gz"), Path("Task02_Heart/dataset.json")]:
            if file.suffix == ".json":
                file.write_text(file.read_text().replace("phantom_", "la_"))
            else:
                file.rename(file.with_name(file.name.replace("phantom_", "la_")))
        run(README, scheduler)
        made_layouts.write("nnunet", Path("my_data"))
        made_layouts.write("chd", Path("CHD"))
        made_layouts.write("acdc", Path("ACDC"), 9)
        Path("splits.txt").write_text("# ACDC\nsample 8 train_keys: [1 2 3 4 5, 6, 7, 8]\ntest: [9]\n")
        Path("new_scans").mkdir()
        shutil.copy("Task02_Heart/imagesTr/la_003.nii.gz", "new_scans")
    return folder


@pytest.mark.slow
def test_the_readme_leads_to_a_report(road: Path) -> None:
    assert len(open_cache(road / "heart.zarr").done) == 8
    for run_path in ("runs/scratch", "runs/pretrained"):
        assert json.loads((road / run_path / "evaluation.json").read_text())["rows"]
    assert (road / "report.html").stat().st_size > 50_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES[1:]
        if page not in RUN_ELSEWHERE and {"sh", "python"} & {block.language for block in blocks(page)}
    ],
    ids=lambda page: str(page.relative_to(DOCS)),
)
def test_a_page_runs_from_top_to_bottom(page: Path, road: Path, scheduler: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(road, tmp_path / "road"))
    with contextlib.chdir(folder):
        run(page, scheduler)


@pytest.mark.slow
def test_the_examples_of_the_python_api_run(road: Path) -> None:
    packages = [importlib.import_module(name) for name in ("supercl_core", "preprocess", "train")]
    public = {name: getattr(package, name) for package in packages for name in package.__all__}
    examples = {}
    for name, documented in public.items():
        after = (inspect.getdoc(documented) or "").partition("Example:\n")[2]
        if after:
            examples[name] = textwrap.dedent(after.partition("\n\n")[0])
    assert {"open_cache", "SliceDataset"} <= examples.keys()
    with contextlib.chdir(road):
        for name, example in examples.items():
            names = {**vars(inspect.getmodule(public[name])), **public}  # type: ignore[arg-type]
            exec(compile(example, name, "exec"), names)


def test_the_python_api_is_typed_and_documented() -> None:
    for name in ("supercl_core", "preprocess", "train"):
        package = importlib.import_module(name)
        assert (REPOSITORY / name / "py.typed").exists()
        for public in package.__all__:
            documented = getattr(package, public)
            assert inspect.getdoc(documented)
            of_call = documented.__init__ if inspect.isclass(documented) else documented
            assert "return" in inspect.get_annotations(of_call)
            assert f"{name}.{public}" in (DOCS / "python.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_demo_goes_from_nothing_to_a_page(tmp_path: Path) -> None:
    """`make demo` with fewer cases and steps: its script calls a `supercl` that adds the options."""
    program = tmp_path / "bin" / "supercl"
    program.parent.mkdir()
    cheap = {**CHEAP, "preprocess": ["--workers", "1"]}
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom supercl_core.cli import main\n"
        f"if __name__ == '__main__':\n    main([*sys.argv[1:], *{cheap!r}.get(sys.argv[1], [])])\n"
    )
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    finished = subprocess.run(
        [REPOSITORY / "benchmarks" / "demo.sh", "demo"],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "pretrained" in finished.stdout
    assert (tmp_path / "demo" / "report.html").stat().st_size > 50_000
