"""The integer programme against enumeration of whole profiles, priced by the cost model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest

from grainwise.plan.choices import PRECISIONS, STRUCTURES, Choice, Entry, Granularity, Method, entry_of, numbers_of
from grainwise.plan.cost import CostModel
from grainwise.plan.layers import Block, Coupling, LayerGraph
from grainwise.plan.prices import COSTS, Cost, PackedPrices, Shared
from grainwise.plan.projection import Projection
from grainwise.plan.space import SearchSpace
from grainwise.search import options, programme
from grainwise.search.local import reduced
from grainwise.search.options import OptionTables
from grainwise.search.prior import finite_scores
from grainwise.search.programme import Programme
from tests.search.synthetic import _conv, _slots, bed


@dataclass(frozen=True)
class SharedPrices(PackedPrices):
    """Packed prices, and something that the entries of different layers share."""

    common: Shared

    @property
    def shared(self) -> Shared:  # type: ignore[override]
        return self.common


def _space(methods: tuple[Method, ...]) -> tuple[SearchSpace, dict[str, tuple[int, ...]]]:
    """Three convolutions in a row; the first two are a block that can be distilled."""
    layers = (_conv("a", 16, 48, 3, 1, 8), _conv("b", 48, 32, 3, 1, 8), _conv("c", 32, 8, 1, 1, 8))
    inner, outer = Coupling("a", 48, _slots(["a"], ["b"], 48)), Coupling("b", 32, _slots(["b"], ["c"], 32))
    graph = LayerGraph(layers, (inner, outer), (Block("block", "a", ("a", "b")),))
    others = {slot.parameter: (c.width, 40) for c in (inner, outer) for slot in c.slots if slot.layer is None}
    return SearchSpace.of(graph, methods=methods), others


def _profiles(space: SearchSpace) -> list[dict[str, Entry]]:
    """Every legal profile."""
    pairs = [[entry_of(int(s), int(p)) for s, p in np.argwhere(space.pairs(i))] for i in range(len(space.layers))]
    found = []
    for entries in product(*pairs):
        profile = dict(zip((layer.name for layer in space.layers), entries, strict=True))
        try:
            space.check(profile)
        except ValueError:
            continue
        found.append(profile)
    return found


def _score(scores: np.ndarray, entries: Mapping[str, Entry]) -> float:
    return float(sum(scores[i][numbers_of(entry)] for i, entry in enumerate(entries.values())))


def _scores(seed: int, layers: int) -> np.ndarray:
    """Any scores do, for uncompressed layers too."""
    return np.exp(np.random.default_rng(seed).normal(0, 1.5, (layers, len(STRUCTURES), len(PRECISIONS))))


def _projection(cost: CostModel, **shares: float) -> Projection:
    full = cost.total({})
    return Projection(cost, {name: full[COSTS.index(name)] * share for name, share in shares.items()})


@pytest.mark.parametrize("shares", [{"size": 0.5}, {"macs": 0.4}, {"size": 0.6, "macs": 0.3}, {"size": 0.25}], ids=str)
def test_it_finds_the_best_of_all_profiles(shares: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programme, "_ROUNDS", 1)  # exact as it is, nothing is corrected
    space, others = _space((Method.PRUNE, Method.DISTILL))
    cost = CostModel(space, others)
    projection = _projection(cost, **shares)
    fitting = [p for p in _profiles(space) if (cost.total(p) <= projection.budget).all()]
    solver = Programme(projection)
    for seed in range(4):
        scores = _scores(seed, 3)
        found = solver.solve(scores)
        space.check(found)
        assert (cost.total(found) <= projection.budget).all()
        assert _score(scores, found) <= 1.0015 * min(_score(scores, p) for p in fitting)


def _common(layers: int, boundary: float) -> Shared:
    """Every structure needs a part of the file of its own; prune/layer runs in 8 bits; each change of kind costs."""
    parts = np.zeros((layers, len(STRUCTURES), len(PRECISIONS), len(STRUCTURES)), dtype=bool)
    static = np.zeros(parts.shape[:3], dtype=bool)
    for s in range(1, len(STRUCTURES)):
        parts[:, s, :, s] = True
    static[:, 1:5] = True

    def between(numbers: frozenset[int]) -> Cost:
        changes = sum((i in numbers) != (i + 1 in numbers) for i in range(layers - 1))
        return np.array([boundary * changes, 0.0, 0.0])

    return Shared(parts, np.linspace(6000, 12000, len(STRUCTURES)), static, between)


@pytest.mark.parametrize("boundary", [0.0, 2000.0])
def test_shared_parts_are_paid_once_and_conversions_are_checked(
    boundary: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not boundary:
        monkeypatch.setattr(programme, "_ROUNDS", 1)
    space, others = _space((Method.PRUNE, Method.DISTILL))
    digits = PackedPrices.of(space.layers, list(others.values())).digits
    cost = CostModel(space, others, SharedPrices(digits, _common(3, boundary)))
    projection = _projection(cost, size=0.5)
    fitting = [p for p in _profiles(space) if (cost.total(p) <= projection.budget).all()]
    for seed in (5, 6, 9, 11):  # where the greedy solution is not the best
        scores = _scores(seed, 3)
        found = Programme(projection).solve(scores)
        assert (cost.total(found) <= projection.budget).all()
        assert _score(scores, found) <= _score(scores, reduced(projection, scores))
        if not boundary:
            assert _score(scores, found) <= 1.0015 * min(_score(scores, p) for p in fitting)


def test_what_only_pays_in_all_layers_together_is_found() -> None:
    """Between layers of 8 bits and others stands a conversion that costs more than 8 bits save in any one layer."""
    space, others = _space((Method.PRUNE, Method.QUANTIZE))
    eight = PRECISIONS.index(Choice(Method.QUANTIZE, Granularity.CHANNEL, 8))
    common = _common(3, 60_000.0)
    static = np.zeros_like(common.static)
    static[:, :, eight] = True
    digits = PackedPrices.of(space.layers, list(others.values())).digits
    cost = CostModel(space, others, SharedPrices(digits, replace(common, static=static)))
    projection = _projection(cost, size=0.6)
    scores = np.full((3, len(STRUCTURES), len(PRECISIONS)), 10.0)
    scores[:, 1:] = 1.0
    scores[:, 0, eight], scores[:, 0, 0] = 0.01, 0.0
    everywhere = {layer.name: Entry(precision=PRECISIONS[eight]) for layer in space.layers}
    assert reduced(projection, scores) == Programme(projection).solve(scores) == everywhere


def test_a_layer_in_a_block_may_stay_plain_though_a_structure_costs_and_scores_less() -> None:
    """A student of the block leaves it no structure."""
    space, others = _space((Method.PRUNE, Method.DISTILL))
    projection = _projection(CostModel(space, others), size=0.5)
    scores = np.full((3, len(STRUCTURES), len(PRECISIONS)), 0.5)
    scores[:, 0] = 1.0
    tables = OptionTables(projection)
    inside, outside = (tables.useful(index, {}, scores, np.inf).numbers[:, 0] for index in (1, 2))
    assert 0 in inside
    assert 0 not in outside


def test_couplings_that_are_not_told_apart_keep_the_widths_of_the_greedy_solution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = bed(2, size=None, macs=0.3, blocks=1)
    cost, scores = problem.projection.cost, finite_scores(problem.projection, problem.sensitivity)
    greedy = reduced(problem.projection, scores)
    exact = _score(scores, Programme(problem.projection).solve(scores))
    assert cost.widths(greedy)
    for few in (8, 1):  # one coupling of six widths, and none but the one that a layer leads
        monkeypatch.setattr(options, "_COMBINATIONS", few)
        found = Programme(problem.projection).solve(scores)
        problem.projection.space.check(found)
        assert (cost.total(found) <= problem.projection.budget).all()
        assert exact * 0.998 <= _score(scores, found) < 0.995 * _score(scores, greedy)
    assert cost.widths(found) == cost.widths(greedy)  # all of them are pinned now
