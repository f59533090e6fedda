"""The searchers by name: the one table that the command line and `SearchOptions` read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from grainwise.plan.projection import Projection
from grainwise.search.additive import ThompsonSearcher, additive, greedy
from grainwise.search.baselines import EvolutionSearcher, RandomSearcher
from grainwise.search.optuna import OptunaSearcher
from grainwise.search.prior import Prior, finite_scores
from grainwise.search.programme import Programme
from grainwise.search.rl import ControllerConfig, ControllerSearcher
from grainwise.search.searcher import Searcher
from grainwise.study.sensitivity import Sensitivity

Table = Literal["kl", "fisher"]
"""Which sensitivity scores: measured divergences, or their estimate from gradients."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a searcher is made from.

    features: gives `[L, F]` static features of the layers. sensitivity: of the table that the technique names, or None
    to search without. config: of the controller; its `projected` holds for random search and evolution too.
    """

    projection: Projection
    features: Callable[[], Tensor]
    sensitivity: Sensitivity | None
    seed: int
    config: ControllerConfig

    @property
    def scores(self) -> Sensitivity:
        """Raises ValueError when there are none."""
        if self.sensitivity is None:
            raise ValueError("this searcher starts from sensitivity scores; leave the prior on")
        return self.sensitivity


@dataclass(frozen=True, slots=True)
class Technique:
    """make: the searcher. table: the scores that it starts from, None where it knows none."""

    make: Callable[[Given], Searcher]
    table: Table | None = "kl"


def _controller(given: Given) -> Searcher:
    return ControllerSearcher(
        given.projection, given.features(), given.sensitivity, seed=given.seed, config=given.config
    )


def _evolution(given: Given) -> Searcher:
    prior = None if given.sensitivity is None else Prior(given.projection, given.sensitivity)
    return EvolutionSearcher(given.projection, projected=given.config.projected, prior=prior, seed=given.seed)


def _optuna(sampler: Literal["tpe", "nsgaii"]) -> Callable[[Given], Searcher]:
    def make(given: Given) -> Searcher:
        start = None
        if given.sensitivity is not None:
            start = Programme(given.projection).solve(finite_scores(given.projection, given.sensitivity))
        return OptunaSearcher(given.projection, sampler, start=start, seed=given.seed)

    return make


TECHNIQUES: Mapping[str, Technique] = {
    "rl": Technique(_controller),
    "random": Technique(
        lambda given: RandomSearcher(given.projection, projected=given.config.projected, seed=given.seed), None
    ),
    "evolution": Technique(_evolution),
    "evolution:plain": Technique(
        lambda given: EvolutionSearcher(given.projection, projected=False, seed=given.seed), None
    ),
    "greedy": Technique(lambda given: greedy(given.projection, given.scores, seed=given.seed)),
    "additive": Technique(lambda given: additive(given.projection, given.scores, seed=given.seed)),
    "additive:fisher": Technique(lambda given: additive(given.projection, given.scores, seed=given.seed), "fisher"),
    "additive+thompson": Technique(
        lambda given: ThompsonSearcher(given.projection, given.scores, seed=given.seed)
    ),
    "additive+thompson:fisher": Technique(
        lambda given: ThompsonSearcher(given.projection, given.scores, seed=given.seed), "fisher"
    ),
    "optuna:tpe": Technique(_optuna("tpe")),
    "optuna:nsgaii": Technique(_optuna("nsgaii")),
}


def technique(name: str) -> Technique:
    """Raises ValueError, with the names there are, for an unknown one."""
    if name not in TECHNIQUES:
        raise ValueError(f"no searcher is called {name!r}; give one of {', '.join(TECHNIQUES)}")
    return TECHNIQUES[name]
