"""What a study is: arms x recipes x labelled counts x seeds, read from a TOML file and checked before anything runs.

Arms differ in where fine-tuning starts: from scratch, from pre-training by some method, or from weights made elsewhere.
All arms are fine-tuned alike, and those pre-trained here take the steps of [pretrain]. `train.study.runner` runs the
cells, `train.study.collection` gathers what came of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from supercl_core.config import as_dict, from_dict, resolve
from supercl_core.errors import UsageError
from train import methods, recipes
from train.finetuning import SCRATCH
from train.methods import PretrainConfig
from train.recipes import FinetuneConfig
from train.runs import Part

Labelled = int | Literal["all"]
ReadT = TypeVar("ReadT")
Status = Literal["finished", "running", "waiting", "failed"]

DEFAULT_FOLDS: Final = 3

_SHOWN: Final = 200
"""Characters of a wrong name or value in a message."""

BUDGET: Final = (
    "steps",
    "epochs",
    "batch_size",
    "patch_size",
    "backbone",
    "filters",
    "in_channels",
    "adjacent_slices",
    "seed",
    "device",
    "precision",
    "channels_last",
    "compile",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
)
"""Settings that no arm may have of its own, so that arms differ in their method alone."""

NETWORK: Final = ("backbone", "filters", "in_channels", "adjacent_slices")
"""Settings of [pretrain] that recipes take over unless they say otherwise: an encoder fits its own kind of network."""

_OF_THE_CELL: Final = {
    "seed": "the seeds of the study",
    "device": "--device",
}
_FOLDS: Final = dict.fromkeys(("validation_folds", "validation_fold"), "scored_on and folds of the study")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Where fine-tuning starts."""

    init: str | None
    """`scratch`, or the path of weights made elsewhere; None for an encoder that the study pre-trains."""
    pretrain: PretrainConfig | None
    """Its settings, but for seed and device; None where nothing is pre-trained."""


@dataclass(frozen=True, kw_only=True)
class CellKey:
    """One fine-tuned run of a study."""

    recipe: str
    arm: str
    labelled: Labelled
    seed: int

    def title(self) -> str:
        """The cell in words."""
        return f"{self.recipe}, {self.arm}, {self.labelled} labelled, seed {self.seed}"

    def path(self, out_path: Path) -> Path:
        """Its run folder in the folder of the study."""
        return (
            out_path / "finetune" / self.recipe / self.arm / f"labelled_{self.labelled}" / f"seed_{self.seed}"
        )


