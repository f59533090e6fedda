"""Does the controller earn its keep? Search techniques at equal evaluations on ResNet-20/CIFAR-10, over seeds.

    python -m bench.controller --evaluations 300 --seeds 0 1 2

Runs in pieces: each (technique, seed) is a study in out/bench-controller.db and is skipped when it is complete. Writes
bench/results/controller.json; `python -m bench.tables` makes the table in docs/controller.md from it.

Written down before any test data were read: the figure of a run is the divergence (KL, nats) on the search split of its
best profile within the budget, then the test accuracy of that profile; techniques are compared by means over seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from examples import cifar10, resnet20
from grainwise.api import SearchOptions, make_reward, make_searcher
from grainwise.plan.projection import Projection
from grainwise.search.driver import Budget, Judge, search
from grainwise.session import Session
from grainwise.store.studies import Store
from grainwise.study.sensitivity import Sensitivity
from grainwise.study.trial import Trial, best, meets

RESULTS = Path(__file__).parent / "results" / "controller.json"
TECHNIQUES: dict[str, SearchOptions] = {
    "controller, prior + projection": SearchOptions(),
    "controller, projection, no prior": SearchOptions(prior=False),
    "random, projection": SearchOptions(searcher="random", prior=False),
    "random, plain": SearchOptions(searcher="random", prior=False, projected=False),
    "evolution, prior + projection": SearchOptions(searcher="evolution"),
    "evolution, projection": SearchOptions(searcher="evolution", prior=False),
    "evolution, plain": SearchOptions(searcher="evolution", prior=False, projected=False),
}


def run(
    session: Session, sensitivity: Sensitivity, store: Store, options: SearchOptions, study: str, evaluations: int
) -> tuple[Trial, ...]:
    """One search, or what is in the store of it."""
    budgets = session.budgets(CONSTRAINTS)
    if study not in store.studies():
        store.create(study, {})
    done = store.trials(study)
    if len(done) >= evaluations:
        return done
    searcher = make_searcher(
        session, Projection(session.cost, budgets), sensitivity if options.prior else None, options, evaluations
    )
    judge = Judge(
        session.evaluator, make_reward(session, budgets, options), session.evaluator.reference, session.space.graph
    )
    return search(
        searcher=searcher,
        judge=judge,
        store=store,
        study=study,
        budget=Budget(evaluations=evaluations),
        observer=lambda trial: None,
    )


def kept_sensitivity(session: Session, store: Store) -> Sensitivity:
    """Scores that a study in the store was begun with for the same search space, or measured now."""
    legal = session.space.structures.tobytes() + session.space.precisions.tobytes()
    facts = {
        "model": session.model_fingerprint,
        "data": session.splits.fingerprint,
        "target": session.reference.target.name,
        "legal": hashlib.sha256(legal).hexdigest(),
    }
    for study in store.studies():
        settings = store.settings(study)
        if settings.get("sensitivity") and all(settings.get(name) == value for name, value in facts.items()):
            return Sensitivity.from_json(settings["sensitivity"])
    measured = session.sensitivity(lambda done, total: None)
    store.create(f"sensitivity {len(store.studies())}", {**facts, "sensitivity": measured.to_json()})
    return measured


CONSTRAINTS = {"size": 0.15, "macs": 0.75}


def figures(session: Session, trials: tuple[Trial, ...]) -> dict[str, Any]:
    """What is reported of one search; the test split is read here, once, for its best profile."""
    budgets = session.budgets(CONSTRAINTS)
    leader = best(trials, budgets)
    last = [t for t in trials[-50:] if t.measurement is not None]
    found: dict[str, Any] = {
        "within_budget": sum(t.measurement is not None and meets(t.measurement, budgets) for t in trials),
        "last_50_reward": sum(t.reward or 0.0 for t in last) / max(1, len(last)),
        "last_50_divergence": sum(t.measurement.divergence for t in last if t.measurement) / max(1, len(last)),
        "evaluation_seconds": sum(t.seconds for t in trials),
    }
    if leader is not None and leader.measurement is not None:
        candidate = session.evaluator.finish(leader.entries)
        found |= {
            "best_trial": leader.number,
            "best_divergence": leader.measurement.divergence,
            "size_bytes": candidate.measurement.size_bytes,
            "macs": candidate.measurement.macs,
            "test_accuracy": session.evaluator.test(candidate.model, session.evaluator.forward),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--worker", action="store_true", help="run searches that nobody has begun, write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = cifar10.splits()
    few = replace(data, search=list(data.search)[:1])  # 128 pictures
    session = Session.prepare(resnet20.pretrained(), few, target="packed")
    Path("out").mkdir(exist_ok=True)
    store = Store("sqlite:///out/bench-controller.db")
    sensitivity = kept_sensitivity(session, store)
    rows: list[dict[str, Any]] = []
    runs = [(seed, *item) for seed in arguments.seeds for item in TECHNIQUES.items()]
    if arguments.worker:  # several processes of one thread share the searches; then one run without --worker
        for seed, technique, options in runs:
            study = f"{technique} / {arguments.evaluations} / seed {seed}"
            if study not in store.studies():
                run(session, sensitivity, store, replace(options, seed=seed), study, arguments.evaluations)
                print(study, flush=True)
        return
    torch.set_num_threads(2)  # nothing else runs beside the final figures
    for seed, technique, options in runs:
        study = f"{technique} / {arguments.evaluations} / seed {seed}"
        trials = run(session, sensitivity, store, replace(options, seed=seed), study, arguments.evaluations)
        rows.append({"technique": technique, "seed": seed, **figures(session, trials)})
        print(json.dumps(rows[-1]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    body = {
        "command": f"python -m bench.controller --evaluations {arguments.evaluations} --seeds "
        + " ".join(map(str, arguments.seeds)),
        "machine": f"{platform.machine()}, 2 cores, torch {torch.__version__}, 1 thread",
        "constraints": CONSTRAINTS,
        "evaluations": arguments.evaluations,
        "search_pictures": len(session.splits.search[0].inputs),
        "sensitivity_evaluations": int(session.space.structures[:, 1:].sum() + session.space.precisions[:, 1:].sum()),
        "reference_test_accuracy": session.evaluator.test(session.reference.model, session.evaluator.forward),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
