"""The skeleton computes what the user's module computes, and its points stand where 8-bit kernels meet."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grainwise.graph.forward import default_forward
from grainwise.graph.narrow import narrow
from grainwise.graph.skeleton import Join, Point, Skeleton, Unit, build_skeleton, skeleton_forward
from grainwise.graph.trace import trace
from grainwise.plan.layers import LayerGraph
from tests.graph.conftest import Traced
from tests.graph.graph_networks import NETWORKS, build

UNCHANGED = [name for name in NETWORKS if name != "attention"]  # its sums run in another order: 1e-6


@cache
def skeleton_of(name: str) -> Skeleton:
    model, inputs = build(name)
    return build_skeleton(model, inputs, default_forward, trace(model, inputs))


def batch(inputs: Any, size: int) -> Any:
    """Inputs of `size` samples, no two alike unless they are tokens."""
    match inputs:
        case dict():
            return {name: batch(value, size) for name, value in inputs.items()}
        case tuple():
            return tuple(batch(value, size) for value in inputs)
    samples = inputs[torch.arange(size) % len(inputs)]
    factors = torch.linspace(0.5, 1.5, size).reshape(-1, *(1,) * (inputs.dim() - 1))
    return samples * factors if inputs.is_floating_point() else samples


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_computes_what_the_module_computes(traced: Traced, name: str, size: int) -> None:
    model, inputs, _ = traced(name)
    x = batch(inputs, size)
    with torch.no_grad():
        found, wanted = skeleton_forward(skeleton_of(name).module, x), default_forward(model, x)
    assert torch.allclose(found, wanted, rtol=0, atol=0 if name in UNCHANGED else 1e-6)


def test_token_tensors_may_have_any_length(traced: Traced) -> None:
    model, _, _ = traced("bert")
    x = {"input_ids": torch.arange(33).reshape(3, 11), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    x["attention_mask"][1, 7:] = 0
    skeleton = skeleton_of("bert")
    assert skeleton.inputs == ("input_ids", "attention_mask")
    with torch.no_grad():
        assert torch.equal(skeleton_forward(skeleton.module, x), default_forward(model, x))


@pytest.mark.parametrize("name", UNCHANGED)
def test_narrowing_is_that_of_the_module(traced: Traced, name: str) -> None:
    model, inputs, graph = traced(name)
    rng = np.random.default_rng(0)
    free = [c for c in graph.couplings if c.frozen is None]
    kept = {c.name: rng.permutation(c.width)[: rng.integers(1, c.width + 1)].tolist() for c in free}
    small, twin = narrow(model, free, kept), narrow(skeleton_of(name).module, free, kept)
    with torch.no_grad():
        assert torch.equal(skeleton_forward(twin, inputs), default_forward(small, inputs))
    widths = {key: value.shape for key, value in small.state_dict().items()}
    assert {key: value.shape for key, value in twin.state_dict().items() if key in widths} == widths


def test_copies_share_code_and_no_tensor(traced: Traced) -> None:
    _, x, _ = traced("resnet20")
    module = skeleton_of("resnet20").module
    twin = copy.deepcopy(module)
    assert twin._code is module._code
    pairs = zip(module.state_dict().values(), twin.state_dict().values(), strict=True)
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)
    with torch.no_grad():
        before = module(x)
        twin.set_submodule("layer1.0.conv1", nn.Conv2d(16, 16, 3, padding=1, bias=False))
        assert torch.equal(module(x), before) and not torch.equal(twin(x), before)


def test_dropout_is_gone() -> None:
    module = copy.deepcopy(skeleton_of("vgg").module).train()
    x = NETWORKS["vgg"][1]
    with torch.no_grad():
        assert torch.equal(module(x), skeleton_of("vgg").module(x))
    assert "dropout" not in module._code.__code__.co_names


# -- points, sums and units, by hand


def marked(model: nn.Module, *shape: int) -> Skeleton:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    model.eval()
    return build_skeleton(model, x, default_forward, trace(model, x))


class Residual(nn.Module):
    """Two convolutions with norms beside a strided one, their sum rectified, a pool and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, 2, padding=1), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.shortcut = nn.Conv2d(3, 8, 1, 2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(torch.relu(self.norm(self.first(x)))))
        y = F.relu6(y + self.shortcut(x))
        return self.head(y.mean((2, 3)))


def test_a_residual_network_by_hand() -> None:
    skeleton = marked(Residual(), 3, 8, 8)
    assert dict(skeleton.units) == {
        "first": Unit("first", "input_1", "relu", "norm"),
        "second": Unit("second", "relu", "second_norm", "second_norm"),
        "shortcut": Unit("shortcut", "input_1", "shortcut"),
        "head": Unit("head"),
    }
    assert skeleton.joins == (Join("add", ("second_norm", "shortcut"), "relu6"),)
    assert dict(skeleton.points) == {
        "input_1": Point("input_1", None, ("first", "shortcut"), False, 3 * 64),
        "relu": Point("relu", "first", ("second",), False, 8 * 16),
        "second_norm": Point("second_norm", "second", ("add",), False, 8 * 16),
        "shortcut": Point("shortcut", "shortcut", ("add",), False, 8 * 16),
        "relu6": Point("relu6", "add", (), True, 8 * 16),
    }
    assert skeleton.inputs == ("input",) and not skeleton.missing
    paths = {name for name, module in skeleton.module.named_modules() if not list(module.children())}
    assert paths == {*Residual()._modules, *(f"points.{name}" for name in skeleton.points), "joins.add"}


