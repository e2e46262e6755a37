"""What there is to do: which cases of a source are new, finished already, changed or known to fail. Writes nothing.

A case is identified by content: settings, version of the kernels and digest of its files. As reading all files takes
as long as a run, size and times of change stand for them; where these differ, the digest decides.
Called by `preprocess.runner` before any work starts.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from preprocess.pipeline import PreprocessConfig, kernels_version
from supercl_core import config as settings
from supercl_core.cache.cases import CaseRow, case_key
from supercl_core.cache.reader import check_version, open_cache
from supercl_core.cache.writer import committed_case
from supercl_core.cache.zarr_files import read_attributes
from supercl_core.errors import CacheError, SuperCLError
from supercl_core.files import digest_of
from supercl_core.formats.case_files import all_files, read_headers
from supercl_core.formats.volumes import Header
from supercl_core.progress import progress
from supercl_core.sources import CaseSource, DataSource

_THREADS: Final = 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work that a run has before it."""

    attributes: dict[str, Any]
    """Root attributes of the cache, but for those that its writer sets."""
    is_new: bool
    """Whether the cache has no root yet."""
    todo: tuple[CaseSource, ...]
    """Cases to compute, largest first, so that no worker is left alone with a large one at the end."""
    headers: Mapping[str, Header]
    """Of the images of these cases, by case id."""
    kept: tuple[CaseRow, ...]
    """Cases that the cache holds already."""
    restamped: Mapping[str, list[list[int]]]
    """Source stamps of kept cases whose files were moved, copied or touched, by case id."""
    failed: tuple[CaseRow, ...]
    """Cases whose image cannot even be opened, and those that failed before and have not changed."""
    changed: tuple[str, ...]
    """Cases of the cache whose files hold something else by now; they are computed again."""
    vanished: tuple[str, ...]
    """Cases of the cache that the source no longer has; they are kept."""
    is_finished: bool
    """Whether the cache is complete and holds just this."""

    @property
    def num_channels(self) -> int:
        """Channels of every image of the cache."""
        return len(self.attributes["channel_names"])

    @property
    def num_classes(self) -> int:
        """Classes of the ground truth, background included; 0 where there is none."""
        return len(self.attributes["class_names"])


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What a cache says of itself before its cases are looked at."""

    root: dict[str, Any] | None
    """None where there is no root, or a damaged one."""
    rows: Mapping[str, CaseRow]
    """Its table, by case id; empty where there is none, or a damaged one."""
    is_complete: bool
    """Whether it is marked so, and its tables and weak labels are whole."""
    config_digest: str
    recompute: Collection[str]
    retry_failed: bool


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """What becomes of one case: one of the first three."""

    kept: CaseRow | None = None
    failed: CaseRow | None = None
    header: Header | None = None
    stamp: list[list[int]] | None = None
    """The new stamp of a case that is kept."""
    changed: bool = False


def make_plan(
    source: DataSource,
    cache_path: Path,
    config: PreprocessConfig,
    *,
    retry_failed: bool = False,
    recompute: Collection[str] = (),
) -> Plan:
    """Compare the source with what is in the cache, and look into the headers of what is to do.

    `retry_failed`: compute failed cases again although their files are the same. `recompute`: ids of cases that are
    not to be kept. Raises CacheError when something else lies at `cache_path`, or a cache with other settings;
    SuperCLError when there are label maps and the source declares no classes.
    """
    _check_classes(source)
    wanted = {"config": settings.as_dict(config), "kernels": kernels_version(config)}
    config_digest = settings.digest(wanted)
    root = _root(cache_path, wanted)
    known = _known(cache_path, root, config_digest, recompute, retry_failed)
    findings: list[_Finding] = []
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        progress("plan", total=len(source.cases), unit="cases", shown=root is not None) as advance,
    ):
        for finding in pool.map(lambda case: _examine(case, cache_path, known), source.cases):
            findings.append(finding)
            advance()
    cases = list(zip(source.cases, findings, strict=True))
    headers = {case.id: finding.header for case, finding in cases if finding.header is not None}
    ids = {case.id for case in source.cases}
    committed = _committed_ids(cache_path)
    if committed and not ids & {*committed}:
        raise CacheError(
            "The cache holds another data set.",
            where=cache_path,
            expected=f"some of its cases, such as {', '.join(committed[:3])}",
            found=f"{source.name}: {', '.join(sorted(ids)[:3])}",
            next_step="Check the input's path, or name another path for a new cache.",
        )
    attributes = {
        **(root or {"default_weak_labels": "", "provenance": {}}),
        **_declared(source, root, Counter(header.shape[0] for header in headers.values()), cache_path),
        **wanted,
        "config_digest": config_digest,
    }
    gone = {
        case_id: _committed(cache_path, case_id, config_digest) for case_id in committed if case_id not in ids
    }
    vanished = {case_id: found[0] for case_id, found in gone.items() if found is not None}
    kept = [finding.kept for finding in findings if finding.kept is not None] + [*vanished.values()]
    failed = [finding.failed for finding in findings if finding.failed is not None]
    todo = [case for case in source.cases if case.id in headers]
    return Plan(
        attributes=attributes,
        is_new=root is None,
        todo=tuple(sorted(todo, key=lambda case: (-math.prod(headers[case.id].shape), case.id))),
        headers=headers,
        kept=tuple(kept),
        restamped={case.id: finding.stamp for case, finding in cases if finding.stamp is not None},
        failed=tuple(failed),
        changed=tuple(case.id for case, finding in cases if finding.changed),
        vanished=tuple(vanished),
        is_finished=known.is_complete
        and not todo
        and attributes == root
        and {row.id: row for row in (*kept, *failed)} == known.rows,
    )


def source_stamp(case: CaseSource) -> list[list[int]]:
    """Size (bytes) and times of change of content and of anything (ns) of every source file that can be looked at.

    A case that is not simply one image file and at most one label file ends with a number for how it is read.
    """
    stamps = []
    for path in all_files(case):
        with suppress(OSError):
            stat = path.stat()
            stamps.append([stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    if way := _way_of_reading(case):
        stamps.append([int.from_bytes(hashlib.sha256(way).digest()[:6])])
    return stamps


def source_digest(case: CaseSource) -> str:
    """SHA-256 (hex) over the case's source files, in order, and how they are read. Raises OSError where they cannot."""
    return digest_of(all_files(case), _way_of_reading(case))


