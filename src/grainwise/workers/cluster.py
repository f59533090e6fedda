"""The pool of Ray actors, on this machine or on a cluster: each node holds one copy of the evaluator's tensors."""

from __future__ import annotations

import logging
import os
import socket
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from grainwise.threads import limit_threads
from grainwise.workers.pool import Entries, Evaluate
from grainwise.workers.seats import Answer, Seats, checked, timed
from grainwise.workers.shared import Packed, unpack

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported: nothing is told to its makers

try:
    import ray
    from ray.exceptions import AuthenticationError, OutOfMemoryError, RayActorError
except ModuleNotFoundError as error:
    raise RuntimeError("a search on Ray needs the package ray: pip install 'grainwise[ray]'") from error

_PATIENCE_SECONDS = 10.0  # with a cluster that does not answer


class _Worker:
    """What runs in an actor: made once, it keeps its activations from one profile to the next."""

    def __init__(self, threads: int, packed: Any) -> None:
        limit_threads(threads)
        self._evaluate: Evaluate = unpack(packed)  # Ray maps the node's copy, read-only

    def pid(self) -> int:
        return os.getpid()

    def judge(self, entries: Entries) -> Answer:
        return timed(self._evaluate, entries)


class _Seat:
    """A `Seat` of one actor. A lost one is replaced by ours, not by Ray's restarts: its profile must be counted."""

    def __init__(self, name: str, packed: Any, threads: int) -> None:
        self.name = name
        self._packed = packed
        self._threads = threads
        self._hire()

    def _hire(self) -> None:
        actor: Any = ray.remote(_Worker).options(num_cpus=self._threads, max_restarts=0, max_task_retries=0)
        self._actor = actor.remote(self._threads, self._packed)
        self.process: Future[int] = self._actor.pid.remote().future()

    def submit(self, entries: Entries) -> Future[Answer]:
        if fault := self.process.exception():
            raise RuntimeError(f"the worker {self.name} does not start: {_first_line(fault)}") from fault
        answer: Future[Answer] = self._actor.judge.remote(dict(entries)).future()
        return answer

    def lost(self, fault: BaseException) -> bool:
        return isinstance(fault, RayActorError | OutOfMemoryError)  # the second: ended by Ray's own watch over memory

    def replace(self) -> None:
        self.dismiss()
        self._hire()

    def dismiss(self) -> None:
        with suppress(ValueError, RayActorError):  # it is gone already
            ray.kill(self._actor)


class Cluster(Seats):
    """Evaluates in `workers` actors, by default one for each processor of the cluster, with as many threads each as
    this process has now.

    evaluate: what can be pickled, by cloudpickle; its code must be installed on every node. address: of a running
    cluster, or `auto`; None starts Ray on this machine, for as long as this pool is open. limit_seconds: as in `Seats`.

    Raises RuntimeError when ray is not installed, the cluster cannot be joined, or asks for no token: who reaches
    such a one runs any code on it.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        workers: int | None = None,
        limit_seconds: float | None = None,
        address: str | None = None,
    ) -> None:
        checked(1 if workers is None else workers, limit_seconds)
        threads, count = torch.get_num_threads(), workers or workers_of(address)
        _join(address, count * threads)
        packed = Packed(evaluate)
        content = np.empty(packed.bytes, np.uint8)
        packed.write(content.data)
        held = ray.put(content)  # each node fetches it once, whatever the number of its workers
        super().__init__(evaluate, [_Seat(f"ray/{n}", held, threads) for n in range(count)], limit_seconds)

    def close(self) -> None:
        super().close()
        ray.shutdown()


def workers_of(address: str | None) -> int:
    """How many workers a pool has unless it is told: one for each processor of this machine, or, joined now, of the
    cluster, with as many threads each as this process has now. Raises RuntimeError as `Cluster` does.
    """
    if address is None:
        return os.cpu_count() or 1
    _join(address, 0)
    return max(1, _processors() // torch.get_num_threads())


def _join(address: str | None, processors: int) -> None:
    options: dict[str, Any] = {"include_dashboard": False, "num_cpus": processors} if address is None else {}
    if address is not None and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise RuntimeError(
            "a search joins only a Ray cluster that asks for a token: start every node with RAY_AUTH_MODE=token "
            "(and the token of `ray get-auth-token --generate`), and set the same here"
        )
    if ray.is_initialized():
        return
    try:
        host, _, port = (address or "").rpartition(":")
        if host:  # Ray itself would ask for minutes
            socket.create_connection((host, int(port)), _PATIENCE_SECONDS).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, AuthenticationError, ValueError, RuntimeError) as error:
        raise RuntimeError(f"the Ray cluster {address or 'local'} cannot be joined: {_first_line(error)}") from error


def _processors() -> int:
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(found.get("CPU", 1))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
