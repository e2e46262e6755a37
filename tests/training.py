"""What the tests of training runs share: how to kill one at a given step, and how to compare two."""

import itertools

import torch
from safetensors.torch import load_file

from train.runs import read_metrics

SMALL = {
    "steps": 6,
    "batch_size": 6,
    "patch_size": (32, 32),
    "filters": 4,
    "warmup_steps": 2,
    "device": "cpu",
    "precision": "float32",
    "log_every": 1,
    "checkpoint_every": 2,
}
"""Settings of a run of seconds on the tiny cache."""


class Killed(BaseException):
    """Stands for the death of the process."""


def kill():
    raise Killed


def call_at(number, action, function):
    """`function`, but its call number `number` begins with `action`."""
    calls = itertools.count(1)

    def called(*arguments, **settings):
        if next(calls) == number:
            action()
        return function(*arguments, **settings)

    return called


def losses_of(run_path):
    """What a run logged, without what two equal runs differ in."""
    timing = {"samples_per_s", "data_wait_share", "seconds"}
    return [{k: v for k, v in entry.items() if k not in timing} for entry in read_metrics(run_path)]


def assert_same_weights(one, other):
    one, other = load_file(one / "weights.safetensors"), load_file(other / "weights.safetensors")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def snapshot(folder):
    """Content and time of change of every file."""
    return {
        file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()
    }
