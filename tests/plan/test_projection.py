"""Every finished walk is legal and meets the budgets, on random residual graphs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grainwise.plan.choices import entry_of
from grainwise.plan.cost import CostModel
from grainwise.plan.layers import Block, Coupling, Geometry, Kind, Layer, LayerGraph, Slot
from grainwise.plan.prices import COSTS
from grainwise.plan.projection import Projection, Unreachable, Walk
from grainwise.plan.space import SearchSpace

_BUDGETS = st.sampled_from([{"size": 0.15}, {"macs": 0.5}, {"size": 0.2, "macs": 0.6}, {}])


def graph(rng: np.random.Generator) -> tuple[LayerGraph, dict[str, tuple[int, ...]]]:
    """A stem, some blocks with inner couplings, a residual stream that all of them share, and a classifier."""
    stream = int(rng.choice([16, 24, 32]))
    layers = [_conv("stem", 3, stream)]
    couplings, blocks, producers, consumers = [], [], ["stem"], []
    for number in range(int(rng.integers(1, 4))):
        inner = int(rng.choice([8, 16, 40]))
        a, b = f"b{number}.a", f"b{number}.b"
        layers += [_conv(a, stream, inner), _conv(b, inner, stream)]
        couplings.append(Coupling(a, inner, _slots([a], [b], inner)))
        blocks.append(Block(f"b{number}", a, (a, b)))
        producers.append(b)
        consumers.append(a)
    layers.append(Layer("fc", Geometry(Kind.LINEAR, stream, 10, bias=True), 1, 1))
    couplings.append(Coupling("stem", stream, _slots(producers, [*consumers, "fc"], stream)))
    led = {producer: c.name for c in couplings for producer in c.producers()}
    named = tuple(
        Layer(la.name, la.geometry, la.positions_in, la.positions_out, output_coupling=led.get(la.name))
        for la in layers
    )
    others = {slot.parameter: (c.width,) for c in couplings for slot in c.slots if slot.layer is None}
    return LayerGraph(named, tuple(couplings), tuple(blocks), other_macs=1000), others


def _conv(name: str, inputs: int, outputs: int) -> Layer:
    return Layer(name, Geometry(Kind.CONV2D, inputs, outputs, (3, 3), (1, 1), (1, 1), (1, 1)), 64, 64)


def _slots(producers: list[str], consumers: list[str], width: int) -> tuple[Slot, ...]:
    units = tuple((i,) for i in range(width))
    made = [Slot(f"{p}.weight", 0, units, True, p) for p in producers]
    norms = [Slot(f"{p}.norm.weight", 0, units, True) for p in producers]
    return (*made, *norms, *(Slot(f"{c}.weight", 1, units, False, c) for c in consumers))


def projection(rng: np.random.Generator, kind: str, shares: dict[str, float]) -> Projection:
    found, others = graph(rng)
    cost = CostModel(SearchSpace.of(found, kind), others)
    full = dict(zip(COSTS, cost.total({}), strict=True))
    return Projection(cost, {name: share * full[name] for name, share in shares.items()})


@given(seed=st.integers(0, 2**20), kind=st.sampled_from(["single", "chain"]), shares=_BUDGETS)
@settings(max_examples=60, deadline=None)
def test_every_finished_walk_meets_the_budgets(seed: int, kind: str, shares: dict[str, float]) -> None:
    rng = np.random.default_rng(seed)
    try:
        shared = projection(rng, kind, shares)
    except Unreachable:
        return
    walk = Walk(shared)
    while not walk.done:
        _, costs = walk.costs()
        options = np.argwhere(walk.allowed())
        s, p = (int(i) for i in options[rng.integers(len(options))])
        walk.take(entry_of(s, p))
        assert (walk.completed == costs[s, p]).all()
    shared.space.check(walk.entries)
    assert (walk.completed == shared.cost.total(walk.entries)).all()
    assert (walk.completed <= shared.budget).all()


@given(seed=st.integers(0, 2**20), kind=st.sampled_from(["single", "chain"]))
@settings(max_examples=20, deadline=None)
def test_a_walk_without_projection_is_legal_and_its_cost_exact(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    shared = projection(rng, kind, {"size": 0.9})
    walk = Walk(shared)
    while not walk.done:
        options = np.argwhere(walk.legal())
        s, p = (int(i) for i in options[rng.integers(len(options))])
        walk.take(entry_of(s, p))
    shared.space.check(walk.entries)
    assert (walk.completed == shared.cost.total(walk.entries)).all()


def test_budgets_that_nothing_meets_are_refused_with_the_least_that_can_be_had() -> None:
    with pytest.raises(Unreachable, match="size budget of"):
        projection(np.random.default_rng(0), "chain", {"size": 0.001})


def test_an_unknown_budget_is_refused() -> None:
    found, others = graph(np.random.default_rng(0))
    with pytest.raises(ValueError, match="no cost is called 'energy'"):
        Projection(CostModel(SearchSpace.of(found), others), {"energy": 1.0})