def pretrain_path(out_path: Path, arm: str, seed: int) -> Path:
    """The run folder of the pre-training of an arm in the folder of the study."""
    return out_path / "pretrain" / arm / f"seed_{seed}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as declared, with all settings resolved."""

    name: str
    cache: Path
    split: str
    """FILE or FILE:SECTION (`supercl_core.splits`)."""
    labelled: tuple[Labelled, ...]
    seeds: tuple[int, ...]
    """Of pre-training and fine-tuning of a cell alike."""
    baseline: str
    """The arm that others are measured against."""
    scored_on: Part
    folds: int | None
    """For scores on validation cases: each seed holds out fold `seed % folds` of the labelled cases."""
    pretrain: PretrainConfig
    """The budget of pre-training, shared by all arms that are pre-trained here."""
    recipes: Mapping[str, Mapping[Labelled, FinetuneConfig]]
    """The settings of fine-tuning by name and labelled count, but for seed and device."""
    arms: Mapping[str, Arm]

    def cells(self) -> list[CellKey]:
        """All cells, seed by seed: the first results are of every arm."""
        return [
            CellKey(recipe=recipe, arm=arm, labelled=labelled, seed=seed)
            for seed in self.seeds
            for labelled in self.labelled
            for recipe in self.recipes
            for arm in self.arms
        ]

    def finetune_config(self, cell: CellKey, *, device: str) -> FinetuneConfig:
        """The settings of a cell."""
        config = dataclasses.replace(self.recipes[cell.recipe][cell.labelled], seed=cell.seed, device=device)
        if self.folds is None:
            return config
        return dataclasses.replace(
            config, validation_folds=self.folds, validation_fold=cell.seed % self.folds
        )

    def as_dict(self) -> dict[str, Any]:
        """The study as plain values that JSON can hold."""
        return {
            "name": self.name,
            "cache": str(self.cache),
            "split": self.split,
            "labelled": list(self.labelled),
            "seeds": list(self.seeds),
            "baseline": self.baseline,
            "scored_on": self.scored_on,
            "folds": self.folds,
            "pretrain": as_dict(self.pretrain),
            "recipes": {
                name: {str(labelled): as_dict(config) for labelled, config in by_count.items()}
                for name, by_count in self.recipes.items()
            },
            "arms": {
                name: {"init": arm.init, "pretrain": arm.pretrain and as_dict(arm.pretrain)}
                for name, arm in self.arms.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Study:
        """The study that `as_dict` gave, after a way through JSON.

        Raises KeyError, TypeError, ValueError, AttributeError or UsageError for any other value.
        """
        return cls(
            **{key: values[key] for key in ("name", "split", "baseline", "scored_on", "folds")},
            cache=Path(values["cache"]),
            labelled=tuple(values["labelled"]),
            seeds=tuple(values["seeds"]),
            pretrain=from_dict(PretrainConfig, values["pretrain"]),
            recipes={
                name: {
                    "all" if count == "all" else int(count): from_dict(FinetuneConfig, config)
                    for count, config in by_count.items()
                }
                for name, by_count in values["recipes"].items()
            },
            arms={
                name: Arm(
                    init=arm["init"],
                    pretrain=arm["pretrain"] and from_dict(PretrainConfig, arm["pretrain"]),
                )
                for name, arm in values["arms"].items()
            },
        )


def read_study(path: Path, *, assignments: Iterable[str] = ()) -> Study:
    """Read the declaration of a study; `assignments` such as `seeds=[0]` are put over what the file says.

    Paths in the file are relative to its folder, those in `assignments` to the folder of the process.
    Raises UsageError for an unreadable file, unknown keys, settings that make no sense, and an arm that touches the
    budget.
    """
    if not path.is_file():
        raise UsageError(
            "There is no such study.",
            where=path,
            expected="a TOML file (see `supercl study --help`)",
            found="no file",
            next_step="Check the path.",
        )
    with _in(path):
        declared = resolve(_Declaration, config_path=path, assignments=map(_from_here, assignments))
        labelled = _labelled(declared.labelled)
    with _in(path, "pretrain"):
        _refuse(declared.pretrain, {**_OF_THE_CELL, "epochs": "steps, which are the same for all arms"})
        pretrain = from_dict(PretrainConfig, declared.pretrain)
    folder = path.resolve().parent
    is_validated = declared.scored_on == "validation"
    arms = _each(path, "arms", declared.arms, lambda table: _arm(table, declared.pretrain, folder))
    by_recipe = _each(
        path,
        "recipes",
        declared.recipes,
        lambda table: _recipe(table, declared.pretrain, labelled=labelled, is_validated=is_validated),
    )
    if declared.baseline not in arms:
        raise UsageError(
            "The baseline is no arm of the study.",
            where=path,
            expected=f"one of {', '.join(arms)}"[:_SHOWN],
            found=declared.baseline[:_SHOWN],
            next_step="Name one of the arms: baseline = NAME",
        )
    return Study(
        name=path.stem,
        cache=folder / declared.cache,
        split=str(folder / declared.split),
        labelled=labelled,
        seeds=declared.seeds,
        baseline=declared.baseline,
        scored_on=declared.scored_on,
        folds=(declared.folds or DEFAULT_FOLDS) if is_validated else None,
        pretrain=pretrain,
        recipes=by_recipe,
        arms=arms,
    )


@dataclass(frozen=True, kw_only=True)
class _Declaration:
    """The top level of the TOML file; its tables stay plain until they are read with their own classes."""

    cache: str = ""
    split: str = ""
    labelled: list = field(default_factory=list)
    seeds: tuple[int, ...] = ()
    baseline: str = SCRATCH
    scored_on: Part = "test"
    folds: int | None = None
    pretrain: dict = field(default_factory=dict)
    recipes: dict = field(default_factory=dict)
    arms: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [
            name
            for name in ("cache", "split", "labelled", "seeds", "recipes", "arms")
            if not getattr(self, name)
        ]
        self._check(
            "is incomplete", not missing, "cache, split, labelled, seeds, [recipes.*], [arms.*]", missing
        )
        valid = len(set(self.seeds)) == len(self.seeds) and min(self.seeds) >= 0
        self._check("has seeds that make no sense", valid, "different ones from 0 on", self.seeds)
        valid = self.folds is None or (self.scored_on == "validation" and self.folds >= 2)
        self._check(
            "has folds that make no sense", valid, "2 or more, with scored_on = 'validation'", [self.folds]
        )

    @staticmethod
    def _check(problem: str, valid: bool, expected: str, found: Sequence[object]) -> None:
        if not valid:
            raise UsageError(
                f"The declaration of the study {problem}.",
                expected=expected,
                found=f"{'without ' if problem == 'is incomplete' else ''}{', '.join(map(str, found))}",
                next_step="Mend it; `supercl study --help` shows one.",
            )


def _from_here(assignment: str) -> str:
    """An assignment whose path, if it has one, is no longer relative to the folder of the process."""
    key, equals, value = assignment.partition("=")
    return f"{key}{equals}{Path(value).absolute()}" if key in ("cache", "split") else assignment


def _labelled(declared: list[Any]) -> tuple[Labelled, ...]:
    valid = all(item == "all" or (type(item) is int and item >= 1) for item in declared)
    if not valid or len(set(declared)) < len(declared):
        raise UsageError(
            "The labelled counts make no sense.",
            expected='different counts from 1 on, or "all"',
            found=str(declared)[:_SHOWN],
            next_step='Write labelled = [3, 21, "all"], say.',
        )
    return tuple(declared)


def _each(
    path: Path, kind: str, declared: Mapping[str, Any], read: Callable[[dict[str, Any]], ReadT]
) -> dict[str, ReadT]:
    """What `read` makes of each table below [arms] or [recipes], by name."""
    found = {}
    for name, table in declared.items():
        with _in(path, f"{kind}.{name}"):
            if not isinstance(table, dict) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", name):
                raise UsageError(
                    f"[{kind}] holds what is none of its tables.",
                    expected=f"tables [{kind}.NAME], NAME of letters, digits and . _ + -",
                    found=f"{name} = {table}"[:_SHOWN],
                    next_step="Give it a name that a folder can have.",
                )
            found[name] = read(table)
    return found


def _arm(table: dict[str, Any], budget: Mapping[str, Any], folder: Path) -> Arm:
    settings = dict(table)
    preset, init = settings.pop("preset", None), settings.pop("init", None)
    if init is not None:
        if settings or preset is not None or not isinstance(init, str):
            raise UsageError(
                "An arm either starts from what is there or is pre-trained.",
                expected=f"init = {SCRATCH!r}, or the path of weights, and nothing beside it",
                found=", ".join(map(str, table))[:_SHOWN],
                next_step="Remove init, or what stands beside it.",
            )
        if init != SCRATCH:
            init = str(folder / init)
            if not _exists(init):
                raise UsageError(
                    "There are no such weights.",
                    expected=f"a run, a file of weights, or {SCRATCH!r}",
                    found=init[:_SHOWN],
                    next_step="Check the path; it is relative to the folder of the study's file.",
                )
        return Arm(init=init, pretrain=None)
    _refuse(settings, dict.fromkeys(BUDGET, "[pretrain], the budget that all arms share"))
    of_preset = _preset(methods.PRESETS, preset)
    method = {name: value for name, value in of_preset.items() if name not in BUDGET}
    merged = _merged(_merged(budget, method), settings)
    return Arm(init=None, pretrain=from_dict(PretrainConfig, merged))


def _recipe(
    table: dict[str, Any], budget: Mapping[str, Any], *, labelled: tuple[Labelled, ...], is_validated: bool
) -> dict[Labelled, FinetuneConfig]:
    settings = dict(table)
    preset, by_count = settings.pop("preset", None), settings.pop("labelled", {})
    unknown = set(by_count) - {str(count) for count in labelled} if isinstance(by_count, dict) else {by_count}
    if unknown:
        raise UsageError(
            "The recipe has settings for labelled counts that the study has not.",
            expected=f"tables for some of {', '.join(map(str, labelled))}",
            found=", ".join(map(str, unknown))[:_SHOWN],
            next_step="Remove them, or add the count to `labelled`.",
        )
    network = {name: budget[name] for name in NETWORK if name in budget}
    base = _merged(_preset(recipes.PRESETS, preset), network)
    configs = {}
    for count in labelled:
        own = _merged(settings, by_count.get(str(count), {}))
        _refuse(own, {**_OF_THE_CELL, **(_FOLDS if is_validated else {})})
        # A budget in steps takes the place of one in epochs.
        kept = {name: value for name, value in base.items() if not (name == "epochs" and "steps" in own)}
        configs[count] = from_dict(FinetuneConfig, _merged(kept, own))
    return configs


def _preset(presets: Mapping[str, Mapping[str, Any]], name: object) -> Mapping[str, Any]:
    if name is None:
        return {}
    if not isinstance(name, str) or name not in presets:
        raise UsageError(
            f"There is no preset {repr(name)[:_SHOWN]}.",
            expected=", ".join(sorted(presets)),
            found=str(name)[:_SHOWN],
            next_step="Name one of the presets, or leave it out.",
        )
    return presets[name]


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name that is too long for the system, or has a byte that no path has
        return False


def _refuse(settings: Mapping[str, Any], elsewhere: Mapping[str, str]) -> None:
    """Raise UsageError for settings that belong `elsewhere`."""
    if found := [name for name in settings if name in elsewhere]:
        raise UsageError(
            "A setting is not to be set here.",
            expected="; ".join(f"{name}: {elsewhere[name]}" for name in found),
            found=", ".join(found),
            next_step="Remove it here.",
        )


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` put over `base`, table by table."""
    merged = dict(base)
    for name, value in changes.items():
        before = base.get(name)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        merged[name] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return merged


@contextmanager
def _in(path: Path, table: str = "") -> Iterator[None]:
    """Add to errors the file and the table that they are about."""
    try:
        yield
    except UsageError as error:
        raise UsageError(
            error.what,
            where=f"{path} [{table[:_SHOWN]}]" if table else path,
            expected=error.expected,
            found=error.found,
            next_step=error.next_step,
        ) from error
