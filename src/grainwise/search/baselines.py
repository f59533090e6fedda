"""Searchers without learning: uniform random, and regularised evolution."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grainwise.plan.choices import Entry
from grainwise.plan.projection import Projection, Walk
from grainwise.search.prior import Prior
from grainwise.search.searcher import Proposal, State
from grainwise.search.walks import Guide, Key, distinct, entries_of, filled, key_of, sample, uniform
from grainwise.study.trial import Trial


class RandomSearcher:
    """Uniform over the entries that each layer may take; `projected=False` asks for legality only."""

    def __init__(self, projection: Projection, *, seed: int = 0, projected: bool = True) -> None:
        self._projection = projection
        self._projected = projected
        self._rng = np.random.default_rng(seed)
        self._seen: set[Key] = set()

    def ask(self, count: int) -> list[Proposal]:
        def draw(number: int, temperature: float) -> list[dict[str, Entry]]:
            return sample(self._projection, number, uniform, self._rng, projected=self._projected)

        new = distinct(self._projection, count, draw, self._seen, self._rng, projected=self._projected)
        return [Proposal(entries, "random") for entries in new]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Nothing is learnt."""

    def state(self) -> State:
        return {}, {"rng": self._rng.bit_generator.state, "seen": sorted(self._seen)}

    def restore(self, tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> None:
        self._rng.bit_generator.state = body["rng"]
        self._seen = {tuple(key) for key in body["seen"]}


@dataclass(frozen=True, slots=True)
class EvolutionConfig:
    """Regularised evolution (Real et al. 2019, algorithm 1)."""

    population: int = 32
    """Members; the oldest dies when a child is born."""
    tournament: int = 8
    """Members drawn for each parent, of which the best is taken."""
    mutations: int = 3
    """A child differs in 1 to this many layers, before it is repaired."""


class EvolutionSearcher:
    """Regularised evolution: aging population, tournament, mutation of a few layers.

    projected: a child is repaired by a walk that follows it wherever the budgets allow. prior: the first population
    and the mutations are drawn from it and slack is filled; None for uniform ones.
    """

    def __init__(
        self,
        projection: Projection,
        *,
        seed: int = 0,
        projected: bool = True,
        prior: Prior | None = None,
        config: EvolutionConfig | None = None,
    ) -> None:
        self._projection = projection
        self._projected = projected
        self._prior = prior
        self._config = config or EvolutionConfig()
        self._rng = np.random.default_rng(seed)
        self._seen: set[Key] = set()
        self._population: deque[tuple[float, Key]] = deque(maxlen=self._config.population)

    def ask(self, count: int) -> list[Proposal]:
        new = distinct(self._projection, count, self._draw, self._seen, self._rng, projected=self._projected)
        return [Proposal(entries, "evolution") for entries in new]

    def _draw(self, count: int, temperature: float) -> list[dict[str, Entry]]:
        guides = [self._child() for _ in range(count)]
        drawn = sample(
            self._projection,
            count,
            self._weights,
            self._rng,
            guides=guides,
            projected=self._projected,
            temperature=temperature,
        )
        scores = self._prior.scores if self._prior and self._prior.sensitivity and self._projected else None
        return filled(self._projection, drawn, scores, guides)

    def _weights(self, walks: Sequence[Walk], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        if self._prior is None:
            return uniform(walks, mask)
        return np.stack([self._prior.log_weights(walk) for walk in walks])

    def _child(self) -> Guide | None:
        """A parent to follow except at the mutated layers; None while the first population is filled."""
        if len(self._population) < self._config.population:
            return None
        drawn = self._rng.integers(len(self._population), size=self._config.tournament)
        _, parent = max((self._population[i] for i in drawn), key=lambda member: member[0])
        layers = len(parent)
        changed = self._rng.choice(layers, min(layers, int(self._rng.integers(1, self._config.mutations + 1))), False)
        return Guide(entries_of(self._projection, parent), frozenset(int(i) for i in changed))

    def tell(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            reward = -1e9 if trial.reward is None else trial.reward
            self._population.append((reward, key_of(self._projection, trial.entries)))

    def state(self) -> State:
        body = {
            "rng": self._rng.bit_generator.state,
            "seen": sorted(self._seen),
            "population": [[reward, list(key)] for reward, key in self._population],
        }
        return {}, body

    def restore(self, tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> None:
        self._rng.bit_generator.state = body["rng"]
        self._seen = {tuple(key) for key in body["seen"]}
        self._population.clear()
        self._population.extend((float(reward), tuple(key)) for reward, key in body["population"])
