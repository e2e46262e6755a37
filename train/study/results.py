"""The results of a study: what they are, their files OUT/results.json and OUT/results.csv, and their table.

They are gathered by `train.study.collection`, and read by the report. Called by `supercl study`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from supercl_core.errors import SuperCLError, UsageError
from supercl_core.files import read_json, write_json, write_text
from train import runs
from train.bootstrap import Difference
from train.comparison import difference_text, number
from train.metrics import MEAN
from train.run_shapes import check, count
from train.study.declaration import Labelled, Status

if TYPE_CHECKING:
    from rich.console import Group

FORMAT_VERSION: Final = 2
"""Version of results.json."""


Bound = Literal["", "at least", "at most"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One fine-tuned run of the study, and how far it is."""

    recipe: str
    arm: str
    labelled: Labelled
    seed: int
    run_path: Path
    pretrain_path: Path | None
    status: Status
    error: str | None
    """Why it failed."""
    seconds: float | None
    """Of its fine-tuning, as logged; None before it is finished."""
    pretrain_seconds: float | None
    """Of the pre-training that it starts from, which other cells share."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Scores of one arm, recipe and labelled count, of one class or the mean of all."""

    recipe: str
    labelled: Labelled
    arm: str
    class_name: str
    """A class, or `mean`."""
    dsc: float | None
    """In %, the mean over classes, cases and seeds; None where nothing is defined."""
    sd: float | None
    """Standard deviation of `dsc` over seeds, and thus over their folds, in points; None below two seeds."""
    interval: tuple[float, float] | None
    """95 % interval of `dsc` (`bootstrap.mean_interval`)."""
    jc: float | None
    """In %."""
    hd95: float | None
    asd: float | None
    num_cases: int
    """Structures that DSC and JC are means over, of all seeds together."""
    num_seeds: int
    num_missing: int
    """Structures of `num_cases` that are missing in either prediction or truth."""
    difference: Difference | None
    """To the baseline arm of the same recipe and count, over their common seeds; None for the baseline itself."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """How many labelled cases the baseline needs for the DSC that an arm reaches with fewer."""

    recipe: str
    arm: str
    labelled: Labelled
    baseline_labels: float | None
    """None where the scores for it are not there yet."""
    bound: Bound
    """Where the DSC lies outside of the baseline's curve: its largest or smallest count is all that is known."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """What is known of a study, finished or not."""

    name: str
    data_set: str
    split: str
    scored_on: str
    folds: int | None
    arms: tuple[str, ...]
    baseline: str
    recipes: tuple[str, ...]
    labelled: tuple[Labelled, ...]
    seeds: tuple[int, ...]
    class_names: tuple[str, ...]
    """Without the background; empty before the first evaluation."""
    unit: str
    """Of HD95 and ASD: `mm` or `voxel`; empty before the first evaluation."""
    cells: tuple[Cell, ...]
    rows: tuple[Row, ...]
    """Those that have scores: by recipe, count, arm, and class, the mean last."""
    saved: tuple[Saved, ...]
    budget: dict[str, Any]
    """`pretrain` and `finetune`: settings of pre-training here and of each recipe and count; `unknown`: the arms whose
    weights were made elsewhere."""
    provenance: dict[str, Any]
    """`runs`: the distinct values of those behind `rows`, by dotted name; `results`: of what gathered them."""
    notes: tuple[str, ...]
    """What a reader has to know, one sentence or a few each."""


# ---------------------------------------------------------------- files


def write_results(results: Results, out_path: Path) -> None:
    """Write OUT/results.json and OUT/results.csv, one line a row. Workers do so in turn (`collection`)."""
    values = dataclasses.asdict(results)
    for cell in values["cells"]:
        for name in ("run_path", "pretrain_path"):
            cell[name] = cell[name] and cell[name].relative_to(out_path).as_posix()
    write_json(out_path / "results.json", {"format_version": FORMAT_VERSION, **values})
    write_text(out_path / "results.csv", _csv(results.rows))


def _csv(rows: Sequence[Row]) -> str:
    """One line a row; the columns have the names of the fields, with `_low` and `_high` for intervals."""
    lines = []
    for row in rows:
        line: dict[str, Any] = {}
        for name, value in vars(row).items():
            if name == "interval":
                line |= _bounds("dsc", value)
            elif name == "difference":
                line["difference"] = value and value.mean
                line |= _bounds("difference", value and value.interval)
                line["difference_num_cases"] = value and value.num_cases
            else:
                line[name] = value
        lines.append(line)
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()


