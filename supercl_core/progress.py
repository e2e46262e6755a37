"""Progress of long work on stderr: a bar with rate and ETA on a terminal, a line every 30 s in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from supercl_core.messages import is_quiet

LOG_INTERVAL_S: Final = 30.0
WIDE: Final = 120
"""Columns of a terminal from which on the bar is a long one, and still leaves room for the notes of training."""


class Advance(Protocol):
    """Says that `count` more units are done; `note` is shown behind the bar."""

    def __call__(self, count: int = 1, *, note: str = "") -> None: ...


@contextmanager
def progress(title: str, *, total: int, unit: str, done: int = 0, shown: bool = True) -> Iterator[Advance]:
    """Show how far a loop over `total` units is; `done` of them were finished by an earlier run.

    Of several processes in step, all but one leave it to that one (`shown`). `supercl --quiet` shows nothing.
    """
    if not shown or is_quiet():
        yield lambda count=1, *, note="": None
    elif sys.stderr.isatty():
        with _bar(title, total=total, unit=unit, done=done) as advance:
            yield advance
    else:
        log = _LogLines(title, total=total, unit=unit, done=done)
        yield log
        log.write()


@contextmanager
def _bar(title: str, *, total: int, unit: str, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class Note(ProgressColumn):
        """The only column that is cut short where the line gets too long."""

        def render(self, task: Task) -> Text:
            return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24 if console.width >= WIDE else 8, table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn(unit),
        TextColumn("ETA"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        Note(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")

        def advance(count: int = 1, *, note: str = "") -> None:
            bar.advance(task, count)
            if note:
                bar.update(task, note=note)

        yield advance


class _LogLines:
    def __init__(self, title: str, *, total: int, unit: str, done: int) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._first, self._done = done, done
        self._start = self._last = time.monotonic()
        self._note = ""

    def __call__(self, count: int = 1, *, note: str = "") -> None:
        self._done += count
        self._note = note or self._note
        if time.monotonic() - self._last >= LOG_INTERVAL_S:
            self.write()

    def write(self) -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._start
        rate = (self._done - self._first) / elapsed if elapsed > 0 else 0.0
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        print(
            f"{self._title}: {self._done}/{self._total} {self._unit}, {rate:.3g} {self._unit}/s, "
            f"{elapsed:.0f} s elapsed, ETA {left:.0f} s{'  ' + self._note if self._note else ''}",
            file=sys.stderr,
            flush=True,
        )
