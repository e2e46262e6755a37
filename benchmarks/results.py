"""The tables and pictures of docs/results.md, from the folders of studies.

    python -m benchmarks.results OUT/hippocampus OUT/acdc

The part of the page for each recipe that has finished runs, between `<!-- study NAME RECIPE -->` and `<!-- end -->`, is
written anew, and for several labelled counts images/study-NAME-RECIPE.svg beside the page. The text around it is
written by hand.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import click
import matplotlib
import numpy as np
from matplotlib.figure import Figure

if not __package__:  # run by its path: beside it lies a script that has the name of a package
    sys.path[0] = str(Path(__file__).parents[1])

from train.comparison import difference_text, number
from train.metrics import MEAN
from train.study.results import Results, Row, Saved, made_by, mean_text, read_results, spread

PAGE: Final = Path(__file__).parents[1] / "docs" / "results.md"


@click.command(help=__doc__)
@click.argument("studies", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--page", default=PAGE, type=click.Path(exists=True, path_type=Path), help="The page.")
def main(studies: tuple[Path, ...], page: Path) -> None:
    """Write the parts of all studies."""
    text = page.read_text()
    for study in studies:
        results = read_results(study)
        for recipe in results.recipes:
            of_recipe = _only(results, recipe)
            if any(cell.status == "finished" for cell in of_recipe.cells):
                text = _with_part(text, of_recipe, page)
    page.write_text(text)


def _with_part(text: str, results: Results, page: Path) -> str:
    """The page's `text` with the part for the one recipe of `results`, whose picture is drawn."""
    name = f"{results.name} {results.recipes[0]}"
    shown = lines(results)
    if any(row.difference for row in results.rows) and len({row.labelled for row in results.rows}) > 1:
        picture = Path("images", f"study-{name.replace(' ', '-')}.svg")
        shown += ["", f"![DSC minus that of {results.baseline}, with intervals]({picture.as_posix()})"]
        draw(results, page.parent / picture)
    begin = f"<!-- study {name} -->"
    part = re.compile(rf"{re.escape(begin)}\n.*?<!-- end -->", re.DOTALL)
    text, num_found = part.subn(lambda _: "\n".join([begin, *shown, "<!-- end -->"]), text)
    if num_found != 1:
        raise click.ClickException(f"{page}: {num_found} parts {begin} ... <!-- end -->, not one")
    return text


def _only(results: Results, recipe: str) -> Results:
    """What `results` has of one recipe."""
    finetune = results.budget["finetune"]
    return dataclasses.replace(
        results,
        recipes=(recipe,),
        cells=tuple(cell for cell in results.cells if cell.recipe == recipe),
        rows=tuple(row for row in results.rows if row.recipe == recipe and row.dsc is not None),
        saved=tuple(one for one in results.saved if one.recipe == recipe),
        budget={**results.budget, "finetune": {recipe: finetune[recipe]}},
    )


def lines(results: Results) -> list[str]:
    """The conditions of the runs of a recipe, and a row for each count and arm."""
    finished = sum(cell.status == "finished" for cell in results.cells)
    saved = {(one.arm, one.labelled): one for one in results.saved}
    means = [row for row in results.rows if row.class_name == MEAN]
    best: dict[Any, float] = {}
    for row in means:
        best[row.labelled] = max(best.get(row.labelled, 0.0), row.dsc or 0.0)
    rows = [_cells(row, saved.get((row.arm, row.labelled)), best[row.labelled]) for row in means]
    titles = [
        *("labelled", "arm", "seeds", f"DSC % ± sd of {spread(results)}", "95 % interval"),
        *(f"difference to {results.baseline}", f"HD95 {results.unit}", "missing"),
        *([f"{results.baseline} needs"] if saved else []),
    ]
    return [
        f"{finished} of {len(results.cells)} cells, seeds {', '.join(map(str, results.seeds))}, scored on "
        f"{results.scored_on} cases. {_budget(results)} {made_by(results.provenance['runs'])}",
        "",
        f"| {' | '.join(titles)} |",
        f"| {' | '.join('---' for _ in titles)} |",
        *(f"| {' | '.join(cells[: len(titles)])} |" for cells in rows),
    ]


