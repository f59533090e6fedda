"""Where each layer stands in a network: the shape it reads, and what follows it in the same kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import nn

from grainwise.export.functions import DOMAIN
from grainwise.export.graph import LAYER, POINT, MarkedGraph
from grainwise.graph.forward import Forward
from grainwise.plan.layers import LayerGraph

CLIPS = ("Relu", "Clip")
"""Operators that a float convolution takes over. Only the first is free: the other goes over the output once more."""


@dataclass(frozen=True, slots=True)
class Place:
    """shape: of the layer's input without the batch, at full width. normed: a batch norm follows. clip: the operator of
    CLIPS that follows then, or nothing. padded: zeros that are a part of the input on both sides of each spatial
    dimension, which ONNX Runtime lets the convolution add; empty for none.
    """

    shape: tuple[int, ...]
    normed: bool = False
    clip: str = ""
    padded: tuple[int, ...] = ()


def input_shapes(model: nn.Module, inputs: Any, forward: Forward, graph: LayerGraph) -> dict[str, tuple[int, ...]]:
    """Shape of each layer's input without the batch, by layer name; layers that do not run are left out.

    inputs: a batch of any size.
    """
    found: dict[str, tuple[int, ...]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
            found.setdefault(name, tuple(given[0].shape[1:]))

        return keep

    layers = [layer.name for layer in graph.layers if not layer.blocked]
    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        with torch.inference_mode():
            forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def places_of(marked: MarkedGraph, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """The place of each layer that can be compressed, by name. shapes: of the layers' inputs (`input_shapes`)."""
    clips, padding = clips_of(marked.model), padding_of(marked.model)
    return {
        name: Place(shapes[name], unit.norm is not None, clips.get(unit.result or "", ""), padding.get(name, ()))
        for name, unit in marked.skeleton.units.items()
        if name in shapes
    }


def clips_of(model: ModelProto) -> dict[str, str]:
    """The operator of CLIPS that makes the value at a point, by the point's name; other points are left out.

    model: of a `MarkedGraph`.
    """
    makers = {out: node.op_type for node in model.graph.node for out in node.output}
    found = {_name(node): makers.get(node.input[0], "") for node in _markers(model, POINT)}
    return {name: kind for name, kind in found.items() if kind in CLIPS}


def padding_of(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """Zeros that a layer's input is padded with, as many on both sides of each spatial dimension, by layer name; other
    padding is left out.

    model: of a `MarkedGraph`.
    """
    makers = {out: node for node in model.graph.node for out in node.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in _markers(model, LAYER):
        maker = makers.get(node.input[0])
        if maker is not None and maker.op_type == "Pad" and maker.input[1] in tensors:
            sides = numpy_helper.to_array(tensors[maker.input[1]]).reshape(2, -1)
            if (sides[0] == sides[1]).all() and not sides[:, :2].any():
                found[_name(node)] = tuple(sides[0, 2:].tolist())
    return found


def _markers(model: ModelProto, kind: str) -> Iterator[NodeProto]:
    return (node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, kind))


def _name(marker: NodeProto) -> str:
    name = next(helper.get_attribute_value(a) for a in marker.attribute if a.name == "name")
    return str(name.decode())
