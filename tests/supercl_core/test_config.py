"""Settings: where they come from, in which order, and what is refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supercl_core.config import as_dict, digest, from_dict, resolve
from supercl_core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    kind: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class Training:
    steps: int = 10
    name: str = "run"
    amp: bool = False
    weights: tuple[float, ...] = (1.0,)
    limit: int | None = None
    optimiser: Optimiser = field(default_factory=Optimiser)


PRESETS = {"quick": {"steps": 3, "optimiser": {"lr": 0.5, "kind": "adamw"}}}


def test_defaults_without_any_setting() -> None:
    assert resolve(Training) == Training()


def test_preset_then_file_then_assignments(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("steps = 4\nname = 'file'\n[optimiser]\nlr = 0.25\n")
    config = resolve(
        Training,
        presets=PRESETS,
        preset="quick",
        config_path=tmp_path / "x.toml",
        assignments=["name=set", "optimiser.betas=[0.5, 1]"],
    )
    assert config == Training(
        steps=4, name="set", optimiser=Optimiser(kind="adamw", lr=0.25, betas=(0.5, 1.0))
    )
    assert PRESETS["quick"] == {"steps": 3, "optimiser": {"lr": 0.5, "kind": "adamw"}}


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("steps=7", {"steps": 7}),
        ("name=seven", {"name": "seven"}),
        ("name='7'", {"name": "7"}),
        ("name=a=b", {"name": "a=b"}),
        ("amp=true", {"amp": True}),
        ("limit=5", {"limit": 5}),
        ("limit=none", {"limit": None}),
        ("weights=[1, 0.5]", {"weights": (1.0, 0.5)}),
        ("optimiser.lr=1", {"optimiser": Optimiser(lr=1.0)}),
    ],
)
def test_assignments_are_read_as_toml(assignment: str, expected: dict[str, Any]) -> None:
    config = resolve(Training, assignments=[assignment])
    assert config == dataclasses.replace(Training(), **expected)
    assert isinstance(config.optimiser.lr, float)


@pytest.mark.parametrize(
    ("assignment", "message", "next_step"),
    [
        ("step=7", "no setting 'step'", "Did you mean 'steps'?"),
        ("optimiser.lrr=1", "no setting 'optimiser.lrr'", "Did you mean 'optimiser.lr'?"),
        ("zzz=1", "no setting 'zzz'", "Remove it"),
        ("steps=1.5", "'steps' has a value of the wrong type", "--help"),
        ("steps=true", "'steps' has a value of the wrong type", "--help"),
        ("steps=", "'steps' has a value of the wrong type", "--help"),
        ("name=7", "'name' has a value of the wrong type", "--help"),
        ("amp=1", "'amp' has a value of the wrong type", "--help"),
        ("optimiser.lr=true", "'optimiser.lr' has a value of the wrong type", "--help"),
        ("optimiser.kind=adam", "'optimiser.kind' has a value of the wrong type", "--help"),
        ("optimiser.betas=[1]", "'optimiser.betas' has a value of the wrong type", "--help"),
        ("weights=1", "'weights' has a value of the wrong type", "--help"),
        ("optimiser=5", "'optimiser' has a value of the wrong type", "--help"),
        ("steps=none", "'steps' has a value of the wrong type", "--help"),
        ("steps", "key=value", "equals sign"),
        ("=5", "key=value", "equals sign"),
    ],
)
def test_what_makes_no_sense_is_refused(assignment: str, message: str, next_step: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        resolve(Training, assignments=[assignment])
    assert next_step in caught.value.next_step


def test_choices_are_listed() -> None:
    with pytest.raises(UsageError, match="'sgd' or 'adamw'"):
        resolve(Training, assignments=["optimiser.kind=adam"])


def test_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="no preset 'slow'") as caught:
        resolve(Training, presets=PRESETS, preset="slow")
    assert caught.value.expected == "quick"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"steps = ", "not valid TOML"), (b"name = '\xff'", "not valid TOML")],
)
def test_unreadable_file_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        resolve(Training, config_path=path)
    assert caught.value.where == path


def test_stored_settings_come_back() -> None:
    config = Training(limit=4, weights=(0.5, 2.0), optimiser=Optimiser(kind="adamw"))
    assert from_dict(Training, as_dict(config)) == config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, min_size=2, max_size=5))
def test_digest_does_not_depend_on_the_order_of_keys(value: dict[str, Any]) -> None:
    assert digest(dict(reversed(value.items()))) == digest(value)
    assert digest({**value, "one more": 1}) != digest({**value, "one more": 2})


@dataclass(frozen=True, kw_only=True)
class Tuning:
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(kind="adamw"))


def test_what_a_nested_table_leaves_open_comes_from_the_default_of_its_field() -> None:
    assert resolve(Tuning, assignments=["optimiser.lr=0.5"]) == Tuning(
        optimiser=Optimiser(kind="adamw", lr=0.5)
    )


# ---------------------------------------------------------------- harmful settings, found by fuzzing

HARMFUL_VALUES = {
    "steps=" + "9" * 5000: "limit",
    "steps=0x" + "f" * 5000: "64 bits",
    "optimiser.lr=nan": "number nan",
    "optimiser.lr=-inf": "number -inf",
    "name=a\udcff": "surrogates not allowed",
    "weights=" + "[" * 2000: "nested deeper",
    "a." * 5000 + "a=1": "nested deeper",
}


@pytest.mark.parametrize("assignment", HARMFUL_VALUES, ids=lambda text: text[:12])
def test_a_value_that_no_setting_can_have_is_a_usage_error(assignment: str) -> None:
    with pytest.raises(UsageError, match=HARMFUL_VALUES[assignment]) as caught:
        resolve(Training, assignments=[assignment])
    assert len(caught.value.message()) < 600


def test_an_assignment_of_several_lines_sets_one_thing() -> None:
    assert resolve(Training, assignments=["name=1\nsteps=7"]) == Training(name="1\nsteps=7")


@pytest.mark.parametrize(
    "content", [b"a=" + b"[" * 50_000, b"steps = 1\n" + b"#" * 70_000, b"\xff", b"name = nan"]
)
def test_a_harmful_settings_file_is_a_usage_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(UsageError, match="not valid TOML"):
        resolve(Training, config_path=tmp_path / "x.toml")


def test_long_keys_and_values_do_not_flood_the_terminal(tmp_path: Path) -> None:
    for text in ("x" * 60_000 + " = 1", f"steps = '{'x' * 60_000}'"):
        (tmp_path / "x.toml").write_text(text)
        with pytest.raises(UsageError) as caught:
            resolve(Training, config_path=tmp_path / "x.toml")
        assert len(caught.value.message()) < 1000
