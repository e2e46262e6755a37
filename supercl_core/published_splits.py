"""The text in which the authors published their split lists, as the sections that a split file of JSON has.

    # ACDC
    sample 2 train_keys: [73, 18]
    sample 4 train_keys: [73 18  1,
        15]
    test: [5, 10]

Numbers are separated by commas or blanks, and lists go over lines. Called by `supercl_core.splits`. The form is known
from a description of the published file; other lines are left alone as long as they hold no list.
"""

from __future__ import annotations

import re
from typing import Any, Final

_LABELLED: Final = re.compile(r"sample ([1-9][0-9]{0,8}) train[_ ]?keys? ?[:=]?", re.IGNORECASE)
_TEST: Final = re.compile(r"test(?:[_ ]?keys?)? ?[:=]?", re.IGNORECASE)
_LONGEST_NUMBER: Final = 9


def parse(text: str) -> dict[str, Any]:
    """The sections of a published list, by name: each `{"labelled": {"2": [key, ...]}, "test": [key, ...]}`.

    A key is an integer, or the text where it is none. Raises ValueError for a list under no name or of an unknown
    kind, one that does not end, one that is there twice, and where there is no section at all.
    """
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in text.split("\n"):
        if line.strip().startswith("#"):
            parts.append((line.strip(" \t\r#:"), []))
        else:
            parts[-1][1].append(line)
    sections: dict[str, Any] = {}
    for name, lines in parts:
        lists = _lists_of("\n".join(lines), name)
        if not lists:
            continue  # a comment
        if not name or name in sections:
            raise ValueError(f"two sections {name[:80]!r}" if name else "a list before the first section")
        section: dict[str, Any] = {"labelled": {}}
        for kind, keys in lists:
            place, key = (section, "test") if kind == "test" else (section["labelled"], kind)
            if key in place:
                raise ValueError(f"two lists of {key!r} in section {name[:80]!r}")
            place[key] = keys
        sections[name] = section
    if not sections:
        raise ValueError("no section with lists, which begins with a line such as `# ACDC`")
    return sections


def _lists_of(text: str, section: str) -> list[tuple[str, list[int | str]]]:
    """The lists in a part of the text: their kind, `test` or a number of labelled cases, and their keys."""
    parts = re.split(r"([][])", text)
    texts, brackets = parts[::2], parts[1::2]
    if brackets != ["[", "]"] * (len(brackets) // 2):
        raise ValueError(f"a list without its beginning or end in {section[:80]!r}")
    lists = []
    for before, inner in zip(texts[::2], texts[1::2], strict=False):  # what is behind the last list is none
        kind = " ".join(before.strip().rpartition("\n")[2].split())
        labelled = _LABELLED.fullmatch(kind)
        if labelled is None and _TEST.fullmatch(kind) is None:
            raise ValueError(f"the list {kind[:80]!r} in {section[:80]!r}, which is of no known kind")
        keys = [_key(key) for key in re.split(r"[\s,;]+", inner) if key]
        lists.append((labelled[1] if labelled else "test", keys))
    return lists


def _key(text: str) -> int | str:
    text = text.strip("'\"")
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _LONGEST_NUMBER else text
