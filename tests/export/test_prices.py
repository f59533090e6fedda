"""Predicted bytes against files that are written, and what entries share against whole profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from examples import zoo
from grainwise import Data
from grainwise.export.graph import MarkedGraph, file_bytes
from grainwise.export.prices import OnnxPrices
from grainwise.graph.forward import default_forward
from grainwise.graph.skeleton import build_skeleton
from grainwise.graph.trace import trace
from grainwise.plan.choices import (
    NONE,
    PRECISIONS,
    STRUCTURES,
    Choice,
    Entry,
    Granularity,
    Method,
    entry_of,
    numbers_of,
)
from grainwise.plan.cost import CostModel
from grainwise.plan.prices import SIZE, Shared
from grainwise.plan.projection import Projection, Walk
from grainwise.plan.space import SearchSpace
from grainwise.plan.target import TARGETS
from grainwise.search.draft import Draft
from grainwise.search.walks import sample, uniform
from grainwise.session import Session
from tests.networks import tiny, tiny_data

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Data]]] = {
    "tiny": (tiny, tiny_data),
    "conv1d": (zoo.conv1d, zoo.signal_data),
    "densenet": (zoo.densenet, zoo.picture_data),
}
RANDOM = 8
INT8 = Choice(Method.QUANTIZE, Granularity.CHANNEL, 8)


@cache
def prepared(name: str) -> Session:
    model, data = NETWORKS[name]
    return Session.prepare(model(), data())


def same_for_all(space: SearchSpace, precision: Choice) -> dict[str, Entry]:
    p = PRECISIONS.index(precision)
    return {la.name: Entry(precision=precision) for i, la in enumerate(space.layers) if space.precisions[i, p]}


def profiles(session: Session) -> Iterator[dict[str, Entry]]:
    """Uniform ones, and random ones without a budget and within 0.4 of the network's bytes."""
    yield from (same_for_all(session.space, precision) for precision in PRECISIONS)
    rng = np.random.default_rng(0)
    for budgets in ({}, {"size": 0.4 * session.evaluator.reference.size_bytes}):
        yield from sample(Projection(session.cost, budgets), RANDOM, uniform, rng)


@pytest.mark.parametrize("name", NETWORKS)
def test_predicted_bytes_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    """Within 1 %, and never too few: a budget that is met by prediction is met by the file."""
    session = prepared(name)
    for entries in profiles(session):
        file = session.evaluator.finish(entries).file
        assert file is not None
        onnx.save(file, tmp_path / "model.onnx")
        written = (tmp_path / "model.onnx").stat().st_size
        assert written == file_bytes(file)
        predicted = session.cost.total(entries)[SIZE]
        assert written <= predicted <= 1.01 * written, {layer: str(entry) for layer, entry in entries.items()}


def test_a_budget_holds_to_the_byte() -> None:
    session = prepared("tiny")
    budget = 0.3 * session.evaluator.reference.size_bytes
    for entries in sample(Projection(session.cost, {"size": budget}), 5, uniform, np.random.default_rng(3)):
        assert session.evaluator.finish(entries).measurement.size_bytes <= budget


# -- what entries share


