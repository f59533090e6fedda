"""The pool of local processes (loky): each maps one copy of the evaluator's tensors, and may be lost or hang."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

import loky
import torch

from grainwise.threads import limit_threads
from grainwise.workers.pool import Entries, Evaluate, this_worker
from grainwise.workers.seats import Answer, Seats, checked, timed
from grainwise.workers.shared import Shared, unpack_from

_GROWS = {"LOKY_MAX_MEMORY_LEAK_SIZE": "1e18"}  # loky's own 300 MB take what a worker keeps for a leak, and end it
_ORPHANED_SECONDS = 1.0  # how soon a worker ends when its search was killed

_evaluate: Evaluate | None = None  # of a worker process


class _Seat:
    """A `Seat` with an executor of its own, so that a process that dies takes no other one's work with it."""

    def __init__(self, name: str, shared: Shared) -> None:
        self.name = name
        self._shared = shared
        self._hire()

    def _hire(self) -> None:
        given = (self._shared.path, torch.get_num_threads(), os.getpid())
        self._executor = loky.ProcessPoolExecutor(1, timeout=None, initializer=_begin, initargs=given, env=_GROWS)
        self.process: Future[int] = self._executor.submit(os.getpid)

    def submit(self, entries: Entries) -> Future[Answer]:
        if fault := self.process.exception():
            raise RuntimeError(f"the worker process {self.name} does not start: {fault.__cause__ or fault}") from fault
        answer: Future[Answer] = self._executor.submit(_judge, dict(entries))
        return answer

    def lost(self, fault: BaseException) -> bool:
        return isinstance(fault, BrokenProcessPool)

    def replace(self) -> None:
        self.dismiss()
        self._hire()

    def dismiss(self) -> None:
        with suppress(Exception):  # it did not start, or was lost: then there is nothing to end
            os.kill(self.process.result(timeout=60), signal.SIGKILL)
        self._executor.shutdown(wait=False, kill_workers=True)


class Processes(Seats):
    """Evaluates in `workers` processes of this machine, in each with as many threads as this process has now.

    evaluate: what can be pickled, by cloudpickle; its tensors are mapped from one copy. limit_seconds: as in `Seats`.

    Raises RuntimeError where the system cannot share memory, or when a worker does not start.
    """

    def __init__(self, evaluate: Evaluate, workers: int, limit_seconds: float | None = None) -> None:
        checked(workers, limit_seconds)
        self._shared = Shared(evaluate)
        seats = [_Seat(f"{this_worker()}/{number}", self._shared) for number in range(workers)]
        super().__init__(evaluate, seats, limit_seconds)

    def close(self) -> None:
        super().close()
        self._shared.close()


def _begin(path: str, threads: int, parent: int) -> None:
    """What a worker process does first."""
    global _evaluate  # noqa: PLW0603  (loky hands an initializer's work to the calls in no other way)
    serve(threads, parent)
    _evaluate = unpack_from(path)


def serve(threads: int, parent: int) -> None:
    """From now on this process computes for `parent`, and ends when that does: who is killed cannot end its workers."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_ORPHANED_SECONDS)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the search's, which lets this one finish
    limit_threads(threads)
    threading.Thread(target=watch, daemon=True).start()


def _judge(entries: Entries) -> Answer:
    assert _evaluate is not None
    return timed(_evaluate, entries)
