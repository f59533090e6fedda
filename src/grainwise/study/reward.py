"""Rewards: from a measurement to one number that guides the search. The best profile is chosen without shaping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from grainwise.plan.choices import UNCOMPRESSED, Entry, Method
from grainwise.plan.layers import LayerGraph
from grainwise.study.measurement import Measurement

# (candidate, reference, entries by layer name) -> reward, higher is better
Reward = Callable[[Measurement, Measurement, Mapping[str, Entry]], float]


def quality(candidate: Measurement, reference: Measurement) -> float:
    """exp(-divergence), in 0..1: how much of the reference's behaviour is kept.

    On few pictures it ranks candidates far better than accuracy does; the reference itself has 1.
    """
    return math.exp(-candidate.divergence)


@dataclass(frozen=True, slots=True)
class WeightedProduct:
    """Quality times (cost / budget) ** exponent for each budget (MnasNet, Tan et al. 2019, eq. 2-3).

    exponent: negative; -0.07 is the paper's. Meeting the budget exactly multiplies by 1.
    """

    budgets: Mapping[str, float]
    exponent: float = -0.07

    def __call__(self, candidate: Measurement, reference: Measurement, entries: Mapping[str, Entry]) -> float:
        factors = [
            math.pow(max(candidate.cost(name), 1.0) / budget, self.exponent) for name, budget in self.budgets.items()
        ]
        return quality(candidate, reference) * math.prod(factors)


@dataclass(frozen=True, slots=True)
class Absolute:
    """Quality minus weight * |cost / budget - 1| for each budget (TuNAS, Bender et al. 2020, eq. 2)."""

    budgets: Mapping[str, float]
    weight: float = 0.3

    def __call__(self, candidate: Measurement, reference: Measurement, entries: Mapping[str, Entry]) -> float:
        misses = [abs(candidate.cost(name) / budget - 1) for name, budget in self.budgets.items()]
        return quality(candidate, reference) - self.weight * sum(misses)


@dataclass(frozen=True, slots=True)
class HardBudget:
    """Quality within the budgets, else minus the relative excess beyond them (AMC, He et al. 2018; HAQ 2019)."""

    budgets: Mapping[str, float]

    def __call__(self, candidate: Measurement, reference: Measurement, entries: Mapping[str, Entry]) -> float:
        excess = [max(0.0, candidate.cost(name) / budget - 1) for name, budget in self.budgets.items()]
        return quality(candidate, reference) if not any(excess) else -sum(excess)


def diversity(entries: Mapping[str, Entry], graph: LayerGraph) -> float:
    """D in 0..1: normalised entropy of the (method, granularity) mix over layers, each layer weighing as much as its
    share of the parameters, so that tiny layers cannot buy diversity.
    """
    shares: dict[tuple[str, str], float] = {}
    total = sum(layer.geometry.weights for layer in graph.layers)
    for layer in graph.layers:
        entry = entries.get(layer.name, UNCOMPRESSED)
        used = [c for c in (entry.structure, entry.precision) if c.method is not Method.NONE] or [entry.structure]
        for choice in used:
            kind = (str(choice.method), str(choice.granularity))
            shares[kind] = shares.get(kind, 0.0) + layer.geometry.weights / total / len(used)
    entropy = -sum(share * math.log(share) for share in shares.values() if share > 0)
    return entropy / math.log(_KINDS)


_KINDS = 13  # none, and four methods at three granularities


@dataclass(frozen=True, slots=True)
class WithComplexity:
    """Another reward minus weight * (1 - D): a gentle push towards a mix of techniques. It shapes the search only."""

    reward: Reward
    graph: LayerGraph
    weight: float = 0.1

    def __call__(self, candidate: Measurement, reference: Measurement, entries: Mapping[str, Entry]) -> float:
        shaped = self.weight * (1 - diversity(entries, self.graph))
        return self.reward(candidate, reference, entries) - shaped


REWARDS: Mapping[str, Callable[[Mapping[str, float]], Reward]] = {
    "weighted_product": WeightedProduct,
    "absolute": Absolute,
    "hard_budget": HardBudget,
}
"""Shipped rewards by the name that the command line takes."""
