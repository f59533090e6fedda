"""How a model is called and which tensor is its output."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from grainwise.graph.forward import batch_size, default_forward

X = torch.ones(2, 3)


class Returns(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x, scale=1):
        return self.make(x * scale)


@pytest.mark.parametrize(
    "make",
    [
        lambda y: y,
        lambda y: SimpleNamespace(logits=y),
        lambda y: {"logits": y},
        lambda y: SimpleNamespace(last_hidden_state=y),
        lambda y: (None, y, 2 * y),
        lambda y: [y],
    ],
)
def test_the_output_tensor_is_found(make) -> None:
    assert torch.equal(default_forward(Returns(make), X), X)


@pytest.mark.parametrize("inputs", [{"x": X, "scale": 2}, (X, 2), [X, 2]])
def test_inputs_are_spread(inputs) -> None:
    assert torch.equal(default_forward(Returns(lambda y: y), inputs), 2 * X)


def test_an_output_without_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"returned dict, .*pass forward="):
        default_forward(Returns(lambda y: {"boxes": 1}), X)


def test_batch_size_is_that_of_the_first_tensor() -> None:
    assert batch_size({"flag": True, "x": (X,)}) == 2
    assert batch_size(None) == 1
