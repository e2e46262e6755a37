"""Requests to stop: from whom they come, and who is told."""

from __future__ import annotations

import os
import signal

from train.stopping import STOP_SIGNALS, stop_requests


def test_a_request_that_came_after_the_inner_work_s_last_look_reaches_the_outer():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with stop_requests() as outer:
        with stop_requests() as inner:
            assert not inner()
            os.kill(os.getpid(), signal.SIGUSR1)
        assert outer()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a second Ctrl-C stops at once
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    with stop_requests() as outer:
        with stop_requests():
            pass
        assert not outer()
