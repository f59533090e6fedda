"""How small, and how few multiply-accumulates, before accuracy goes: ResNet-20/CIFAR-10, post-training.

    python -m bench.frontier

Each row is what `grainwise search --model examples.demo:model --data examples.demo:data --NAME SHARE --budget 200`
gives: same seed, same options. Writes bench/results/frontier.json; `python -m bench.tables` makes the README's table.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from bench.controller import kept_sensitivity
from examples import cifar10, resnet20
from grainwise.api import SearchOptions, choose, make_reward, make_searcher
from grainwise.plan.projection import Projection
from grainwise.search.driver import Budget, Judge, search
from grainwise.session import Session
from grainwise.store.studies import Store

RESULTS = Path(__file__).parent / "results" / "frontier.json"
POINTS = [
    {"size": 0.125},
    {"size": 0.10},
    {"size": 0.08},
    {"macs": 0.9},
    {"macs": 0.75},
    {"macs": 0.6},
    {"macs": 0.5},
]
EVALUATIONS = 200


def main() -> None:
    torch.set_num_threads(1)
    session = Session.prepare(resnet20.pretrained(), cifar10.splits(), target="packed")
    Path("out").mkdir(exist_ok=True)
    store = Store("sqlite:///out/bench-frontier.db")
    sensitivity = kept_sensitivity(session, store)
    options = SearchOptions()
    rows: list[dict[str, Any]] = []
    for constraints in POINTS:
        study = "frontier " + " ".join(f"{name} {share}" for name, share in constraints.items())
        if study not in store.studies():
            store.create(study, {})
        budgets = session.budgets(constraints)
        judge = Judge(
            session.evaluator, make_reward(session, budgets, options), session.evaluator.reference, session.space.graph
        )
        trials = search(
            searcher=make_searcher(
                session, Projection(session.cost, budgets), sensitivity, options, evaluations=EVALUATIONS
            ),
            judge=judge,
            store=store,
            study=study,
            budget=Budget(evaluations=EVALUATIONS),
            observer=lambda trial: None,
        )
        result = session.finish(choose(session, trials, budgets), len(trials))
        rows.append({"constraints": constraints, **result.figures()})
        print(json.dumps(rows[-1]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    machine = f"{platform.machine()}, 2 cores, torch {torch.__version__}, 1 thread"
    body = {"command": "python -m bench.frontier", "machine": machine, "evaluations": EVALUATIONS, "rows": rows}
    RESULTS.write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