def _way_of_reading(case: CaseSource) -> bytes:
    """What another layout might do otherwise with the same files; empty for one image and at most one label file."""
    classes = None if case.label_classes is None else sorted(case.label_classes.items())
    num_label_files = len(case.label_paths)
    if case.reading == "volume" and len(case.paths) == 1 + num_label_files < 3 and classes is None:
        return b""
    return repr((case.reading, len(case.image_paths), num_label_files, classes)).encode()


def failed_row(case: CaseSource, error: BaseException | str) -> CaseRow:
    """The row of a case that could not be computed."""
    if isinstance(error, SuperCLError):
        reason = error.one_line() + (f" ({error.where})" if error.where is not None else "")
    else:
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return CaseRow(id=case.id, state="failed", reason=reason, source=case.name, digest=_digest_or_empty(case))


def _check_classes(source: DataSource) -> None:
    labelled = [case for case in source.cases if case.label_paths and not case.problem]
    if source.class_names or not labelled:
        return
    raise SuperCLError(
        "There are label maps, and nothing says which classes they have.",
        where=labelled[0].label_paths[0],
        expected='dataset.json in the input folder, such as {"labels": {"background": 0, "liver": 1}}',
        found="no classes",
        next_step="Write this file, with the name and number of every class.",
    )


def _root(cache_path: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The root attributes of an existing cache that was made with these settings.

    None where there is none yet, or where the root is damaged: it is written again, from the same settings.
    """
    if not cache_path.exists() or (cache_path.is_dir() and not any(cache_path.iterdir())):
        return None
    check_version(cache_path)
    try:
        root = read_attributes(cache_path, "/")
    except CacheError:
        if _is_ours(cache_path / "cases"):
            return None
        raise CacheError(
            "Something else lies where the cache is to be.",
            where=cache_path,
            expected="a cache of supercl, or nothing",
            found="a folder that holds other things" if cache_path.is_dir() else "a file",
            next_step="Name another path for the cache.",
        ) from None
    before = {**root["config"], "kernels": root["kernels"]}
    now = {**wanted["config"], "kernels": wanted["kernels"]}
    changed = [key for key in {**now, **before} if now.get(key) != before.get(key)]
    if changed:
        raise _other_settings(cache_path, {key: (before.get(key), now.get(key)) for key in changed})
    return root


def _is_ours(cases_path: Path) -> bool:
    """Whether a folder was made by `create_cache`, also by one that was killed."""
    return (cases_path / "zarr.json").is_file() or (cases_path.is_dir() and not any(cases_path.iterdir()))


def _known(
    cache_path: Path,
    root: dict[str, Any] | None,
    config_digest: str,
    recompute: Collection[str],
    retry_failed: bool,
) -> _Known:
    rows: dict[str, CaseRow] = {}
    is_complete = False
    if root is not None:
        with suppress(CacheError):
            cache = open_cache(cache_path, unfinished=True)
            rows = {row.id: row for row in cache.rows}
            cache.weak_labels()
            is_complete = root["complete"]
    return _Known(
        root=root,
        rows=rows,
        is_complete=is_complete,
        config_digest=config_digest,
        recompute=recompute,
        retry_failed=retry_failed,
    )


def _examine(case: CaseSource, cache_path: Path, known: _Known) -> _Finding:
    if case.problem:
        return _Finding(failed=failed_row(case, case.problem))
    committed = None if case.id in known.recompute else _committed(cache_path, case.id, known.config_digest)
    if committed is not None:
        row, stamp = committed
        if (now := source_stamp(case)) == stamp:
            return _Finding(kept=row)
        if _digest_or_empty(case) == row.digest:
            return _Finding(kept=row, stamp=now)
    earlier = known.rows.get(case.id)
    if earlier is not None and earlier.state == "failed" and not known.retry_failed:
        digest = _digest_or_empty(case)
        if digest and digest == earlier.digest:
            return _Finding(failed=earlier)
    try:
        return _Finding(header=read_headers(case), changed=committed is not None)
    except SuperCLError as error:
        return _Finding(failed=failed_row(case, error))


def _committed(
    cache_path: Path, case_id: str, config_digest: str
) -> tuple[CaseRow, list[list[int]] | None] | None:
    """Row and source stamp of a case that is in the cache, computed with these settings."""
    attributes = committed_case(cache_path, case_id)
    if attributes is None:
        return None
    row = CaseRow.from_dict(attributes["row"])
    if attributes["key"] != case_key(config_digest, row.digest):
        return None
    return row, attributes["provenance"].get("source_stamp")


def _committed_ids(cache_path: Path) -> list[str]:
    folder = cache_path / "cases"
    if not folder.is_dir():
        return []
    return sorted(path.parent.name for path in folder.glob("*/zarr.json"))


def _digest_or_empty(case: CaseSource) -> str:
    """The digest of a case's files; empty where one is missing, no regular file, or unreadable."""
    with suppress(OSError):
        if all(path.is_file() for path in case.paths):
            return source_digest(case)
    return ""


def _declared(
    source: DataSource, root: Mapping[str, Any] | None, channels: Counter[int], cache_path: Path
) -> dict[str, Any]:
    """Name, channels and classes as the source declares them, or as the cache has them where it declares none.

    Raises CacheError where cases of the cache cannot be cases of such a data set.
    """
    class_names = list(source.class_names or ())
    if root is None:
        channel_names = list(source.channel_names or _channel_names(channels))
    else:
        channel_names = list(source.channel_names or root["channel_names"])
        before = {"channels": root["channel_names"], "classes": root["class_names"]}
        if len(channel_names) != len(root["channel_names"]) or len(class_names) < len(root["class_names"]):
            now = {"channels": channel_names, "classes": class_names}
            raise _other_settings(cache_path, {key: (before[key], now[key]) for key in before})
    return {"name": source.name, "channel_names": channel_names, "class_names": class_names}


def _other_settings(cache_path: Path, changed: Mapping[str, tuple[Any, Any]]) -> CacheError:
    return CacheError(
        "The cache was made with other settings.",
        where=cache_path,
        expected=", ".join(f"{key} = {before}" for key, (before, _) in changed.items()),
        found=", ".join(f"{key} = {now}" for key, (_, now) in changed.items()),
        next_step="Use the settings of the cache, or name another path for a new one.",
    )


def _channel_names(channels: Counter[int]) -> list[str]:
    """Names for the number of channels that most volumes have (the smaller number where two are as common)."""
    if not channels:
        return ["0"]
    most = max(channels.values())
    return [str(index) for index in range(min(count for count in channels if channels[count] == most))]
