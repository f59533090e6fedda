"""`compare`: searchers at equal evaluations over seeds; every run is a study, skipped when done, resumed when cut."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from math import ceil
from typing import Any

from torch import Tensor

from grainwise.api import Observer, SearchOptions, make_judge, make_searcher, open_study, study_settings, watching
from grainwise.calibrate import with_latency
from grainwise.evaluate.calibration import Calibration
from grainwise.evaluate.fisher import DRAWS
from grainwise.leaders import aimed
from grainwise.search.driver import Budget, search
from grainwise.search.registry import Table, technique
from grainwise.search.searcher import Proposal, Searcher, State
from grainwise.session import AIM, Session
from grainwise.store.studies import Store, StoreError
from grainwise.study.sensitivity import Sensitivity
from grainwise.study.trial import Trial, best, meets

Clock = list[list[float]]
"""(trials told, seconds that the searcher itself took until then) for each batch."""

_BEGUN = "budgets"  # record of what milliseconds decide

OPTIONS = SearchOptions(complexity_weight=0.0)
"""Shaping is off: every searcher pursues the figure that is compared."""


def compare(
    session: Session,
    *,
    searchers: Sequence[str],
    seeds: Sequence[int],
    evaluations: int,
    constraints: Mapping[str, float],
    store: Store,
    study: str,
    options: SearchOptions = OPTIONS,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Run each searcher with each seed for `evaluations` evaluations by one evaluator, and report all of it as JSON.

    The figure of a run is the divergence on the search split of its best profile within the budgets; the test split is
    read once for that profile, when the run has ended, and kept. Scores are measured once for all; a run's `seconds`
    count them in full. Compressed layers are shared between the runs of a process (`VariantLibrary`), so that the first
    ones pay for solving them, and so are measurements unless the session's `Sharing` says otherwise: seconds compare
    techniques roughly, evaluations exactly.

    options: of all searches but for searcher and seed. Raises ValueError for an unknown searcher, StoreError when
    `study` was begun with something else.
    """
    runs = {(name, seed): replace(options, searcher=name, seed=seed) for seed in seeds for name in searchers}
    if "latency" in constraints:
        session = _with_milliseconds(session, store, study, observer or Observer())
    bench = _Bench(session, store, study, constraints, evaluations, observer or Observer())
    tables = {found.table: bench.scores(found.table, options) for found in map(technique, searchers) if found.table}
    return {
        "study": study,
        "model": session.model_fingerprint,
        "data": session.splits.fingerprint,
        "target": session.reference.target.name,
        "constraints": dict(constraints),
        "budgets": bench.budgets(),
        "evaluations": evaluations,
        "seeds": list(seeds),
        "reference": session.evaluator.reference.to_json(),
        "scores": {name: {k: v for k, v in kept.items() if k != "sensitivity"} for name, kept in tables.items()},
        "runs": [bench.run(given) for given in runs.values()],
    }


def _with_milliseconds(session: Session, store: Store, study: str, observer: Observer) -> Session:
    """The session with milliseconds as the comparison was begun with, or as they are measured now."""
    begun = f"{study}/{_BEGUN}"
    line = store.settings(begun)["line"] if begun in store.studies() else None
    observer.stage("latency")
    return with_latency(session, observer.progress, None if line is None else Calibration(**line))


