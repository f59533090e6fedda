"""Targets are the network's own classes, found once for the same weights and inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from examples.agreement import labelled
from grainwise.evaluate.data import Splits


class Counting(nn.Module):
    """A classifier [B, 3, 4, 4] -> [B, 5] that counts its calls."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.fc = nn.Linear(48, 5)
        self.calls = 0
        generator = torch.Generator().manual_seed(seed)
        self.load_state_dict({n: torch.randn(p.shape, generator=generator) for n, p in self.state_dict().items()})

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x.flatten(1))


def inputs(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {split: torch.randn(40, 3, 4, 4, generator=generator) for split in ("calibration", "search", "test")}


@pytest.mark.usefixtures("empty_cache")
def test_the_uncompressed_network_agrees_with_itself() -> None:
    network = Counting(0)
    splits = Splits.read(labelled(network, inputs(0)))
    assert [len(batch.targets) for batch in splits.test] == [32, 8]
    for batch in (*splits.calibration, *splits.search, *splits.test):
        torch.testing.assert_close(network(batch.inputs).argmax(1), batch.targets, rtol=0, atol=0)


def test_targets_are_found_once_for_the_same_weights_and_inputs(empty_cache: Path) -> None:
    labelled(Counting(0), inputs(0))
    again = Counting(0)
    labelled(again, inputs(0))
    assert again.calls == 0
    labelled(Counting(1), inputs(0))
    labelled(Counting(0), inputs(1))
    assert len(list(empty_cache.iterdir())) == 3
