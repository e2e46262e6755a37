"""The commands that need neither half: `inspect`, `split`, `doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("case", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def inspect(cache: Path, case: str | None, as_json: bool) -> None:
    """Show what CACHE holds, or one CASE of it: cases, slices, sizes, spacing, weak labels, settings, failures.

    \b
    Example:  supercl inspect heart.zarr
              supercl inspect heart.zarr la_003 --json
    """
    from supercl_core import inspection
    from supercl_core.cache_reader import open_cache

    opened = open_cache(cache)
    values = inspection.summary(opened) if case is None else inspection.case_summary(opened, case)
    if as_json:
        click.echo(json.dumps(values, indent=1))
    else:
        _print_rows(inspection.render_rows(values))


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--test-fraction", default=0.25, show_default=True, help="Share of the labelled cases for testing."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the shuffle.")
def split(cache: Path, file: Path, test_fraction: float, seed: int) -> None:
    """Write a random split of CACHE's labelled cases to FILE (JSON), with nested lists of 1, 2, 4, ... cases.

    \b
    Example:  supercl split heart.zarr heart_split.json
              supercl finetune heart.zarr runs/scratch --split heart_split.json --labelled 2 --init scratch
    """
    from supercl_core.cache_reader import open_cache
    from supercl_core.errors import UsageError
    from supercl_core.splits import write_random_split

    if not 0 < test_fraction < 1:
        raise UsageError(
            "The test fraction is out of range.",
            expected="a number between 0 and 1",
            found=test_fraction,
            next_step="Ask for --test-fraction 0.25, for example.",
        )
    case_ids = [row.id for row in open_cache(cache).done if row.has_ground_truth]
    num_test = write_random_split(file, case_ids, test_fraction=test_fraction, seed=seed)
    click.echo(f"{file}: {num_test} cases for testing, {len(case_ids) - num_test} for training")


@click.command()
def doctor() -> None:
    """Show versions, accelerators, free disk, and what is missing for which command."""
    from supercl_core.doctor import report

    _print_rows(report())


def _print_rows(rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    Console(soft_wrap=False).print(table, markup=False, highlight=False)
