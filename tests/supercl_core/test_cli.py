"""The command line: what it prints where, its exit codes, and messages for input that makes no sense."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
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
        assert entry.summary() in outcome.out
        assert entry.summary().endswith("Resumes.") == entry.resumes
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


def test_what_prints_tables_or_counts_also_prints_json() -> None:
    """The other commands write JSON files, or name what they wrote."""
    context = click.Context(cli.supercl)
    commands = {name: cli.supercl.get_command(context, name) for name in cli.COMMANDS}
    assert {name for name, command in commands.items() if "as_json" in {option.name for option in command.params}} == {
        "doctor", "evaluate", "inspect", "predict", "preprocess", "quality", "repair", "report", "verify"
    }  # fmt: skip


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
        (KeyboardInterrupt(), 130, "interrupted; the same command starts anew\n"),
        (click.Abort(), 130, "interrupted; the same command starts anew\n"),
    ],
)
def test_errors_become_one_message_and_an_exit_code(
    error: BaseException, code: int, text: str, supercl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr("supercl_core.cache.reader.open_cache", fail)
    outcome = supercl("inspect", "x")
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.strip() == text.strip()


def test_ctrl_c_says_of_a_command_that_resumes_that_it_goes_on(
    supercl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("supercl_core.archive.forms.pack", interrupt)
    outcome = supercl("pack", tmp_path / "a.zarr", tmp_path / "a.zip")
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err == "interrupted; the same command goes on where it stopped\n"


def test_a_real_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "supercl_core.cli", "phantom", tmp_path / "phantom", "--cases", "1000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("phantom.wip/imagesTr/*")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted; the same command starts anew"
    assert not (tmp_path / "phantom").exists()


def test_verbose_also_shows_where_an_error_arose(supercl: Callable[..., Any], tmp_path: Path) -> None:
    plain, verbose = supercl("inspect", tmp_path), supercl("--verbose", "inspect", tmp_path)
    assert (plain.code, verbose.code) == (4, 4)
    assert "Traceback" not in plain.err
    assert verbose.err.startswith("Traceback")
    assert "open_cache" in verbose.err
    assert verbose.err.endswith(plain.err)


@pytest.mark.parametrize("option", [[], ["-v"]])
def test_verbose_lets_libraries_log(
    option: list[str], supercl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)

    def inspected(path: Path) -> None:
        logging.getLogger("library").info("something small")
        raise CacheError("None.", next_step="Nothing.")

    monkeypatch.setattr("supercl_core.cache.reader.open_cache", inspected)
    outcome = supercl(*option, "inspect", tmp_path)
    assert ("library: something small\n" in outcome.err) == bool(option)


@pytest.mark.parametrize("option", ["-q", "--quiet"])
def test_quiet_leaves_nothing_but_results_and_errors(
    option: str, cache_path: Path, tmp_path: Path, supercl: Callable[..., Any]
) -> None:
    loud = supercl("pack", cache_path, tmp_path / "loud.zip")
    assert loud.err.startswith("pack: ")
    quiet = supercl(option, "pack", cache_path, tmp_path / "quiet.zip")
    assert (quiet.code, quiet.err) == (0, "")
    assert quiet.out.startswith(f"{tmp_path / 'quiet.zip'}: 4 cases")
    assert supercl(option, "inspect", tmp_path).err.startswith("error: There is no cache here.\n")


def test_no_color_leaves_no_codes_on_a_terminal(
    cache_path: Path, supercl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in supercl("inspect", cache_path).out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in supercl("inspect", cache_path).out


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("bash", "complete -o nosort -F _supercl_completion supercl"),
        ("zsh", "compdef _supercl_completion supercl"),
        ("fish", "complete --no-files --command supercl"),
    ],
)
def test_scripts_for_the_completion_of_shells(
    shell: str, line: str, supercl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_SUPERCL_COMPLETE", f"{shell}_source")
    outcome = supercl()
    assert (outcome.code, outcome.err) == (0, "")
    assert line in outcome.out


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("supercl pre", ["preprocess", "pretrain", "predict"]),
        ("supercl preprocess --sl", ["--slurm", "--slic"]),
        ("supercl preprocess --slic ", ["fast", "exact", "skimage"]),
    ],
)
def test_what_is_completed(
    words: str, found: list[str], supercl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_SUPERCL_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    assert [line.partition(",")[2] for line in supercl().out.splitlines()] == found


def test_a_mistake_of_ours_is_not_hidden(
    supercl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise ModuleNotFoundError("No module named 'supercl_core.nothing'", name="supercl_core.nothing")

    monkeypatch.setattr("supercl_core.cache.reader.open_cache", fail)
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
    assert outcome.err == f"next: supercl pretrain {cache_path} RUN --split {tmp_path / 'split.json'}\n"
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
