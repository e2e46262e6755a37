"""Whether a cache is what was written: every file, checksum, index, shape and invariant that the schema declares.

Nothing but the files themselves is believed, and nothing found in them ends the search: what is wrong becomes a list.
Mending is left to `preprocess`. Called by `supercl verify` and by `supercl repair`.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from supercl_core.cache.cases import CaseRow, case_id_problem
from supercl_core.cache.reader import Cache, read_root
from supercl_core.cache.schema import ARRAYS, SETS, SLICE_ARRAYS, TABLE_ARRAYS, ArraySpec
from supercl_core.cache.weak_labels import LINKED
from supercl_core.cache.zarr_files import chunk_path, metadata_digest, read_array, read_attributes, read_node
from supercl_core.checks.case_check import (
    NOT_EXPECTED,
    CaseReport,
    Expected,
    Problem,
    check_case,
    compare_names,
    list_files,
    located,
)
from supercl_core.checks.superpixel_check import component_roots
from supercl_core.errors import CacheError, SuperCLError

ALONE_S: Final = 1.0
"""Others are started, which takes half a second, once this process has worked as long and has as much to do yet."""

_NOT_SEALED: Final = "the metadata is not what `metadata_digest` was made of"

ROUNDING: Final = 1e-5
"""By how much the cosine of float32 rows of length 1 may exceed 1."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong with a cache."""

    case_id: str
    """The damaged case; empty where the damage is not one case's."""
    where: str
    """Path below the cache."""
    problem: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a verification found."""

    damages: tuple[Damage, ...]
    is_complete: bool
    """Whether the cache says that it is complete. Of any other, tables and weak labels are not checked."""
    num_cases: int
    num_slices: int
    num_bytes: int
    """Read altogether."""
    seconds: float

    def summary(self) -> str:
        """One line on what was checked, how fast, and what came out."""
        text = (
            f"{self.num_cases:,} cases, {self.num_slices:,} slices, {self.num_bytes / 1e9:,.2f} GB in "
            f"{self.seconds:,.1f} s ({self.num_bytes / 1e9 / self.seconds:.1f} GB/s): "
            f"{f'{len(self.damages):,} damages' if self.damages else 'no damage'}"
        )
        return text if self.is_complete else f"{text}; not complete yet, without tables and weak labels"


def num_committed(path: Path) -> int:
    """Number of cases in a cache, whatever their state: how often `verify` will call `on_case` at least."""
    return len(_case_folders(path))


def verify(path: Path, *, num_workers: int, on_case: Callable[[], object]) -> Verification:
    """Check a cache with `num_workers` processes (1: in this one); `on_case` is called after each case.

    A cache that is not complete yet can be verified too: the cases that are in it. Raises CacheError where there is no
    cache of this schema version, or one whose root cannot be read; all other damage is returned.
    """
    start = time.perf_counter()
    attributes = read_root(path)
    problems = list(_root_problems(path, attributes))
    cache, num_bytes = None, 0
    if attributes["complete"]:
        cache, found, num_bytes = _check_tables(path, attributes)
        problems += found
    damages = [Damage(case_id="", where=where, problem=problem) for where, problem in problems]
    rows = None if cache is None else {row.id: row for row in cache.done}
    names = sorted(_case_folders(path) | (rows or {}).keys())
    known = [name for name in names if rows is None or name in rows]
    for name in sorted(set(names) - set(known)):
        case_id = name if case_id_problem(name) is None else ""
        damages.append(
            Damage(case_id=case_id, where=f"cases/{name}", problem="not listed as done in `table`")
        )
    jobs = [
        (path / "cases" / name, _expected(attributes, None if rows is None else rows[name])) for name in known
    ]
    num_slices = 0
    for name, report in zip(known, _reports(jobs, num_workers), strict=True):
        for where, problem in report.problems:
            where = f"cases/{name}/{where}".rstrip("/")
            damages.append(Damage(case_id=name, where=where, problem=problem))
        num_slices += report.num_slices
        num_bytes += report.num_bytes
        on_case()
    return Verification(
        damages=tuple(damages),
        is_complete=attributes["complete"],
        num_cases=len(names),
        num_slices=num_slices,
        num_bytes=num_bytes,
        seconds=time.perf_counter() - start,
    )


def _case_folders(path: Path) -> Set[str]:
    folder = path / "cases"
    return {entry.name for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else set()


def _expected(attributes: Mapping[str, Any], row: CaseRow | None) -> Expected:
    return Expected(
        config_digest=attributes["config_digest"],
        num_channels=len(attributes["channel_names"]),
        num_classes=len(attributes["class_names"]),
        row=row,
    )


def _reports(jobs: Sequence[tuple[Path, Expected]], num_workers: int) -> Iterator[CaseReport]:
    """What `check_case` gives for every job, in their order."""
    _prepare_memory()
    start = time.perf_counter()
    for num_done, job in enumerate(jobs):
        elapsed_s = time.perf_counter() - start
        left_s = elapsed_s / max(num_done, 1) * (len(jobs) - num_done)
        if num_workers > 1 and min(elapsed_s, left_s) >= ALONE_S:
            jobs = jobs[num_done:]
            break
        yield check_case(*job)
    else:
        return
    # Processes, since NumPy holds the interpreter's lock in most of what is done with superpixels: two threads took
    # longer than one. Not forked, as this process may have threads (a progress bar) whose locks would be copied.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(jobs)), context, _prepare_worker) as pool:
        try:
            yield from pool.map(check_case, *zip(*jobs, strict=True))
        except BrokenProcessPool:
            raise SuperCLError(
                "A process of the verification died.",
                found="most likely too little memory for so many at a time",
                next_step="Run it again with fewer workers (--workers 1).",
            ) from None


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that waits for this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _prepare_memory()


def _end_with_parent() -> None:
    """End this process once that which started it is gone: by itself it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _prepare_memory() -> None:
    """Have glibc's malloc keep what is freed for the next request.

    It learns by the largest block that was freed. Otherwise the system hands out, and clears, the few megabytes that
    each piece of a shard needs anew every time, which takes as long as all the rest.
    """
    np.empty(16 << 20, np.uint8)


