"""What there is to do: which cases of a source are new, finished already, or changed. Writes nothing.

Called by `preprocess.runner` before any work starts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr

from preprocess.pipeline import PreprocessConfig
from supercl_core import config as settings
from supercl_core.cache_reader import check_version
from supercl_core.cache_writer import committed_case
from supercl_core.cases import CaseRow
from supercl_core.errors import CacheError, SuperCLError
from supercl_core.sources import CaseSource, DataSource
from supercl_core.volumes import Header, read_header


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work that a run has before it."""

    attributes: dict[str, Any]
    """Root attributes of the cache."""
    todo: tuple[CaseSource, ...]
    """Cases to compute, largest first, so that no worker is left alone with a large one at the end."""
    headers: Mapping[str, Header]
    """Of the images of these cases, by case id."""
    kept: tuple[CaseRow, ...]
    """Cases that the cache holds already."""
    failed: tuple[CaseRow, ...]
    """Cases whose image cannot even be opened."""
    vanished: tuple[str, ...]
    """Cases of the cache that the source no longer has; they are kept."""

    @property
    def nothing_to_do(self) -> bool:
        """Whether the cache is finished, and the source holds nothing that it has not."""
        return self.attributes.get("complete", False) and not self.todo and not self.failed

    @property
    def num_channels(self) -> int:
        """Channels of every image of the cache."""
        return len(self.attributes["channel_names"])

    @property
    def num_classes(self) -> int:
        """Classes of the ground truth, background included; 0 where there is none."""
        return len(self.attributes["class_names"])


def make_plan(source: DataSource, cache_path: Path, config: PreprocessConfig) -> Plan:
    """Compare the source with what is in the cache, and look into the headers of what is to do.

    Raises CacheError when something else lies at `cache_path`, or a cache with other settings.
    """
    config_digest = settings.digest(settings.as_dict(config))
    stored = _stored_attributes(cache_path, config)
    kept, todo = [], []
    for case in source.cases:
        row = _finished_row(cache_path, case, config_digest) if stored else None
        if row is None:
            todo.append(case)
        else:
            kept.append(row)
    headers: dict[str, Header] = {}
    failed = []
    with ThreadPoolExecutor(8) as pool:
        for case, outcome in zip(todo, pool.map(_header_or_error, todo), strict=True):
            if isinstance(outcome, SuperCLError):
                failed.append(failed_row(case, outcome))
            else:
                headers[case.id] = outcome
    channels = Counter(header.shape[0] for header in headers.values())
    attributes = stored or {
        "name": source.name,
        "channel_names": list(source.channel_names or _channel_names(channels)),
        "class_names": list(source.class_names or ()),
        "config": settings.as_dict(config),
        "config_digest": config_digest,
        "default_weak_labels": None,
    }
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
    vanished = tuple(case_id for case_id in committed if case_id not in ids)
    kept += [row for row in map(_committed_row, [cache_path] * len(vanished), vanished) if row is not None]
    readable = [case for case in todo if case.id in headers]
    return Plan(
        attributes=attributes,
        todo=tuple(sorted(readable, key=lambda case: (-math.prod(headers[case.id].shape), case.id))),
        headers=headers,
        kept=tuple(kept),
        failed=tuple(failed),
        vanished=vanished,
    )


def source_stamp(case: CaseSource) -> list[list[Any]]:
    """Path, size (bytes) and modification time (ns) of every source file that exists."""
    return [
        [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
        for path in case.paths
        if path.is_file()
    ]


def failed_row(case: CaseSource, error: BaseException) -> CaseRow:
    """The row of a case that could not be computed."""
    if isinstance(error, SuperCLError):
        reason = error.one_line() + (f" ({error.where})" if error.where is not None else "")
    else:
        reason = f"{type(error).__name__}: {error}"
    return CaseRow(id=case.id, state="failed", reason=reason, source=str(case.image_path))


def _stored_attributes(cache_path: Path, config: PreprocessConfig) -> dict[str, Any] | None:
    """The root attributes of an existing cache that was made with these settings; None where there is none."""
    if not cache_path.exists():
        return None
    attributes: Any = {}
    if (cache_path / "zarr.json").is_file():
        attributes = zarr.open_group(cache_path, mode="r", zarr_format=3).attrs.get("supercl", {})
    elif next(iter(cache_path.iterdir()) if cache_path.is_dir() else iter([cache_path]), None) is None:
        return None
    check_version(cache_path, attributes)
    wanted = settings.as_dict(config)
    changed = [key for key in wanted if wanted[key] != attributes["config"].get(key)]
    if changed:
        raise CacheError(
            "The cache was made with other settings.",
            where=cache_path,
            expected=", ".join(f"{key} = {attributes['config'].get(key)}" for key in changed),
            found=", ".join(f"{key} = {wanted[key]}" for key in changed),
            next_step="Use the settings of the cache, or name another path for a new one.",
        )
    return attributes


def _finished_row(cache_path: Path, case: CaseSource, config_digest: str) -> CaseRow | None:
    """The row of a case that the cache holds, computed from these files with these settings."""
    attributes = committed_case(cache_path, case.id)
    if attributes is None or attributes["config_digest"] != config_digest:
        return None
    if attributes["source_stamp"] != source_stamp(case):
        return None
    return CaseRow.from_dict(attributes["row"])


def _committed_row(cache_path: Path, case_id: str) -> CaseRow | None:
    attributes = committed_case(cache_path, case_id)
    return None if attributes is None else CaseRow.from_dict(attributes["row"])


def _committed_ids(cache_path: Path) -> list[str]:
    folder = cache_path / "cases"
    if not folder.is_dir():
        return []
    return sorted(path.parent.name for path in folder.glob("*/zarr.json"))


def _header_or_error(case: CaseSource) -> Header | SuperCLError:
    try:
        for path in case.paths[1:]:
            read_header(path)
        return read_header(case.image_path)
    except SuperCLError as error:
        return error


def _channel_names(channels: Counter[int]) -> list[str]:
    """Names for the number of channels that most volumes have (the smaller number where two are as common)."""
    if not channels:
        return ["0"]
    most = max(channels.values())
    return [str(index) for index in range(min(count for count in channels if channels[count] == most))]
