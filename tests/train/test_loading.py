"""What a step draws, for one process and for several; threads and their errors; memory that is used again."""

import itertools
import os
import subprocess
import sys
import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch

from supercl_core.cache.reader import open_cache
from supercl_core.errors import CacheError
from train import loading
from train.data import SliceDataset, normalise
from train.loading import NUM_THREADS, BatchLoader, StoppedWaitingError
from train.sampling import SliceOrder

CPU = torch.device("cpu")


@pytest.fixture
def tiny(cache_path):
    return SliceDataset(open_cache(cache_path), patch_size=(32, 32))


@pytest.fixture
def labelled(cache_path):
    """Smaller patches than slices, so that crops differ, with all that a batch may hold."""
    ids = ["case_a", "case_b", "case_c"]
    return SliceDataset(
        open_cache(cache_path),
        ids,
        patch_size=(16, 16),
        ground_truth=True,
        superpixel_stride=4,
        adjacent_slices=1,
        foreground_share=0.5,
    )


def load(dataset, count, *, batch_size, seed=3, labels=None, foreground_share=0.0, **settings):
    """The first `count` batches of a loader; `batch_size` is that of all ranks together."""
    order = SliceOrder(
        slices=dataset.slices,
        batch_size=batch_size,
        seed=seed,
        labels=labels,
        foreground=dataset.class_slices() if foreground_share else (),
        foreground_share=foreground_share,
    )
    with closing(iter(BatchLoader(dataset, order, device=CPU, **settings))) as batches:
        return [next(batches) for _ in range(count)]


def assert_equal(one, other):
    for name, tensor in vars(one).items():
        found = getattr(other, name)
        assert tensor is found is None or torch.equal(tensor, found), name


# ---------------------------------------------------------------- what a step draws


@pytest.mark.parametrize("foreground_share", [0.0, 0.4])
def test_equal_seeds_give_equal_batches_from_any_first_step(labelled, foreground_share):
    whole = load(labelled, 6, batch_size=6, foreground_share=foreground_share)
    for first in (1, 4):
        resumed = load(labelled, 6 - first, batch_size=6, first_step=first, foreground_share=foreground_share)
        for one, other in zip(whole[first:], resumed, strict=True):
            assert_equal(one, other)
    assert not torch.equal(whole[0].slices_B, load(labelled, 1, batch_size=6, seed=4)[0].slices_B)


def test_crops_differ_between_steps_and_are_drawn_from_seed_and_step(labelled):
    order = SliceOrder(slices=labelled.slices[:1], batch_size=2, seed=9)  # one slice over and over
    with closing(iter(BatchLoader(labelled, order, device=CPU, first_step=30))) as batches:
        for step in range(30, 36):
            places = labelled.place(np.repeat(labelled.slices[:1], 2), np.random.default_rng([9, step]))
            expected = normalise(labelled.gather(np.repeat(labelled.slices[:1], 2), places))
            assert_equal(next(batches), expected)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("drawn", ["at random", "in groups", "with foreground"])
