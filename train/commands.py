"""The commands of the training half: `describe`, `pretrain`, `finetune`, `report`.

Those that score are in `train.scoring_commands`, studies in `train.study.commands`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from supercl_core.messages import next_command, note
from supercl_core.options import json_option

_PATH = click.Path(path_type=Path)


def _settings_options(presets: str) -> Callable[[Any], Any]:
    """--preset, --config and --set, in the order in which they apply."""

    def decorate(function: Any) -> Any:
        for option in (
            click.option(
                "--set",
                "assignments",
                multiple=True,
                metavar="KEY=VALUE",
                help="One setting; may be repeated.",
            ),
            click.option("--config", "config_path", type=_PATH, help="Settings in a TOML file."),
            click.option("--preset", metavar="NAME", help=f"A set of settings: {presets}."),
        ):
            function = option(function)
        return function

    return decorate


class _Labelled(click.ParamType):
    """A number from 1, or `all`."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "all" else click.IntRange(min=1).convert(value, param, ctx)


class _WithSettings(click.Command):
    """A command whose help ends with its settings, their defaults and meanings, read from the dataclass."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from importlib import import_module

        name = {"pretrain": "methods", "finetune": "recipes"}[str(self.name)]
        config = getattr(import_module(f"train.{name}"), f"{str(self.name).capitalize()}Config")
        with formatter.section("Settings (for --config and --set), their defaults and meanings"):
            formatter.write_dl(_setting_rows(config()))


def _setting_rows(config: Any, prefix: str = "") -> list[tuple[str, str]]:
    explanations = _explanations(type(config))
    rows: list[tuple[str, str]] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            rows += _setting_rows(value, f"{field.name}.")
        else:
            text = "none" if value is None else str(list(value) if isinstance(value, tuple) else value)
            text = text.lower() if isinstance(value, bool) else text
            rows.append((prefix + field.name, f"{text}. {explanations[field.name]}"))
    return rows


def _explanations(kind: type) -> dict[str, str]:
    """The strings below the fields of a dataclass and its bases, by field."""
    import ast
    import inspect
    import textwrap

    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        [parsed] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(parsed, ast.ClassDef)
        for field, below in itertools.pairwise(parsed.body):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


@click.command()
@click.argument("cache", type=_PATH)
@click.option(
    "--encoder",
    required=True,
    metavar="RUN|FILE",
    type=_PATH,
    help="A finished run, or a file of weights (.safetensors, or a published checkpoint).",
)
@click.option(
    "--name", metavar="NAME", help="Name of the descriptors in CACHE [default: that of the run or file]."
)
@click.option("--device", default="auto", show_default=True, help="Such as cpu or cuda:1.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Slices that go through the encoder together.",
)
def describe(cache: Path, encoder: Path, name: str | None, device: str, batch_size: int) -> None:
    """Compute a descriptor of every slice of CACHE from an encoder, and store them in CACHE.

    Weak labels link slices with similar descriptors. A cache has descriptors from its intensities; those from an
    encoder say where its features differ from superpixel to superpixel (their mean over channels, as published).
    Descriptors of the same name are replaced.

    \b
    Example:  supercl pretrain heart.zarr runs/first
              supercl describe heart.zarr --encoder runs/first
              supercl weak-labels heart.zarr --descriptors first
    """
    from supercl_core.cache.reader import open_cache
    from train.descriptors import store_descriptors
    from train.device import select_device

    opened = open_cache(cache)
    _say_missing(opened)
    stored = store_descriptors(
        opened, encoder, name=name, device=select_device(device), batch_size=batch_size
    )
    click.echo(f"{cache}: descriptors {stored!r} of {opened.num_slices:,} slices")
    next_command("weak-labels", cache, "--descriptors", stored)


@click.command(cls=_WithSettings)
@click.argument("cache", type=_PATH)
@click.argument("run", type=_PATH)
@click.option(
    "--split",
    metavar="FILE[:SECTION]",
    help="Leave the test cases of this split out, also those under other names: cases of identical content.",
)
@_settings_options("default, published, simclr, gcl, pcl, supercl-ilcp, supercl-igcp, demo")
def pretrain(
    cache: Path,
    run: Path,
    split: str | None,
    preset: str | None,
    config_path: Path | None,
    assignments: tuple[str, ...],
) -> None:
    """Pre-train an encoder on all slices of CACHE, without labels; the result goes to the folder RUN.

    SIGTERM, SIGUSR1 and Ctrl-C finish the step, write a checkpoint and exit with code 5. The same command goes on
    from there, with the same number of processes. On several GPUs, start it with torchrun or srun (docs/slurm);
    batch_size is then that of each.

    \b
    Example:  supercl pretrain heart.zarr runs/pretrain --split heart_split.json
              torchrun --nproc-per-node 4 --no-python supercl pretrain heart.zarr runs/pretrain
    """
    from supercl_core.cache.reader import open_cache
    from supercl_core.config import resolve
    from supercl_core.errors import some_of
    from supercl_core.splits import of_same_patients, read_split
    from train import distributed
    from train.methods import PRESETS, PretrainConfig
    from train.pretraining import pretrain as start
    from train.runs import read_run

    config = resolve(
        PretrainConfig, presets=PRESETS, preset=preset, config_path=config_path, assignments=assignments
    )
    opened = open_cache(cache)
    _say_missing(opened)
    excluded: tuple[str, ...] = ()
    if split is not None:
        ids = [row.id for row in opened.rows]
        excluded = read_split(split, ids, data_set=opened.name, num_labelled=None).test
    with distributed.process_group():
        if (others := of_same_patients(opened.rows, excluded)) and distributed.rank() == 0:
            note(f"also left out, as cases of a test patient or of identical content: {some_of(others)}")
        weights_path = start(opened, run, config=config, excluded=excluded)
        if distributed.rank() == 0:
            click.echo(f"{weights_path}: encoder after {read_run(run)['config']['steps']} steps")
            given = split or "FILE"
            next_command("finetune", cache, "RUN", "--init", run, "--split", given, "--labelled", "N")


@click.command(cls=_WithSettings)
@click.argument("cache", type=_PATH)
@click.argument("run", type=_PATH)
@click.option(
    "--init",
    required=True,
    help="A pre-training run, a file of weights, a folder that `supercl export` wrote, or `scratch`.",
)
@click.option(
    "--split",
    required=True,
    metavar="FILE[:SECTION]",
    help="Labelled cases and test cases.",
)
@click.option(
    "--labelled",
    required=True,
    metavar="N|all",
    type=_Labelled(),
    help="How many labelled cases (keys of the split) to use, or all outside of the test list.",
)
@_settings_options("strong (the default), published, demo")
def finetune(
    cache: Path,
    run: Path,
    init: str,
    split: str,
    labelled: int | Literal["all"],
    preset: str | None,
    config_path: Path | None,
    assignments: tuple[str, ...],
) -> None:
    """Fine-tune a U-Net on the labelled cases of CACHE; the result goes to the folder RUN.

    SIGTERM, SIGUSR1 and Ctrl-C finish the step, write a checkpoint and exit with code 5. The same command goes on
    from there.

    \b
    Example:  supercl finetune heart.zarr runs/pretrained --init runs/pretrain \\
                  --split heart_split.json --labelled 2
    """
    from supercl_core.cache.reader import open_cache
    from supercl_core.config import resolve
    from supercl_core.splits import read_split
    from train.finetuning import finetune as start
    from train.recipes import PRESETS, FinetuneConfig
    from train.runs import read_run

    config = resolve(
        FinetuneConfig, presets=PRESETS, preset=preset, config_path=config_path, assignments=assignments
    )
    opened = open_cache(cache)
    _say_missing(opened)
    ids = [row.id for row in opened.rows]
    cases = read_split(split, ids, data_set=opened.name, num_labelled=labelled, rows=opened.rows)
    weights_path = start(opened, run, split=cases, init=init, config=config)
    described = read_run(run)
    if seen := described["unlabelled_test_cases_seen"]:
        note(f"{seen} of {len(cases.test)} test cases were among the pre-training images (without labels)")
    steps, num_cases = described["config"]["steps"], len(described["cases"]["train"])
    click.echo(f"{weights_path}: network after {steps} steps on {num_cases} labelled cases")
    next_command("evaluate", run, cache)


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=_PATH)
@click.option("-o", "--output", required=True, type=_PATH, help="The page to write.")
@click.option("--cache", type=_PATH, help="The cache, where it has moved since the runs.")
@json_option
def report(paths: tuple[Path, ...], output: Path, cache: Path | None, as_json: bool) -> None:
    """Write one self-contained HTML page on one or more runs, or on one study, and print how they compare.

    The first fine-tuned run is the baseline of the comparison of runs. What a study has by now is gathered anew; its
    JSON is that of OUT/results.json.

    \b
    Example:  supercl report runs/scratch runs/pretrained runs/pretrain -o report.html
              supercl report studies/heart -o study.html
    """
    from rich.console import Console

    from train.comparison import compare, render_table
    from train.report.page import is_study, write_report
    from train.study.collection import update_results
    from train.study.results import render_results

    results = update_results(paths[0]) if is_study(paths[0]) else None
    write_report(list(paths), output, cache_path=cache)
    evaluated = [path for path in paths if (path / "evaluation.json").exists()]
    compared = compare(evaluated) if results is None and evaluated else None
    if as_json and results is not None:
        click.echo((paths[0] / "results.json").read_text(encoding="utf-8"), nl=False)
    elif as_json:
        click.echo(json.dumps(compared and dataclasses.asdict(compared), indent=1))
    elif results is not None:
        Console().print(render_results(results))
    elif compared is not None:
        Console().print(render_table(compared))
    click.echo(f"report: {output}", err=as_json)


def _say_missing(cache: Any) -> None:
    if cache.failed:
        note(f"{len(cache.failed)} cases failed in preprocessing and are missing here")
