"""A trial: one profile that was tried, and what it gave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from grainwise.plan.choices import Entry
from grainwise.study.measurement import Failure, Measurement, Outcome


class State(StrEnum):
    """Where a trial stands: asked for, in a worker's hands, measured, or failed for a reason."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Task:
    """A trial to be. policy: how many trials the searcher had been told of when it proposed this one; the checkpoint of
    as many trials holds the policy that proposed it.
    """

    number: int
    entries: Mapping[str, Entry]
    source: str
    policy: int


@dataclass(frozen=True, slots=True)
class Trial:
    """number: from 0 in the order of asking. entries: by layer name. reward: None after a failure.
    source: what proposed it (`controller`, `prior`, `random`, ...). seconds: of evaluation, by the monotonic clock.
    prefix_rewards: with per-layer credit, for each layer the reward of the profile cut after it, else empty.
    policy: as in `Task`. worker: host and process that measured it. started: seconds since 1970 by the wall clock, for
    people to read. The last three are None in studies of version 0.1.
    """

    number: int
    entries: Mapping[str, Entry]
    outcome: Outcome
    reward: float | None
    source: str
    seconds: float
    prefix_rewards: tuple[float, ...] = ()
    policy: int | None = None
    worker: str | None = None
    started: float | None = None

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
