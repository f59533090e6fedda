"""The searchers by name: the one table that the command line and `SearchOptions` read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from torch import Tensor

from grainwise.plan.projection import Projection
from grainwise.search.additive import ThompsonSearcher, additive, greedy
from grainwise.search.baselines import EvolutionSearcher, RandomSearcher
from grainwise.search.optuna import OptunaSearcher
from grainwise.search.prior import finite_scores
from grainwise.search.programme import Programme, solved_prior
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
        """Of a technique that needs them."""
        assert self.sensitivity is not None
        return self.sensitivity


@dataclass(frozen=True, slots=True)
class Technique:
    """make: the searcher. table: the scores that it starts from, None where it knows none. needs_table: True when it
    cannot do without. package: what must be installed for it, and the extra of grainwise that installs it.
    """

    make: Callable[[Given], Searcher]
    table: Table | None = "kl"
    needs_table: bool = False
    package: str | None = None


def _controller(given: Given) -> Searcher:
    return ControllerSearcher(
        given.projection, given.features(), given.sensitivity, seed=given.seed, config=given.config
    )


def _evolution(given: Given) -> Searcher:
    prior = None if given.sensitivity is None else solved_prior(Programme(given.projection), given.sensitivity)
    return EvolutionSearcher(given.projection, projected=given.config.projected, prior=prior, seed=given.seed)


def _optuna(sampler: Literal["tpe", "nsgaii"]) -> Callable[[Given], Searcher]:
    def make(given: Given) -> Searcher:
        start = None
        if given.sensitivity is not None:
            start = Programme(given.projection).solve(finite_scores(given.projection, given.sensitivity))
        return OptunaSearcher(given.projection, sampler, start=start, seed=given.seed)

    return make


def _greedy(given: Given) -> Searcher:
    return greedy(given.projection, given.scores, seed=given.seed)


def _additive(given: Given) -> Searcher:
    return additive(given.projection, given.scores, seed=given.seed)


def _thompson(given: Given) -> Searcher:
    return ThompsonSearcher(given.projection, given.scores, seed=given.seed)


def _random(given: Given) -> Searcher:
    return RandomSearcher(given.projection, projected=given.config.projected, seed=given.seed)


def _plain_evolution(given: Given) -> Searcher:
    return EvolutionSearcher(given.projection, projected=False, seed=given.seed)


TECHNIQUES: Mapping[str, Technique] = {
    "rl": Technique(_controller),
    "random": Technique(_random, None),
    "evolution": Technique(_evolution),
    "evolution:plain": Technique(_plain_evolution, None),
    "greedy": Technique(_greedy, needs_table=True),
    "additive": Technique(_additive, needs_table=True),
    "additive:fisher": Technique(_additive, "fisher", needs_table=True),
    "additive+thompson": Technique(_thompson, needs_table=True),
    "additive+thompson:fisher": Technique(_thompson, "fisher", needs_table=True),
    "optuna:tpe": Technique(_optuna("tpe"), package="optuna"),
    "optuna:nsgaii": Technique(_optuna("nsgaii"), package="optuna"),
}


def technique(name: str) -> Technique:
    """Raises ValueError, with the names there are, for an unknown one; RuntimeError when its package is missing."""
    if name not in TECHNIQUES:
        raise ValueError(f"no searcher is called {name!r}; give one of {', '.join(TECHNIQUES)}")
    found = TECHNIQUES[name]
    if found.package and find_spec(found.package) is None:
        raise RuntimeError(
            f"the searcher {name} needs the package {found.package}, which is not installed: "
            f"pip install 'grainwise[{found.package}]'"
        )
    return found
