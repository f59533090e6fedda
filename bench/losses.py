"""Workers that are killed with kill -9 while they evaluate: each trial ends once, and all seats work again soon.

    python -m bench.losses [--kills 40] [--trials 200] [--workers 2]

The small network of bench.kills, profiles of a random search, the real driver and SQLite. An evaluation waits before it
answers, so that there is something to kill, and leaves a line when it begins. Workers are killed in turn,
at a random moment; a loss is over when the process that took the place begins its first evaluation. Every figure must
be that of an unhurt search, to the last bit. Writes bench/results/losses.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bench.kills import Bench
from grainwise.api import SearchOptions, make_judge
from grainwise.evaluate.timing import device_name
from grainwise.plan.choices import Entry
from grainwise.search.baselines import RandomSearcher
from grainwise.search.driver import Budget, search
from grainwise.store.studies import Store
from grainwise.study.measurement import Outcome
from grainwise.workers.pool import Evaluate, Inline, Pool
from grainwise.workers.processes import Processes

RESULTS = Path(__file__).parent / "results" / "losses.json"
WAIT_SECONDS = 0.6


@dataclass(frozen=True)
class Waiting:
    """An evaluation that leaves (process, monotonic seconds) in `log` when it begins, and waits before it answers."""

    evaluate: Evaluate
    log: Path
    seconds: float

    def __call__(self, entries: Mapping[str, Entry]) -> Outcome:
        with self.log.open("a") as lines:
            lines.write(f"{os.getpid()} {time.monotonic()!r}\n")
        time.sleep(self.seconds)
        return self.evaluate(entries)

    def begun(self) -> list[tuple[int, float]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(int(process), float(at)) for process, at in map(str.split, lines)]


class Killer(threading.Thread):
    """Kills processes that evaluate, each some time into its second evaluation or later; `at`: when, and which."""

    def __init__(self, waiting: Waiting, kills: int, rng: np.random.Generator) -> None:
        super().__init__(daemon=True)
        self.waiting, self.kills, self.rng = waiting, kills, rng
        self.at: list[tuple[int, float]] = []

    def run(self) -> None:
        while len(self.at) < self.kills:
            time.sleep(float(self.rng.uniform(0.3, 1.0)) * self.waiting.seconds)
            begun, dead = Counter(process for process, _ in self.waiting.begun()), {process for process, _ in self.at}
            if grown := [process for process, count in begun.items() if count > 1 and process not in dead]:
                self.at.append((grown[0], time.monotonic()))
                os.kill(grown[0], signal.SIGKILL)


def searched(bench: Bench, study: str, pool: Pool, evaluate: Evaluate) -> dict[str, int]:
    """Trials by state after one search through this pool, which is closed."""
    session = bench.session
    with closing(Store(bench.url)) as store:
        store.create(study, {})
        try:
            search(
                searcher=RandomSearcher(session.projection(bench.budgets), seed=bench.seed),
                judge=replace(make_judge(session, bench.budgets, SearchOptions()), evaluate=evaluate),
                store=store,
                study=study,
                budget=Budget(evaluations=bench.trials),
                pool=pool,
            )
        finally:
            pool.close()
        return {str(state): count for state, count in store.study(study).counts.items()}


def measure(bench: Bench, folder: Path, workers: int, kills: int) -> dict[str, Any]:
    evaluator = bench.session.evaluator
    waiting = Waiting(evaluator, folder / "log", WAIT_SECONDS)
    killer = Killer(waiting, kills, np.random.default_rng(bench.seed))
    start = time.monotonic()
    pool = Processes(waiting, workers)
    pool.processes()
    started = time.monotonic() - start
    killer.start()
    states = searched(bench, "hurt", pool, waiting)
    begun = waiting.begun()
    searched(bench, "unhurt", Inline(evaluator), evaluator)
    first = sorted({process: at for process, at in reversed(begun)}.values())
    back = [min((at for at in first if at > when), default=float("inf")) - when for _, when in killer.at]
    trials = bench.trials_of("hurt")
    return {
        "kills": len(killer.at),
        "trials": states,
        "numbers": len({trial.number for trial in trials}),
        "evaluations": len(begun),
        "failed": sum(trial.measurement is None for trial in trials),
        "other_figures": sum(a.outcome != b.outcome for a, b in zip(trials, bench.trials_of("unhurt"), strict=True)),
        "start_seconds": round(started, 2),
        "back_seconds": {"median": round(median(back), 2), "most": round(max(back), 2)} if back else {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(f"sqlite:///{folder}/losses.db", given.trials, 0)
        found = measure(bench, Path(folder), given.workers, given.kills)
    body = {
        "command": f"python -m bench.losses --kills {given.kills} --trials {given.trials} --workers {given.workers}",
        "machine": f"{device_name()}, {os.cpu_count()} cores",
        **found,
    }
    RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
