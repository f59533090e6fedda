"""Ctrl-C and SIGTERM: the first lets the running step finish, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAID = b"\nstopping after the running step; Ctrl-C again stops at once\n"


class Stopped(KeyboardInterrupt):
    """What ran was asked to stop, and did so after a whole step; what was done until then is kept."""


@dataclass(slots=True)
class StopFlag:
    """working: there is a step to finish; before and after, a signal stops at once. number: of the signal that came, 0
    before.
    """

    working: bool
    number: int = 0

    def stop(self) -> bool:
        return bool(self.number)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.number or not self.working:
            raise KeyboardInterrupt
        self.number = number
        os.write(2, _SAID)  # not print: the signal may have come in the middle of one


@contextmanager
def stop_flag(*, working: bool = True) -> Iterator[StopFlag]:
    """Inside, signals are received as the module says; a thread other than the main one gets none."""
    flag = StopFlag(working)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, flag.receive) for number in _SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
