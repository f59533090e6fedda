"""Layers, positions, multiply-accumulates, what is refused, and what is left when torch.export fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grainwise.graph.recording import TraceError
from grainwise.graph.trace import trace
from grainwise.plan.layers import Kind
from tests.graph.conftest import Traced
from tests.graph.graph_networks import build


def test_macs_of_resnet20_equal_the_hand_count(traced: Traced) -> None:
    graph = traced("resnet20")[2]
    by_hand = 32 * 32 * 9 * (3 * 16 + 6 * 16 * 16)
    by_hand += 16 * 16 * (9 * (16 * 32 + 5 * 32 * 32) + 16 * 32)
    by_hand += 8 * 8 * (9 * (32 * 64 + 5 * 64 * 64) + 32 * 64)
    by_hand += 64 * 10
    assert sum(layer.macs for layer in graph.layers) == by_hand == 40_813_184
    assert graph.other_macs == 0


def test_layers_come_in_execution_order(traced: Traced) -> None:
    names = [layer.name for layer in traced("resnet20")[2].layers]
    assert names[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert names[-1] == "fc"
    assert len(names) == 22
    assert len(traced("resnet20")[2].norms) == 21


def test_attention_products_are_other_macs(traced: Traced) -> None:
    graph = traced("bert")[2]
    assert graph.other_macs == 2 * 2 * 8 * 8 * 64  # layers x (scores, values) x tokens x tokens x hidden
    query = graph.layer("bert.encoder.layer.0.attention.self.query")
    assert (query.positions_in, query.positions_out) == (8, 8)
    assert graph.layer("bert.embeddings.position_embeddings").positions_out == 8
    assert graph.layer("classifier").positions_out == 1


def test_a_shared_module_sums_its_positions(traced: Traced) -> None:
    graph = traced("twice")[2]
    shared = graph.layer("shared")
    assert shared.positions_out == 64 + 16
    assert graph.other_macs == 0


def test_geometry_of_convolutions(traced: Traced) -> None:
    graph = traced("grouped")[2]
    depthwise = graph.layer("depthwise").geometry
    assert depthwise.padding == (1, 1)
    assert depthwise.groups == depthwise.inputs == 6
    assert graph.layer("grouped").geometry.groups == 4
    assert traced("conv1d")[2].layer("0").geometry.kind is Kind.CONV1D


def test_tied_weights_name_their_owner(traced: Traced) -> None:
    graph = traced("tied")[2]
    assert graph.layer("embed").tied_to is None
    assert graph.layer("head").tied_to == "embed"


def test_layers_that_are_not_called_are_blocked(traced: Traced) -> None:
    graph = traced("attention")[2]
    projection = graph.layer("attention.out_proj")
    assert projection.blocked is not None and "never called" in projection.blocked
    assert graph.layers[-1] == projection
    assert graph.other_macs == 5 * 16 * 16 * 4 + 2 * 5 * 5 * 16
    assert any("MultiheadAttention" in note for note in graph.notes)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_unsupported_padding_is_blocked() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 2, padding="same"),
        nn.Conv2d(8, 8, 3, padding="same", dilation=2),
    )
    mirrored, even, odd = trace(model, torch.randn(1, 3, 8, 8)).layers
    assert mirrored.blocked == "padding mode 'reflect' is not supported"
    assert even.blocked is not None and "two unequal sides" in even.blocked
    assert odd.blocked is None and odd.geometry.padding == (2, 2)


def test_a_parametrised_weight_is_blocked() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
    first = trace(model, torch.randn(2, 4)).layers[0]
    assert first.blocked == "its weight is computed from other parameters"


def test_training_flags_are_restored() -> None:
    model, inputs = build("resnet20")
    model.train()
    model.bn1.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model, inputs)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        if y.sum() > 0:
            y = -y
        return self.b(y)


def test_without_export_layers_are_left_and_a_note() -> None:
    graph = trace(Branches(), torch.randn(3, 4))
    assert [layer.macs for layer in graph.layers] == [32, 16]
    assert graph.couplings == () and graph.blocks == ()
    assert "torch.export failed" in graph.notes[0]
    assert "channel pruning and block distillation are not offered" in graph.notes[0]


def test_a_model_that_does_not_run_is_an_error() -> None:
    with pytest.raises(TraceError, match=r"running Linear .* failed with RuntimeError: .* pass forward="):
        trace(nn.Linear(3, 4), torch.randn(2, 5))


def test_a_forward_function_adapts_the_call() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = trace(model, {"picture": torch.randn(2, 3)}, lambda m, batch: m(batch["picture"]))
    assert graph.coupling("0").frozen is None