def draw(results: Results, path: Path) -> None:
    """Write the paired differences to the baseline with their intervals as SVG."""
    arms = [arm for arm in results.arms if arm != results.baseline]
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="black", linewidth=0.8)
    for index, arm in enumerate(arms):
        found = [
            (results.labelled.index(row.labelled), row.difference.mean, *row.difference.interval)
            for row in results.rows
            if (row.class_name, row.arm) == (MEAN, arm) and row.difference and row.difference.interval
        ]
        if found:
            x, mean, low, high = np.array(found).T
            x += 0.12 * (index - (len(arms) - 1) / 2)  # so that no interval hides another
            lengths = mean - low, high - mean
            axes.errorbar(
                x, mean, yerr=lengths, fmt="o", markersize=5, capsize=2, color=f"C{index}", label=arm
            )
    axes.set_xticks(range(len(results.labelled)), map(str, results.labelled))
    axes.set_xlabel("labelled")
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_ylabel(f"DSC minus that of {results.baseline} [points]")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "supercl"}):
        figure.savefig(path, metadata={"Date": None})


def _cells(row: Row, saved: Saved | None, best: float) -> list[str]:
    mark = "**" if row.dsc == best else ""
    interval = f"{row.interval[0]:.1f} to {row.interval[1]:.1f}" if row.interval else "–"
    difference = difference_text(row.difference) if row.difference else ""
    is_clear = row.difference is not None and row.difference.is_clear
    needs = f"{saved.bound} {saved.baseline_labels:.0f}".strip() if saved and saved.baseline_labels else ""
    if needs and not is_clear:
        needs += " (not told apart)"
    return [
        str(row.labelled),
        row.arm,
        str(row.num_seeds),
        f"{mark}{mean_text(row)}{mark}",
        interval,
        difference + ("*" if is_clear else ""),
        number(row.hd95),
        f"{row.num_missing}/{row.num_cases}",
        needs,
    ]


def _budget(results: Results) -> str:
    """Steps and sizes in a few words, and what finished runs took."""
    finished = [cell for cell in results.cells if cell.status == "finished"]
    parts = []
    if pretrain := results.budget["pretrain"]:
        times = _seconds(cell.pretrain_seconds for cell in finished)
        parts.append(f"pre-training of arms that are pre-trained here: {_steps(pretrain)}, {times}")
    for recipe, by_count in results.budget["finetune"].items():
        kinds = list(dict.fromkeys(_steps(config) for config in by_count.values()))
        times = _seconds(cell.seconds for cell in finished if cell.recipe == recipe)
        parts.append(f"`{recipe}`, for all arms: {' or '.join(kinds)}, {times}")
    if unknown := results.budget["unknown"]:
        parts.append(f"unknown pre-training made elsewhere: {', '.join(unknown)}")
    return f"Budgets: {'; '.join(parts)}."


def _steps(config: dict[str, Any]) -> str:
    length = f"{config['epochs']} epochs" if config.get("epochs") else f"{config['steps']:,} steps"
    patch = f" of {config['patch_size'][0]} x {config['patch_size'][1]}" if config["patch_size"] else ""
    channels = f", {config['adjacent_slices']} slice on each side" if config["adjacent_slices"] else ""
    return f"{length} x {config['batch_size']} slices{patch}, {config['filters']} filters{channels}"


def _seconds(of_runs: Iterable[float | None]) -> str:
    known = [value for value in of_runs if value is not None]
    return f"{min(known):.0f} to {max(known):.0f} s a run" if known else "not run yet"


if __name__ == "__main__":
    main()
