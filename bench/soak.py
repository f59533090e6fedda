"""Thousands of trials in one process: its memory, its open files and what it leaves behind do not grow.

    python -m bench.soak [--trials 5000] [--searcher rl]

The small network of bench.kills, SQLite, this process and one worker process. Memory is that of this process and of its
worker after a fifth of the trials and at the end; what is left behind, in shared memory and in the folder of temporary
files, when such a search has ended, and when one was killed. Writes bench/results/soak.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from bench.kills import Bench
from grainwise.api import SearchOptions, make_judge, make_searcher
from grainwise.evaluate.timing import device_name
from grainwise.search.driver import Budget, search
from grainwise.store.studies import Store
from grainwise.study.trial import Trial
from grainwise.workers.processes import Processes

KILLED_AFTER = 10.0  # seconds
PATIENCE = 5.0  # until workers have seen that their search is no more
RESULTS = Path(__file__).parent / "results" / "soak.json"


def memory_kb(process: int) -> int:
    """Of what is in memory, all that is not a file's."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def litter() -> set[str]:
    """Names in shared memory and in the folder of temporary files."""
    return {str(path) for folder in ("/dev/shm", tempfile.gettempdir()) for path in Path(folder).iterdir()}  # noqa: S108


def soak(bench: Bench, searcher: str) -> Iterator[dict[str, Any]]:
    """What there is after a fifth of the trials and after all of them."""
    session, options = bench.session, SearchOptions(seed=bench.seed, searcher=searcher)
    scores, marks, found = bench.scores, (bench.trials // 5, bench.trials), list[dict[str, Any]]()
    pool = Processes(session.evaluator, 1)
    (worker,) = pool.processes()
    start = time.monotonic()

    def observe(trial: Trial) -> None:
        if trial.number + 1 in marks:
            found.append(
                {
                    "trials": trial.number + 1,
                    "seconds": round(time.monotonic() - start),
                    "this_process_kb": memory_kb(os.getpid()),
                    "worker_kb": memory_kb(worker),
                    "open_files": len(list(Path("/proc/self/fd").iterdir())),
                    "worker_open_files": len(list(Path(f"/proc/{worker}/fd").iterdir())),
                }
            )

    with closing(Store(bench.url)) as store:
        store.create("soak", {})
        try:
            search(
                searcher=make_searcher(session, session.projection(bench.budgets), scores, options, bench.trials),
                judge=make_judge(session, bench.budgets, options),
                store=store,
                study="soak",
                budget=Budget(evaluations=bench.trials),
                observer=observe,
                pool=pool,
            )
        finally:
            pool.close()
    yield from found


def command(url: str, trials: int, searcher: str) -> list[str]:
    return [sys.executable, "-m", "bench.soak", "--url", url, "--trials", str(trials), "--searcher", searcher]


def left_by_a_kill(url: str, trials: int, searcher: str) -> list[str]:
    """What a search that is killed amid its trials leaves behind."""
    before = litter()
    with subprocess.Popen(command(url, trials, searcher), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while litter() == before:  # its workers are on their way
            time.sleep(0.1)
        time.sleep(KILLED_AFTER)
        run.kill()
    time.sleep(PATIENCE)
    return sorted(litter() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--searcher", default="rl")
    parser.add_argument("--url", help="of a store: search there, print the rows and write no results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.url:
        print(json.dumps(list(soak(Bench(given.url, given.trials, 0), given.searcher))))
        return
    with tempfile.TemporaryDirectory() as folder:
        before = litter()
        inner = command(f"sqlite:///{folder}/soak.db", given.trials, given.searcher)
        rows = json.loads(subprocess.run(inner, stdout=subprocess.PIPE, check=True).stdout)
        body = {
            "command": f"python -m bench.soak --trials {given.trials} --searcher {given.searcher}",
            "machine": f"{device_name()}, {os.cpu_count()} cores",
            "rows": rows,
            "left_behind": sorted(litter() - before),
            "left_behind_by_a_kill": left_by_a_kill(f"sqlite:///{folder}/killed.db", given.trials, given.searcher),
        }
    RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
