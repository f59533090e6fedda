"""Searches that are killed with kill -9 at random points: no acknowledged trial is lost, none is there twice, and a
seeded search that is cut goes through the same profiles as an uncut one.

    python -m bench.kills [--kills 50] [--trials 200] [--cuts 5] [--seed 0]

A small network on noise, the controller as searcher, SQLite. The search is a process of its own that
tells each trial after it was stored; it is killed after a random number of trials and up to 30 ms later, and begun
again, until all kills are done; a search that ends before is followed by the next. Writes bench/results/kills.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from grainwise import Data
from grainwise.api import SearchOptions, make_judge, make_searcher
from grainwise.evaluate.timing import device_name
from grainwise.search.driver import Budget, search
from grainwise.session import Session
from grainwise.store.studies import Store
from grainwise.study.trial import Trial, best

RESULTS = Path(__file__).parent / "results" / "kills.json"
MOST_TOLD = 7  # trials that a process tells before it is killed
MOST_LATER = 0.03  # seconds


def network() -> nn.Module:
    """Three layers, random weights: what counts here is the order of things."""
    torch.manual_seed(0)
    stem, body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
    return nn.Sequential(stem, nn.ReLU(), body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def noise() -> Data:
    generator = torch.Generator().manual_seed(0)
    splits = [torch.randn(3, 32, 3, 8, 8, generator=generator)[i] for i in range(3)]
    labels = torch.randint(0, 4, (32,), generator=generator)
    return Data(*([(pictures, labels)] for pictures in splits))


@dataclass(frozen=True)
class Bench:
    """url: of the store. trials: of each search. seed: of the searches."""

    url: str
    trials: int
    seed: int

    @cached_property
    def session(self) -> Session:
        return Session.prepare(network(), noise(), target="packed")

    @cached_property
    def budgets(self) -> dict[str, float]:
        return self.session.budgets({"size": 0.4})

    def search(self, study: str, tell: int | None = None) -> None:
        """One search from where it stands, by this process. tell: a file descriptor to which numbers of trials go."""
        session, options = self.session, SearchOptions(seed=self.seed)
        store = Store(self.url)
        if study not in store.studies():
            store.create(study, {"budgets": self.budgets})
        search(
            searcher=make_searcher(session, session.projection(self.budgets), self.scores, options, self.trials),
            judge=make_judge(session, self.budgets, options),
            store=store,
            study=study,
            budget=Budget(evaluations=self.trials),
            observer=lambda trial: None if tell is None else _told(tell, trial),
        )
        store.close()

    @cached_property
    def scores(self) -> Any:
        return self.session.sensitivity(lambda done, total: None)

    def life(self, study: str, told: int, later: float) -> list[tuple[int, float]]:
        """A process that searches until it has told so many trials, or has ended; (number, divergence) of those told.
        `later` seconds after the last one it is killed.
        """
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                self.search(study, writing)
            finally:
                os._exit(0)
        os.close(writing)
        found = list[str]()
        with os.fdopen(reading) as lines:
            while len(found) < told and (line := lines.readline()):
                found.append(line)
            time.sleep(later)
            os.kill(child, signal.SIGKILL)
            found += lines.readlines()  # told before the kill, read after it
        os.waitpid(child, 0)
        pairs = [line.split() for line in found if line.endswith("\n")]
        return [(int(number), float(divergence)) for number, divergence in pairs]

    def trials_of(self, study: str) -> tuple[Trial, ...]:
        store = Store(self.url)
        try:
            return store.trials(study) if study in store.studies() else ()
        finally:
            store.close()


def _told(tell: int, trial: Trial) -> None:
    divergence = -1.0 if trial.measurement is None else trial.measurement.divergence
    os.write(tell, f"{trial.number} {divergence!r}\n".encode())


@dataclass(slots=True)
class Kills:
    """What was seen. lost: trials that were told and are not in the store as they were told. duplicates: numbers that
    are there twice. unsound: times that SQLite's integrity check was not ok. worse: times that the best trial of a
    study was worse than before. resumed: processes that went on where another one was killed.
    """

    kills: int = 0
    told: int = 0
    lost: int = 0
    duplicates: int = 0
    unsound: int = 0
    worse: int = 0
    resumed: int = 0
    searches: int = 0


def killed(bench: Bench, kills: int, rng: np.random.Generator) -> Kills:
    seen = Kills()
    while seen.kills < kills:
        study, told, leader = f"killed {seen.searches}", dict[int, float](), float("inf")
        seen.searches += 1
        while len(told) < bench.trials and seen.kills < kills:
            seen.resumed += bool(told)
            new = bench.life(study, int(rng.integers(0, MOST_TOLD + 1)), float(rng.uniform(0, MOST_LATER)))
            told.update(new)
            seen.kills += 1
            seen.told += len(new)
            trials = bench.trials_of(study)
            seen.lost += len(
                told.items() - {(t.number, t.measurement.divergence if t.measurement else -1.0) for t in trials}
            )
            seen.duplicates += _duplicates(bench.url)
            seen.unsound += _integrity(bench.url) != "ok"
            found = best(trials, bench.budgets)
            divergence = float("inf") if found is None or found.measurement is None else found.measurement.divergence
            seen.worse += divergence > leader
            leader = divergence
        bench.search(study)
        seen.lost += len(bench.trials_of(study)) != bench.trials
    return seen


def _rows(url: str, query: str) -> list[Any]:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        return connection.execute(query).fetchall()


def _duplicates(url: str) -> int:
    return len(_rows(url, "SELECT study, number FROM trials GROUP BY study, number HAVING count(*) > 1"))


def _integrity(url: str) -> str:
    return str(_rows(url, "PRAGMA integrity_check")[0][0])


def cut(bench: Bench, cuts: int, rng: np.random.Generator) -> int:
    """How many of the searches that are killed once, after a random trial, go through the profiles of an uncut one."""
    bench.search("uncut")
    return sum(sequence == list(_sequence(bench, "uncut")) for sequence in _cut(bench, cuts, rng))


def _cut(bench: Bench, cuts: int, rng: np.random.Generator) -> Iterator[list[Any]]:
    for number, place in enumerate(rng.choice(np.arange(1, bench.trials), cuts, replace=False).tolist()):
        bench.life(f"cut {number}", place, 0.0)
        before = len(bench.trials_of(f"cut {number}"))
        if not place <= before < bench.trials:
            raise RuntimeError(f"a search was to be cut after trial {place} of {bench.trials}, and has {before}")
        bench.search(f"cut {number}")
        yield list(_sequence(bench, f"cut {number}"))


def _sequence(bench: Bench, study: str) -> Iterator[Any]:
    for trial in bench.trials_of(study):
        yield trial.number, trial.entries, trial.outcome, trial.reward, trial.source, trial.policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--cuts", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/kills.db"
        bench = Bench(url, given.trials, given.seed)
        bench.scores  # noqa: B018  (measured before the first process begins)
        found = killed(bench, given.kills, rng)
        same = cut(bench, given.cuts, rng)
    body = {
        "command": f"python -m bench.kills --kills {given.kills} --trials {given.trials} --cuts {given.cuts}",
        "machine": device_name(),
        **asdict(found),
        "cuts": given.cuts,
        "cuts_with_the_same_profiles": same,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
