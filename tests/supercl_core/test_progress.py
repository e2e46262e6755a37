"""Progress: lines in a log file, a bar on a terminal, all on stderr."""

from __future__ import annotations

import re

import pytest

from supercl_core import progress as module
from supercl_core.progress import progress


class Clock:
    """A clock that tests move by hand."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_log_file_gets_a_line_every_30_s_and_one_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("work", total=100, unit="cases", done=20) as advance:
        for _ in range(7):
            clock.now += 10
            advance(10, note="1 failed" if clock.now >= 150 else "")
        clock.now += 5
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "work: 50/100 cases, 1 cases/s, 30 s elapsed, ETA 50 s",
        "work: 80/100 cases, 1 cases/s, 60 s elapsed, ETA 20 s  1 failed",
        "work: 90/100 cases, 0.933 cases/s, 75 s elapsed, ETA 11 s  1 failed",
    ]


def test_no_time_at_all_gives_no_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work", total=1, unit="cases"):
        pass
    assert capsys.readouterr().err == "work: 0/1 cases, 0 cases/s, 0 s elapsed, ETA 0 s\n"


def test_an_error_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="inside"), progress("work", total=1, unit="cases"):
        raise RuntimeError("inside")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress("work", total=4, unit="cases", done=1) as advance:
        advance(3, note="all well")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4/4" in captured.err
    assert "all well" in captured.err


@pytest.mark.parametrize("columns", [60, 100, 140])
def test_a_bar_never_wraps_and_only_its_note_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    note = "ins 1.23 intra 10.12 inter 2.10 312/s wait 1% 12.1GB"  # as train.run_log makes it
    with progress("train", total=20_000, unit="steps", done=12_000) as advance:
        advance(345, note=note)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    lines = [line for line in re.split(r"[\r\n]+", shown) if "12345/20000 steps" in line]
    assert lines
    assert all(len(line) <= columns for line in lines)
    assert all((note in line) == (columns >= 100) for line in lines)
    assert all("ins 1.23" in line for line in lines)
