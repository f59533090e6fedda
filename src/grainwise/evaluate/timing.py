"""Timing programs against each other: in turn, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

NOISY = 0.05  # a spread between two runs of one program above which smaller differences mean nothing
WARM_UP = 3  # calls before the first that counts

_CPUINFO = Path("/proc/cpuinfo")

Progress = Callable[[int, int], None]
"""(done, total) of whatever takes a while, called after each step."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a timing was taken on. device: the processor's name. threads: that one call may use. runtime: the program
    that ran the network, with its version.
    """

    device: str
    threads: int
    runtime: str
    version: str

    def to_json(self) -> dict[str, str | int]:
        return asdict(self)


def device_name() -> str:
    """The processor's name with family and model, which tell processors apart whose names are the same."""
    facts: dict[str, str] = {}
    for line in _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.exists() else []:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [facts[key] for key in ("cpu family", "model", "stepping") if key in facts]
    return f"{name} ({'.'.join(numbers)})" if numbers else name


@dataclass(frozen=True, slots=True)
class Timing:
    """Calls of one program.

    wall_ms: of each call. process_ms: processor time that this process spent in each call, on all its threads.
    """

    wall_ms: tuple[float, ...]
    process_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.wall_ms or len(self.wall_ms) != len(self.process_ms):
            raise ValueError(f"{len(self.wall_ms)} wall times and {len(self.process_ms)} process times are no timing")

    @property
    def runs(self) -> int:
        return len(self.wall_ms)

    @property
    def p50_ms(self) -> float:
        """Wall time that half of the calls stay below."""
        return float(np.percentile(self.wall_ms, 50))

    @property
    def p95_ms(self) -> float:
        """Wall time that all but one call of twenty stay below."""
        return float(np.percentile(self.wall_ms, 95))

    @property
    def cpu_median_ms(self) -> float:
        return float(np.median(self.process_ms))

    def to_json(self) -> dict[str, float | int]:
        """Figures for reports, in milliseconds rounded to 0.1 µs."""
        names = ("p50_ms", "p95_ms", "cpu_median_ms")
        return {**{name: round(getattr(self, name), 4) for name in names}, "runs": self.runs}


def interleaved(
    programs: Mapping[str, Callable[[], object]], *, rounds: int | None = None, seconds: float | None = None
) -> dict[str, Timing]:
    """Calls the programs in turn (A B C A B C ...) after a warm-up, for a number of rounds or until the time is over.

    Each turn is two calls, of which the second counts: it finds the processor's caches as the program itself leaves
    them, not as the others do.
    Raises ValueError unless exactly one of `rounds` (at least 1) and `seconds` is given.
    """
    if (rounds is None) == (seconds is None) or (rounds is not None and rounds < 1):
        raise ValueError(f"give a number of rounds, at least 1, or seconds; got rounds={rounds}, seconds={seconds}")
    for program in programs.values():
        for _ in range(WARM_UP):
            program()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    end, done = time.perf_counter() + (seconds or 0.0), 0
    while done < (rounds or 1) or (seconds is not None and time.perf_counter() < end):
        for name, program in programs.items():
            program()
            found[name].append(_timed(program))
        done += 1
    return {name: Timing(*zip(*calls, strict=True)) for name, calls in found.items()}


def _timed(program: Callable[[], object]) -> tuple[float, float]:
    """(wall, process) milliseconds of one call."""
    wall, process = time.perf_counter_ns(), time.process_time_ns()
    program()
    return (time.perf_counter_ns() - wall) / 1e6, (time.process_time_ns() - process) / 1e6


def ratio(a: Timing, b: Timing, *, wall: bool = False) -> float:
    """How many times the processor time of `b` a call of `a` takes: the median over the rounds of one `interleaved`.

    Rounds in which the processor clock did not move do not count; where it never moved, the time on the clock does.
    wall: of the time on the clock, which is what more than one thread is for.
    Raises ValueError when the two do not come from the same rounds.
    """
    if a.runs != b.runs:
        raise ValueError(f"{a.runs} and {b.runs} calls do not pair up: time both in one run")
    mine, its = (np.array(times) for times in ((a.wall_ms, b.wall_ms) if wall else (a.process_ms, b.process_ms)))
    # A virtual machine's processor clock stands still for a while after other machines took its processor.
    ran = (mine > 0) & (its > 0)
    return float(np.median(mine[ran] / its[ran])) if ran.any() else ratio(a, b, wall=True)


@dataclass(frozen=True, slots=True)
class Noise:
    """How far two runs of the same program lie apart. spread: |ratio - 1| of the two."""

    spread: float

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY


def noise(first: Timing, second: Timing, *, wall: bool = False) -> Noise:
    """The noise floor of a run in which one program was timed under two names."""
    return Noise(abs(ratio(first, second, wall=wall) - 1))


def mean_percentage_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Mean of |predicted - measured| / measured, in percent."""
    found, true = np.asarray(predicted, dtype=float), np.asarray(measured, dtype=float)
    return float(100 * np.mean(np.abs(found - true) / true))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; values that are equal share their mean rank. 0 where one side is constant."""
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (first, second)]
    a, b = (rank - rank.mean() for rank in ranks)
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else 0.0


def _ranks(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    smaller = (values[None, :] < values[:, None]).sum(axis=1)
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    ranks: np.ndarray[tuple[int], np.dtype[np.float64]] = smaller + (equal - 1) / 2
    return ranks
