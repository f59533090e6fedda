"""Which channels belong together, and why others must stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grainwise.graph.trace import trace
from grainwise.plan.layers import Coupling, LayerGraph
from tests.graph.conftest import Traced


def producing(graph: LayerGraph, layer: str) -> Coupling:
    (found,) = [c for c in graph.couplings if layer in c.producers()]
    return found


def test_the_residual_stream_is_one_coupling(traced: Traced) -> None:
    graph = traced("resnet20")[2]
    stream = graph.coupling("conv1")
    assert stream.frozen is None and stream.width == 16
    assert stream.producers() == ("conv1", "layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2")
    assert stream.consumers() == (
        "layer1.0.conv1",
        "layer1.1.conv1",
        "layer1.2.conv1",
        "layer2.0.conv1",
        "layer2.0.shortcut.0",
    )
    buffers = {s.parameter for s in stream.slots if s.layer is None}
    assert {"bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"} <= buffers
    second = graph.coupling("layer2.0.conv2")
    assert second.producers() == ("layer2.0.conv2", "layer2.0.shortcut.0", "layer2.1.conv2", "layer2.2.conv2")
    assert graph.layer("layer2.0.shortcut.0").output_coupling == "layer2.0.conv2"
    assert graph.layer("layer2.0.shortcut.0").input_couplings == ("conv1",)
    assert graph.layer("fc").output_coupling is None
    assert graph.coupling("fc").frozen == "the network's outputs"


def test_depthwise_layers_belong_to_their_inputs(traced: Traced) -> None:
    graph = traced("mobilenet")[2]
    expand = graph.coupling("mobilenet_v2.layer.0.expand_1x1.convolution")
    assert expand.frozen is None
    assert expand.producers()[1] == "mobilenet_v2.layer.0.conv_3x3.convolution"
    assert graph.layer("mobilenet_v2.layer.0.conv_3x3.convolution").input_couplings == (expand.name,)
    assert all(c.frozen is None for c in graph.couplings if c.name != "classifier")


def test_a_depth_multiplier_gives_units_several_places(traced: Traced) -> None:
    coupling = producing(traced("grouped")[2], "b")
    slot = next(s for s in coupling.slots if s.parameter == "depthwise.weight")
    assert slot.indices == tuple((2 * k, 2 * k + 1) for k in range(6))
    assert "gate" in coupling.producers() and "gate" in coupling.consumers()


def test_grouped_convolutions_are_frozen_with_a_reason(traced: Traced) -> None:
    graph = traced("grouped")[2]
    for layer in ("a", "grouped"):
        assert "grouped convolution" in (producing(graph, layer).frozen or "")


def test_a_flattened_map_gives_units_several_places(traced: Traced) -> None:
    slot = next(s for s in producing(traced("vgg")[2], "3").slots if s.parameter == "7.weight")
    assert slot.indices[1] == tuple(range(16, 32))
    assert not slot.produces


def test_concatenated_couplings_stay_apart(traced: Traced) -> None:
    graph = traced("densenet")[2]
    free = [c for c in graph.couplings if c.frozen is None]
    assert [c.width for c in free] == [8, 6, 6, 6]
    assert graph.layer("head").input_couplings == ("stem", "grow.0", "grow.1", "grow.2")
    slot = next(s for s in graph.coupling("grow.1").slots if s.parameter == "head.weight")
    assert slot.indices == tuple((14 + k,) for k in range(6))


def test_bert_offers_its_feed_forward_only(traced: Traced) -> None:
    graph = traced("bert")[2]
    feed_forward = graph.coupling("bert.encoder.layer.1.intermediate.dense")
    assert feed_forward.frozen is None and feed_forward.width == 128
    assert feed_forward.consumers() == ("bert.encoder.layer.1.output.dense",)
    for part in ("query", "key", "value"):
        reason = producing(graph, f"bert.encoder.layer.0.attention.self.{part}").frozen
        assert reason is not None and "heads" in reason
    hidden = producing(graph, "bert.embeddings.word_embeddings")
    assert hidden.frozen is not None and "layer_norm" in hidden.frozen
    assert "bert.encoder.layer.1.output.dense" in hidden.producers()


def test_gated_halves_are_one_unit(traced: Traced) -> None:
    coupling = producing(traced("halves")[2], "both")
    assert coupling.frozen is None and coupling.width == 8
    assert coupling.slots[0].indices == tuple((k, 8 + k) for k in range(8))


def test_a_tied_embedding_is_produced_and_read(traced: Traced) -> None:
    coupling = traced("tied")[2].coupling("embed")
    assert coupling.frozen is None and coupling.width == 12
    assert coupling.producers() == ("embed",) and coupling.consumers() == ("head",)


class Between(nn.Module):
    """Two convolutions with something in between."""

    def __init__(self, between, width: int = 16) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(3, 16, 1), nn.Conv2d(width, 4, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def shuffle(x: Tensor) -> Tensor:
    return x.view(x.shape[0], 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    ("between", "width", "reason"),
    [
        (lambda x: x.softmax(1), 16, "softmax"),
        (lambda x: F.group_norm(x, 2), 16, "group_norm"),
        (lambda x: x - x.mean(1, keepdim=True), 16, "mean runs over these channels"),
        (lambda x: x + torch.arange(16.0).view(1, 16, 1, 1), 16, "fixed width"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 2, 2)), 20, "padded"),
        (lambda x: x.flip(1), 16, "flipped"),
        (lambda x: x[:, :10], 10, "of the 16 outputs of a"),
        (lambda x: F.pixel_shuffle(x, 2), 4, "pixel_shuffle"),
        (lambda x: x.cumsum(1), 16, "summed"),
        (lambda x: x * x[:, :1], 16, "broadcast"),
        (lambda x: x * x[:, 0].unsqueeze(1), 16, "picked by number"),
        (shuffle, 16, "groups"),
        (lambda x: x.view(-1, 16, x.shape[2], x.shape[3]), 16, "needs the full width"),
        (lambda x: x / x.shape[1], 16, "differ by"),
    ],
)
def test_what_needs_all_channels_says_why(between, width: int, reason: str) -> None:
    graph = trace(Between(between, width), torch.randn(2, 3, 4, 4))
    frozen = [c.frozen for c in graph.couplings if "a" in c.producers()]
    assert frozen and all(text is not None for text in frozen)
    assert any(reason in (text or "") for text in frozen), frozen
    assert graph.layer("a").output_coupling is None and graph.layer("b").input_couplings == ()


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.flatten(2).view(x.shape),
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.pad(x, (1, 1)).relu_(),
        lambda x: torch.stack([x, x * 2]).sum(0),
        lambda x: x[:, :, 1:3],
        lambda x: x.unsqueeze(1).squeeze(1).clamp(min=0).type_as(x),
        lambda x: x * torch.ones_like(x),
        F.instance_norm,
        lambda x: x.reshape(x.shape[0] * x.shape[1], -1).view(x.shape),
        lambda x: torch.cat([x, -x], dim=2),
        lambda x: torch.where(x > 0, x, x.exp() - 1),
    ],
)
def test_what_keeps_channels_apart_is_offered(between) -> None:
    graph = trace(Between(between), torch.randn(2, 3, 4, 4))
    assert graph.coupling("a").frozen is None, graph.coupling("a").frozen
    assert graph.layer("a").output_coupling == "a"
    assert graph.layer("b").input_couplings == ("a",)
