"""What every layout module returns: a data source and its cases, each with an id of its own.

How the files of a case are read is said here (`Reading`) and done by `supercl_core.formats.case_files`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from supercl_core.cache.cases import case_id_problem
from supercl_core.errors import printable

Reading = Literal["volume", "channels", "series"]
"""How files make one image: `volume`: one file; `channels`: one file for each channel, in order (the three
of a colour image are in one); `series`: the files of a DICOM series, in the order of their slices."""

MOST_CLASSES: Final = 256
"""Ground truth is stored in a byte."""

_MADE_UP_BYTES: Final = 150
"""Of an id that is made up for a case that cannot have its own."""


@dataclass(frozen=True, kw_only=True)
class CaseSource:
    """The files of one case."""

    id: str
    name: str
    """Path of the image below the folder of the data set, with slashes; what cannot be printed in it is escaped."""
    image_paths: tuple[Path, ...]
    """At least one."""
    reading: Reading = "volume"
    label_paths: tuple[Path, ...] = ()
    """None, one file (which may be that of the image), or one 2-D image for each slice, in order."""
    label_classes: Mapping[int, int] | None = field(default=None, hash=False)
    """The class of each value that the label map may hold; None where the values are the classes."""
    problem: str = ""
    """Why the case cannot be used, found while listing; such a case is listed as failed, and its files are not read."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every source file of the case, image first, each once."""
        return tuple(dict.fromkeys((*self.image_paths, *self.label_paths)))


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A folder of cases."""

    name: str
    cases: tuple[CaseSource, ...]
    """In order of their ids, each of which is there once."""
    channel_names: tuple[str, ...] | None = None
    """None where the layout does not say: the volumes then tell how many channels there are."""
    class_names: tuple[str, ...] | None = None
    """Class 0 (background) first; None where the layout declares no classes."""
    left_out: Mapping[Path, str] = field(default_factory=dict)
    """Why a file of data is in no case, for each that is left out on purpose."""

    def notes(self, path: Path) -> tuple[str, ...]:
        """What is to be said of the files below `path` that are left out, a line for each reason."""
        files: dict[str, list[Path]] = {}
        for file, reason in self.left_out.items():
            files.setdefault(reason, []).append(file)
        return tuple(f"left out: {count_of(same, path)} ({reason})" for reason, same in sorted(files.items()))


def count_of(files: Sequence[Path], path: Path) -> str:
    """How many files there are, and the first of them below `path`: for messages."""
    first = printable(min(files).relative_to(path).as_posix())
    return f"{len(files)} files such as {first}" if len(files) > 1 else f"the file {first}"


def with_usable_ids(cases: Iterable[CaseSource]) -> tuple[CaseSource, ...]:
    """The cases in order of their ids, each of which is there once and can be one.

    Cases of the same id become one with a problem, and so does each whose id cannot be one. Those with a problem take
    no id from the others: where theirs is not free, they get one made of their name.
    """
    by_id: dict[str, list[CaseSource]] = {}
    unusable = []
    for case in cases:
        if not case.problem and (problem := case_id_problem(case.id)):
            problem = f"The file's name cannot name a case: {case.id[:60]!r} {problem}"
            case = dataclasses.replace(case, problem=problem)
        if case.problem:
            unusable.append(case)
        else:
            by_id.setdefault(case.id, []).append(case)
    usable = {case_id: _only(same) for case_id, same in by_id.items()}
    for case in sorted(unusable, key=lambda case: (case.name, case.problem)):
        case_id = next(i for i in _made_up_ids(case) if i not in usable and case_id_problem(i) is None)
        usable[case_id] = dataclasses.replace(case, id=case_id)
    return tuple(usable[case_id] for case_id in sorted(usable))


def _only(same: list[CaseSource]) -> CaseSource:
    """The case of an id, with a problem where there are several."""
    if len(same) == 1:
        return same[0]
    names = " and ".join(case.name for case in same[:3]) + (" and more" if len(same) > 3 else "")
    problem = f"Several entries would become the case {same[0].id!r}; expected one, found {names}"
    return dataclasses.replace(same[0], problem=problem)


def _made_up_ids(case: CaseSource) -> Iterator[str]:
    yield case.id
    text = "".join("_" if c in "/\\" else c for c in case.name).lstrip("._ ")
    text = text.encode()[:_MADE_UP_BYTES].decode(errors="ignore") or "case"
    yield text
    yield from (f"{text}-{number}" for number in itertools.count(2))
