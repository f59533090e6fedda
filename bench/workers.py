"""Evaluations per second of worker processes: 1, 2, ... of them, actors of Ray, and this process alone, on the same
profiles.

    python -m bench.workers [--network resnet20] [--evaluations 64] [--workers 1 2] [--rounds 3]

Profiles of a random search within an eighth of the size, target `packed`, one thread for each process; their layers are
solved before the clock starts, and workers have started. Every way runs in turn, `rounds` times, on new profiles in
each round and some before the first; medians are reported.
Outcomes must be the same to the last bit. memory_kb: what a worker has of its own (anonymous pages) after the
evaluations, beside that of this process, most of it layers and activations that it keeps within an eighth of the free
memory each; copied_kb: what it has copied of the shared tensors. Writes bench/results/workers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from examples import demo, minilm
from grainwise import Data
from grainwise.evaluate.sharing import Sharing
from grainwise.evaluate.timing import device_name
from grainwise.plan.choices import Entry
from grainwise.search.baselines import RandomSearcher
from grainwise.session import Session
from grainwise.study.measurement import Outcome
from grainwise.workers.cluster import Cluster
from grainwise.workers.pool import Inline, Pool
from grainwise.workers.processes import Processes
from grainwise.workers.seats import Seats
from grainwise.workers.shared import Shared

RESULTS = Path(__file__).parent / "results" / "workers.json"
Profiles = Mapping[int, Mapping[str, Entry]]
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Data]]] = {
    "resnet20": (demo.model, demo.data),
    "minilm": (minilm.model, minilm.data),
}


def run(pool: Pool, profiles: Profiles) -> tuple[float, dict[int, Outcome]]:
    """(seconds, outcomes)."""
    start = time.monotonic()
    run = pool.run(profiles, lambda key: None, lambda hands: None, lambda: False)
    judged = [each for ended in run for each in ended]
    return time.monotonic() - start, {each.number: each.outcome for each in judged}


def own_kilobytes(pid: int) -> int:
    """Memory that no other process has: anonymous pages, in memory or swapped out."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Anonymous:", "Swap:")))


def copied_kilobytes(pid: int) -> int:
    """Of the one copy of the tensors, what a process of ours has written to and so has for itself."""
    found, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, *others = line.split()
        if not first.endswith(":"):
            ours = "memfd:grainwise" in line
        elif ours and first == "Anonymous:":
            found += int(others[0])
    return found


def measure(session: Session, rounds: Sequence[Profiles], workers: Sequence[int]) -> list[dict[str, Any]]:
    pools: dict[str, Pool] = {"this process": Inline(session.evaluator)}
    pools |= {f"{count} processes": Processes(session.evaluator, count) for count in workers}
    pools[f"{max(workers)} actors of Ray"] = Cluster(session.evaluator, max(workers))
    seconds: dict[str, list[float]] = {name: [] for name in pools}
    rows = []
    for number, profiles in enumerate(rounds):  # the first one starts and warms them
        truth: dict[int, Outcome] = {}
        for name, pool in pools.items():
            taken, outcomes = run(pool, profiles)
            truth = truth or outcomes
            if outcomes != truth:
                raise RuntimeError(f"{name} gave other figures than this process")
            seconds[name] += [taken] if number else []
    for name, pool in pools.items():
        row: dict[str, Any] = {"pool": name, "evaluations_per_second": round(len(rounds[0]) / median(seconds[name]), 3)}
        if isinstance(pool, Seats):
            row["memory_kb"] = [own_kilobytes(pid) for pid in pool.processes()]
        if isinstance(pool, Processes):
            row["copied_kb"] = [copied_kilobytes(pid) for pid in pool.processes()]
        rows.append({**row, "seconds": [round(s, 2) for s in seconds[name]]})
        pool.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--evaluations", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, data = NETWORKS[given.network]
    session = Session.prepare(model(), data(), target="packed", sharing=Sharing(measurements=False))
    searcher = RandomSearcher(session.projection(session.budgets({"size": 0.125})), seed=0)
    rounds = [
        {number: proposal.entries for number, proposal in enumerate(searcher.ask(given.evaluations))}
        for _ in range(given.rounds + 1)
    ]
    for profiles in rounds:  # layers are solved, nothing else is kept
        run(Inline(session.evaluator), profiles)
    session.evaluator.__dict__.pop("prefixes", None)
    shared = Shared(session.evaluator)
    body = {
        "command": f"python -m bench.workers --network {given.network} --evaluations {given.evaluations}",
        "machine": f"{device_name()}, {os.cpu_count()} cores, torch {torch.__version__}, 1 thread each",
        "shared_kb": shared.bytes // 1024,
        "this_process_kb": own_kilobytes(os.getpid()),
        "rows": measure(session, rounds, given.workers),
    }
    shared.close()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**kept, given.network: body}, indent=1) + "\n")
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
