"""How profiles are dealt to worker processes that may be lost or hang, whatever starts those processes."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from grainwise.plan.choices import numbers_of
from grainwise.study.measurement import Failure, Outcome
from grainwise.workers.pool import Begun, Entries, Evaluate, EvaluatesMany, Inline, Judged, Known, Stop

RETRIES = 2  # of a profile whose worker was lost: what kills every worker must not do so for ever
_POLL_SECONDS = 0.2  # how soon a stop is seen

Answer = tuple[Outcome, float, float]
"""(outcome, start by the wall clock, seconds) of an evaluation."""


class Seat(Protocol):
    """The place of one worker process: who sits there is replaced when it is lost.

    name: of the place, for people. process: done when the process has started; its result is the process's id.
    """

    name: str
    process: Future[int]

    def submit(self, entries: Entries) -> Future[Answer]:
        """To a process that has started. Raises RuntimeError when it could not."""
        ...

    def lost(self, fault: BaseException) -> bool:
        """Whether this fault of an answer means that the process is no more."""
        ...

    def replace(self) -> None:
        """End the process at once, stopped or hung as it may be, and start another one."""
        ...

    def dismiss(self) -> None:
        """End the process at once."""
        ...


@dataclass(frozen=True, slots=True)
class _Given:
    """An evaluation that runs. late: when it is given up, by the monotonic clock; infinite without a limit."""

    number: int
    seat: Seat
    late: float


class Seats:
    """The pool over seats. A profile whose worker was lost is given to another one, RETRIES times; then it is a
    Failure.

    limit_seconds: of one evaluation; a worker that takes longer counts as lost.
    """

    def __init__(self, evaluate: Evaluate, seats: Sequence[Seat], limit_seconds: float | None = None) -> None:
        self._evaluate = evaluate
        self._limit = float("inf") if limit_seconds is None else limit_seconds
        self._seats = seats

    def run(self, profiles: Mapping[int, Entries], known: Known, begun: Begun, stop: Stop) -> Iterator[list[Judged]]:
        stored = {number: entries for number, entries in profiles.items() if self._known(entries, known)}
        yield from Inline(self._evaluate).run(stored, known, begun, stop)
        order = sorted(
            profiles.keys() - stored.keys(), key=lambda number: list(map(numbers_of, profiles[number].values()))
        )
        hands, idle, lost = _Hands(order, self._seats), list(self._seats), Counter[int | str]()
        running: dict[Future[Answer], _Given] = {}
        try:
            while running or (hands and not stop()):
                ready = [] if not hands or stop() else [seat for seat in idle if self._started(seat, lost)]
                if dealt := {seat.name: (seat, hands.take(seat)) for seat in ready[: len(hands)]}:
                    begun({number: name for name, (_, number) in dealt.items()})
                for seat, number in dealt.values():
                    idle.remove(seat)
                    given = _Given(number, seat, time.monotonic() + self._limit)
                    running[seat.submit(profiles[number])] = given
                ended = []
                for future in self._ended(running, idle if hands else []):
                    given = running.pop(future)
                    idle.append(given.seat)
                    if (judged := self._judged(future, given, lost)) is None:
                        hands.put_back(given.number)
                    else:
                        ended.append(judged)
                if ended:
                    yield ended
        finally:
            for given in running.values():  # the search was cut: what these answer is for nobody
                given.seat.replace()

    def _started(self, seat: Seat, lost: Counter[int | str]) -> bool:
        """Whether a process has started, or cannot; one that was lost before it had, with its node, is replaced."""
        if not seat.process.done():
            return False
        fault = seat.process.exception()
        if fault is None or not seat.lost(fault) or lost[seat.name] == RETRIES:
            return True
        lost[seat.name] += 1
        seat.replace()
        return False

    def _known(self, entries: Entries, known: Known) -> bool:
        key = self._evaluate.key(entries) if isinstance(self._evaluate, EvaluatesMany) else ""
        return bool(key) and known(key) is not None

    def _ended(self, running: Mapping[Future[Answer], _Given], idle: Sequence[Seat]) -> list[Future[Answer]]:
        """Evaluations that have an answer, have lost their worker, or are late. Waits for one, or for a process that
        starts, _POLL_SECONDS at most.
        """
        awaited: list[Future[Any]] = [*running, *(seat.process for seat in idle if not seat.process.done())]
        wait(awaited, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        now = time.monotonic()
        return [future for future, given in running.items() if future.done() or given.late <= now]

    def _judged(self, future: Future[Answer], given: _Given, lost: Counter[int | str]) -> Judged | None:
        """The answer; None when its worker was lost and the profile is to be tried again."""
        fault = future.exception() if future.done() else None
        if future.done() and (fault is None or not given.seat.lost(fault)):
            outcome, started, seconds = future.result()
            return Judged(given.number, outcome, given.seat.name, started, seconds)
        reason = "its worker was lost" if future.done() else f"it took longer than {self._limit:g} s"
        given.seat.replace()
        lost[given.number] += 1
        if lost[given.number] <= RETRIES:
            return None
        failure = Failure("worker", f"{reason}, {lost[given.number]} times")
        return Judged(given.number, failure, given.seat.name, time.time(), 0.0)

    def processes(self) -> list[int]:
        """Process ids of the workers, once they have started."""
        return [seat.process.result() for seat in self._seats]

    def close(self) -> None:
        for seat in self._seats:
            seat.dismiss()


class _Hands:
    """Profiles that wait, in the order of their first layers: each seat has a part of its own, since a worker keeps the
    activations that its next profile has in common with its last ones; one that has none left takes the last of the
    longest part.
    """

    def __init__(self, order: Sequence[int], seats: Sequence[Seat]) -> None:
        share = -(-len(order) // len(seats))
        self._parts = {seat.name: deque(order[n * share : (n + 1) * share]) for n, seat in enumerate(seats)}
        self._again: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._again) + sum(map(len, self._parts.values()))

    def take(self, seat: Seat) -> int:
        if self._again:
            return self._again.popleft()
        own = self._parts[seat.name]
        return own.popleft() if own else max(self._parts.values(), key=len).pop()

    def put_back(self, number: int) -> None:
        self._again.append(number)


def checked(workers: int, limit_seconds: float | None) -> None:
    """Raises ValueError for fewer than 1 worker, or no time."""
    if workers < 1:
        raise ValueError(f"a search needs at least one worker, got {workers}")
    if limit_seconds is not None and limit_seconds <= 0:
        raise ValueError(f"the time limit of an evaluation is a number of seconds above 0, got {limit_seconds}")


def timed(evaluate: Evaluate, entries: Entries) -> Answer:
    """What a worker process answers."""
    wall, start = time.time(), time.monotonic()
    outcome: Outcome
    try:
        outcome = evaluate(entries)
    except MemoryError as error:  # of this profile, and not a fault of the search
        outcome = Failure("evaluate", str(error) or "out of memory")
    return outcome, wall, time.monotonic() - start
