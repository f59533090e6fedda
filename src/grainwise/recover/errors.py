"""What a recovery stops with."""

from __future__ import annotations


class RecoveryError(RuntimeError):
    """A recovery cannot begin or go on; the message says why, what to do, and what is kept."""


class Stopped(KeyboardInterrupt):
    """A recovery was asked to stop by a signal, and stopped after a whole step. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number
