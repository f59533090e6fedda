"""Mean, variance and entropy of feature maps, streamed."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import nn

from grainwise.graph.statistics import feature_statistics
from grainwise.graph.trace import trace
from tests.graph.conftest import Traced


def identity() -> nn.Module:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    return nn.Sequential(layer)


def test_a_uniform_map_has_the_largest_entropy() -> None:
    model, x = identity(), torch.arange(64.0).view(64, 1)
    found = feature_statistics(model, trace(model, x), [x, x])
    assert found[0].tolist() == pytest.approx([31.5, (64**2 - 1) / 12, log(64)])


def test_two_values_have_the_entropy_of_a_coin() -> None:
    model, x = identity(), torch.tensor([[1.0], [1.0], [3.0], [3.0]])
    assert feature_statistics(model, trace(model, x), [x])[0].tolist() == pytest.approx([2, 1, log(2)])


def test_a_constant_map_has_no_entropy() -> None:
    model, x = identity(), torch.full((4, 1), 5.0)
    assert feature_statistics(model, trace(model, x), [x])[0].tolist() == pytest.approx([5, 0, 0])


def test_batches_add_up_to_one_large_batch(traced: Traced) -> None:
    model, _, graph = traced("resnet20")
    batches = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    model.train()
    streamed = feature_statistics(model, graph, iter(batches))
    assert model.training
    model.eval()
    whole = feature_statistics(model, graph, [torch.cat(batches)])
    torch.testing.assert_close(streamed[:, :2], whole[:, :2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(streamed[:, 2], whole[:, 2], rtol=0.2, atol=0.2)  # another range of the histogram


def test_outputs_that_are_not_finite_are_named() -> None:
    model, x = identity(), torch.ones(2, 1)
    graph = trace(model, x)
    with pytest.raises(ValueError, match="output of 0 holds infinite"):
        feature_statistics(model, graph, [x * float("inf")])


def test_layers_that_never_run_have_zeros(traced: Traced) -> None:
    model, inputs, graph = traced("attention")
    assert feature_statistics(model, graph, [inputs])[-1].tolist() == [0, 0, 0]