# ---------------------------------------------------------------- root and tables


def _root_problems(path: Path, attributes: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the root's own metadata, with the group of cases, and with what lies in both."""
    if metadata_digest({"": read_node(path)}) != attributes["metadata_digest"]:
        yield "zarr.json", _NOT_SEALED
    yield from _group_problems(path, "cases")
    known = {"zarr.json", *(spec.path.split("/")[0] for spec in ARRAYS)}
    for entry in sorted(path.iterdir()):
        if entry.name not in known:
            yield entry.name, NOT_EXPECTED
    for entry in sorted((path / "cases").iterdir()) if (path / "cases").is_dir() else ():
        if entry.name != "zarr.json" and not entry.is_dir():
            yield f"cases/{entry.name}", NOT_EXPECTED


def _group_problems(path: Path, name: str) -> Iterator[Problem]:
    try:
        if read_node(path / name).get("node_type") != "group":
            yield f"{name}/zarr.json", "not the metadata of a group"
    except CacheError as error:
        yield located(error, path)


def _check_tables(path: Path, attributes: Mapping[str, Any]) -> tuple[Cache | None, list[Problem], int]:
    """The cache as its tables tell it, None where they cannot; what is wrong with them, and their size in bytes."""
    problems: list[Problem] = []
    num_bytes = 0
    for group, specs in (("table", TABLE_ARRAYS), ("slices", SLICE_ARRAYS)):
        _, found, size = _read_group(path, group, specs)
        problems += found
        num_bytes += size
    cache = None
    if not problems:
        try:
            cache = Cache(path, dict(attributes))
        except CacheError as error:
            problems.append(located(error, path))
    for group in SETS:
        problems += _group_problems(path, group)
        for entry in sorted((path / group).iterdir()) if (path / group).is_dir() else ():
            if entry.is_dir():
                found, size = _check_set(path, group, entry.name, cache)
                problems += found
                num_bytes += size
            elif entry.name != "zarr.json":
                problems.append((f"{group}/{entry.name}", NOT_EXPECTED))
    default = attributes["default_weak_labels"]
    if case_id_problem(default) or not (path / "weak_labels" / default).is_dir():
        problems.append(("zarr.json", "`default_weak_labels` names labels that are not there"))
    return cache, problems, num_bytes


def _check_set(path: Path, group: str, name: str, cache: Cache | None) -> tuple[list[Problem], int]:
    """What is wrong with a set over slices, and its size in bytes. Of a stale one nothing but its files is checked."""
    place = f"{group}/{name}"
    arrays, problems, num_bytes = _read_group(path, place, SETS[group])
    if problems:
        return problems, num_bytes
    check = _wrong_labels if group == "weak_labels" else _wrong_descriptors
    try:
        sealed = read_attributes(path / place, f"{group}/{{name}}")["metadata_digest"]
        if metadata_digest({"": read_node(path / place)}) != sealed:
            problems.append((f"{place}/zarr.json", _NOT_SEALED))
        elif cache is not None and not cache.is_stale(group, name):
            found = check(path / place, arrays, cache)
            problems += [(f"{place}/{where}", problem) for where, problem in found]
    except CacheError as error:
        problems.append(located(error, path))
    return problems, num_bytes


def _wrong_descriptors(folder: Path, arrays: Mapping[str, np.ndarray], cache: Cache) -> Iterator[Problem]:
    """What is wrong with descriptors, given by the name of their array."""
    values = arrays["values"]
    if len(values) != cache.num_slices:
        yield "values", f"expected {cache.num_slices} rows, found {len(values)}"
    elif not np.isfinite(values).all():
        yield "values", "values that are not finite"
    elif hashlib.sha256(values.data).hexdigest() != read_attributes(folder, "descriptors/{name}")["digest"]:
        yield "values", "the values are not what `digest` was made of"


def _read_group(
    path: Path, group: str, specs: tuple[ArraySpec, ...]
) -> tuple[dict[str, np.ndarray], list[Problem], int]:
    """The arrays of a group that can be read, what is wrong with it and its files, and their size in bytes."""
    folder = path / group
    files = list_files(folder) if folder.is_dir() else {}
    names = {"zarr.json"}
    for spec in specs:
        names |= {f"{spec.name}/zarr.json", chunk_path(Path(spec.name), len(spec.axes)).as_posix()}
    problems = [(f"{group}/{name}", problem) for name, problem in compare_names(files, names)]
    if "zarr.json" in files:
        problems += _group_problems(path, group)
    arrays = {}
    for spec in specs:
        try:
            arrays[spec.name] = read_array(folder / spec.name, spec)
        except CacheError as error:
            name, problem = located(error, path)
            if name.removeprefix(f"{group}/") in files:
                problems.append((name, problem))
    return arrays, problems, sum(max(size, 0) for size in files.values())


# ---------------------------------------------------------------- weak labels


def _wrong_labels(folder: Path, arrays: Mapping[str, np.ndarray], cache: Cache) -> Iterator[Problem]:
    """Arrays of weak labels that cannot have come from nearest neighbours, and why."""
    attributes = read_attributes(folder, "weak_labels/{name}")
    num_components = attributes["num_components"]
    expected = (len(num_components), cache.num_slices)
    wrong = [(name, array.shape) for name, array in arrays.items() if array.shape != expected]
    for name, shape in wrong:
        yield name, f"expected shape {expected}, found {shape}"
    if wrong:
        return
    node_of_slice, num_nodes = np.arange(cache.num_slices), cache.num_slices
    for level, count in enumerate(num_components):
        level_arrays = {name: array[level] for name, array in arrays.items()}
        for name, problem in _wrong_level(level_arrays, node_of_slice, num_nodes, count):
            yield name, f"level {level}: {problem}"
            if name == "ccl":
                return
        node_of_slice, num_nodes = level_arrays["ccl"], count
    neighbours, nearest = attributes["neighbours"], arrays["nearest"][0]
    known = (nearest >= 0) & (nearest < cache.num_slices)
    if neighbours not in LINKED:
        yield "zarr.json", f"expected neighbours {' or '.join(LINKED)}, found {neighbours!r:.40}"
    elif neighbours == "other-cases" and (cache.slice_case[known] == cache.slice_case[nearest[known]]).any():
        yield "nearest", "level 0: a slice is linked to one of its own case"


def _wrong_level(
    arrays: Mapping[str, np.ndarray], node_of_slice: np.ndarray, num_nodes: int, count: int
) -> Iterator[Problem]:
    """The same for one level, which merges `num_nodes` nodes of the finer one into `count` components."""
    ccl, nearest, similarity = (arrays[name] for name in ("ccl", "nearest", "similarity"))
    if ccl.min() != 0 or ccl.max() != count - 1 or len(np.unique(ccl)) != count:
        yield "ccl", f"expected all labels 0 to {count - 1}, found others"
        return
    label_of_node = np.full(num_nodes, -1)
    label_of_node[node_of_slice] = ccl
    if not np.array_equal(label_of_node[node_of_slice], ccl):
        yield "ccl", "slices with one label in the finer level have different ones"
        return
    nodes, neighbours = np.arange(num_nodes), nearest[:num_nodes]
    if neighbours.min() < 0 or neighbours.max() >= num_nodes or (nearest[num_nodes:] != -1).any():
        yield "nearest", f"expected {num_nodes} nodes from 0 to {num_nodes - 1} and then -1, found others"
    elif num_nodes > 1 and (neighbours == nodes).any():
        yield "nearest", "a node is its own nearest neighbour"
    elif not np.array_equal(label_of_node[neighbours], label_of_node):
        yield "nearest", "a node and its nearest neighbour have different labels"
    elif len(component_roots(num_nodes, nodes, neighbours)) != count:
        yield "ccl", "slices that no nearest neighbours link have one label"
    if (
        not (np.abs(similarity[:num_nodes]) <= 1 + ROUNDING).all()
        or not np.isnan(similarity[num_nodes:]).all()
    ):
        yield "similarity", f"expected {num_nodes} values from -1 to 1 and then NaN, found others"
