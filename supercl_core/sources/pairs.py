"""Cases put together from files that belong to each other by their names: channels, and a label map.

Called by the layouts whose files say by name which case and channel they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from supercl_core.errors import printable, some_of
from supercl_core.sources.base import CaseSource


def paired(
    path: Path,
    images: Iterable[tuple[str, str, Path]],
    labels: Iterable[tuple[str, Path]],
    *,
    channels: Mapping[str, str] | Sequence[str] = ("",),
    label_classes: Mapping[int, int] | None = None,
) -> tuple[CaseSource, ...]:
    """The cases of the folder `path`: a file for each of `channels`, in their order, and a label map or none.

    `images`: case, channel and file; `labels`: case and file. A case that lacks a channel, has one that is not
    expected, has two files for one thing, or has a label map alone, is a case with a problem that names files.
    """
    images_of: dict[str, dict[str, list[Path]]] = {}
    labels_of: dict[str, list[Path]] = {}
    for case_id, channel, file in images:
        images_of.setdefault(case_id, {}).setdefault(channel, []).append(file)
    for case_id, file in labels:
        labels_of.setdefault(case_id, []).append(file)
    cases = []
    for case_id in sorted({*images_of, *labels_of}):
        by_channel, maps = images_of.get(case_id, {}), labels_of.get(case_id, [])
        files = [file for channel in sorted(by_channel) for file in by_channel[channel]]
        problem = _problem(by_channel, files, maps, tuple(channels))
        chosen = files if problem else [by_channel[channel][0] for channel in channels]
        cases.append(
            CaseSource(
                id=case_id,
                name=printable((chosen or maps)[0].relative_to(path).as_posix()),
                image_paths=tuple(chosen or maps),
                reading="channels" if len(chosen) > 1 else "volume",
                label_paths=tuple(maps),
                label_classes=label_classes,
                problem=problem,
            )
        )
    return tuple(cases)


def _problem(
    by_channel: Mapping[str, list[Path]], files: list[Path], maps: list[Path], channels: tuple[str, ...]
) -> str:
    """Why the files make no case; empty where they do."""
    if not files:
        return f"A label map has no image: {_names(maps)}"
    for same in (*by_channel.values(), maps):
        if len(same) > 1:
            return f"Several files would be the same part of the case; expected one, found {_names(same)}"
    missing = [channel for channel in channels if channel not in by_channel]
    unknown = [channel for channel in by_channel if channel not in channels]
    if missing or unknown:
        what = "Channel files are missing" if missing else "There are more channel files than channels"
        return f"{what}; expected {', '.join(channels)}, found {_names(files)}" + (
            f" and none for {', '.join(missing)}" if missing else ""
        )
    return ""


def _names(files: Sequence[Path]) -> str:
    return some_of([printable(file.name) for file in files])
