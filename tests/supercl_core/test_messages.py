"""Notes on stderr, and who asked for how much. What the options of the command line do is in test_cli."""

from __future__ import annotations

import threading

import click
import pytest

from supercl_core.messages import is_quiet, is_verbose, next_command, note


def test_a_note_of_a_program_that_nobody_started_with_our_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    note("a file named \x1b[31m\nsecond line")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "note: a file named \\x1b[31m\nsecond line\n"
    assert not is_quiet()
    assert not is_verbose()


@pytest.mark.parametrize(("quiet", "verbose"), [(True, False), (False, True)])
def test_the_options_hold_for_all_that_runs_below(
    quiet: bool, verbose: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    group = click.Context(click.Group("supercl"))
    group.params = {"quiet": quiet, "verbose": verbose}
    with click.Context(click.Command("verify"), parent=group):
        assert (is_quiet(), is_verbose()) == (quiet, verbose)
        note("something", "else")
        next_command("verify", "a b.zarr")
    said = capsys.readouterr().err
    assert said == ("" if quiet else "note: something\nnote: else\nnext: supercl verify 'a b.zarr'\n")


def test_a_thread_knows_of_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    """Click keeps what was asked for by thread; a note from another one is shown rather than lost."""
    context = click.Context(click.Group("supercl"))
    context.params = {"quiet": True}
    with context:
        thread = threading.Thread(target=note, args=("from a thread",))
        thread.start()
        thread.join()
    assert capsys.readouterr().err == "note: from a thread\n"
