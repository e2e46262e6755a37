"""The transcript of docs/first-minutes.md; its commands are run by tests/test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import first_minutes


def test_answers_stand_below_commands_with_their_times(tmp_path: Path) -> None:
    shown = first_minutes.transcript("pwd\nsh -c 'echo last >&2'\n", tmp_path)
    assert re.sub(r"\d+ s", "N s", shown) == (
        "\n```text\n$ pwd\n/home/me/supercl\n[N s]\n\n$ sh -c 'echo last >&2'\nlast\n[N s]\n```\n"
    )


def test_of_a_long_answer_the_beginning_is_shown(tmp_path: Path) -> None:
    lines = first_minutes.transcript("seq 99\n", tmp_path).splitlines()
    assert lines[1 + first_minutes.MOST_LINES : 4 + first_minutes.MOST_LINES] == ["29", "30", "..."]
    assert "99" not in lines


def test_a_command_that_fails_ends_the_transcript(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="(?s)^ls nothing\n.*No such file"):
        first_minutes.transcript("ls nothing\n", tmp_path)


def test_the_page_is_made_anew_from_its_own_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- machine -->\n\n```sh\necho hi\n```\n\nLast.\n")
    monkeypatch.setattr(first_minutes, "PAGE", page)
    first_minutes.main()
    once = page.read_text()
    assert "\n```sh\necho hi\n```\n\n```text\n$ echo hi\nhi\n[" in once
    assert once.endswith("```\n\nLast.\n")
    first_minutes.main()
    assert re.sub(r"\d+ s", "N s", page.read_text()) == re.sub(r"\d+ s", "N s", once)
