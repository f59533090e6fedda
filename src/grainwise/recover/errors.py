"""What a recovery stops with."""

from __future__ import annotations


class RecoveryError(RuntimeError):
    """A recovery cannot begin or go on; the message says why, what to do, and what is kept."""
