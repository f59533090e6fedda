"""What the store costs: processes that fill one study at the same time, and what a trial adds to its evaluation.

    python -m bench.store [--processes 8] [--trials 500] [--layers 500] [--postgres | --url URL]

First `processes` processes add `trials` trials each to one study, profiles of 20 layers, as fast as they can. Then one
process does for a trial what the driver does (queued and started in batches of 16, then added, a checkpoint of 500 kB
after each batch), profiles of `layers` layers. SQLite in a temporary directory unless a URL is given. Writes
bench/results/store.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np

from grainwise.evaluate.timing import device_name
from grainwise.plan.choices import PRECISIONS, STRUCTURES, Entry
from grainwise.search.driver import BATCH
from grainwise.store.studies import Checkpoint, Store, StoreError
from grainwise.study.measurement import Measurement
from grainwise.study.trial import Task, Trial
from tests.store.postgres import server

RESULTS = Path(__file__).parent / "results" / "store.json"
STATE_BYTES = 500_000  # of a searcher: about the controller's after 200 trials


def profile(layers: int, number: int) -> dict[str, Entry]:
    """Every layer is compressed in two ways."""
    pick = np.random.default_rng(number).integers(1, 9, (layers, 2)).tolist()
    return {f"stage{i}.conv": Entry(STRUCTURES[s], PRECISIONS[1 + p % 3]) for i, (s, p) in enumerate(pick)}


def trial(number: int, entries: Mapping[str, Entry], worker: str) -> Trial:
    measured = Measurement(0.9, 0.1, 1000, 2000)
    return Trial(number, entries, measured, 0.5, "controller", 0.1, policy=0, worker=worker, started=time.time())


def fill(url: str, first: int, trials: int, told: Queue[tuple[list[float], str]]) -> None:
    """One process; tells seconds of each trial, and what went wrong."""
    store, seconds = Store(url), list[float]()
    try:
        for number in range(first, first + trials):
            start = time.monotonic()
            entries = profile(20, number)
            store.start("together", {number: f"worker {first}"}, time.time())
            store.add("together", trial(number, entries, f"worker {first}"))
            seconds.append(time.monotonic() - start)
        told.put((seconds, ""))
    except StoreError as error:
        told.put((seconds, str(error)))
    finally:
        store.close()


def together(url: str, processes: int, trials: int) -> dict[str, Any]:
    store = Store(url)
    store.create("together", {})
    store.queue("together", [Task(n, profile(20, n), "random", 0) for n in range(processes * trials)])
    store.close()
    fork = multiprocessing.get_context("fork")
    told: Queue[tuple[list[float], str]] = fork.Queue()
    running = [fork.Process(target=fill, args=(url, place * trials, trials, told)) for place in range(processes)]
    start = time.monotonic()
    for process in running:
        process.start()
    found = [told.get() for _ in running]
    wall = time.monotonic() - start
    for process in running:
        process.join()
    seconds = sorted(s for each, _ in found for s in each)
    store = Store(url)
    rows = len(store.trials("together"))
    store.close()
    return {
        "processes": processes,
        "rows": rows,
        "errors": [error for _, error in found if error],
        "trials_per_second": round(len(seconds) / wall, 1),
        "p50_ms": round(1000 * float(np.median(seconds)), 2),
        "p99_ms": round(1000 * float(np.quantile(seconds, 0.99)), 2),
        "longest_ms": round(1000 * seconds[-1], 2),
    }


def overhead(url: str, layers: int, batches: int) -> dict[str, Any]:
    """Milliseconds of a trial beside its evaluation: by the clock, and of the processor."""
    store = Store(url)
    store.create("alone", {})
    wall, cpu = list[float](), list[float]()
    for first in range(0, batches * BATCH, BATCH):
        profiles = {number: profile(layers, number) for number in range(first, first + BATCH)}
        start, processor = time.monotonic(), time.process_time()
        store.queue("alone", [Task(number, entries, "controller", first) for number, entries in profiles.items()])
        store.start("alone", dict.fromkeys(profiles, "worker"), time.time())
        for number, entries in profiles.items():
            store.add("alone", trial(number, entries, "worker"), keys={number: f"{number:064}"})
        store.save_checkpoint("alone", Checkpoint(first + BATCH, {"rng": 1}, bytes(STATE_BYTES)))
        wall.append((time.monotonic() - start) / BATCH)
        cpu.append((time.process_time() - processor) / BATCH)
    start = time.monotonic()
    read = len(store.trials("alone"))
    reading = (time.monotonic() - start) / read
    store.close()
    milliseconds = {"median": np.median(wall), "longest": max(wall), "processor": np.median(cpu), "reading": reading}
    return {"layers": layers, **{f"{name}_ms": round(1000 * float(value), 2) for name, value in milliseconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--layers", type=int, default=500)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="of an empty database")
    where.add_argument("--postgres", action="store_true", help="a server of this bench's own, forced to the disk")
    given = parser.parse_args()
    load = os.getloadavg()[0]  # with other work on the machine, times are the disk's and the scheduler's
    with tempfile.TemporaryDirectory() as folder, server(durable=True) if given.postgres else nullcontext("") as own:
        url = given.url or (f"{own}/postgres" if own else f"sqlite:///{folder}/store.db")
        body = {
            "command": f"python -m bench.store --processes {given.processes} --trials {given.trials}"
            + " --postgres" * bool(given.postgres),
            "machine": f"{device_name()}, load {load:.1f} before",
            "database": url.partition(":")[0],
            "together": together(url, given.processes, given.trials),
            "alone": overhead(url, given.layers, 20),
        }
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**kept, body["database"]: body}, indent=1) + "\n")
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
