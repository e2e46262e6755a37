"""Splits: which cases are labelled for fine-tuning and which are kept for testing.

A split file is JSON: `{"labelled": {"2": [key, key], "4": [...]}, "test": [key, ...]}`, or several of these under
the names of their data sets. The text in which the authors published theirs is read too (`published_splits`).
A key is a case id, or a number as the publication uses it: where cases are named like `patient007_frame01` (ACDC,
MM-WHS, HVSMR, CHAOS) the patient, with all its cases; else the index of the case in sorted order. Cases with identical
content are one case under several names: this module also says where that would let a test case into training. Called
by training; `supercl split` writes a new file.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from supercl_core import published_splits
from supercl_core.cache.cases import CaseRow, patient_number, patients
from supercl_core.errors import UsageError, some_of
from supercl_core.files import parse_json, read_text, write_json

Key = int | str

LARGEST_FILE_BYTES: Final = 1 << 24
"""Room for a hundred thousand cases with long names, several times over."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The cases of one experiment, as ids of the cache."""

    file: str
    labelled: tuple[str, ...]
    """Cases whose ground truth fine-tuning may use."""
    test: tuple[str, ...]
    """Cases that only evaluation may look at."""
    num_labelled_keys: int
    """Labelled keys asked for, or those of "all" in the unit of the file; a patient's number may stand for several
    cases."""

    def __post_init__(self) -> None:
        both = sorted(set(self.test) & set(self.labelled))
        if both:
            raise UsageError(
                "The split uses cases both for training and for testing.",
                where=self.file,
                expected="no case in both lists",
                found=some_of(both),
                next_step="Remove them from one of the lists.",
            )


def read_split(
    file: str,
    case_ids: list[str],
    *,
    data_set: str,
    num_labelled: int | Literal["all"] | None,
    rows: Sequence[CaseRow] = (),
) -> Split:
    """Read a split and turn its keys into ids of `case_ids` (all cases of the cache, sorted).

    `file` is a path, or `path:SECTION` for a file with several data sets; without a section the one whose name
    matches `data_set` is taken. `num_labelled` counts keys. A count that the file lists is used as it is. Any other
    takes the first keys of all lists together, shorter lists first, so that such counts are nested. "all" takes every
    case with ground truth but those of test patients. None takes no case (pre-training).
    With `rows`, the cases of the cache, which "all" needs, what they hold is checked too.

    Raises UsageError for an unreadable file, an unknown section, count or case, a case that is listed twice or is
    both labelled and for testing and, with `rows`, a labelled case without ground truth or of a test patient.
    """
    section = _section(file, data_set)
    test = _resolve(section["test"], case_ids, file)
    if num_labelled == "all":
        assert rows, "only the rows of a cache tell which cases have a ground truth"
        left_out = {*test, *of_same_patients(rows, test)}
        labelled = [row.id for row in rows if row.has_ground_truth and row.id not in left_out]
        listed, chosen = (section["test"], *section["labelled"].values()), set(labelled)
        kind = int if any(isinstance(key, int) for keys in listed for key in keys) else str
        by_key = _cases_by_key(case_ids).items()
        num_keys = sum(isinstance(key, kind) and not chosen.isdisjoint(ids) for key, ids in by_key)
    else:
        keys = [] if num_labelled is None else _labelled_keys(section, num_labelled, file)
        labelled, num_keys = _resolve(keys, case_ids, file), len(keys)
    split = Split(file=file, labelled=tuple(labelled), test=tuple(test), num_labelled_keys=num_keys)
    if rows:
        _check_ground_truth(split, rows)
        check_patients(split, rows)
    return split


def of_same_patients(rows: Sequence[CaseRow], case_ids: Iterable[str]) -> tuple[str, ...]:
    """The other cases of the patients that `case_ids` are of, in order: further frames, and identical cases."""
    known = set(case_ids)
    patient = dict(zip([row.id for row in rows], patients(rows).tolist(), strict=True))
    theirs = {patient[case_id] for case_id in known & patient.keys()}
    return tuple(sorted(case_id for case_id in patient.keys() - known if patient[case_id] in theirs))


def cases_without(rows: Sequence[CaseRow], case_ids: Sequence[str]) -> list[str]:
    """The cases that are done, but for `case_ids` and all others of their patients: what pre-training may see.

    Raises UsageError where no case is left.
    """
    left_out = {*case_ids, *of_same_patients(rows, case_ids)}
    done = [row.id for row in rows if row.state == "done"]
    left = [case_id for case_id in done if case_id not in left_out]
    if not left:
        raise UsageError(
            "No case is left beside those of the test list.",
            expected="other cases too",
            found=f"{len(done)} cases, all left out",
            next_step="Check the split, or leave it out.",
        )
    return left