@pytest.mark.parametrize("name", NETWORKS)
@given(seed=st.integers(0, 2**20), share=st.sampled_from([None, 0.4]))
@settings(max_examples=8, deadline=None)
def test_a_finished_walk_knows_the_whole_cost(name: str, seed: int, share: float | None) -> None:
    session, rng = prepared(name), np.random.default_rng(seed)
    budgets = {} if share is None else {"size": share * session.evaluator.reference.size_bytes}
    walk = Walk(Projection(session.cost, budgets))
    while not walk.done:
        _, costs = walk.costs()
        s, p = (int(i) for i in rng.choice(np.argwhere(walk.allowed())))
        walk.take(entry_of(s, p))
        np.testing.assert_allclose(walk.completed, costs[s, p], rtol=1e-12)
    np.testing.assert_allclose(walk.completed, session.cost.total(walk.entries), rtol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
@given(seed=st.integers(0, 2**20))
@settings(max_examples=8, deadline=None)
def test_a_draft_knows_the_whole_cost_of_each_revision(name: str, seed: int) -> None:
    session, rng = prepared(name), np.random.default_rng(seed)
    (entries,) = sample(Projection(session.cost, {}), 1, uniform, rng)
    draft = Draft(session.cost, entries)
    for index in rng.integers(0, len(draft.layers), 12).tolist():
        legal = np.argwhere(np.isfinite(draft.changes()[index, ..., SIZE]))
        draft.replace(index, *(int(i) for i in rng.choice(legal)))
        np.testing.assert_allclose(draft.total, session.cost.total(draft.entries()), rtol=1e-12)
        other = int(rng.integers(len(draft.layers)))  # a revision that is not made, priced after all that were
        s, p = (int(i) for i in rng.choice(np.argwhere(np.isfinite(draft.changes()[other, ..., SIZE]))))
        revised = Draft(session.cost, draft.entries())
        revised.replace(other, s, p)
        expected = session.cost.total(revised.entries()) - draft.total
        np.testing.assert_allclose(draft.changes()[other, s, p], expected, rtol=0, atol=1e-6)


def test_a_function_is_paid_for_once() -> None:
    """The second layer that is stored alike costs its own bytes; the first one brings the function as well."""
    session = prepared("densenet")
    groups = Choice(Method.QUANTIZE, Granularity.BLOCK, 4)
    names = ("layers.0", "layers.1", "layers.2")
    totals = [session.cost.total(dict.fromkeys(names[:n], Entry(precision=groups)))[SIZE] for n in range(4)]
    additive = [session.cost.table(i + 1, {})[0] for i in range(3)]  # the stem is layer 0
    p = PRECISIONS.index(groups)
    own = [float(table[p, SIZE] - table[0, SIZE]) for table in additive]
    functions = [totals[n + 1] - totals[n] - own[n] for n in range(3)]
    assert functions[1:] == pytest.approx([0, 0], abs=1e-6)
    file = session.evaluator.finish({"layers.0": Entry(precision=groups)}).file
    assert file is not None
    beside = [f for f in file.functions if f.name.startswith(("Conv2d", "Groups"))]
    assert {f.name for f in beside} == {"Conv2d_int4_group32", "Groups"}
    assert functions[0] == pytest.approx(sum(f.ByteSize() for f in beside), abs=10)


def test_layers_in_8_bits_pay_for_the_values_around_them_once() -> None:
    """Neighbours share the value between them: both together cost less than each alone."""
    session = prepared("tiny")
    shared = session.cost.prices.shared
    assert shared is not None
    index = {layer.name: i for i, layer in enumerate(session.space.layers)}

    def points(*names: str) -> int:
        skeleton = session.evaluator.marked.skeleton if session.evaluator.marked else None
        assert skeleton is not None
        return len(skeleton.active(names))

    def boundary(*names: str) -> float:
        return float(shared.boundary(frozenset(index[name] for name in names))[SIZE])

    assert (points("block.0"), points("block.3"), points("block.0", "block.3")) == (2, 2, 4)  # with the sum
    assert (points("stem"), points("stem", "block.0")) == (2, 3)
    assert boundary("stem", "block.0") < boundary("stem") + boundary("block.0")
    assert boundary() == 0
    assert shared.static[index["block.0"]][numbers_of(Entry(precision=INT8))]
    assert not shared.static[index["fc"]].any()


def test_shared_costs_by_hand() -> None:
    """Two layers with two structures and one precision; part 0 costs 100 bytes, part 1 costs 10."""
    parts = np.array([[[[False, False]], [[True, False]]], [[[False, True]], [[True, True]]]])
    static = np.array([[[False], [True]], [[False], [True]]])
    boundary = {(): 0.0, (0,): 1.0, (1,): 2.0, (0, 1): 2.5}
    shared = Shared(
        parts, np.array([100.0, 10.0]), static, lambda found: np.array([boundary[tuple(sorted(found))], 0.0, 0.5])
    )
    expected = {(0, 0): 10.0, (1, 0): 111.0, (0, 1): 112.0, (1, 1): 112.5}
    for (a, b), size in expected.items():
        numbers = [(a, 0), (b, 0)]
        assert shared.of(numbers).tolist() == [size, 0.0, 0.5]
        tables = shared.tables(numbers, [(0, ()), (1, ())])[:, :, 0, SIZE]
        assert tables.tolist() == [[expected[0, b], expected[1, b]], [expected[a, 0], expected[a, 1]]]
        assert shared.tables(numbers, [(1, ())])[0, :, 0, SIZE].tolist() == tables[1].tolist()
        plain = shared.tables(numbers, [(0, [1])])  # as if layer 1 were without structure
        assert plain[0, :, 0, SIZE].tolist() == [expected[0, 0], expected[1, 0]]


class Twins(nn.Module):
    """Layers that differ in nothing but what the runtime makes of them: 256 rows have tall tiles, 40 have not; and a
    table whose factors are whole bytes wide beside one whose factors are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table_a, self.table_b = nn.Embedding(100, 64), nn.Embedding(20, 64)
        self.layer_a, self.layer_b = nn.Linear(64, 256), nn.Linear(64, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.table_a(tokens) * self.table_b(tokens))
        return torch.cat([self.layer_a(x), self.layer_b(x)], -1)


def test_layers_of_one_shape_by_name_are_priced_by_what_they_become() -> None:
    model = Twins().eval()
    tokens = torch.arange(20).reshape(2, 10)
    graph = trace(model, tokens)
    skeleton = build_skeleton(model, tokens, default_forward, graph)
    space = SearchSpace.of(graph)
    prices = OnnxPrices(MarkedGraph.export(skeleton, graph, tokens), space, TARGETS["ort-cpu-vnni"])
    cost, index = CostModel(space, {}, prices), {layer.name: i for i, layer in enumerate(space.layers)}
    names = list(prices._weigh(space.layers[index["layer_a"]], NONE, NONE).functions)
    assert names == ["Linear_float_bias"]

    def functions(layer: str, entry: Entry) -> set[str]:
        s, p = numbers_of(entry)
        assert cost.pairs(index[layer])[s, p]
        return set(prices._weigh(space.layers[index[layer]], entry.structure, entry.precision).functions)

    tiles = Entry(Choice(Method.PRUNE, Granularity.BLOCK, 0.7))
    assert functions("layer_a", tiles) == {"BlockSparseLinear_bias"}
    assert functions("layer_b", tiles) == {"Linear_float_tiles_bias", "Bits", "Scatter"}
    factors = Entry(Choice(Method.FACTORIZE, Granularity.LAYER, 0.25), Choice(Method.QUANTIZE, Granularity.LAYER, 2))
    assert "Embedding_int2_one_rows" in functions("table_a", factors)  # 16 codes of 2 bits a row
    assert "Embedding_int2_one" in functions("table_b", factors)  # 5 codes


def test_every_entry_of_a_layer_alone() -> None:
    """One layer at a time, so that nothing is made up for elsewhere: the excess is a few bytes and the margin."""
    session = prepared("tiny")
    for index, layer in enumerate(session.space.layers):
        for s, p in np.argwhere(session.space.pairs(index)):
            if s and p not in (0, 2, 9):
                continue
            entries = {layer.name: Entry(STRUCTURES[s], PRECISIONS[p])}
            file = session.evaluator.finish(entries).file
            assert file is not None
            excess = session.cost.total(entries)[SIZE] - file_bytes(file)
            assert 0 <= excess <= 32 + 0.001 * file_bytes(file), entries
