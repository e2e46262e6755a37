"""Being told to stop: SIGTERM, SIGUSR1 and Ctrl-C as a question that long work asks when it can stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

STOP_SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)
"""Windows has no SIGUSR1."""


class _Request:
    """The handler of a signal, which keeps that it came."""

    came = False

    def __call__(self, *_: object) -> None:
        self.came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yield whether the process was told to stop since; a second Ctrl-C stops at once.

    May be nested: what the inner one was told, the outer one knows when the inner one has ended.
    """
    request = _Request()
    try:
        before = {number: signal.signal(number, request) for number in STOP_SIGNALS}
    except ValueError:  # not in the main thread: nobody sends it signals
        before = {}
    try:
        yield lambda: request.came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        outer = before.get(signal.SIGTERM)
        if request.came and isinstance(outer, _Request):
            outer()
