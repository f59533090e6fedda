"""What each part of the controller is worth: ResNet-20/CIFAR-10, size and MACs, one part left out or changed at a time.

    python -m bench.controller [VARIANT ...] [--seeds 0 1 2] [--evaluations 300] [--worker]

The task is `resnet20-mixed` of bench/search.py. Runs in pieces: each (variant, seed) is a study in
out/bench-controller.db and is skipped when it is complete; several processes with --worker share the work, each with
variants of its own. A run without it writes its rows to bench/results/controller.json, under the number of evaluations;
`python -m bench.tables` makes the tables in docs/controller.md.

Written down before any test data were read: the figure of a run is the divergence (KL, nats) on the search split of its
best profile within the budgets, then the test accuracy of that profile; variants are compared by means over seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.search import TASKS
from grainwise.api import SearchOptions, make_judge
from grainwise.evaluate.timing import device_name
from grainwise.graph.features import controller_features
from grainwise.plan.space import SpaceKind
from grainwise.search.driver import Budget, search
from grainwise.search.rl import ControllerConfig, ControllerSearcher
from grainwise.session import Session
from grainwise.store.studies import Store
from grainwise.study.sensitivity import Sensitivity
from grainwise.study.trial import Trial, best, meets

RESULTS = Path(__file__).parent / "results" / "controller.json"
STUDIES = Path("out") / "bench-controller.db"
TASK = TASKS["resnet20-mixed"]


@dataclass(frozen=True)
class Variant:
    """config: fields of `ControllerConfig` that differ. complexity_weight: of the reward; 0 as in the scoreboard.
    statistics: whether the controller sees those of the feature maps, beside each layer's kind and shape.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    complexity_weight: float = 0.0
    space: SpaceKind = SpaceKind.CHAIN
    statistics: bool = True


VARIANTS = {
    "as it is": Variant(),
    "untrained: the prior as policy": Variant({"learning_rate": 0.0}),
    "no statistics of feature maps": Variant(statistics=False),
    "REINFORCE for PPO": Variant({"algorithm": "reinforce"}),
    "no programme, no Thompson samples": Variant({"sampled": 0.0}),
    "no exchanges": Variant({"exchanged": 0.0}),
    "the policy alone": Variant({"sampled": 0.0, "exchanged": 0.0}),
    "the policy alone, untrained": Variant({"sampled": 0.0, "exchanged": 0.0, "learning_rate": 0.0}),
    "scores not corrected": Variant({"learn_scores": False}),
    "no prior": Variant({"use_prior": False}),
    "complexity weight 0.1": Variant(complexity_weight=0.1),
    "complexity weight 0.5": Variant(complexity_weight=0.5),
    "one technique a layer": Variant(space=SpaceKind.SINGLE),
}


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


class Bench:
    """The sessions of both kinds of space, made when they are needed, and their scores."""

    def __init__(self, store: Store, evaluations: int) -> None:
        self.store, self.evaluations = store, evaluations
        self._sessions: dict[SpaceKind, Session] = {}

    def session(self, kind: SpaceKind) -> Session:
        if kind not in self._sessions:
            self._sessions[kind] = Session.prepare(TASK.model(), TASK.data(), target=TASK.target, space=kind)
        return self._sessions[kind]

    def search(self, name: str, seed: int) -> tuple[Trial, ...]:
        """One search, or what is in the store of it; one that was cut goes on."""
        study = f"{name} / {self.evaluations} / seed {seed}"
        if study not in self.store.studies():
            self.store.create(study, {})
        done = self.store.trials(study)
        if len(done) >= self.evaluations:
            return done
        variant = VARIANTS[name]
        session = self.session(variant.space)
        budgets = session.budgets(TASK.constraints)
        config = ControllerConfig(horizon=self.evaluations, **variant.config)
        scores = kept_sensitivity(session, self.store) if config.use_prior else None
        features = session.features() if variant.statistics else _without_statistics(session)
        options = SearchOptions(complexity_weight=variant.complexity_weight, space=variant.space)
        return search(
            searcher=ControllerSearcher(session.projection(budgets), features, scores, seed=seed, config=config),
            judge=make_judge(session, budgets, options),
            store=self.store,
            study=study,
            budget=Budget(evaluations=self.evaluations),
        )

    def row(self, name: str, seed: int) -> dict[str, Any]:
        """What is reported of one search; the test split is read here, once, for its best profile."""
        trials, session = self.search(name, seed), self.session(VARIANTS[name].space)
        budgets = session.budgets(TASK.constraints)
        leader = best(trials, budgets)
        found: dict[str, Any] = {
            "variant": name,
            "seed": seed,
            "within_budget": sum(t.measurement is not None and meets(t.measurement, budgets) for t in trials),
            "evaluation_seconds": sum(t.seconds for t in trials),
        }
        if leader is None or leader.measurement is None:
            return found
        candidate = session.evaluator.finish(leader.entries)
        return found | {
            "best_trial": leader.number,
            "best_source": leader.source,
            "best_divergence": leader.measurement.divergence,
            "size_bytes": candidate.measurement.size_bytes,
            "macs": candidate.measurement.macs,
            "test_accuracy": session.evaluator.test(candidate.model, session.evaluator.forward),
        }


def _without_statistics(session: Session) -> Tensor:
    return controller_features(session.space.graph, torch.zeros_like(session.statistics()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("variants", nargs="*", default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--worker", action="store_true", help="make searches, write no results")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.variants if name not in VARIANTS]:
        parser.error(f"no variant is called {unknown[0]!r}; give some of {', '.join(VARIANTS)}")
    torch.set_num_threads(1)
    STUDIES.parent.mkdir(exist_ok=True)
    bench = Bench(Store(f"sqlite:///{STUDIES}"), arguments.evaluations)
    runs = [(name, seed) for seed in arguments.seeds for name in arguments.variants]
    if arguments.worker:
        for name, seed in runs:
            bench.search(name, seed)
            print(name, seed, flush=True)
        return
    session = bench.session(SpaceKind.CHAIN)
    body = {
        "command": shlex.join(["python", "-m", "bench.controller", *sys.argv[1:]]),
        "machine": f"{device_name()}, torch {torch.__version__}, 1 thread",
        "constraints": dict(TASK.constraints),
        "evaluations": arguments.evaluations,
        "search_pictures": len(session.splits.search[0].inputs),
        "sensitivity_evaluations": int(session.space.structures[:, 1:].sum() + session.space.precisions[:, 1:].sum()),
        "reference_test_accuracy": session.evaluator.test(session.reference.model, session.evaluator.forward),
        "rows": [bench.row(name, seed) for name, seed in runs],
    }
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[str(arguments.evaluations)] = body
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
