"""A trial: one profile that was tried, and what it gave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from grainwise.plan.choices import Entry
from grainwise.study.measurement import Failure, Measurement, Outcome


@dataclass(frozen=True, slots=True)
class Trial:
    """number: from 0 in the order of asking. entries: by layer name. reward: None after a failure.
    source: what proposed it (`controller`, `prior`, `random`, ...). seconds: of evaluation.
    prefix_rewards: with per-layer credit, for each layer the reward of the profile cut after it, else empty.
    """

    number: int
    entries: Mapping[str, Entry]
    outcome: Outcome
    reward: float | None
    source: str
    seconds: float
    prefix_rewards: tuple[float, ...] = ()

    @property
    def measurement(self) -> Measurement | None:
        return None if isinstance(self.outcome, Failure) else self.outcome


def meets(measurement: Measurement, budgets: Mapping[str, float]) -> bool:
    """True when every budget holds."""
    return all(measurement.cost(name) <= budget for name, budget in budgets.items())


def best(trials: Iterable[Trial], budgets: Mapping[str, float]) -> Trial | None:
    """The trial of lowest divergence among those that meet the budgets (first one on ties); None when none does.

    Unshaped on purpose: the reward guides the search, it does not choose the result.
    """
    fitting = [t for t in trials if t.measurement is not None and meets(t.measurement, budgets)]
    return min(fitting, key=lambda t: (t.measurement.divergence if t.measurement else 0.0, t.number), default=None)
