"""What recovery wins back: ResNet-20 on CIFAR-10, compressed hard by a short search, then fine-tuned.

    python -m bench.recover [TASK ...] [--seeds N ...] [--epochs N]

The start of a task is one search; seeds are of the training data's order and augmentation. Artefacts and checkpoints
lie in out/bench-recover/, rows in bench/results/recover.json, written as soon as they are made: a run that was cut, or
is repeated, goes on where it was. `python -m bench.tables` makes the table in docs/recover.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench.controller import kept_sensitivity
from bench.workshop import Kept
from examples import cifar10, resnet20
from grainwise.api import SearchOptions, make_judge, make_searcher
from grainwise.evaluate.timing import device_name
from grainwise.export.artefact import load
from grainwise.leaders import choose
from grainwise.recover.checkpoint import Checkpoint
from grainwise.recover.options import STANDARD, RecoverOptions, training_budget
from grainwise.search.driver import Budget, search
from grainwise.session import Session
from grainwise.store.studies import Store

RESULTS = Path(__file__).parent / "results" / "recover.json"
FILES = Path("out") / "bench-recover"
BATCH = 64  # pictures: an epoch of `size` ends at a divergence of 0.060, in batches of 128 at 0.065
EVALUATIONS = 240  # of the controller
SEARCH = 2048  # pictures: by 256 an epoch cannot be chosen, their divergence swings by a factor of two


@dataclass(frozen=True, slots=True)
class Task:
    """constraints: of the search. epochs: of all training pictures. most: drop in points that is asked for. rate: peak
    of the learning rate.
    """

    constraints: Mapping[str, float]
    epochs: int
    most: float
    rate: float = STANDARD.learning_rate


TASKS = {
    "size": Task({"size": 1 / 16}, 12, 1.0, rate=2.5e-3),
    "macs": Task({"macs": 0.5}, 1, 1.5),
}


class Bench:
    """One network and its data, prepared when they are needed."""

    def __init__(self, folder: Path, kept: Kept) -> None:
        self.folder, self.kept = folder, kept
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def session(self) -> Session:
        return Session.prepare(resnet20.pretrained(), cifar10.splits(search=SEARCH))

    def start(self, name: str) -> Path:
        """The artefact of a task's search, made when it is not there."""
        directory = self.folder / name
        if directory.exists():
            return directory
        session, constraints = self.session, TASKS[name].constraints
        store = Store(f"sqlite:///{self.folder / 'searches.db'}")
        options = SearchOptions()
        try:
            budgets, study = session.budgets(constraints), f"{name} {len(store.studies())}"
            sensitivity = kept_sensitivity(session, store)
            store.create(study, {"constraints": dict(constraints)})
            trials = search(
                searcher=make_searcher(session, session.projection(budgets), sensitivity, options, EVALUATIONS),
                judge=make_judge(session, budgets, options),
                store=store,
                study=study,
                budget=Budget(evaluations=EVALUATIONS),
            )
        finally:
            store.close()
        return session.finish(choose(session, trials, budgets), len(trials)).export(directory)

    def row(self, name: str, seed: int, epochs: int) -> dict[str, Any]:
        """One recovery, from the results file or made now."""
        label, start = f"seed {seed}, epochs: {epochs}", self.start(name)
        if (found := self.kept.rows(name).get(label)) is not None:
            return found
        directory = self.folder / f"{name}-{seed}-{epochs}"
        session = self.session
        artefact = load(start, resnet20.pretrained())
        before = artefact.manifest.figures
        folder = directory.with_name(f"{directory.name}.recovery")
        candidate, recovered = session.recover(
            session.evaluator.deployed(artefact.model, artefact.profile.entries),
            artefact.profile.entries,
            cifar10.Training(size=BATCH),
            budget=training_budget(epochs, None),
            options=RecoverOptions(seed=seed, learning_rate=TASKS[name].rate),
            folder=folder,
            resume=Checkpoint.exists(folder),
            watch=_print_progress,
        )
        result = session.result(candidate, artefact.profile.entries, int(before["trials"] or 0), recovered)
        result.export(directory)
        row = {"name": label, "seed": seed, "epochs": epochs, "before": before, "after": result.figures()}
        self.kept.update(name, rows=[*self.kept.rows(name).values(), {**row, "scores": recovered.scores}])
        Checkpoint.remove(folder)
        return row


def _print_progress(done: int, total: int, note: str) -> None:
    if done % 50 == 0:
        print(f"{done}/{total}: {note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of all training pictures; the task's own number otherwise")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--files", type=Path, default=FILES)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.tasks if name not in TASKS]:
        parser.error(f"no task is called {unknown[0]}; give some of {', '.join(TASKS)}")
    torch.set_num_threads(1)
    bench = Bench(arguments.files, Kept(arguments.out))
    for name in arguments.tasks:
        task = TASKS[name]
        for seed in arguments.seeds:
            row = bench.row(name, seed, arguments.epochs or task.epochs)
            print(json.dumps({key: row["after"][key] for key in ("accuracy", "size_bytes", "macs")}), flush=True)
        bench.kept.update(
            name,
            constraints=dict(task.constraints),
            most=task.most,
            command=" ".join(["python -m bench.recover", *sys.argv[1:]]),
            machine=f"{device_name()}, torch {torch.__version__}",
        )


if __name__ == "__main__":
    main()
