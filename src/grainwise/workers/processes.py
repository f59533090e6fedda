"""The pool of local processes (loky): each maps one copy of the evaluator's tensors, and may be lost or hang."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import loky
import torch

from grainwise.study.measurement import Failure, Outcome
from grainwise.workers.pool import Begun, Entries, Evaluate, EvaluatesMany, Inline, Judged, Known, Stop, this_worker
from grainwise.workers.shared import Shared, unpack

RETRIES = 2  # of a profile whose worker was lost: what kills every worker must not do so for ever
_POLL_SECONDS = 0.2  # how soon a stop is seen
_ORPHANED_SECONDS = 1.0  # how soon a worker ends when its search was killed

Answer = tuple[Outcome, float, float]
"""(outcome, start by the wall clock, seconds) of an evaluation."""

_evaluate: Evaluate | None = None  # of a worker process


class _Seat:
    """The place of one worker process: who sits there is replaced when it is lost.

    Each has an executor of its own, so that a process that dies takes no other one's work with it.
    """

    def __init__(self, name: str, shared: Shared) -> None:
        self.name = name
        self._shared = shared
        self._hire()

    def _hire(self) -> None:
        given = (self._shared.path, torch.get_num_threads(), os.getpid())
        self._executor = loky.ProcessPoolExecutor(1, timeout=None, initializer=_begin, initargs=given)
        self.process: Future[int] = self._executor.submit(os.getpid)  # done when it has started

    def submit(self, entries: Entries) -> Future[Answer]:
        """To a process that has started. Raises RuntimeError when it could not."""
        if fault := self.process.exception():
            raise RuntimeError(f"the worker process {self.name} does not start: {fault.__cause__ or fault}") from fault
        answer: Future[Answer] = self._executor.submit(_judge, dict(entries))
        return answer

    def replace(self) -> None:
        self.dismiss()
        self._hire()

    def dismiss(self) -> None:
        """End the process at once, stopped or hung as it may be."""
        with suppress(Exception):  # it did not start, or was lost: then there is nothing to end
            os.kill(self.process.result(timeout=60), signal.SIGKILL)
        self._executor.shutdown(wait=False, kill_workers=True)


@dataclass(frozen=True, slots=True)
class _Given:
    """An evaluation that runs. late: when it is given up, by the monotonic clock; infinite without a limit."""

    number: int
    seat: _Seat
    late: float


class Processes:
    """Evaluates in `workers` processes of this machine, in each with as many threads as this process has now.

    evaluate: what can be pickled, by cloudpickle; its tensors are mapped from one copy. A profile whose worker was lost
    is given to another one, RETRIES times; then it is a Failure. limit_seconds: of one evaluation; a worker that takes
    longer counts as lost.

    Raises RuntimeError where the system cannot share memory, or when a worker does not start.
    """

    def __init__(self, evaluate: Evaluate, workers: int, limit_seconds: float | None = None) -> None:
        if workers < 1:
            raise ValueError(f"a search needs at least one worker, got {workers}")
        if limit_seconds is not None and limit_seconds <= 0:
            raise ValueError(f"the time limit of an evaluation is a number of seconds above 0, got {limit_seconds}")
        self._evaluate = evaluate
        self._limit = float("inf") if limit_seconds is None else limit_seconds
        self._shared = Shared(evaluate)
        self._seats = [_Seat(f"{this_worker()}/{number}", self._shared) for number in range(workers)]

    def run(self, profiles: Mapping[int, Entries], known: Known, begun: Begun, stop: Stop) -> Iterator[Judged]:
        stored = {number: entries for number, entries in profiles.items() if self._known(entries, known)}
        yield from Inline(self._evaluate).run(stored, known, begun, stop)
        # In the order of their first layers: a worker keeps the activations that its next profile has in common.
        order = sorted(profiles.keys() - stored.keys(), key=lambda number: list(map(str, profiles[number].values())))
        waiting, idle, lost = deque(order), list(self._seats), Counter[int]()
        running: dict[Future[Answer], _Given] = {}
        try:
            while running or (waiting and not stop()):
                for seat in [seat for seat in idle if seat.process.done()]:
                    if waiting and not stop():
                        idle.remove(seat)
                        running |= self._give(waiting.popleft(), profiles, seat, begun)
                for future in self._ended(running, idle if waiting else []):
                    given = running.pop(future)
                    idle.append(given.seat)
                    if (judged := self._judged(future, given, lost)) is None:
                        waiting.appendleft(given.number)
                    else:
                        yield judged
        finally:
            for given in running.values():  # the search was cut: what these answer is for nobody
                given.seat.replace()

    def _give(
        self, number: int, profiles: Mapping[int, Entries], seat: _Seat, begun: Begun
    ) -> dict[Future[Answer], _Given]:
        begun([number], seat.name)
        answer = seat.submit(profiles[number])
        return {answer: _Given(number, seat, time.monotonic() + self._limit)}

    def _known(self, entries: Entries, known: Known) -> bool:
        key = self._evaluate.key(entries) if isinstance(self._evaluate, EvaluatesMany) else ""
        return bool(key) and known(key) is not None

    def _ended(self, running: Mapping[Future[Answer], _Given], idle: Sequence[_Seat]) -> list[Future[Answer]]:
        """Evaluations that have an answer, have lost their worker, or are late. Waits for one, or for a process that
        starts, _POLL_SECONDS at most.
        """
        awaited: list[Future[Any]] = [*running, *(seat.process for seat in idle if not seat.process.done())]
        wait(awaited, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        now = time.monotonic()
        return [future for future, given in running.items() if future.done() or given.late <= now]

    def _judged(self, future: Future[Answer], given: _Given, lost: Counter[int]) -> Judged | None:
        """The answer; None when its worker was lost and the profile is to be tried again."""
        if future.done() and not isinstance(future.exception(), BrokenProcessPool):
            return Judged(given.number, *_answer(future.result(), given.seat.name))
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
        self._shared.close()


def _answer(answer: Answer, worker: str) -> tuple[Outcome, str, float, float]:
    outcome, started, seconds = answer
    return outcome, worker, started, seconds


def _begin(path: str, threads: int, parent: int) -> None:
    """What a worker process does first."""
    global _evaluate  # noqa: PLW0603  (loky hands an initializer's work to the calls in no other way)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the search's, which lets this one finish
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _evaluate = unpack(path)


def _end_with(parent: int) -> None:
    """A search that was killed cannot end its workers."""
    while os.getppid() == parent:
        time.sleep(_ORPHANED_SECONDS)
    os._exit(1)


def _judge(entries: Entries) -> Answer:
    assert _evaluate is not None
    wall, start = time.time(), time.monotonic()
    outcome = _evaluate(entries)
    return outcome, wall, time.monotonic() - start
