"""The command `study`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from train.study.declaration import Study
    from train.study.runner import Task

_PATH = click.Path(path_type=Path)

_EXAMPLE = """\b
A study, STUDY.toml:
  cache = "heart.zarr"          # paths are relative to this file
  split = "heart_split.json"    # FILE or FILE:SECTION
  labelled = [2, 4, "all"]      # labelled keys of the split
  seeds = [0, 1, 2]             # of pre-training and fine-tuning
  baseline = "scratch"          # what the other arms are measured against
  scored_on = "test"            # or "validation": seed s holds out fold
                                # s % folds (3) of the labelled cases, and no
                                # label of a test case is read. Choose so.

\b
  [pretrain]                    # settings of `supercl pretrain`, for all arms
  steps = 20000

\b
  [recipes.strong]              # settings of `supercl finetune`, and a preset
  preset = "strong"
  steps = 4000
  labelled.2 = {steps = 2000}   # what is different with 2 labelled cases

\b
  [arms.scratch]
  init = "scratch"              # or the path of weights made elsewhere
  [arms.simclr]
  preset = "simclr"             # a preset of `supercl pretrain`
  [arms.supercl]
  ilcp_stride = 4               # settings of the method, none of the budget
"""


@click.command(epilog=_EXAMPLE)
@click.argument("declaration", metavar="STUDY.toml", type=_PATH)
@click.argument("out", type=_PATH)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Worker processes on this machine, each with its share of the cores.",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME",
    help="Such as cuda:1; may be repeated, and workers take them in turn [default: auto].",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="One setting of STUDY.toml, such as cache=FILE or seeds=[0]; may be repeated.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="KEY=VALUE",
    help="Do only these runs now, by recipe, arm, labelled or seed, such as labelled=8; may be repeated.",
)
@click.option("--dry-run", is_flag=True, help="Print the runs and their budgets, and do nothing.")
def study(
    declaration: Path,
    out: Path,
    jobs: int,
    devices: tuple[str, ...],
    assignments: tuple[str, ...],
    only: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Compare ways of pre-training: arms x recipes x labelled counts x seeds.

    Each arm but those with init is pre-trained once a seed on all cases but the test cases, for the same steps. All are
    then fine-tuned alike, with every recipe on every labelled count, and scored. OUT gets the folders of all runs,
    without the checkpoints of finished ones, and results.json and results.csv, after a stop too. The same command goes
    on where an earlier one stopped, tries again what failed, and may add seeds, counts, arms and recipes.

    Any number of processes work together that run this command on the same OUT, on one machine (--jobs) or many
    (docs/slurm/study.sbatch): each takes the next run that nobody has.

    \b
    Example:  supercl study heart.toml studies/heart --dry-run
              supercl study heart.toml studies/heart --jobs 2 --device cuda:0 --device cuda:1
    """
    from rich.console import Console

    from supercl_core.cache.reader import open_cache
    from supercl_core.messages import note
    from train.study.collection import update_results
    from train.study.declaration import read_study
    from train.study.results import render_results
    from train.study.runner import (
        failures,
        only_tasks,
        read_splits,
        run_task,
        run_workers,
        start_study,
        tasks_of,
        work,
    )

    declared = read_study(declaration, assignments=assignments)
    cache = open_cache(declared.cache)
    splits = read_splits(declared, cache)
    out = out.resolve()
    tasks = only_tasks(tasks_of(declared, out), only)
    if dry_run:
        _print_plan(declared, tasks)
        return
    if added := start_study(declared, out):
        note(f"new in this study: {', '.join(added)}")
    devices = devices or ("auto",)
    try:
        if jobs == 1:
            work(
                tasks,
                lambda task, check: run_task(
                    task, check, study=declared, cache=cache, splits=splits, device=devices[0]
                ),
            )
        else:
            command = [sys.executable, "-m", "supercl_core.cli", "study", str(declaration), str(out)]
            command += [argument for value in assignments for argument in ("--set", value)]
            command += [argument for value in only for argument in ("--only", value)]
            run_workers(
                [[*command, "--device", devices[index % len(devices)]] for index in range(jobs)],
                tasks,
                logs_path=out / "logs",
            )
    finally:
        results = update_results(out)
    Console().print(render_results(results))
    if error := failures(tasks):
        raise error


def _print_plan(study: Study, tasks: list[Task]) -> None:
    """The runs to do in their order, each with its budget and state."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("run", "budget", "state"):
        table.add_column(title, overflow="fold")
    for task in tasks:
        config = study.pretrain if task.cell is None else study.finetune_config(task.cell, device="auto")
        length = f"{config.epochs} epochs" if config.epochs is not None else f"{config.steps:,} steps"
        budget = f"{length} x {config.batch_size}, {config.filters} filters"
        table.add_row(*map(Text, (task.title, budget, task.status()[0])))
    num_pretrained = sum(arm.pretrain is not None for arm in study.arms.values())
    Console().print(table)
    click.echo(
        f"{len(study.cells())} cells = {len(study.arms)} arms x {len(study.recipes)} recipes x {len(study.labelled)} "
        f"labelled counts x {len(study.seeds)} seeds, and {num_pretrained * len(study.seeds)} pre-trainings; scored on "
        f"{study.scored_on} cases"
    )
