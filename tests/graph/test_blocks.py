"""Modules that can be replaced by a narrower twin."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grainwise.graph.trace import trace
from grainwise.plan.layers import Block
from tests.graph.conftest import Traced


def test_residual_blocks_of_resnet20(traced: Traced) -> None:
    blocks = traced("resnet20")[2].blocks
    assert [b.name for b in blocks] == [f"layer{stage}.{k}" for stage in (1, 2, 3) for k in range(3)]
    layers = ("layer2.0.conv1", "layer2.0.conv2", "layer2.0.shortcut.0")
    assert Block("layer2.0", "layer2.0.conv1", layers) in blocks


def test_bert_layers_enclose_their_feed_forward(traced: Traced) -> None:
    blocks = {b.name: b for b in traced("bert")[2].blocks}
    assert blocks["bert.encoder.layer.0"].coupling == "bert.encoder.layer.0.intermediate.dense"


def test_the_network_itself_is_no_block(traced: Traced) -> None:
    assert traced("vgg")[2].blocks == ()
    assert traced("twice")[2].blocks == ()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(6, 16), nn.Linear(16, 6)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.parts[1](self.parts[0](x).relu())


class Outer(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.inner, self.head, self.times = Inner(), nn.Linear(6, 2), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.inner(x)
        return self.head(x)


def test_a_list_that_never_runs_stands_for_its_owner() -> None:
    graph = trace(Outer(1), torch.randn(2, 6))
    assert graph.blocks == (Block("inner", "inner.parts.0", ("inner.parts.0", "inner.parts.1")),)


def test_a_module_that_runs_twice_is_no_block() -> None:
    graph = trace(Outer(2), torch.randn(2, 6))
    assert graph.coupling("inner.parts.0").frozen is None
    assert graph.blocks == ()
