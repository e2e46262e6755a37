"""Command lines in texts (documentation, manifests), held against the parsers of the programs that they call."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click

from supercl_core import cli

REPOSITORY = Path(__file__).parents[1]
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")

FOREIGN = {"$EDITOR", "./submit.sh", "nnUNetv2_train"}
FOREIGN |= {"cd", "conda", "cp", "docker", "eval", "kubectl", "sbatch"}
"""Programs of which only the paths are looked at, the ones of this repository."""


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell script, without variables set before it and without redirections."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word[0] not in "|&;":
                words.append(word)
                continue
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            if words:
                yield words[: words.index(">")] if ">" in words else words
            words = []


def made(arguments: list[str]) -> list[list[str]]:
    """The commands that `make` would call. Raises CalledProcessError where a variable is missing."""
    for variable in re.findall(r"(?m)^([A-Z_]+)=", "\n".join(arguments)):
        assert re.search(rf"\$\({variable}\b", MAKEFILE), f"make knows no {variable}"
    printed = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "--old-file", ".venv/.ready", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    called = [line for line in commands(printed.stdout) if line[0].startswith((".venv", "benchmarks"))]
    return [[Path(words[0]).name, *words[1:]] for words in called]


def check(words: list[str]) -> None:
    """Raise where a command is not one that its program understands."""
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        for called in made(arguments):
            if called[0] in ("supercl", "torchrun"):
                check(called)
    elif program == "supercl":
        if arguments:  # none where the shell's completion is asked for
            parse(cli.supercl, arguments[1:] if arguments[0] in ("-q", "-v") else arguments)
    elif program == "dask":
        from distributed.cli import dask_scheduler, dask_worker

        parse(click.Group("dask", {"scheduler": dask_scheduler.main, "worker": dask_worker.main}), arguments)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(arguments)
        assert parsed.no_python
        check([Path(parsed.training_script).name, *parsed.training_script_args])
    elif program == "python":
        assert arguments[0] == "-m"
        assert importlib.util.find_spec(arguments[1]) is not None
    elif program == "pip":
        assert arguments[0] == "install"
    else:
        assert program in FOREIGN, program
        ours = {"benchmarks", "deploy", "docs", "studies", "tests"}
        for word in arguments:
            assert word.split("/")[0] not in ours or (REPOSITORY / word).exists(), word


def parse(group: click.Group, arguments: list[str]) -> None:
    """Raise a UsageError of click for what a command of the group does not take."""
    context = click.Context(group, **group.context_settings)
    _, found, rest = group.resolve_command(context, arguments)
    assert found is not None
    found.make_context(arguments[0], rest, parent=context)
