"""The command line: what it prints where, its exit codes, and messages for input that makes no sense."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from supercl_core import cli
from supercl_core.errors import CacheError, CasesFailedError, PreemptedError, SuperCLError, UsageError


def test_help_lists_every_command_and_exit_code(supercl: Callable[..., Any]) -> None:
    outcome = supercl("--help")
    assert (outcome.code, outcome.err) == (0, "")
    for name, entry in cli.COMMANDS.items():
        assert f"  {name} " in outcome.out
        assert entry.help in outcome.out
    for kind in (SuperCLError, UsageError, CasesFailedError, CacheError, PreemptedError):
        assert f"\n    {kind.exit_code}    " in outcome.out
    assert "\n    130  " in outcome.out


@pytest.mark.parametrize("name", [name for name, entry in cli.COMMANDS.items() if entry.extra != "train"])
def test_every_command_explains_itself_with_an_example(name: str, supercl: Callable[..., Any]) -> None:
    outcome = supercl(name, "-h")
    assert outcome.code == 0
    assert f"supercl {name}" in outcome.out
    if "[OPTIONS]\n" not in outcome.out:  # a command with arguments
        assert "Example:" in outcome.out


def test_version(supercl: Callable[..., Any]) -> None:
    outcome = supercl("--version")
    assert outcome.code == 0
    assert outcome.out.startswith("supercl, version ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preproces"], "Did you mean 'preprocess'?"),
        (["zzz"], "No such command 'zzz'."),
        (["inspect"], "Missing argument 'CACHE'"),
        (["inspect", "x", "--yaml"], "No such option"),
        (["preprocess", "in", "out", "--workers", "0"], "--workers"),
    ],
)
def test_wrong_usage_is_code_2_on_stderr(
    arguments: list[str], message: str, supercl: Callable[..., Any]
) -> None:
    outcome = supercl(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (SuperCLError("It broke.", next_step="Mend it."), 1, "error: It broke.\n  next:     Mend it.\n"),
        (
            PreemptedError("Told to stop.", next_step="Go on."),
            5,
            "error: Told to stop.\n  next:     Go on.\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (click.Abort(), 130, "interrupted\n"),
    ],
)
def test_errors_become_one_message_and_an_exit_code(
    error: BaseException, code: int, text: str, supercl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr("supercl_core.cache_reader.open_cache", fail)
    outcome = supercl("inspect", "x")
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.strip() == text.strip()


def test_a_mistake_of_ours_is_not_hidden(
    supercl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise ModuleNotFoundError("No module named 'supercl_core.nothing'", name="supercl_core.nothing")

    monkeypatch.setattr("supercl_core.cache_reader.open_cache", fail)
    with pytest.raises(ModuleNotFoundError):
        supercl("inspect", "x")


# ---- caches


def test_no_cache_at_all_is_code_4(tmp_path: Path, supercl: Callable[..., Any]) -> None:
    for arguments in (
        ["inspect", tmp_path],
        ["split", tmp_path, tmp_path / "s.json"],
        ["weak-labels", tmp_path],
    ):
        outcome = supercl(*arguments)
        assert (outcome.code, outcome.out) == (4, "")
        assert outcome.err.splitlines() == [
            "error: There is no cache here.",
            f"  where:    {tmp_path}",
            "  expected: a folder written by `supercl preprocess`",
            "  found:    another folder",
            "  next:     Check the path, or write one with `supercl preprocess INPUT CACHE`.",
        ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"complete": False}, "The cache is not complete."),
        ({"schema_version": 99}, "The cache has another schema version."),
    ],
)
def test_incomplete_caches_and_other_versions_are_code_4(
    changes: dict[str, Any], message: str, cache_copy: Path, supercl: Callable[..., Any]
) -> None:
    content = json.loads((cache_copy / "zarr.json").read_text())
    content["attributes"]["supercl"].update(changes)
    (cache_copy / "zarr.json").write_text(json.dumps(content))
    outcome = supercl("inspect", cache_copy)
    assert (outcome.code, outcome.out) == (4, "")
    for part in (f"error: {message}", f"where:    {cache_copy}", "expected:", "found:", "next:"):
        assert part in outcome.err


# ---- splits


def test_split_writes_a_file_of_the_labelled_cases(
    cache_path: Path, tmp_path: Path, supercl: Callable[..., Any]
) -> None:
    outcome = supercl("split", cache_path, tmp_path / "split.json", "--test-fraction", "0.3", "--seed", "4")
    assert outcome.code == 0
    assert outcome.out == f"{tmp_path / 'split.json'}: 1 cases for testing, 2 for training\n"
    content = json.loads((tmp_path / "split.json").read_text())
    assert sorted([*content["labelled"]["2"], *content["test"]]) == ["case_a", "case_b", "case_c"]


@pytest.mark.parametrize("fraction", ["0", "1", "-0.5", "nan"])
def test_split_refuses_a_fraction_out_of_range(
    fraction: str, cache_path: Path, tmp_path: Path, supercl: Callable[..., Any]
) -> None:
    outcome = supercl("split", cache_path, tmp_path / "split.json", f"--test-fraction={fraction}")
    assert outcome.code == 2
    assert "test fraction is out of range" in outcome.err
    assert not (tmp_path / "split.json").exists()


def test_what_the_system_refuses_is_an_error_with_its_path(
    supercl: Any, cache_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = supercl("split", cache_path, tmp_path / "file" / "split.json")
    assert outcome.code == 1
    assert "The system refuses a file" in outcome.err
    assert "where:    " in outcome.err
