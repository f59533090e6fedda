from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grainwise.graph.forward import default_forward, tensors_in
from grainwise.graph.program import Kind, NotShared, Program
from grainwise.graph.skeleton import build_skeleton, skeleton_forward
from grainwise.graph.trace import trace
from tests.graph.conftest import Traced
from tests.graph.graph_networks import NETWORKS


def _run(program: Program, model: nn.Module, inputs: object) -> Tensor:
    values: list[object] = []
    for step, actor in zip(program.steps, program.actors(model), strict=True):
        values.append(tensors_in(inputs)[step.target] if step.kind is Kind.INPUT else step.run(values, actor))
    found = values[program.output]
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "tied"])
def test_step_by_step_is_the_same_to_the_bit(name: str, traced: Traced) -> None:
    model, inputs, graph = traced(name)
    skeleton = build_skeleton(model, inputs, default_forward, graph)
    with torch.no_grad():
        assert torch.equal(
            _run(Program(skeleton.graph), skeleton.module, inputs), skeleton_forward(skeleton.module, inputs)
        )


class InPlace(nn.Module):
    """Rectifies in place; `reads`: what it was given is read afterwards, through a view or as it is."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        view = y.flatten(1)
        if self.reads == "inside":
            y[:, :4].mul_(2.0)
            return self.second(y)
        z = self.second(F.relu(y, inplace=True))
        return z + view.sum() if self.reads == "view" else z


@pytest.mark.parametrize("reads", ["view", "inside"])
def test_a_write_that_others_see_is_refused(reads: str) -> None:
    model, x = InPlace(reads).eval(), torch.randn(2, 3, 8, 8)
    skeleton = build_skeleton(model, x, default_forward, trace(model, x))
    with pytest.raises(NotShared, match="writes to a value"):
        Program(skeleton.graph)


def test_a_write_that_nobody_sees_leaves_its_argument_alone() -> None:
    model, x = InPlace("").eval(), torch.randn(2, 3, 8, 8)
    skeleton = build_skeleton(model, x, default_forward, trace(model, x))
    assert any(str(node.target).endswith("relu_.default") for node in skeleton.graph.nodes)
    program = Program(skeleton.graph)
    assert not any(str(step.target).endswith("relu_.default") for step in program.steps)
    with torch.no_grad():
        torch.testing.assert_close(_run(program, skeleton.module, x), model(x), rtol=0, atol=0)


def test_random_numbers_are_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.rand_like(x)

    model, x = Noisy().eval(), torch.randn(3, 4)
    skeleton = build_skeleton(model, x, default_forward, trace(model, x))
    with pytest.raises(NotShared, match="random"):
        Program(skeleton.graph)


def test_keys_tell_what_decides_a_value(traced: Traced) -> None:
    model, inputs, graph = traced("resnet20")
    skeleton = build_skeleton(model, inputs, default_forward, graph)
    program = Program(skeleton.graph)
    actors = program.actors(skeleton.module)
    before = program.keys(actors)
    assert program.keys(actors) == before
    index = next(i for i, step in enumerate(program.steps) if step.target == "layer2.0.conv1")
    actors[index] = nn.Conv2d(16, 32, 3, 2, 1)
    after = program.keys(actors)
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert changed[0] == index
    assert program.output in changed
    shortcut = next(i for i, step in enumerate(program.steps) if step.target == "layer2.0.conv1") - 1
    assert before[shortcut] == after[shortcut]
    assert len(set(before)) == len(before)
