"""Where evaluations run: what every pool does, and the pool that is this very process."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from grainwise.plan.choices import Entry
from grainwise.study.measurement import Measurement, Outcome

Entries = Mapping[str, Entry]

Evaluate = Callable[[Entries], Outcome]

Known = Callable[[str], Measurement | None]
"""(key) -> the measurement that was stored under it, if there is one."""

Begun = Callable[[Mapping[int, str]], None]
"""(worker by number): these profiles are in these hands now, once more after other hands lost one."""

Stop = Callable[[], bool]
"""() -> True when no further profile is to begin."""


@runtime_checkable
class EvaluatesMany(Protocol):
    """An `Evaluate` that shares work between the profiles of a batch."""

    def __call__(self, entries: Entries) -> Outcome: ...

    def many(self, profiles: Sequence[Entries], known: Known) -> Iterable[tuple[int, Outcome]]:
        """(number in `profiles`, outcome), each before the next profile runs, in an order of its own choice."""
        ...

    def key(self, entries: Entries) -> str:
        """Under which the measurement is stored for other studies; empty for one that is not to be."""
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """What a profile gave. started: seconds since 1970 by the wall clock; seconds: by the monotonic clock."""

    number: int
    outcome: Outcome
    worker: str
    started: float
    seconds: float


class Pool(Protocol):
    """Runs evaluations; the outcome of a profile is the same in every pool, to the last bit."""

    def run(self, profiles: Mapping[int, Entries], known: Known, begun: Begun, stop: Stop) -> Iterator[list[Judged]]:
        """Each profile by its number, in any order: those that were judged since the last ones were taken, together, so
        that many workers cost one write to the disk and not one each. A worker begins its next profile when its last
        one was taken. What has begun when `stop` turns True is finished.
        """
        ...

    def close(self) -> None:
        """End the workers, at once. A pool that was closed is not used again."""
        ...


def this_worker() -> str:
    """The name of this process among all that may work on a study."""
    return f"{socket.gethostname()}:{os.getpid()}"


class Inline:
    """The pool that evaluates in this process, one profile after the other."""

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate

    def run(self, profiles: Mapping[int, Entries], known: Known, begun: Begun, stop: Stop) -> Iterator[list[Judged]]:
        if stop() or not profiles:
            return
        numbers, worker = list(profiles), this_worker()
        begun(
            dict.fromkeys(numbers, worker)
        )  # all of them: layers of the whole batch are solved before its first profile runs
        outcomes = iter(self._outcomes([profiles[number] for number in numbers], known))
        while not stop():
            wall, start = time.time(), time.monotonic()
            if (found := next(outcomes, None)) is None:
                return
            yield [Judged(numbers[found[0]], found[1], worker, wall, time.monotonic() - start)]

    def _outcomes(self, profiles: Sequence[Entries], known: Known) -> Iterable[tuple[int, Outcome]]:
        if isinstance(self._evaluate, EvaluatesMany):
            return self._evaluate.many(profiles, known)
        return ((number, self._evaluate(entries)) for number, entries in enumerate(profiles))

    def close(self) -> None:
        """There is nothing to end."""
