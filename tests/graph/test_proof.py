"""A coupling that does not work is frozen with the reason, the others stay."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from grainwise.graph.forward import default_forward
from grainwise.graph.proof import fault, prove
from grainwise.graph.trace import trace
from tests.graph.conftest import Traced


def test_every_forgotten_slot_is_noticed(traced: Traced) -> None:
    model, inputs, graph = traced("resnet20")
    coupling = graph.coupling("layer1.0.conv1")
    for position in range(len(coupling.slots)):
        slots = coupling.slots[:position] + coupling.slots[position + 1 :]
        assert fault(model, inputs, default_forward, [replace(coupling, slots=slots)]) is not None


def test_a_wrong_pairing_is_noticed(traced: Traced) -> None:
    model, inputs, graph = traced("vgg")
    coupling = graph.coupling("3")
    slots = tuple(replace(s, indices=s.indices[::-1]) if s.parameter == "7.weight" else s for s in coupling.slots)
    proved = prove(model, inputs, default_forward, [replace(coupling, slots=slots), graph.coupling("0")])
    assert "differ" in (proved[0].frozen or "")
    assert proved[1].frozen is None


class SameWidths(nn.Module):
    """Works at any width, but raises unless at least one of its two hidden layers is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if 8 not in (self.a.out_features, self.b.out_features):
            raise RuntimeError("too narrow")
        return self.c(self.b(self.a(x).relu()).relu())


def test_couplings_that_only_work_alone_are_not_offered_together() -> None:
    graph = trace(SameWidths(), torch.randn(3, 4))
    assert graph.coupling("a").frozen is None
    assert graph.coupling("b").frozen == "the network's code needs the full width: RuntimeError: too narrow"


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x + torch.randn_like(x)).relu())


def test_random_networks_draw_the_same_numbers_in_both_runs() -> None:
    torch.manual_seed(5)
    model = Noisy()
    before = torch.random.get_rng_state()
    graph = trace(model, torch.ones(3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert graph.coupling("a").frozen is None
    assert fault(model, torch.ones(3, 4), default_forward, graph.couplings[:1]) is None
