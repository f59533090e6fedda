"""Evaluations that take no time, or go wrong; apart from the rest, so that a worker starts soon."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from grainwise.plan.choices import PRECISIONS, STRUCTURES, Entry
from grainwise.study.measurement import Failure, Measurement, Outcome
from grainwise.workers.pool import Begun, Entries, Judged, Pool

PROFILES = {number: {"a": Entry(STRUCTURES[number % 9], PRECISIONS[number % 3])} for number in range(7)}


def by_text(entries: Entries) -> Outcome:
    return Measurement(0.5, float(len(str(entries["a"]))), 1, 1)


def often_fails(entries: Entries) -> Outcome:
    return Failure("build", "no") if "prune" in str(entries["a"]) else by_text(entries)


def unknown(key: str) -> None:
    return None


def never() -> bool:
    return False


def _swell() -> None:
    """Asks for 64 GB where 1 GB more is to be had. Raises MemoryError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, before[1]))
    try:
        bytearray(2**36)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def nobody(hands: Mapping[int, str]) -> None:
    return None


def all_of(pool: Pool, profiles: Mapping[int, Entries], begun: Begun = nobody) -> list[Judged]:
    return [judged for ended in pool.run(profiles, unknown, begun, never) for judged in ended]


class Troubled:
    """Leaves a line in `folder` for each evaluation; profile 3 does what `trouble` says, in its first `times`."""

    def __init__(self, folder: Path, trouble: str, times: int) -> None:
        self.folder, self.trouble, self.times = folder, trouble, times

    def __call__(self, entries: Entries) -> Outcome:
        number = next(n for n, p in PROFILES.items() if p == entries)
        log = self.folder / str(number)
        with log.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        if number == 3 and len(log.read_text().splitlines()) <= self.times:
            {
                "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
                "hangs": lambda: time.sleep(600),
                "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP),
                "swells": _swell,
            }[self.trouble]()
        return by_text(entries)

    def evaluations(self, number: int) -> int:
        return len((self.folder / str(number)).read_text().splitlines())


class Slow:
    """Leaves a line in `folder` for each evaluation, which takes `seconds`."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds

    def __call__(self, entries: Entries) -> Outcome:
        with (self.folder / "log").open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        time.sleep(self.seconds)
        return by_text(entries)

    def evaluations(self) -> int:
        return len((self.folder / "log").read_text().splitlines())


class Growing:
    """Keeps 100 MB of each evaluation, which takes a second."""

    kept: list[bytearray] = []  # noqa: RUF012

    def __call__(self, entries: Entries) -> Outcome:
        Growing.kept.append(bytearray(b"1") * 10**8)
        time.sleep(1.0)
        return Measurement(0.5, 0.0, len(Growing.kept), 1)


class Watched:
    """64 MB of weights; an evaluation reads all, writes to one, and tells how many kB are this process's own."""

    def __init__(self) -> None:
        self.weights = torch.ones(2**24)

    def __call__(self, entries: Entries) -> Outcome:
        total = float(self.weights.sum())
        self.weights[0] = 5.0
        return Measurement(total, 0.0, own_kilobytes(self.weights.data_ptr()), 1)


def own_kilobytes(address: int) -> int:
    """Memory of the mapping around an address that no other process has."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split()
        if "-" in first and ":" not in first:
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low <= address < high
        elif inside and first == "Anonymous:":
            return int(others[0])
    raise ValueError(f"nothing is mapped at {address}")


def broken(entries: Entries) -> Outcome:
    raise KeyError("a fault of the evaluation itself")


class Unreadable:
    def __call__(self, entries: Entries) -> Outcome:
        return by_text(entries)

    def __reduce__(self) -> tuple[object, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise ValueError("cannot be made again")