def test_a_sum_is_in_8_bits_when_both_operands_are() -> None:
    skeleton = marked(Residual(), 3, 8, 8)
    assert skeleton.active(()) == set()
    assert skeleton.active({"first"}) == {"input_1", "relu"}
    assert skeleton.active({"second"}) == {"relu", "second_norm"}
    assert skeleton.active({"first", "shortcut"}) == {"input_1", "relu", "shortcut"}
    assert skeleton.active({"second", "shortcut"}) == {"input_1", "relu", "second_norm", "shortcut", "relu6"}


class Sums(nn.Module):
    """A sum that a layer and another sum read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.b(y) + y
        return torch.sigmoid(torch.relu(y + self.c(y)))


def test_chains_of_sums_follow() -> None:
    skeleton = marked(Sums(), 4, 6, 6)
    first, second = skeleton.joins
    assert first.operands == ("b", "a") and second.operands == (first.result, "c") and second.result == "relu"
    assert skeleton.points[first.result].readers == ("c", second.name)
    assert skeleton.active({"a"}) == {"input_1", "a"}
    assert skeleton.active({"b"}) == {"a", "b", first.result}
    assert skeleton.active({"c"}) == {first.result, "c", "relu"}
    assert skeleton.active({"a", "c"}) == {"input_1", "a", first.result, "c", "relu"}
    assert skeleton.active({"b", "c"}) == {"a", "b", first.result, "c", "relu"}


def test_a_sum_of_different_shapes_or_with_a_factor_is_none() -> None:
    class Scaled(Sums):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.add(self.a(x), self.b(x), alpha=2)
            return self.c(y) + y.mean((2, 3), keepdim=True)

    assert marked(Scaled(), 4, 6, 6).joins == ()


def test_a_layer_that_runs_twice_stays_as_it_is() -> None:
    skeleton = skeleton_of("twice")
    assert dict(skeleton.missing) == {"shared": "it runs more than once"}
    assert set(skeleton.units) == {"stem", "head"}
    assert not any("shared" in (point.maker, *point.readers) for point in skeleton.points.values())


class Padded(nn.Module):
    """A convolution that pads by itself, as the MobileNetV2 of transformers does."""

    def __init__(self, **padding: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, 2)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.pad(torch.relu(self.a(x)), (0, 1, 0, 1), **self.padding))


@pytest.mark.parametrize(
    ("padding", "seen_through"),
    [({}, True), ({"value": 0.0}, True), ({"value": 1.0}, False), ({"mode": "reflect"}, False)],
)
def test_padding_with_zeros_is_looked_through(padding: dict[str, Any], seen_through: bool) -> None:
    skeleton = marked(Padded(**padding), 3, 8, 8)
    assert (skeleton.units["b"].source == "relu") == seen_through
    assert skeleton.points["relu"] == Point("relu", "a", ("b",) if seen_through else (), not seen_through, 4 * 64)


def test_mobilenet_is_8_bits_throughout() -> None:
    """All its convolutions, and its sums with them, though each pads by itself; only its input is made elsewhere."""
    skeleton = skeleton_of("mobilenet")
    order = [unit for unit in skeleton.units.values() if unit.source]
    assert len(order) == len(skeleton.units) - 1 and not skeleton.missing  # all but the classifier
    assert skeleton.active({unit.layer for unit in order}) == set(skeleton.points)
    assert [name for name, point in skeleton.points.items() if point.maker is None] == [order[0].source]
    assert [name for name, point in skeleton.points.items() if point.floats] == [order[-1].result]


@pytest.mark.parametrize(
    ("activation", "taken_over"),
    [
        (torch.relu, True),
        (F.relu6, True),
        (nn.ReLU6(), True),
        (nn.Hardtanh(0, 2), True),
        (lambda x: x.clamp(min=0), True),
        (lambda x: x.clamp(0, 6), True),
        (nn.Hardtanh(), False),
        (nn.Hardtanh(-3, 2), False),
        (lambda x: x.clamp(max=1), False),
        (F.leaky_relu, False),
        (F.silu, False),
    ],
)
def test_a_clip_at_zero_is_part_of_the_kernel(activation: Callable[[Tensor], Tensor], taken_over: bool) -> None:
    class Activated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(activation(self.a(x)))

    a, b = marked(Activated(), 3, 4, 4).units.values()
    assert (a.result == b.source) == taken_over
    assert taken_over or a.result == "a"


class Normed(nn.Module):
    """Norms that do not follow one layer alone: of a value read twice, of a norm used twice, over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.a, self.b, self.shared = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.tokens, self.over_tokens = nn.Linear(6, 6), nn.BatchNorm1d(4)
        self.flat, self.folded = nn.Linear(6, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read_twice(x)
        y = self.norm(y) * y
        y = self.shared(self.a(y)) * self.shared(self.b(y))
        y = self.over_tokens(self.tokens(y))
        return self.folded(self.flat(y.mean(1)))


def test_a_norm_is_folded_only_where_it_alone_reads_one_layer() -> None:
    units = marked(Normed(), 4, 6).units
    norms = {name: unit.norm for name, unit in units.items()}
    assert norms == {"read_twice": None, "a": None, "b": None, "tokens": None, "flat": "folded"}


def test_what_no_single_operation_shows_is_missing(traced: Traced) -> None:
    _, _, graph = traced("tied")
    model, inputs = build("tied")
    assert "embed" in build_skeleton(model, inputs, default_forward, LayerGraph(graph.layers, (), ())).missing
