"""What the driver and the store cost with 2 to 128 workers: evaluations that sleep, the real driver, the real store.

    python -m bench.scaling [--workers 2 8 32 128] [--seconds 1.0] [--each 12] [--layers 54]

A worker is a thread that sleeps; profiles of 54 layers (a ResNet-50) are drawn beforehand, so that what is measured is
asking, storing (SQLite, forced to the disk), judging and telling. Evaluations last `seconds`, give or take a half,
drawn evenly; each worker makes about `each` of them, in batches of four for each worker. Efficiency: seconds
slept by seconds of all workers. What is lost is parted in two: workers that wait for a batch's end, which an ideal
driver has too (simulated), and the rest, which is driver and store. Writes bench/results/scaling.json.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np

from bench.store import profile
from grainwise.evaluate.timing import device_name
from grainwise.plan.choices import Entry
from grainwise.plan.layers import LayerGraph
from grainwise.search.driver import BATCH, Budget, Judge, search
from grainwise.search.searcher import Proposal, State
from grainwise.store.studies import Store
from grainwise.study.measurement import Measurement, Outcome
from grainwise.study.trial import Trial
from grainwise.workers.seats import Answer, Seats, timed

RESULTS = Path(__file__).parent / "results" / "scaling.json"
REFERENCE = Measurement(1.0, 0.0, 10**8, 10**9)
ROUNDS = 4  # profiles of a batch for each worker


class Sleeping:
    """An evaluation of a time that its profile decides, so that an ideal driver can be simulated."""

    def __init__(self, profiles: Sequence[Mapping[str, Entry]], seconds: Sequence[float]) -> None:
        self._seconds = {id(entries): each for entries, each in zip(profiles, seconds, strict=True)}

    def __call__(self, entries: Mapping[str, Entry]) -> Outcome:
        time.sleep(self._seconds[id(entries)])
        return Measurement(0.9, 0.1, 10**7, 10**8)


class Chair:
    """A seat whose worker is a thread."""

    def __init__(self, name: str, evaluate: Sleeping, threads: ThreadPoolExecutor) -> None:
        self.name = name
        self._evaluate, self._threads = evaluate, threads
        self.process: Future[int] = Future()
        self.process.set_result(os.getpid())

    def submit(self, entries: Mapping[str, Entry]) -> Future[Answer]:
        return self._threads.submit(timed, self._evaluate, entries)

    def lost(self, fault: BaseException) -> bool:
        return False

    def replace(self) -> None: ...

    def dismiss(self) -> None: ...


class Listed:
    """A searcher that proposes what it was given."""

    def __init__(self, profiles: Sequence[Mapping[str, Entry]]) -> None:
        self._left = list(profiles)

    def ask(self, count: int) -> list[Proposal]:
        asked, self._left = self._left[:count], self._left[count:]
        return [Proposal(entries, "random") for entries in asked]

    def tell(self, trials: Sequence[Trial]) -> None: ...

    def state(self) -> State:
        return {}, {}

    def restore(self, tensors: Any, body: Any) -> None: ...


def ideal(order: Sequence[Sequence[float]], workers: int) -> float:
    """Seconds when nothing but evaluations takes time and batches are waited for; each is dealt in its order."""
    total = 0.0
    for batch in order:
        ends = [0.0] * workers
        for seconds in batch:
            heapq.heapreplace(ends, ends[0] + seconds)
        total += max(ends)
    return total


def measure(workers: int, seconds: float, each: int, layers: int) -> dict[str, Any]:
    count, batch = workers * each, max(BATCH, ROUNDS * workers)
    profiles = [profile(layers, number) for number in range(count)]
    taken = np.random.default_rng(0).uniform(0.5 * seconds, 1.5 * seconds, count).tolist()
    evaluate = Sleeping(profiles, taken)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as threads:
        store = Store(f"sqlite:///{folder}/scaling.db")
        store.create("s", {})
        together = Barrier(workers)
        wait([threads.submit(together.wait) for _ in range(workers)])  # workers have started before a search begins
        start, processor = time.monotonic(), time.process_time()
        search(
            searcher=Listed(profiles),
            judge=Judge(evaluate, lambda candidate, reference, entries: 0.5, REFERENCE, LayerGraph((), (), ())),
            store=store,
            study="s",
            budget=Budget(evaluations=count),
            batch=batch,
            pool=Seats(evaluate, [Chair(f"thread {n}", evaluate, threads) for n in range(workers)]),
        )
        wall, cpu = time.monotonic() - start, time.process_time() - processor
        trials = store.trials("s")
        store.close()
    slept = sum(trial.seconds for trial in trials)
    dealt = sorted(trials, key=lambda trial: (trial.policy, trial.started))  # policy: the same for a batch
    best = ideal([[taken[trial.number] for trial in dealt[at : at + batch]] for at in range(0, count, batch)], workers)
    return {
        "workers": workers,
        "evaluations": count,
        "evaluations_per_second": round(count / wall, 2),
        "efficiency": round(slept / (workers * wall), 4),
        "waiting_for_batches": round(1 - slept / (workers * best), 4),
        "driver_and_store": round(wall / best - 1, 4),
        "processor_ms": round(1000 * cpu / count, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--each", type=int, default=12)
    parser.add_argument("--layers", type=int, default=54)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    rows = [measure(count, given.seconds, given.each, given.layers) for count in given.workers]
    body = {
        "command": "python -m bench.scaling",
        "machine": f"{device_name()}, {os.cpu_count()} cores, load {load:.1f} before",
        "seconds": given.seconds,
        "layers": given.layers,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
