"""The skeleton of a small residual network by hand, and of other networks against their modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import zoo
from grainwise.graph.forward import default_forward
from grainwise.graph.narrow import narrow
from grainwise.graph.skeleton import Skeleton, build_skeleton, skeleton_forward
from grainwise.graph.trace import trace


class Padded(nn.Module):
    """Padding in code, a sum, a layer that runs twice, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(F.pad(x, (0, 1, 0, 1)))))
        x = x + self.drop(self.second(x))
        return self.twice(self.twice(x))


@pytest.fixture(scope="module")
def padded() -> tuple[nn.Module, Skeleton]:
    torch.manual_seed(0)
    model, inputs = Padded().eval(), torch.randn(2, 3, 8, 8)
    return model, build_skeleton(model, inputs, default_forward, trace(model, inputs))


def test_units_points_and_sums_by_hand(padded: tuple[nn.Module, Skeleton]) -> None:
    _, skeleton = padded
    assert set(skeleton.units) == {"first", "second"}
    first, second = skeleton.units["first"], skeleton.units["second"]
    assert first.norm == "norm"
    assert first.source == "input_1"  # not the padded value: zeros have a code
    assert first.result == second.source
    assert [join.operands for join in skeleton.joins] == [(first.result, second.result)]
    assert skeleton.points[str(first.result)].maker == "first"
    assert skeleton.points[skeleton.joins[0].result].floats


def test_a_sum_is_active_when_both_operands_are(padded: tuple[nn.Module, Skeleton]) -> None:
    _, skeleton = padded
    (join,) = skeleton.joins
    assert join.result in skeleton.active(["second"])  # its input is the other operand
    assert join.result not in skeleton.active(["first"])
    assert skeleton.active([]) == frozenset()


def test_a_layer_that_runs_twice_is_left_alone(padded: tuple[nn.Module, Skeleton]) -> None:
    model, skeleton = padded
    graph = trace(model, torch.randn(2, 3, 8, 8))
    assert "twice" in {layer.name for layer in graph.layers}
    assert "twice" not in skeleton.units
    assert skeleton.missing == {"twice": "it runs more than once"}


@pytest.mark.parametrize("size", [1, 5])
def test_it_computes_what_the_module_computes(padded: tuple[nn.Module, Skeleton], size: int) -> None:
    model, skeleton = padded
    x = torch.randn(size, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(skeleton_forward(skeleton.module, x), model(x))


@pytest.mark.parametrize(("model", "data"), [(zoo.densenet, zoo.picture_data), (zoo.conv1d, zoo.signal_data)])
def test_narrowing_it_is_narrowing_the_module(model: object, data: object) -> None:
    assert callable(model) and callable(data)
    network, inputs = model(), data().calibration[0][0][:4]
    graph = trace(network, inputs)
    skeleton = build_skeleton(network, inputs, default_forward, graph)
    free = [c for c in graph.couplings if c.frozen is None]
    kept = {c.name: range(0, c.width, 2) for c in free}
    with torch.no_grad():
        expected = narrow(network, graph.couplings, kept)(inputs)
        found = skeleton_forward(narrow(skeleton.module, graph.couplings, kept), inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_copies_share_code_and_not_weights(padded: tuple[nn.Module, Skeleton]) -> None:
    _, skeleton = padded
    twin = copy.deepcopy(skeleton.module)
    with torch.no_grad():
        twin.get_submodule("first").weight.zero_()  # type: ignore[union-attr, operator]
    assert skeleton.module.get_submodule("first").weight.abs().sum() > 0  # type: ignore[union-attr, operator]