def _bounds(name: str, interval: tuple[float, float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def read_results(out_path: Path) -> Results:
    """What `write_results` left in the folder of a study.

    Raises SuperCLError where there is nothing, or what is there is damaged or of another version.
    """
    file = out_path / "results.json"
    if not file.is_file():
        raise SuperCLError(
            "There are no results of a study here.",
            where=out_path,
            expected="results.json",
            found="none",
            next_step="Run `supercl study`, which writes it when a worker ends or is stopped.",
        )
    with damaged(file, "Run the study again, which writes it again."):
        values = read_json(file, limit_bytes=runs.LARGEST_FILE_BYTES)
        check(values, _SHAPE)
        if values.pop("format_version") != FORMAT_VERSION:
            raise ValueError("another format version")
        for cell in values["cells"]:
            cell["run_path"] = out_path / cell["run_path"]
            cell["pretrain_path"] = cell["pretrain_path"] and out_path / cell["pretrain_path"]
        for row in values["rows"]:
            row["interval"] = row["interval"] and tuple(row["interval"])
            if found := row["difference"]:
                row["difference"] = Difference(
                    **{**found, "interval": found["interval"] and tuple(found["interval"])}
                )
        kinds = {"cells": Cell, "rows": Row, "saved": Saved}
        for name, kind in kinds.items():
            values[name] = [kind(**item) for item in values[name]]
        lists = {key: tuple(item) for key, item in values.items() if isinstance(item, list)}
        return Results(**{**values, **lists})


@contextmanager
def damaged(file: Path, next_step: str) -> Iterator[None]:
    """Turn what goes wrong in reading and checking `file` into a SuperCLError."""
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError, UsageError) as error:
        raise SuperCLError(
            "A file of the study is damaged.",
            where=file,
            expected="JSON as this version of supercl writes it",
            found=error.one_line() if isinstance(error, UsageError) else repr(error)[:300],
            next_step=next_step,
        ) from error


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _labelled(value: Any) -> bool:
    return value == "all" or count(value)


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value))


_SHAPE: Final = {
    "format_version": count,
    **dict.fromkeys(("name", "data_set", "split", "scored_on", "baseline", "unit"), _text),
    "folds": (count,),
    **{key: [_text] for key in ("arms", "recipes", "class_names", "notes")},
    "labelled": [_labelled],
    "seeds": [count],
    "budget": {"pretrain": ({},), "finetune": {None: {None: {}}}, "unknown": [_text]},
    "provenance": {"runs": {None: [_text]}, "results": {}},
    "cells": [
        {
            **dict.fromkeys(("recipe", "arm", "run_path"), _text),
            "status": lambda value: value in ("finished", "running", "waiting", "failed"),
            "labelled": _labelled,
            "seed": count,
            **dict.fromkeys(("pretrain_path", "error"), (_text,)),
            **dict.fromkeys(("seconds", "pretrain_seconds"), (_number,)),
        }
    ],
    "rows": [
        {
            **dict.fromkeys(("recipe", "arm", "class_name"), _text),
            "labelled": _labelled,
            **dict.fromkeys(("dsc", "sd", "jc", "hd95", "asd"), (_number,)),
            "interval": (_pair,),
            **dict.fromkeys(("num_cases", "num_seeds", "num_missing"), count),
            "difference": ({"mean": _number, "interval": (_pair,), "num_cases": count, "num_seeds": count},),
        }
    ],
    "saved": [
        {
            **dict.fromkeys(("recipe", "arm"), _text),
            "labelled": _labelled,
            "baseline_labels": (_number,),
            "bound": lambda value: value in ("", "at least", "at most"),
        }
    ],
}
"""results.json."""


# ---------------------------------------------------------------- the terminal


def render_results(results: Results) -> Group:
    """The mean rows as a table for a terminal of 80 columns or more, and the notes below it."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    where = "test cases" if results.folds is None else "validation cases"
    notes = [
        f"DSC in % on {where}, mean over classes, cases and seeds ± sd over {spread(results)}. Difference: to "
        f"{results.baseline}, in points; * where its interval excludes 0. Bold: the best arm.",
        *results.notes,
    ]
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("recipe", overflow="fold", min_width=6)
    table.add_column("labels", justify="right", no_wrap=True)
    table.add_column("arm", overflow="fold", min_width=8)
    for title in ("DSC", "95 % interval", "difference", "seeds"):
        table.add_column(title, justify="right", no_wrap=True)
    means = [row for row in results.rows if row.class_name == MEAN]
    for group, members in itertools.groupby(means, key=lambda row: (row.recipe, row.labelled)):
        rows = list(members)
        best = max((row.dsc for row in rows if row.dsc is not None), default=None)
        for row in rows:
            first, last = row is rows[0], row is rows[-1]
            clear = "*" if row.difference and row.difference.is_clear else " "
            cells = [
                group[0] if first else "",
                str(group[1]) if first else "",
                row.arm,
                mean_text(row),
                f"{row.interval[0]:z.1f} to {row.interval[1]:z.1f}" if row.interval else "–",
                f"{difference_text(row.difference)}{clear}" if row.difference else "",
                str(row.num_seeds),
            ]
            # Text, since a name may hold what rich takes for markup.
            style = "bold" if row.dsc is not None and row.dsc == best else None
            table.add_row(*map(Text, cells), style=style, end_section=last)
    return Group(table, Text("\n".join(notes)))


def spread(results: Results) -> str:
    """What the standard deviations are over."""
    return "seeds" if results.folds is None else "seeds and their folds"


def made_by(known: Mapping[str, Sequence[str]]) -> str:
    """The commits and versions of `Results.provenance["runs"]` in a sentence; those that runs do not name are left out.

    Example:
        Runs made with commit 3f2a9c1 and 77b0d1e+changes, supercl 0.3.0, torch 2.13.0.
    """
    commits = [commit[:7] + commit[40:] for commit in known.get("commit", ())]
    parts = {"commit": commits, **{name: known.get(f"versions.{name}") for name in ("supercl", "torch")}}
    named = ", ".join(f"{name} {' and '.join(values)}" for name, values in parts.items() if values)
    return f"Runs made with {named or 'a version that they do not name'}."


def mean_text(row: Row) -> str:
    """The DSC of a row with its spread over seeds, such as `85.31 ± 0.42`."""
    return number(row.dsc) + (f" ± {row.sd:.2f}" if row.sd is not None else "")
