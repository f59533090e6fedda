"""Assembled candidates are what `build` makes by copying, and share what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from grainwise.export.weights import stored_tensors, weights_bytes
from grainwise.graph.forward import default_forward
from grainwise.graph.narrow import narrow
from grainwise.graph.trace import trace
from grainwise.plan.choices import PRECISIONS, STRUCTURES, Entry, Method
from grainwise.realise.assemble import Narrower, fresh_tree
from grainwise.realise.build import assemble, build
from grainwise.session import Session
from tests.evaluate.candidates import SUBJECTS, prepared, profiles


@pytest.mark.parametrize("name", SUBJECTS)
def test_assembled_holds_the_tensors_that_building_by_copy_gives(name: str) -> None:
    session = prepared(name)
    library, model = session.evaluator.library, session.reference.model
    before = {n: v.clone() for n, v in model.state_dict().items()}
    for entries in profiles(session, 12, seed=1):
        copied, shared = build(library, entries), assemble(library, entries, model)
        assert weights_bytes(copied) == weights_bytes(shared)
        expected, found = dict(stored_tensors(copied)), dict(stored_tensors(shared))
        assert list(expected) == list(found)
        assert all(torch.equal(expected[n], found[n]) for n in expected)
        states = copied.state_dict(), shared.state_dict()
        assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_equal_parts_are_one_module(session: Session) -> None:
    library, model = session.evaluator.library, session.reference.model
    student = next(c for c in STRUCTURES if c.method is Method.DISTILL and c.granularity == "block")
    pruned = next(c for c in STRUCTURES if c.method is Method.PRUNE and c.granularity == "channel")
    first = assemble(library, {"stem": Entry(pruned), "block.0": Entry(student)}, model)
    second = assemble(
        library, {"stem": Entry(pruned), "block.0": Entry(student), "fc": Entry(precision=PRECISIONS[1])}, model
    )
    for path in ("stem", "norm", "block.0", "block.1", "block.4", "down"):
        assert first.get_submodule(path) is second.get_submodule(path), path
    assert first.block is not second.block
    assert first.fc is not second.fc
    assert first.get_submodule("norm") is not model.norm
    assert first.get_submodule("norm").num_features == first.get_submodule("stem").out_channels


class TiedNorms(nn.Module):
    """Two norms that hold the same weight, and a parameter of the network's own beside its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.a, self.b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.b.weight = self.a.weight
        self.shift = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.b(torch.relu(self.a(self.first(x)) + self.shift))).mean((2, 3))


def test_ties_and_a_networks_own_parameters_are_cut_as_by_copy() -> None:
    model, x = TiedNorms().eval(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        model.a.weight.copy_(torch.randn(8))
    graph = trace(model, x)
    kept = {"first": (1, 2, 5)}
    made: dict[object, Any] = {}

    def once(key: object, make: Callable[[], Any]) -> Any:
        if key not in made:
            made[key] = make()
        return made[key]

    tree = fresh_tree(model)
    Narrower(graph.couplings, skip=()).narrow(tree, kept, once)
    expected = narrow(model, graph.couplings, kept)
    assert {n: v.shape for n, v in tree.state_dict().items()} == {n: v.shape for n, v in expected.state_dict().items()}
    assert all(torch.equal(v, expected.state_dict()[n]) for n, v in tree.state_dict().items())
    assert tree.a.weight is tree.b.weight
    assert torch.equal(default_forward(tree, x), default_forward(expected, x))
    assert model.shift.shape == (8, 1, 1)


def test_random_cuts_are_those_of_narrow() -> None:
    model, x = TiedNorms().eval(), torch.randn(2, 3, 4, 4)
    graph, rng = trace(model, x), np.random.default_rng(0)
    for _ in range(20):
        kept = {"first": tuple(sorted(rng.choice(8, int(rng.integers(1, 8)), replace=False).tolist()))}
        tree = fresh_tree(model)
        Narrower(graph.couplings, skip=()).narrow(tree, kept, lambda key, make: make())
        expected = narrow(model, graph.couplings, kept)
        assert all(torch.equal(v, expected.state_dict()[n]) for n, v in tree.state_dict().items())


def test_what_is_remembered_outlives_the_network_it_was_made_of() -> None:
    """Networks that come and go at the same place in memory are not taken for each other."""
    x, graph = torch.randn(2, 3, 4, 4), trace(TiedNorms().eval(), torch.randn(2, 3, 4, 4))
    made: dict[object, Any] = {}

    def once(key: object, make: Callable[[], Any]) -> Any:
        if key not in made:
            made[key] = make()
        return made[key]

    narrower, kept = Narrower(graph.couplings, skip=()), {"first": (1, 2, 5)}
    for seed in range(30):
        torch.manual_seed(seed)
        model = TiedNorms().eval()
        tree = fresh_tree(model)
        narrower.narrow(tree, kept, once)
        assert torch.equal(default_forward(tree, x), default_forward(narrow(model, graph.couplings, kept), x)), seed
