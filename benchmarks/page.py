"""What the pages of benchmarks share: running a script for its JSON, and tables of figures beside their targets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

Values = dict[str, Any]


class Row(NamedTuple):
    """One line of a table."""

    what: str
    target: str
    shown: Callable[[Values], str]
    met: Callable[[Values], bool] | None = None


def times(key: str) -> Callable[[Values], str]:
    """A ratio, such as 1.25 x."""
    return lambda values: f"{values[key]:.1f} x" if values[key] >= 10 else f"{values[key]:.2f} x"


def at_least(key: str, target: float) -> Callable[[Values], bool]:
    """Whether a figure reaches its target."""
    return lambda values: values[key] >= target


def at_most(key: str, target: float) -> Callable[[Values], bool]:
    """Whether a figure stays within its target."""
    return lambda values: values[key] <= target


def run(name: str, *arguments: object) -> Values:
    """Run one benchmark, show what it prints, and return the JSON object of its last line; end where it fails."""
    last = ""
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line
    if process.returncode != 0:
        sys.exit(process.returncode)
    values: Values = json.loads(last)
    return values


def table(rows: tuple[Row, ...], columns: dict[str, Values]) -> list[str]:
    """The lines of a table in Markdown: a column for each named set of figures."""
    lines = [f"| | target | {' | '.join(columns)} |", "| --- | --- |" + " --- |" * len(columns)]
    for row in rows:
        cells = [
            row.shown(values) + (" (missed)" if row.met is not None and not row.met(values) else "")
            for values in columns.values()
        ]
        lines.append(f"| {row.what} | {row.target} | {' | '.join(cells)} |")
    return lines
