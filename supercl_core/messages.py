"""What is said on stderr beside results, and how much of it the user of the command line asked for.

A program that calls SuperCL is asked by nobody: it hears all notes and sees all progress. Called everywhere.
"""

from __future__ import annotations

import shlex
import sys

import click

from supercl_core.errors import printable


def is_quiet() -> bool:
    """Whether `supercl --quiet` runs: neither notes nor progress."""
    return _asked_for("quiet")


def is_verbose() -> bool:
    """Whether `supercl --verbose` runs: also where errors arose, and the logs of libraries."""
    return _asked_for("verbose")


def note(*texts: str) -> None:
    """Say things that the user may want to know; on a terminal they stand above the progress bar."""
    for text in texts if not is_quiet() else ():
        print(f"note: {printable(text, keep=chr(10))}", file=sys.stderr, flush=True)


def next_command(*words: object) -> None:
    """Name the command that usually comes next; words in capitals are for the user to fill in."""
    if not is_quiet():
        print(f"next: {printable(shlex.join(['supercl', *map(str, words)]))}", file=sys.stderr, flush=True)


def _asked_for(option: str) -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.find_root().params.get(option))
