"""The encoder in a file of another library, found by its tensors' names.

timm, MONAI, segmentation-models-pytorch and what is trained with them write an encoder under names of its own layers,
with a prefix for each network or wrapper that it was a part of. Called by `train.models.weights`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

BODIES: Final = ("encoder.", "encoder.body.", "encoder.body.model.", "encoder.body.model.model.")
"""Where an encoder's own layers are in our networks: the method's own, a library's, those of timm in a library's."""


def encoder_tensors(theirs: Iterable[str], ours: Sequence[str]) -> dict[str, str]:
    """The tensors of a file that make an encoder: the name in our network -> the file's name.

    `ours`: all tensors of the encoder in our network, such as `encoder.body.conv1.weight`. The file's names begin with
    any one prefix or none, and may have a dot where ours have an underscore or the other way round (timm renames
    `stages.0` to `stages_0` where it takes a network for its features). Empty where the file lacks the first of ours.

    Tensors of the file that ours have no counterpart of are left out where they come behind (a classifier, blocks of
    the last part). Those of a part that is not the last, such as the third block of `layer1`, are of a deeper
    encoder: they are given too, under names that our network does not have.
    """
    spelled = {_plain(name): name for name in theirs}
    best: dict[str, str] = {}
    within: dict[str, str] = {}
    for body in BODIES:
        inner = {_plain(name.removeprefix(body)): name for name in ours if name.startswith(body)}
        first = next(iter(inner), None)
        for prefix in [key.removesuffix(first) for key in spelled if first and key.endswith(first)]:
            found = {name: spelled[prefix + key] for key, name in inner.items() if prefix + key in spelled}
            if len(found) > len(best):
                best = found
                rest = [name for key, name in spelled.items() if key.startswith(prefix)]
                within = _of_inner_parts(rest, list(found.values()), len(prefix), body)
    return {**best, **within}


def _of_inner_parts(names: Iterable[str], found: Sequence[str], start: int, body: str) -> dict[str, str]:
    """Of the file's `names`, those that are not `found` but of a part that is, the last one excepted.

    `start`: where in them the names of the encoder's own layers begin.
    """

    def part(name: str) -> str:
        return name[start:].partition(".")[0]

    known = {*found}
    inner = {part(name) for name in known} - {part(found[-1])}
    return {body + name[start:]: name for name in names if name not in known and part(name) in inner}


def _plain(name: str) -> str:
    return name.replace(".", "_")
