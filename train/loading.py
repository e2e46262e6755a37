"""The stream of training batches of one process: threads gather ahead, a GPU copies in the background.

No worker processes: copying from a map releases the GIL, and threads on a map were 6-10 times faster than a
DataLoader with two processes. Memory for batches is allocated once. Where slices are cropped is a function of seed,
step and data alone, and drawn for the batch of all processes, so a resumed run goes on in the middle of an epoch, and
batches do not depend on how many processes share them. Called by `train.loop`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import numpy as np
import torch

from supercl_core.messages import note
from train.data import Batch, SliceDataset, StoredBatch, normalise
from train.sampling import SliceOrder

NUM_THREADS: Final = 4
"""Threads that gather, and batches gathered ahead: where reading is slow they wait for the disk side by side. At the
speed of memory one is busy at a time, for milliseconds a step."""


NOTE_EVERY_S: Final = 60
"""Seconds of waiting for one batch after which there is a note, again and again."""


class StoppedWaitingError(Exception):
    """The consumer is to stop, and its batch has not come."""


class BatchLoader:
    """An endless stream of training batches of one process, from `first_step` on.

    A step's batch holds the slices `[rank::world_size]` of the batch of `order`. Every batch is memory of its own,
    which the consumer may keep. An error of a thread is raised from the next request of a batch, before what other
    threads gathered: StorageError where the cache cannot be read any more. While a batch does not come,
    `stop_requested` is asked every second, and StoppedWaitingError raised where it says so.
    """

    def __init__(
        self,
        dataset: SliceDataset,
        order: SliceOrder,
        *,
        device: torch.device,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self._dataset, self._device = dataset, device
        self._stop_requested = stop_requested
        self._share = slice(rank, None, world_size)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        size = len(range(order.batch_size)[self._share])
        self._free = [_Buffer(dataset, size, self._copies) for _ in range(NUM_THREADS)]
        self._ahead: deque[tuple[Future[StoredBatch], _Buffer]] = deque()
        self.wait_s = 0.0
        """Seconds that the consumer has spent on getting batches."""
        self.restart(order, first_step)

    def restart(self, order: SliceOrder, step: int) -> None:
        """Go on with the batches of another order from `step` on; what was gathered ahead is dropped."""
        self._drop()
        self._seed, self._drawn = order.seed, enumerate(order.batches(step), step)

    def __iter__(self) -> Generator[Batch]:
        # A thread begins on the first GPU, whichever the process uses.
        begin = (None, ()) if self._copies is None else (torch.cuda.set_device, (self._device,))
        with ThreadPoolExecutor(NUM_THREADS, "gather", *begin) as pool:
            try:
                while True:
                    start = time.perf_counter()
                    batch = self._next(pool)
                    self.wait_s += time.perf_counter() - start
                    yield batch
            finally:
                self._drop()

    def _next(self, pool: ThreadPoolExecutor) -> Batch:
        self._refill(pool)
        failed = next((f for f, _ in self._ahead if f.done() and f.exception()), None)
        stored = self._await(failed or self._ahead[0][0])
        buffer = self._ahead.popleft()[1]
        if buffer.copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(buffer.copied)
            for tensor in stored.tensors().values():
                tensor.record_stream(current)  # its memory may be used again when this stream is done with it
        batch = normalise(stored)
        self._free.append(buffer)
        self._refill(pool)
        return batch

    def _await(self, gathered: Future[StoredBatch]) -> StoredBatch:
        """What was gathered, with a word where that takes long."""
        seconds = 0
        while not wait([gathered], timeout=1).done:
            seconds += 1
            if self._stop_requested():
                raise StoppedWaitingError
            if seconds % NOTE_EVERY_S == 0:
                note(f"waiting for data for {seconds} s: does {self._dataset.cache.path} answer?")
        return gathered.result()

    def _refill(self, pool: ThreadPoolExecutor) -> None:
        while self._free:
            buffer = self._free.pop()
            step, slices = next(self._drawn)
            self._ahead.append((pool.submit(self._gather, step, slices, buffer), buffer))

    def _gather(self, step: int, slices: np.ndarray, buffer: _Buffer) -> StoredBatch:
        """The share of this process, on the device as soon as `buffer.copied` is done."""
        corners = self._dataset.place(slices, np.random.default_rng([self._seed, step]))
        if buffer.copied is None:
            return self._dataset.gather(slices[self._share], corners[self._share], out=buffer.stored)
        buffer.copied.synchronize()
        stored = self._dataset.gather(slices[self._share], corners[self._share], out=buffer.stored)
        with torch.cuda.stream(self._copies):
            on_device = stored.to(self._device)
            buffer.copied.record()
        return on_device

    def _drop(self) -> None:
        while self._ahead:
            future, buffer = self._ahead.popleft()
            if not future.cancel():
                wait([future])  # it is being filled
            self._free.append(buffer)


class _Buffer:
    """Host memory of one batch, and for a GPU whether its last content has been copied."""

    def __init__(self, dataset: SliceDataset, size: int, stream: torch.cuda.Stream | None) -> None:
        self.stored = dataset.buffer(size, pinned=stream is not None)
        self.copied = None if stream is None else torch.cuda.Event(blocking=True)