@dataclass(frozen=True)
class _Bench:
    """What the runs of a comparison share."""

    session: Session
    store: Store
    study: str
    constraints: Mapping[str, float]
    evaluations: int
    observer: Observer

    def budgets(self) -> dict[str, float]:
        """Those that the comparison was begun with: milliseconds differ from run to run."""

        def make() -> dict[str, Any]:
            line = self.session.line
            return {"budgets": self.session.budgets(self.constraints), "line": None if line is None else asdict(line)}

        return dict(self._kept(_BEGUN, {**self._place(), "constraints": dict(self.constraints)}, make)["budgets"])

    def scores(self, table: Table, options: SearchOptions) -> dict[str, Any]:
        """A table of scores with what it cost, measured once for a comparison. passes: forward passes of the
        samples that are scored on; for gradients what equals them, a backward pass counted as two.
        """
        space = self.session.space
        choices = int(space.structures[:, 1:].sum() + space.precisions[:, 1:].sum())
        passes = choices if table == "kl" else 1 + 2 * DRAWS + ceil(choices / len(space.layers))
        chosen = options.to_json()

        def make() -> dict[str, Any]:
            self.observer.stage("sensitivity")
            start = time.monotonic()
            found = self.session.sensitivity(self.observer.progress, table)
            return {"passes": passes, "seconds": time.monotonic() - start, "sensitivity": found.to_json()}

        settings = {**self._place(), "space": chosen["space"], "methods": chosen["methods"]}
        return self._kept(f"scores {table}", settings, make)

    def aim(self, options: SearchOptions) -> float:
        """What share of a latency budget all techniques aim at, found once for a comparison."""
        if "latency" not in self.constraints:
            return AIM
        scores = self.scores("kl", options)["sensitivity"]

        def make() -> dict[str, float]:
            return {"aim": aimed(self.session, self.budgets(), Sensitivity.from_json(scores))}

        return float(self._kept("aim", {**self._place(), "constraints": dict(self.constraints)}, make)["aim"])

    def run(self, options: SearchOptions) -> dict[str, Any]:
        """One search, or what is in the store of it, and its figures."""
        name = f"{options.searcher}/{self.evaluations} evaluations/seed {options.seed}"
        study, budgets = f"{self.study}/{name}", self.budgets()
        table = technique(options.searcher).table
        scores = self.scores(table, options) if table else {}
        settings = study_settings(self.session, self.constraints, budgets, options)
        sensitivity, aim = open_study(
            self.store,
            study,
            settings,
            options,
            lambda _: Sensitivity.from_json(scores["sensitivity"]),
            lambda _: self.aim(options),
            resume=study in self.store.studies(),
        )
        trials, kept = self.store.trials(study), self.store.checkpoint(study)
        if kept is not None and kept.trials >= self.evaluations:
            clock = kept.body["clock"]
        else:
            trials, clock = self._search(study, options, budgets, sensitivity, aim)
        found = _figures(options, trials, clock, budgets, scores)
        if (leader := best(trials, budgets)) is not None:
            final = self._kept(f"{name}/result", {}, lambda: _final(self.session, leader, budgets))
            place = {"trial": leader.number, "source": leader.source}
            found["best"] = {**place, "seconds": found["seconds_curve"][leader.number], **final}
        return found

    def _search(
        self,
        study: str,
        options: SearchOptions,
        budgets: Mapping[str, float],
        sensitivity: Sensitivity | None,
        aim: float,
    ) -> tuple[tuple[Trial, ...], Clock]:
        session, limit = self.session, Budget(evaluations=self.evaluations)
        self.observer.stage("search")
        projection = session.projection(budgets, aim)
        searcher = _Timed(lambda: make_searcher(session, projection, sensitivity, options, self.evaluations))
        trials = search(
            searcher=searcher,
            judge=make_judge(session, budgets, options),
            store=self.store,
            study=study,
            budget=limit,
            observer=watching(self.observer, self.store.trials(study), budgets),
        )
        return trials, searcher.clock

    def _place(self) -> dict[str, Any]:
        session = self.session
        target = session.reference.target.name
        return {"model": session.model_fingerprint, "data": session.splits.fingerprint, "target": target}

    def _kept(self, name: str, settings: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What `make` gave when the record `name` was made, with its settings, which must be these."""
        study = f"{self.study}/{name}"
        if study not in self.store.studies():
            self.store.create(study, {**settings, **make()})
        kept = self.store.settings(study)
        for key, value in settings.items():
            if kept[key] != value:
                raise StoreError(
                    f"{study!r} was begun with another {key}: {kept[key]}, not {value}; name another study"
                )
        return kept


class _Timed:
    """A searcher, and the clock of what it takes itself."""

    def __init__(self, make: Callable[[], Searcher]) -> None:
        self.clock: Clock = []
        self._told = 0
        start = time.monotonic()
        self._searcher = make()
        self._seconds = time.monotonic() - start

    def ask(self, count: int) -> list[Proposal]:
        start = time.monotonic()
        proposals = self._searcher.ask(count)
        self._seconds += time.monotonic() - start
        return proposals

    def tell(self, trials: Sequence[Trial]) -> None:
        start = time.monotonic()
        self._searcher.tell(trials)
        self._seconds += time.monotonic() - start
        self._told += len(trials)
        self.clock.append([self._told, self._seconds])

    def state(self) -> State:
        tensors, body = self._searcher.state()
        return tensors, {"searcher": body, "clock": self.clock}

    def restore(self, tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> None:
        self._searcher.restore(tensors, body["searcher"])
        self.clock = [list(entry) for entry in body["clock"]]
        self._told, self._seconds = int(self.clock[-1][0]), self.clock[-1][1]


def _figures(
    options: SearchOptions,
    trials: Sequence[Trial],
    clock: Clock,
    budgets: Mapping[str, float],
    scores: Mapping[str, Any],
) -> dict[str, Any]:
    """What is reported of a run that has ended."""
    leaders = [best(trials[: count + 1], budgets) for count in range(len(trials))]
    measured = [None if found is None else found.measurement for found in leaders]
    scoring, searching = scores.get("seconds", 0.0), clock[-1][1]
    evaluating = list(accumulate(trial.seconds for trial in trials))
    return {
        "searcher": options.searcher,
        "seed": options.seed,
        "sources": dict(Counter(trial.source for trial in trials)),
        "failures": sum(trial.measurement is None for trial in trials),
        "within_budgets": sum(t.measurement is not None and meets(t.measurement, budgets) for t in trials),
        "score_passes": scores.get("passes", 0),
        "score_seconds": scoring,
        "searcher_seconds": searching,
        "evaluation_seconds": evaluating[-1],
        "seconds": scoring + searching + evaluating[-1],
        "seconds_curve": [scoring + _searched(clock, number) + seconds for number, seconds in enumerate(evaluating)],
        "divergence_curve": [None if m is None else m.divergence for m in measured],
        "metric_curve": [None if m is None else m.metric for m in measured],
    }


def _searched(clock: Clock, number: int) -> float:
    """Seconds of the searcher until the end of the batch that a trial was told in."""
    return next(seconds for told, seconds in clock if told > number)


def _final(session: Session, leader: Trial, budgets: Mapping[str, float]) -> dict[str, Any]:
    """The best profile as it is deployed; the test split is read here."""
    assert leader.measurement is not None
    candidate = session.evaluator.finish(leader.entries)
    return {
        "divergence": leader.measurement.divergence,
        "metric": leader.measurement.metric,
        "deployed": candidate.measurement.to_json(),
        "deployed_meets": meets(candidate.measurement, budgets),
        "test_metric": session.evaluator.test(candidate.model, session.evaluator.forward),
    }
