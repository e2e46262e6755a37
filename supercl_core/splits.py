"""Splits: which cases are labelled for fine-tuning and which are kept for testing.

A split file is JSON: `{"labelled": {"2": [key, key], "4": [...]}, "test": [key, ...]}`, or several of these under
the names of their data sets, as in the published list. A key is a case id, or a number as the publication uses
it: for a task of the Medical Segmentation Decathlon the index of the case in sorted order, for ACDC the patient
(both frames). Called by training commands; `supercl split` writes a new file.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supercl_core.errors import UsageError
from supercl_core.files import write_json

Key = int | str


@dataclass(frozen=True, kw_only=True)
class Split:
    """The cases of one experiment, as ids of the cache."""

    file: str
    labelled: tuple[str, ...]
    """Cases whose ground truth fine-tuning may use."""
    test: tuple[str, ...]
    """Cases that only evaluation may look at."""
    num_labelled_keys: int
    """Labelled keys asked for; an ACDC key stands for two cases."""

    def __post_init__(self) -> None:
        both = sorted(set(self.test) & set(self.labelled))
        if both:
            raise UsageError(
                "The split uses cases both for training and for testing.",
                where=self.file,
                expected="no case in both lists",
                found=", ".join(both[:5]) + (f" and {len(both) - 5} more" if len(both) > 5 else ""),
                next_step="Remove them from one of the lists.",
            )


def read_split(file: str, case_ids: list[str], *, data_set: str, num_labelled: int | None) -> Split:
    """Read a split and turn its keys into ids of `case_ids` (all cases of the cache, sorted).

    `file` is a path, or `path:SECTION` for a file with several data sets; without a section the one whose name
    matches `data_set` is taken. `num_labelled` counts keys: a count that the file lists is used as it is, a
    smaller one takes the first keys of the smallest list; None takes no labelled case (pre-training).

    Raises UsageError for an unreadable file, an unknown section, count or case, and when a case is both
    labelled and for testing.
    """
    section = _section(file, data_set)
    test_keys: list[Key] = section["test"]
    labelled_keys = [] if num_labelled is None else _labelled_keys(section, num_labelled, file)
    test = _resolve(test_keys, case_ids, file)
    labelled = _resolve(labelled_keys, case_ids, file)
    return Split(file=file, labelled=tuple(labelled), test=tuple(test), num_labelled_keys=len(labelled_keys))


def write_random_split(path: Path, case_ids: list[str], *, test_fraction: float, seed: int) -> int:
    """Write a split of all `case_ids` with nested labelled lists of 1, 2, 4, 8, ... cases; return the test size.

    Raises UsageError when there are too few cases to have one for testing and one for training.
    """
    num_test = max(1, round(len(case_ids) * test_fraction))
    if len(case_ids) - num_test < 1:
        raise UsageError(
            "There are too few labelled cases to split.",
            expected="at least 2",
            found=len(case_ids),
            next_step="Add labelled cases, or ask for a smaller --test-fraction.",
        )
    order = random.Random(seed).sample(sorted(case_ids), len(case_ids))
    train = order[num_test:]
    counts = [2**power for power in range(len(train).bit_length()) if 2**power < len(train)]
    labelled = {str(count): train[:count] for count in [*counts, len(train)]}
    write_json(path, {"seed": seed, "labelled": labelled, "test": sorted(order[:num_test])})
    return num_test


def _section(file: str, data_set: str) -> dict[str, Any]:
    path, section_name = Path(file), ""
    if not path.exists() and ":" in file:
        text, _, section_name = file.rpartition(":")
        path = Path(text)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a JSON {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise UsageError(
            "The split cannot be read.",
            where=path,
            expected='a JSON file such as {"labelled": {"2": [...]}, "test": [...]}',
            found=error,
            next_step="Check the path, or write one with `supercl split CACHE FILE`.",
        ) from error
    sections = {name: part for name, part in content.items() if isinstance(part, dict) and "test" in part}
    if "test" in content:
        sections = {"": content}
    matching = [name for name in sections if not name or _plain(name) == _plain(section_name or data_set)]
    if len(matching) != 1 or "labelled" not in sections[matching[0]]:
        raise UsageError(
            f"The split has no section for {section_name or data_set!r}.",
            where=path,
            expected="one of " + (", ".join(sections) or "none: no part of the file has a list `test`"),
            found=section_name or data_set,
            next_step=f"Name the section: --split {path}:SECTION",
        )
    section = sections[matching[0]]
    if not _well_formed(section):
        raise UsageError(
            "The lists of the split are not what they should be.",
            where=path,
            expected='lists of keys, those of `labelled` under their counts: {"2": [key, key]}',
            found=", ".join(f"{name}: {json.dumps(section[name])[:60]}" for name in ("labelled", "test")),
            next_step="Mend the file, or write one with `supercl split CACHE FILE`.",
        )
    return section


def _well_formed(section: dict[str, Any]) -> bool:
    labelled = section["labelled"]
    if not (isinstance(labelled, dict) and labelled and all(count.isdecimal() for count in labelled)):
        return False
    lists = [section["test"], *labelled.values()]
    return all(isinstance(keys, list) and all(isinstance(key, Key) for key in keys) for keys in lists)


def _plain(name: str) -> str:
    """A data set's name without the decorations that differ between its sources (MSD-Heart, Task02_Heart)."""
    return re.sub(r"^(msd|task\d+)[-_ ]?", "", name.lower())


def _labelled_keys(section: dict[str, Any], num_labelled: int, file: str) -> list[Key]:
    lists = {int(count): keys for count, keys in section["labelled"].items()}
    if num_labelled in lists:
        return lists[num_labelled]
    if 0 < num_labelled < min(lists):
        return lists[min(lists)][:num_labelled]
    raise UsageError(
        f"The split has no list of {num_labelled} labelled cases.",
        where=file,
        expected=f"one of {', '.join(map(str, sorted(lists)))}"
        + (f", or fewer than {min(lists)}" if min(lists) > 1 else ""),
        found=num_labelled,
        next_step="Ask for one of these with --labelled.",
    )


def _resolve(keys: list[Key], case_ids: list[str], file: str) -> list[str]:
    """Case ids of the keys, in the order of the keys."""
    resolved, unknown = [], []
    for key in keys:
        found = _cases_of_key(key, case_ids)
        resolved += found
        if not found:
            unknown.append(key)
    if unknown:
        raise UsageError(
            "The split names cases that the cache does not have.",
            where=file,
            expected=f"cases such as {', '.join(case_ids[:3])} ({len(case_ids)} in all)",
            found=", ".join(map(str, unknown[:5]))
            + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""),
            next_step="Use the cache of the data set that the split was made for.",
        )
    return resolved


def _cases_of_key(key: Key, case_ids: list[str]) -> list[str]:
    if isinstance(key, str):
        return [case_id for case_id in case_ids if case_id == key]
    patients = [re.match(r"patient0*(\d+)(?!\d)", case_id) for case_id in case_ids]
    if all(patients):
        return [match.string for match in patients if match and int(match[1]) == key]
    return case_ids[key : key + 1] if 0 <= key < len(case_ids) else []
