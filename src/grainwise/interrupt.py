"""Ctrl-C in a search: the first lets the running trial finish, the second stops at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_SAID = b"\nstopping after the running trial; Ctrl-C again stops at once\n"


@dataclass(slots=True)
class Interrupts:
    """searching: trials run, so that there is something to finish; before and after, Ctrl-C stops at once."""

    searching: bool = False
    asked: bool = False

    def stop(self) -> bool:
        return self.asked

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.searching:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, _SAID)  # not print: the signal may have come in the middle of one


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Inside, SIGINT is received as the module says. For the main thread alone."""
    found = Interrupts()
    before = signal.signal(signal.SIGINT, found.receive)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)