def check_patients(split: Split, rows: Sequence[CaseRow]) -> None:
    """Raise UsageError where a labelled case is of the patient of a test case. `rows`: the cases of the cache."""
    patient = dict(zip([row.id for row in rows], patients(rows).tolist(), strict=True))
    both = [
        f"{labelled} = {test}"
        for labelled in sorted(split.labelled)
        for test in sorted(split.test)
        if patient.get(labelled, labelled) == patient.get(test, test)
    ]
    if both:
        raise UsageError(
            "The split uses cases of one patient, or of identical content, both for training and for testing.",
            where=split.file,
            expected="no test case under another name among the labelled ones",
            found=some_of(both),
            next_step="Remove them from one of the lists; `supercl split CACHE FILE` keeps identical cases together.",
        )


def fold_numbers(case_ids: Sequence[str], rows: Sequence[CaseRow], *, num_folds: int) -> list[int]:
    """Cut labelled cases into folds for validation: the fold of each of `case_ids`, 0 to `num_folds` - 1.

    Patients (`cases.patients` of `rows`, all cases of the cache) are dealt to the folds in the order in which
    `case_ids` names them, so a patient is in one fold with all its cases, folds differ by one patient at most, and a
    case that is in nested lists has the same fold in each.

    Raises UsageError for fewer than two folds, and for more folds than patients.

    Example:
        [0, 0, 1, 1, 0, 0] for two frames each of three patients and two folds.
    """
    patient = dict(zip([row.id for row in rows], patients(rows).tolist(), strict=True))
    order = {number: index for index, number in enumerate(dict.fromkeys(patient[case] for case in case_ids))}
    if not 2 <= num_folds <= len(order):
        raise UsageError(
            f"The labelled cases cannot be cut into {num_folds} folds.",
            expected="at least 2 folds, and as many labelled patients",
            found=f"{num_folds} folds, {len(order)} patients ({some_of(case_ids)})",
            next_step="Use more labelled cases, or fewer folds.",
        )
    return [order[patient[case]] % num_folds for case in case_ids]


def next_after_cache(cache_path: Path, rows: Sequence[CaseRow]) -> tuple[object, ...]:
    """What follows preprocessing, as the words of `messages.next_command`: a split, where the cases allow one."""
    labelled = [row for row in rows if row.has_ground_truth]
    if labelled and len(set(patients(labelled).tolist())) > 1:
        return "split", cache_path, "FILE"
    return next_pretraining(cache_path, rows)


def next_pretraining(cache_path: Path, rows: Sequence[CaseRow], *options: object) -> tuple[object, ...]:
    """The words of pre-training on the cases `rows`; without volumes there are no pairs by position."""
    is_flat = all(row.shape[1] == 1 for row in rows)
    return "pretrain", cache_path, "RUN", *options, *(("--set", "instance_rule=view") if is_flat else ())


def write_random_split(
    path: Path, rows: Sequence[CaseRow], *, test_fraction: float, seed: int
) -> tuple[int, int]:
    """Write a split of the cases with ground truth; return the numbers of cases for testing and for training.

    The labelled lists are nested and of 1, 2, 4, 8, ... cases. Cases of one patient (`cases.patients`) stay together,
    on one side and in the same lists, which makes the test list or a labelled list longer where they would be parted.

    Raises UsageError where no case has a ground truth, or too few to have one for testing and one for training.
    """
    rows = [row for row in rows if row.has_ground_truth]
    if not rows:
        raise UsageError(
            "No case of the cache has a ground truth.",
            expected="cases to fine-tune on and to test on, which need one",
            found="images alone",
            next_step="Pre-train without a split, or preprocess the data set with its labels.",
        )
    patient = patients(rows)
    ids = np.array([row.id for row in rows])
    groups = sorted(tuple(sorted(ids[patient == number].tolist())) for number in np.unique(patient))
    num_test = max(1, round(len(rows) * test_fraction))
    if len(rows) - num_test < 1 or len(groups) < 2:
        raise UsageError(
            "There are too few labelled cases to split.",
            expected="at least 2 of different content",
            found=len(groups),
            next_step="Add labelled cases, or ask for a smaller --test-fraction.",
        )
    order = random.Random(seed).sample(groups, len(groups))
    test: list[str] = []
    while len(test) < num_test and len(order) > 1:
        test += order.pop(0)
    counts = list(itertools.accumulate(map(len, order)))
    powers = [2**power for power in range(counts[-1].bit_length())]
    train = [case_id for group in order for case_id in group]
    sizes = {min(count for count in counts if count >= power) for power in powers} | {len(train)}
    labelled = {str(size): train[:size] for size in sorted(sizes)}
    write_json(path, {"seed": seed, "labelled": labelled, "test": sorted(test)})
    return len(test), len(train)


