"""Messages in four parts, exit codes, and errors that survive the way back from a worker."""

from __future__ import annotations

import pickle

import pytest

from supercl_core.errors import CacheError, CasesFailedError, PreemptedError, SuperCLError, UsageError


def test_message_has_four_parts() -> None:
    error = SuperCLError("It broke.", where="here", expected=1, found=0, next_step="Mend it.")
    assert str(error) == error.message()
    assert error.message().splitlines() == [
        "It broke.",
        "  where:    here",
        "  expected: 1",
        "  found:    0",
        "  next:     Mend it.",
    ]
    assert error.one_line() == "It broke; expected 1, found 0"
    assert SuperCLError("It broke.", next_step="Mend it.").message() == "It broke.\n  next:     Mend it."


@pytest.mark.parametrize(
    ("kind", "code"),
    [(SuperCLError, 1), (UsageError, 2), (CasesFailedError, 3), (CacheError, 4), (PreemptedError, 5)],
)
def test_errors_keep_their_class_and_parts_through_pickle(kind: type[SuperCLError], code: int) -> None:
    error = kind("It broke.", where="here", expected=(1, 2), found=[3], next_step="Mend it.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert copy.exit_code == code
    assert (copy.message(), copy.expected, copy.found) == (error.message(), (1, 2), [3])


def test_a_name_from_a_file_cannot_command_the_terminal() -> None:
    error = SuperCLError(
        "Bad.", where="\x1b[31mred\rx", found="a\u202eb\udcff\0", next_step="Größer,\nnext line."
    )
    assert error.message().endswith("Größer,\nnext line.")
    assert "where:    \\x1b[31mred\\rx\n" in error.message()
    assert "found:    a\\u202eb\\udcff\\x00\n" in error.message()
    assert error.one_line() == "Bad; expected None, found a\\u202eb\\udcff\\x00"
