"""Ctrl-C and SIGTERM as a flag that a loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ASKED = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """number: of the signal that came, 0 before."""

    number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step
        self.number = number


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Inside, Ctrl-C and SIGTERM set the flag; outside of the main thread, which alone gets signals, nothing does."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, flag) for number in _ASKED}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