def _section(file: str, data_set: str) -> dict[str, Any]:
    path, section_name = Path(file), ""
    try:
        if not path.exists() and ":" in file:
            text, _, section_name = file.rpartition(":")
            path = Path(text)
        content = _content(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            "The split cannot be read.",
            where=path,
            expected='a JSON file such as {"labelled": {"2": [...]}, "test": [...]}, or the authors\' text',
            found=getattr(error, "strerror", None) or error,
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
            expected="one of " + (", ".join(sections)[:500] or "none: no part of the file has a list `test`"),
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


def _content(path: Path) -> dict[str, Any]:
    """The content of a split file: JSON, or the text of the authors, which starts with no brace."""
    text = read_text(path, limit_bytes=LARGEST_FILE_BYTES)
    if not text.lstrip().startswith(("{", "[", '"')):
        return published_splits.parse(text)
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError(f"a JSON {type(content).__name__}")
    return content


def _well_formed(section: dict[str, Any]) -> bool:
    labelled = section["labelled"]
    counts = re.compile(r"[1-9][0-9]{0,8}")
    if not (isinstance(labelled, dict) and labelled and all(map(counts.fullmatch, labelled))):
        return False
    lists = [section["test"], *labelled.values()]
    return all(isinstance(keys, list) and all(type(key) in (int, str) for key in keys) for keys in lists)


def _plain(name: str) -> str:
    """A data set's name without the decorations that differ between its sources (MSD-Heart, Task02_Heart)."""
    return re.sub(r"^(msd|task\d+)[-_ ]?", "", name.lower())


def _labelled_keys(section: dict[str, Any], num_labelled: int, file: str) -> list[Key]:
    lists = {int(count): keys for count, keys in section["labelled"].items()}
    if num_labelled in lists:
        return lists[num_labelled]
    in_order = list(dict.fromkeys(key for count in sorted(lists) for key in lists[count]))
    if 0 < num_labelled <= len(in_order):
        return in_order[:num_labelled]
    raise UsageError(
        f"The split has no {num_labelled} labelled cases.",
        where=file,
        expected=f"1 to {len(in_order)}, such as {', '.join(map(str, sorted(lists)))}",
        found=num_labelled,
        next_step="Ask for one of these with --labelled.",
    )


def _check_ground_truth(split: Split, rows: Sequence[CaseRow]) -> None:
    with_ground_truth = {row.id for row in rows if row.has_ground_truth}
    if without := [case_id for case_id in split.labelled if case_id not in with_ground_truth]:
        raise UsageError(
            "Labelled cases of the split have no ground truth.",
            where=split.file,
            expected="a label map for every labelled case",
            found=some_of(without),
            next_step="Take them out of the split, or preprocess them with their label maps.",
        )


def _resolve(keys: list[Key], case_ids: list[str], file: str) -> list[str]:
    """Case ids of the keys, in the order of the keys."""
    known = _cases_by_key(case_ids)
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise UsageError(
            "The split names cases that the cache does not have.",
            where=file,
            expected=f"cases such as {', '.join(case_ids[:3])} ({len(case_ids)} in all)",
            found=some_of([str(key)[:200] for key in unknown]),
            next_step="Use the cache of the data set that the split was made for.",
        )
    cases = [case_id for key in keys for case_id in known[key]]
    if repeated := [case_id for case_id, count in Counter(cases).items() if count > 1]:
        raise UsageError(
            "The split names cases twice in one list.",
            where=file,
            expected="each case once",
            found=some_of(repeated),
            next_step="Remove the repeated keys from the list.",
        )
    return cases


def _cases_by_key(case_ids: list[str]) -> dict[Key, list[str]]:
    cases: dict[Key, list[str]] = {case_id: [case_id] for case_id in case_ids}
    numbers = [number for case_id in case_ids if (number := patient_number(case_id)) is not None]
    if len(numbers) < len(case_ids):
        numbers = list(range(len(case_ids)))
    for number, case_id in zip(numbers, case_ids, strict=True):
        cases.setdefault(number, []).append(case_id)
    return cases
