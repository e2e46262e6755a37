"""What a user can cause to go wrong, as exceptions with an exit code.

A message has four parts: what is wrong, where (path, case, slice or key), what was expected against what
was found, and what to do next. `supercl_core.cli` prints it and exits with the class's code; nothing else
in the project catches these, except where one bad case must not stop the others.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import ClassVar, Final, Self, TypeVar

ErrorT = TypeVar("ErrorT", bound="SuperCLError")


class SuperCLError(Exception):
    """A failure that the user can act on.

    `what` is one sentence; `where` names the path, case, slice or key; `expected` and `found` are set
    together; `next_step` tells what to do.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        next_step: str,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.found = found
        self.next_step = next_step
        super().__init__(self.message())

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and workers send errors back pickled.
        return _rebuild, (type(self), self.what, self.where, self.expected, self.found, self.next_step)

    def message(self) -> str:
        """The whole message, one part a line."""
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where:    {self.where}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.found is not None:
            lines.append(f"  found:    {self.found}")
        lines.append(f"  next:     {self.next_step}")
        return printable("\n".join(lines), keep="\n")

    def with_saved(self, saved: str) -> Self:
        """The same error, which also says what is safe."""
        found = saved if self.found is None else f"{self.found}; {saved}"
        return _rebuild(type(self), self.what, self.where, self.expected, found, self.next_step)

    def one_line(self) -> str:
        """The message without the next step, for a row of a table of failures."""
        parts = [self.what.rstrip(".")]
        if self.expected is not None or self.found is not None:
            parts.append(f"expected {self.expected}, found {self.found}")
        return printable("; ".join(parts))


def printable(text: str, *, keep: str = "") -> str:
    """The text with characters escaped that would command a terminal or cannot be encoded: names come from files.

    `keep`: characters to leave as they are although they cannot be printed, such as line breaks.
    """
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first of the names, at most so many, and how many more there are: for messages."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _rebuild(
    kind: type[ErrorT], what: str, where: object, expected: object, found: object, next_step: str
) -> ErrorT:
    return kind(what, where=where, expected=expected, found=found, next_step=next_step)


class UsageError(SuperCLError):
    """Options or settings that make no sense (exit code 2)."""

    exit_code = 2


class CasesFailedError(SuperCLError):
    """Some cases failed and are listed; all others are done (exit code 3)."""

    exit_code = 3


class CacheError(SuperCLError):
    """A cache that is incomplete, damaged, of another version, or not the one asked for (exit code 4)."""

    exit_code = 4


class PreemptedError(SuperCLError):
    """Work was told to stop and goes on where it was when it is run again (exit code 5)."""

    exit_code = 5


class StorageError(SuperCLError):
    """The system cannot write or read files any more, which no other case would change (exit code 1)."""


_REFUSALS: Final = {
    errno.ENOSPC: ("The disk is full.", "Free some space"),
    errno.EDQUOT: ("The quota of this user is used up.", "Remove files, or have the quota raised"),
    errno.EFBIG: ("A file would be larger than the system allows.", "Raise the limit (ulimit -f)"),
    errno.EROFS: (
        "The file system is read-only.",
        "Name a place that can be written to, or have it mounted so",
    ),
    errno.EACCES: (
        "The permission is missing.",
        "Change the permissions (chmod, chown), or name another place",
    ),
    errno.EPERM: (
        "The permission is missing.",
        "Change the permissions (chmod, chown), or name another place",
    ),
    errno.EMFILE: ("Too many files are open.", "Raise the limit (ulimit -n), or use fewer workers"),
    errno.ENFILE: ("Too many files are open on this machine.", "Use fewer workers, or end other work here"),
    errno.EIO: ("The disk reports an error.", "Have the disk looked at, or name another place"),
}
"""What went wrong and what to do about it, for what the system says of a file."""


def cases_failed(
    failed: Sequence[dict[str, str]], what: str, *, where: object, next_step: str
) -> CasesFailedError:
    """The error that lists `failed`, each of a `case` and a `reason`."""
    lines = "".join(f"\n    {entry['case']}: {entry['reason']}" for entry in failed)
    return CasesFailedError(what, where=where, found=lines, next_step=next_step)


def storage_error(error: OSError, *, where: object = None) -> StorageError:
    """The error for a system that refuses to write or read a file."""
    what, advice = _REFUSALS.get(
        error.errno or 0, ("The system refuses a file.", "Check permissions, free space and quota")
    )
    return StorageError(
        what,
        where=error.filename or where,
        found=error.strerror or error,
        next_step=f"{advice}, then run the same command again.",
    )
