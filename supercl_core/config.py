"""Settings: from a preset, a TOML file and `--set key=value`, in this order, into a frozen dataclass.

Each dataclass lives beside the code that it serves and checks its own values in `__post_init__`; this module
only brings the pieces together, refuses unknown keys with a suggestion, and gives every resolved
configuration a digest. Nested dataclasses are nested tables in TOML and dotted keys in `--set`.
Called by every command that has settings.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from supercl_core.errors import UsageError
from supercl_core.files import check_plain, parse_toml, read_toml

ConfigT = TypeVar("ConfigT")

LARGEST_FILE_BYTES: Final = 1 << 16
"""A settings file has a few kilobytes, and parsing TOML takes time that grows with the square of a key's length."""
_SHOWN: Final = 200
"""Characters of a wrong key or value in a message."""


def resolve(
    kind: type[ConfigT],
    *,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    preset: str | None = None,
    config_path: Path | None = None,
    assignments: Iterable[str] = (),
) -> ConfigT:
    """Build one configuration of class `kind` from all the places where a user can set something.

    `presets` maps preset names to (nested) settings; `assignments` are strings like `optimiser.lr=0.1`,
    the value written as in TOML (a bare word counts as a string).

    Raises UsageError for an unknown preset, an unreadable file, an unknown key or a value of another type.
    """
    settings: dict[str, Any] = {}
    if preset is not None:
        known = presets or {}
        if preset not in known:
            raise UsageError(
                f"There is no preset {preset!r}.",
                expected=", ".join(sorted(known)) or "no preset at all for this command",
                found=preset,
                next_step="Name one of the presets, or leave --preset out.",
            )
        _merge(settings, known[preset])
    if config_path is not None:
        _merge(settings, _read_toml(config_path))
    for assignment in assignments:
        _merge(settings, _parse_assignment(assignment))
    return from_dict(kind, settings)


def from_dict(
    kind: type[ConfigT], settings: Mapping[str, Any], *, prefix: str = "", default: ConfigT | None = None
) -> ConfigT:
    """Build a configuration of class `kind` from a (nested) mapping, such as one stored with a run.

    What the mapping leaves open comes from `default`, or from the class. Raises UsageError for an unknown key or a
    value of another type; the class itself checks ranges.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            raise UsageError(
                f"There is no setting {(prefix + key)[:_SHOWN]!r}.",
                expected="one of " + ", ".join(fields),
                found=(prefix + key)[:_SHOWN],
                next_step=f"Did you mean {prefix + close[0]!r}?" if close else "Remove it, or see --help.",
            )
        factory = fields[key].default_factory
        if isinstance(value, Mapping) and dataclasses.is_dataclass(hints[key]) and callable(factory):
            values[key] = from_dict(hints[key], value, prefix=f"{prefix}{key}.", default=factory())
        else:
            values[key] = _coerce(value, hints[key], prefix + key)
    return kind(**values) if default is None else dataclasses.replace(default, **values)  # type: ignore[type-var]


def check_setting(name: str, value: object, valid: bool, expected: object) -> None:
    """Raise UsageError for the setting `name` unless its value is `valid`; called in `__post_init__`."""
    if not valid:
        raise UsageError(
            f"The setting {name!r} is out of range.",
            expected=expected,
            found=str(value)[:_SHOWN],
            next_step="See --help for the settings and their defaults.",
        )


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values that JSON can hold; `from_dict` takes them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def digest(value: Any) -> str:
    """The SHA-256 (hex) of a JSON value, the same whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _merge(into: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            nested = into.setdefault(key, {})
            if isinstance(nested, dict):
                _merge(nested, value)
                continue
        into[key] = value


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path, limit_bytes=LARGEST_FILE_BYTES)
    except OSError as error:
        raise UsageError(
            "The settings file cannot be read.",
            where=path,
            found=error.strerror,
            next_step="Check the path given with --config.",
        ) from error
    except ValueError as error:
        raise UsageError(
            "The settings file is not valid TOML.",
            where=path,
            expected=f"a TOML file in UTF-8 of at most {LARGEST_FILE_BYTES:,} bytes",
            found=error,
            next_step="Mend what is named above.",
        ) from error


def _parse_assignment(assignment: str) -> dict[str, Any]:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UsageError(
            "A setting must be written as key=value.",
            expected="--set batch_size=16",
            found=f"--set {assignment}",
            next_step="Write the key, an equals sign and the value without blanks around it.",
        )
    try:
        nested = _value(text)
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        check_plain(nested)
    except ValueError as error:
        raise UsageError(
            "The setting cannot be used.",
            where=f"--set {assignment[:_SHOWN]}",
            found=error,
            next_step="See --help for the settings and their defaults.",
        ) from error
    return nested


def _value(text: str) -> Any:
    try:
        table = parse_toml(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text  # a bare word
    return table["value"] if len(table) == 1 else text


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type: integers may stand for floats and lists for tuples, nothing else."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None or value == "none":
            if type(None) in arguments:
                return None
        else:
            return _coerce(value, next(a for a in arguments if a is not type(None)), key)
    elif origin is typing.Literal:
        if value in arguments:
            return value
        hint = " or ".join(repr(argument) for argument in arguments)
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and (arguments[-1] is ... or len(value) == len(arguments)):
            kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
            return tuple(_coerce(item, kind, key) for item, kind in zip(value, kinds, strict=True))
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    raise UsageError(
        f"The setting {key!r} has a value of the wrong type.",
        expected=getattr(hint, "__name__", str(hint)),
        found=repr(value)[:_SHOWN],
        next_step="See --help for the settings and their defaults.",
    )
