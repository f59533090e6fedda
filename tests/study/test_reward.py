from __future__ import annotations

import math

import pytest

from grainwise.plan.choices import PRECISIONS, STRUCTURES, Entry
from grainwise.plan.layers import Geometry, Kind, Layer, LayerGraph
from grainwise.study.measurement import Failure, Measurement
from grainwise.study.reward import Absolute, HardBudget, WeightedProduct, WithComplexity, diversity
from grainwise.study.trial import Trial, best, meets

REFERENCE = Measurement(metric=0.9, divergence=0.0, size_bytes=1000, macs=100)
HALF = Measurement(metric=0.8, divergence=0.5, size_bytes=500, macs=100)


def test_weighted_product_by_hand() -> None:
    reward = WeightedProduct({"size": 250.0})
    assert reward(HALF, REFERENCE, {}) == pytest.approx(math.exp(-0.5) * 2**-0.07)


def test_absolute_by_hand() -> None:
    reward = Absolute({"size": 1000.0, "macs": 80.0}, weight=0.3)
    assert reward(HALF, REFERENCE, {}) == pytest.approx(math.exp(-0.5) - 0.3 * (0.5 + 0.25))


def test_hard_budget_by_hand() -> None:
    assert HardBudget({"size": 500.0})(HALF, REFERENCE, {}) == pytest.approx(math.exp(-0.5))
    assert HardBudget({"size": 400.0, "macs": 50.0})(HALF, REFERENCE, {}) == pytest.approx(-(0.25 + 1.0))


def _graph() -> LayerGraph:
    big, small = Geometry(Kind.LINEAR, 90, 10), Geometry(Kind.LINEAR, 10, 10)
    return LayerGraph((Layer("big", big, 1, 1), Layer("small", small, 1, 1)), (), ())


def test_diversity_counts_parameters_not_layers() -> None:
    prune, quantize = Entry(STRUCTURES[1]), Entry(precision=PRECISIONS[1])
    assert diversity({}, _graph()) == 0
    mixed = diversity({"big": prune, "small": quantize}, _graph())
    assert mixed == pytest.approx(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(13))
    both = diversity({"big": Entry(STRUCTURES[1], PRECISIONS[1]), "small": quantize}, _graph())
    assert both > mixed


def test_complexity_shapes_the_reward_by_its_weight() -> None:
    plain = HardBudget({"size": 500.0})
    shaped = WithComplexity(plain, _graph(), weight=0.1)
    assert shaped(HALF, REFERENCE, {}) == pytest.approx(plain(HALF, REFERENCE, {}) - 0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        Measurement(metric=value, divergence=0, size_bytes=1, macs=1)


def test_best_is_unshaped_and_within_the_budgets() -> None:
    def trial(number: int, divergence: float, size: int, reward: float) -> Trial:
        return Trial(number, {}, Measurement(0.5, divergence, size, 1), reward, "x", 0.0)

    failed = Trial(3, {}, Failure("build", "no"), None, "x", 0.0)
    trials = [trial(0, 0.1, 900, 9.0), trial(1, 0.3, 400, 1.0), trial(2, 0.2, 400, 0.0), failed]
    leader = best(trials, {"size": 500.0})
    assert leader is not None
    assert leader.number == 2
    assert best(trials, {"size": 100.0}) is None
    assert meets(HALF, {"size": 500.0}) and not meets(HALF, {"macs": 99.0})
