"""What every layout module returns: a data source and its cases, each with an id of its own."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from supercl_core.cases import case_id_problem
from supercl_core.volume_files import volume_suffix

_MADE_UP_BYTES = 150
"""Of an id that is made up for a case that cannot have its own."""


@dataclass(frozen=True, kw_only=True)
class CaseSource:
    """The files of one case."""

    id: str
    name: str
    """Path of the image below the folder of the data set, with slashes; what cannot be printed in it is escaped."""
    image_path: Path
    label_path: Path | None = None
    problem: str = ""
    """Why the case cannot be used, found while listing; such a case is listed as failed, and its files are not read."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every source file of the case, image first."""
        return (self.image_path,) if self.label_path is None else (self.image_path, self.label_path)


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


def without_suffix(name: str) -> str | None:
    """The file name without its volume suffix; None for a file that is no volume by its name."""
    suffix = volume_suffix(name)
    return None if suffix is None else name[: -len(suffix)]


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
