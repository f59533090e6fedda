"""Searchers on additive scores: an integer programme or a greedy solution first, then local search or Thompson samples.

Nothing here reads the reward: the scores predict divergence, and so it is divergence that corrects them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from grainwise.plan.choices import Entry
from grainwise.plan.projection import Projection
from grainwise.search.beliefs import Beliefs
from grainwise.search.local import exchange, reduced
from grainwise.search.prior import Table, finite_scores
from grainwise.search.programme import Programme
from grainwise.search.searcher import Proposal, State
from grainwise.search.walks import Key, distinct, entries_of, key_of
from grainwise.study.sensitivity import Sensitivity
from grainwise.study.trial import Trial

Solve = Callable[[Table], dict[str, Entry]]
"""`[L, S, P]` scores -> a profile within the budgets."""

_TRIES = 8  # of a neighbour that can be paid for


class LocalSearcher:
    """The solution of the scores first, then neighbours of the best profile so far (first improvement).

    A neighbour is an `exchange`: one entry changed, paid for by the cheapest changes elsewhere. solve: how the first
    profile is found. source: what its trial is called; those after it are `local`.
    """

    def __init__(
        self, projection: Projection, sensitivity: Sensitivity, solve: Solve, *, source: str, seed: int = 0
    ) -> None:
        self._projection = projection
        self._scores = finite_scores(projection, sensitivity)
        self._start = key_of(projection, solve(self._scores))
        self._source = source
        self._rng = np.random.default_rng(seed)
        self._seen: set[Key] = set()
        self._best: tuple[float, Key] | None = None

    def ask(self, count: int) -> list[Proposal]:
        proposals = []
        if count and self._start not in self._seen:
            self._seen.add(self._start)
            proposals.append(Proposal(entries_of(self._projection, self._start), self._source))
        new = distinct(self._projection, count - len(proposals), self._draw, self._seen, self._rng)
        return proposals + [Proposal(entries, "local") for entries in new]

    def _draw(self, count: int, temperature: float) -> list[dict[str, Entry]]:
        centre = entries_of(self._projection, self._start if self._best is None else self._best[1])
        return [neighbour(self._projection, centre, self._scores, self._rng, temperature) for _ in range(count)]

    def tell(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            if trial.measurement is not None:
                found = trial.measurement.divergence, key_of(self._projection, trial.entries)
                self._best = found if self._best is None else min(self._best, found)

    def state(self) -> State:
        best = None if self._best is None else [self._best[0], list(self._best[1])]
        return {}, {"rng": self._rng.bit_generator.state, "seen": sorted(self._seen), "best": best}

    def restore(self, tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> None:
        self._rng.bit_generator.state = body["rng"]
        self._seen = {tuple(key) for key in body["seen"]}
        self._best = None if body["best"] is None else (float(body["best"][0]), tuple(body["best"][1]))


def additive(projection: Projection, sensitivity: Sensitivity, *, seed: int = 0) -> LocalSearcher:
    """The integer programme on the scores, then local search around the best."""
    return LocalSearcher(projection, sensitivity, Programme(projection).solve, source="additive", seed=seed)


def greedy(projection: Projection, sensitivity: Sensitivity, *, seed: int = 0) -> LocalSearcher:
    """From uncompressed always the change that saves most cost per score, then exchanges around the best."""
    return LocalSearcher(
        projection, sensitivity, lambda scores: reduced(projection, scores), source="greedy", seed=seed
    )


class ThompsonSearcher:
    """The integer programme on the scores first; then, for each profile, on scores drawn from what the measurements
    leave possible (`Beliefs`): Thompson sampling (Russo et al. 2018, algorithm 4.2) of a linear model.

    Where the programme gives a profile that is known, a neighbour of it under the drawn scores is proposed.
    """

    def __init__(self, projection: Projection, sensitivity: Sensitivity, *, seed: int = 0) -> None:
        self._projection = projection
        self._sensitivity = sensitivity
        self._programme = Programme(projection)
        self._first = self._programme.solve(finite_scores(projection, sensitivity))
        self._rng = np.random.default_rng(seed)
        self._seen: set[Key] = set()
        self._measured: list[tuple[float, Key]] = []

    def ask(self, count: int) -> list[Proposal]:
        proposals = []
        if count and not self._seen:
            self._seen.add(key_of(self._projection, self._first))
            proposals.append(Proposal(self._first, "additive"))
        new = distinct(self._projection, count - len(proposals), self._draw, self._seen, self._rng)
        return proposals + [Proposal(entries, "thompson") for entries in new]

    def _draw(self, count: int, temperature: float) -> list[dict[str, Entry]]:
        keys, divergences = [key for _, key in self._measured], [divergence for divergence, _ in self._measured]
        beliefs, drawn = Beliefs(self._sensitivity, keys, divergences), []
        for _ in range(count):
            scores = finite_scores(self._projection, beliefs.sample(self._rng))
            entries = self._programme.solve(scores)
            if key_of(self._projection, entries) in self._seen:
                entries = neighbour(self._projection, entries, scores, self._rng, temperature)
            drawn.append(entries)
        return drawn

    def tell(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            if trial.measurement is not None:
                self._measured.append((trial.measurement.divergence, key_of(self._projection, trial.entries)))

    def state(self) -> State:
        measured = [[divergence, list(key)] for divergence, key in self._measured]
        return {}, {"rng": self._rng.bit_generator.state, "seen": sorted(self._seen), "measured": measured}

    def restore(self, tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> None:
        self._rng.bit_generator.state = body["rng"]
        self._seen = {tuple(key) for key in body["seen"]}
        self._measured = [(float(divergence), tuple(key)) for divergence, key in body["measured"]]


def neighbour(
    projection: Projection, entries: Mapping[str, Entry], scores: Table, rng: np.random.Generator, temperature: float
) -> dict[str, Entry]:
    """An `exchange` around a profile; the profile itself when none of a few can be paid for."""
    for _ in range(_TRIES):
        if found := exchange(projection, entries, scores, rng, temperature):
            return found
    return dict(entries)