def test_the_batches_of_all_ranks_together_are_that_of_one_process(labelled, world_size, drawn):
    settings = {
        "at random": {},
        "in groups": {"labels": np.arange(len(labelled)) // 3},
        "with foreground": {"foreground_share": 0.4},
    }[drawn]
    whole = load(labelled, 5, batch_size=8, **settings)
    parts = [
        load(labelled, 5, batch_size=8, rank=rank, world_size=world_size, **settings)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        for name, tensor in vars(batch).items():
            for rank in range(world_size):
                assert torch.equal(getattr(parts[rank][step], name), tensor[rank::world_size]), name


def test_a_restart_goes_on_with_another_order_and_drops_what_was_gathered_ahead(tiny):
    first, second = (SliceOrder(slices=tiny.slices, batch_size=6, seed=seed) for seed in (3, 4))
    loader = BatchLoader(tiny, first, device=CPU)
    with closing(iter(loader)) as batches:
        found = [next(batches) for _ in range(2)]
        loader.restart(second, 7)
        found += [next(batches) for _ in range(6)]
        loader.restart(second, 7)
        found += [next(batches) for _ in range(2)]
        assert len(gathering_threads()) <= NUM_THREADS
    of_second = load(tiny, 6, batch_size=6, seed=4, first_step=7)
    wanted = load(tiny, 2, batch_size=6) + of_second + of_second[:2]
    for one, other in zip(found, wanted, strict=True):
        assert_equal(one, other)


# ---------------------------------------------------------------- threads and memory


def gathering_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gather")]


def slowly(dataset, monkeypatch, seconds):
    """Gathering takes `seconds(slices)` longer."""
    gather = dataset.gather

    def slow(slices, corners=None, *, out=None):
        time.sleep(seconds(slices))
        return gather(slices, corners, out=out)

    monkeypatch.setattr(dataset, "gather", slow)


def test_batches_come_in_order_however_long_each_takes(tiny, monkeypatch):
    expected = load(tiny, 12, batch_size=3)
    slowly(tiny, monkeypatch, lambda slices: 0.02 * (slices[0] % 4))
    for one, other in zip(load(tiny, 12, batch_size=3), expected, strict=True):
        assert_equal(one, other)


def test_a_thread_that_was_late_at_a_restart_spoils_no_batch_after_it(tiny, monkeypatch):
    order = SliceOrder(slices=tiny.slices, batch_size=4, seed=1)
    expected = load(tiny, NUM_THREADS, batch_size=4, seed=1, first_step=50)
    calls = itertools.count(1)
    slowly(tiny, monkeypatch, lambda slices: 0.3 if next(calls) == NUM_THREADS else 0)
    loader = BatchLoader(tiny, order, device=CPU)
    with closing(iter(loader)) as batches:
        next(batches)
        loader.restart(order, 50)
        found = [next(batches)]
        time.sleep(0.6)
        found += [next(batches) for _ in expected[1:]]
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)


def test_memory_is_allocated_once_and_batches_are_the_consumers_own(labelled, monkeypatch):
    allocated = []
    buffer = labelled.buffer
    monkeypatch.setattr(labelled, "buffer", lambda *a, **k: allocated.append(1) or buffer(*a, **k))
    batches = load(labelled, 25, batch_size=5)
    assert len(allocated) == NUM_THREADS
    again = load(labelled, 25, batch_size=5)
    for kept, other in zip(batches, again, strict=True):
        assert_equal(kept, other)
    addresses = [tensor.data_ptr() for batch in batches for tensor in vars(batch).values()]
    assert len(set(addresses)) == len(addresses)


def test_gathering_goes_on_while_the_consumer_works(tiny, monkeypatch):
    slowly(tiny, monkeypatch, lambda slices: 0.02)
    order = SliceOrder(slices=tiny.slices, batch_size=2, seed=0)
    loader = BatchLoader(tiny, order, device=CPU)
    with closing(iter(loader)) as batches:
        next(batches)
        before = loader.wait_s
        for _ in range(8):
            time.sleep(0.06)
            next(batches)
    assert loader.wait_s - before < 8 * 0.02 / 2


def test_the_loader_stops_its_threads_when_closed(tiny):
    loader = BatchLoader(tiny, SliceOrder(slices=tiny.slices, batch_size=2, seed=0), device=CPU)
    batches = iter(loader)
    next(batches)
    assert gathering_threads()
    batches.close()
    assert not gathering_threads()
    assert loader.wait_s > 0


# ---------------------------------------------------------------- errors


def test_an_error_while_gathering_reaches_the_consumer(tiny, monkeypatch):
    def broken(slices, corners, *, out):
        raise CacheError("An array of the cache is damaged.", next_step="Mend it.")

    monkeypatch.setattr(tiny, "gather", broken)
    with pytest.raises(CacheError, match="damaged"):
        load(tiny, 1, batch_size=2)
    assert not gathering_threads()


def test_an_error_comes_before_the_batches_of_steps_between(tiny, monkeypatch):
    gather, calls = tiny.gather, itertools.count(1)

    def broken(slices, corners, *, out):
        if next(calls) >= NUM_THREADS:
            raise CacheError("An array of the cache is damaged.", next_step="Mend it.")
        return gather(slices, corners, out=out)

    monkeypatch.setattr(tiny, "gather", broken)
    order = SliceOrder(slices=tiny.slices, batch_size=2, seed=0)
    with (
        closing(iter(BatchLoader(tiny, order, device=CPU))) as batches,
        pytest.raises(CacheError, match="damaged"),
    ):
        for _ in range(2):
            next(batches)
            time.sleep(0.2)


PROGRAM = """
import os, sys
import torch
from supercl_core.cache.reader import open_cache
from supercl_core.errors import SuperCLError
from train.data import SliceDataset
from train.loading import BatchLoader
from train.sampling import SliceOrder

dataset = SliceDataset(open_cache(sys.argv[1]), patch_size=(32, 32))
order = SliceOrder(slices=dataset.slices, batch_size=4, seed=0)
loader = BatchLoader(dataset, order, device=torch.device("cpu"))
try:
    for step, _ in enumerate(loader):
        if step == 5:
            os.truncate(sys.argv[2], 0)
        assert step < 50
except SuperCLError as error:
    sys.exit(f"{step}: {error.message()}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the process dies")
@pytest.mark.parametrize("array", ["image", "labels/superpixels/0"])
def test_a_file_cut_short_while_training_reads_it_is_an_error_and_not_death(cache_copy, array):
    folder = cache_copy / "cases" / "case_b" / array
    [file] = [path for path in (folder / "c").rglob("*") if path.is_file()]
    command = [sys.executable, "-c", PROGRAM, str(cache_copy), str(file)]
    finished = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 1, finished
    assert "A file of the cache cannot be read any more." in finished.stderr
    assert f"{file}, slice " in finished.stderr
    assert "found:    0 bytes" in finished.stderr


def test_waiting_that_takes_long_is_said_and_can_be_stopped(tiny, monkeypatch, capsys):
    release = threading.Event()
    gather = SliceDataset.gather

    def stuck(dataset, *arguments, **options):
        release.wait(timeout=10)
        return gather(dataset, *arguments, **options)

    monkeypatch.setattr(SliceDataset, "gather", stuck)
    monkeypatch.setattr(loading, "NOTE_EVERY_S", 1)
    asked = []

    def stop_requested():
        asked.append(True)
        return len(asked) == 2

    order = SliceOrder(slices=tiny.slices, batch_size=4, seed=0)
    batches = iter(BatchLoader(tiny, order, device=CPU, stop_requested=stop_requested))
    threading.Timer(2.5, release.set).start()
    with pytest.raises(StoppedWaitingError):
        next(batches)
    said = capsys.readouterr().err
    assert said.count("waiting for data for 1 s") == 1
    assert str(tiny.cache.path) in said
