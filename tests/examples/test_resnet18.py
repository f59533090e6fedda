"""ResNet-18: always the same random network, whose classes differ from picture to picture, and which exports."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from examples import resnet18
from grainwise.evaluate.data import Splits
from tests.examples.conftest import or_skip


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return or_skip(resnet18.model)


def test_it_has_the_published_size() -> None:
    assert sum(p.numel() for p in resnet18.ResNet18().parameters()) == 11_173_962


def test_it_is_always_the_same(network: nn.Module) -> None:
    before = torch.random.get_rng_state()
    again = resnet18.model().state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(again[name], value)


def test_its_classes_are_spread() -> None:
    splits = Splits.read(or_skip(resnet18.data))
    targets = torch.cat([batch.targets for batch in splits.test])
    assert len(targets) == 500
    assert targets.bincount(minlength=10).max() < 150


def test_it_exports_with_any_batch() -> None:
    network = resnet18.ResNet18().eval()
    program = torch.export.export(
        network, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program.module()(x), network(x))
