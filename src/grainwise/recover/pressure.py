"""How adaptive compression goes about it, and how hard it presses at each epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdaptiveOptions:
    """Raises ValueError for a value out of its range."""

    decisions: int = 8
    """At most, spread evenly over the epochs before the last ones, and one an epoch."""
    settle: float = 1 / 3
    """Share of the epochs, at the end, that nothing is decided in: the network gets used to the profile."""
    evaluations: int = 16
    """Profiles that are measured for each decision."""
    samples: int = 256
    """Of the search split, on which they are."""
    margin: float = 0.05
    """A profile must diverge less than the one in force by this share of it to take its place."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("settle", "margin"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be 0 or more and below 1, got {getattr(self, name)}")
        for name, least in (("decisions", 1), ("evaluations", 2), ("samples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def ends(self, epochs: int) -> tuple[int, ...]:
        """Which of the epochs 1, 2, ... end with a decision; at least one does."""
        last = max(1, epochs - math.ceil(self.settle * epochs))
        count = min(self.decisions, last)
        return tuple(round(last * number / count) for number in range(1, count + 1))


STANDARD = AdaptiveOptions()


def shares(constraints: Mapping[str, float], decision: int, decisions: int) -> dict[str, float]:
    """What a decision (1, 2, ... `decisions`) may leave of each cost: from all of it to the constraints, fast at first
    and slowly at the end, when little is left to take away (Zhu & Gupta 2017, equation 1).
    """
    left = (1 - decision / decisions) ** 3
    return {name: share + (1 - share) * left for name, share in constraints.items()}
