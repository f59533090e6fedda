"""What the ONNX file charges: bytes of an entry's tensors, of the nodes that read them, and of the functions they call.

Tensors are counted from the shapes that `methods` will build; nodes and functions are written once for each way of
storing a layer, with blank contents, and weighed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, prod
from typing import Protocol

import numpy as np
import torch
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper
from torch import nn

from grainwise.export.functions import DOMAIN, IR_VERSION, eight_bit, norm
from grainwise.export.graph import LAYER, NORM, POINT, MarkedGraph
from grainwise.export.layers import GraphWriter
from grainwise.methods.activations import EightBit
from grainwise.methods.layers import scale_outputs
from grainwise.methods.structure import blank
from grainwise.plan.choices import NONE, PRECISIONS, STRUCTURES, Choice, Granularity, Method
from grainwise.plan.layers import Geometry, Layer
from grainwise.plan.prices import Cost, Shared
from grainwise.plan.shapes import Stage, group_size, scale_count, stages
from grainwise.plan.space import SearchSpace, narrows
from grainwise.plan.target import Realisation, Target
from grainwise.realise.deploy import stages_of
from grainwise.realise.norms import FrozenNorm

_DIGEST = "0" * 64  # of the profile, as the file's metadata hold it
_MARGIN = 1.001  # lengths written in one byte more or less: a budget must hold to the byte

LayerMs = Callable[[Layer, Geometry, Choice, Choice], float]
BoundaryMs = Callable[[frozenset[str]], float]


@dataclass(frozen=True)
class _Written:
    """Bytes of an entry's nodes and tensor heads, and the functions that they call with their bytes."""

    overhead: int
    functions: dict[str, int]


@dataclass(frozen=True)
class OnnxPrices:
    """layer_time, boundary_time: milliseconds of an entry's kernels, and of what converts between the layers of these
    names that run in static 8 bits and the others; None where latency is not asked for. offset_ms: of every run.
    """

    marked: MarkedGraph
    space: SearchSpace
    target: Target
    layer_time: LayerMs | None = None
    boundary_time: BoundaryMs | None = None
    offset_ms: float = 0.0
    _written: dict[tuple[object, ...], _Written] = field(default_factory=dict, repr=False)  # by what decides it
    _weighed: dict[tuple[str, Choice, Choice], _Written] = field(default_factory=dict, repr=False)
    _stored: dict[tuple[Geometry, Choice, Choice, bool], int] = field(default_factory=dict, repr=False)  # layers repeat
    _boundaries: dict[frozenset[int], Cost] = field(default_factory=dict, repr=False)

    @cached_property
    def fixed(self) -> Cost:
        """The graph without markers and tensors, calls of norms that stay, and what is counted in no other type."""
        graph = self.marked.model.graph
        size = self._empty_file().ByteSize() + 3  # the length of the graph
        size += sum(_framed(node) + self._renamed(node) for node in graph.node if node.domain != DOMAIN)
        size += sum(_framed(value) for value in (*graph.input, *graph.output))
        size += sum(_framed(tensor) for tensor in graph.initializer if tensor.data_type != TensorProto.FLOAT)
        for name in self.marked.free_norms():
            inputs = [self._markers[NORM, name][0], f"{name}.scale", f"{name}.shift"]
            size += _framed(helper.make_node("Norm", inputs, [name], name=name, domain=DOMAIN))
        if self.marked.free_norms():
            size += _function_bytes(norm())
        return np.array([float(size), 0.0, self.offset_ms])

    @cached_property
    def _names(self) -> dict[str, str]:
        """The longest name by which each value may be read: without a norm or point, that of what it was made of."""
        names: dict[str, str] = {}
        for node in self.marked.model.graph.node:
            for output in node.output:
                names[output] = output
            if node.domain == DOMAIN and node.op_type in (NORM, POINT):
                names[node.output[0]] = max(node.output[0], names.get(node.input[0], node.input[0]), key=len)
        return names

    def _renamed(self, node: NodeProto) -> int:
        """Bytes by which the names of a node's inputs may become longer."""
        return sum(len(self._names.get(name, name)) - len(name) for name in node.input)

    @cached_property
    def _markers(self) -> dict[tuple[str, str], tuple[str, str]]:
        """Longest name of what each marker reads, and the name of what it makes, by kind and name of the marker."""
        return {
            (node.op_type, _marked(node)): (self._names.get(node.input[0], node.input[0]), node.output[0])
            for node in self.marked.model.graph.node
            if node.domain == DOMAIN
        }

    def _empty_file(self) -> ModelProto:
        file = helper.make_model(
            helper.make_graph([], "grainwise", [], []),
            opset_imports=self.marked.imports(functions=True),
            ir_version=IR_VERSION,
            producer_name="grainwise",
        )
        helper.set_model_props(file, {"grainwise.target": self.target.name, "grainwise.profile": _DIGEST})
        return file

    @cached_property
    def shared(self) -> Shared:
        """Functions are in the file once, whoever calls them."""
        layers = self.space.layers
        sizes: dict[str, int] = {}
        pairs = [self.space.pairs(index) for index in range(len(layers))]
        needs: dict[tuple[int, int, int], tuple[str, ...]] = {}
        static = np.zeros((len(layers), len(STRUCTURES), len(PRECISIONS)), dtype=bool)
        for index, layer in enumerate(layers):
            for s, p in np.argwhere(pairs[index]).tolist():
                structure, precision = STRUCTURES[s], PRECISIONS[p]
                static[index, s, p] = self.target.static(layer.geometry, structure, precision) and self._plain(layer)
                found = self._weigh(layer, structure, precision).functions
                sizes |= found
                needs[index, s, p] = tuple(found)
        sizes |= {f.name: _function_bytes(f) for f in (eight_bit(), norm())}
        numbers = {name: k for k, name in enumerate(sizes)}
        parts = np.zeros((*static.shape, len(sizes)), dtype=bool)
        for place, names in needs.items():
            parts[place][[numbers[name] for name in names]] = True
        parts[static, numbers["EightBit"]] = True
        if self.marked.free_norms():
            parts[..., numbers["Norm"]] = False  # paid for already
        return Shared(parts, np.array(list(sizes.values()), dtype=np.float64), static, self._boundary)

    def _boundary(self, static: frozenset[int]) -> Cost:
        """Bytes of the 8-bit values around static layers, and milliseconds of the conversions."""
        if static not in self._boundaries:
            names = frozenset(self.space.layers[index].name for index in static)
            size = sum(self._point_bytes[point] for point in self.marked.skeleton.active(names))
            spent = 0.0 if self.boundary_time is None else self.boundary_time(names)
            self._boundaries[static] = np.array([size, 0.0, spent])
        return self._boundaries[static]

    def _plain(self, layer: Layer) -> bool:
        return not layer.blocked and not layer.tied_to

    def layer_bytes(self, layer: Layer, geometry: Geometry, structure: Choice, precision: Choice) -> float:
        if not self._plain(layer):  # stays among the tensors beside the layers
            return 0.0
        data = self._tensor_bytes(layer, geometry, structure, precision)
        return _MARGIN * (data + self._weigh(layer, structure, precision).overhead)

    def layer_ms(self, layer: Layer, geometry: Geometry, structure: Choice, precision: Choice) -> float:
        return 0.0 if self.layer_time is None else self.layer_time(layer, geometry, structure, precision)

    def tensor_bytes(self, name: str, shape: tuple[int, ...]) -> float:
        data = 4 * prod(shape)
        return data + _head_bytes(data) + len(name) + 5 + 3 * len(shape)

    @cached_property
    def _point_bytes(self) -> dict[str, int]:
        """Bytes of each 8-bit value's scale, zero point and call."""
        sizes = {}
        for name in self.marked.skeleton.points:
            writer = GraphWriter()
            writer.point(EightBit(), *self._markers[POINT, name], name)
            sizes[name] = _weight(writer)
        return sizes

    def _weigh(self, layer: Layer, structure: Choice, precision: Choice) -> _Written:
        if not self._plain(layer):
            return _Written(0, {})
        own = layer.name, structure, precision
        if own not in self._weighed:
            unit = self.marked.skeleton.units[layer.name]
            names = (layer.name, *self._markers[LAYER, layer.name], unit.source, unit.norm)
            lengths = (None if name is None else len(name) for name in names)
            key = (*self._form(layer.geometry, structure, precision), *lengths, structure, precision)
            if key not in self._written:
                self._written[key] = self._write(layer, structure, precision)
            self._weighed[own] = self._written[key]
        return self._weighed[own]

    def _form(self, g: Geometry, structure: Choice, precision: Choice) -> tuple[object, ...]:
        """What decides the nodes of an entry beside its choices: how its stages run, and attributes of the calls."""
        found = stages(g, NONE if narrows(structure) else structure)
        hows = (self.target.realisation(stage, precision, routed=_routed(structure)) for stage in found)
        kinds = ((how, s.tile_rows, group_size(s.geometry.columns)) for how, s in zip(hows, found, strict=True))
        return (g.kind, g.kernel, g.stride, g.padding, g.dilation, g.groups > 1, g.bias, g.columns, *kinds)

    def _write(self, layer: Layer, structure: Choice, precision: Choice) -> _Written:
        writer, geometry = GraphWriter(), layer.geometry
        unit, (x, y) = self.marked.skeleton.units[layer.name], self._markers[LAYER, layer.name]
        module = blank(geometry, NONE if narrows(structure) else structure, precision, self.target)
        if unit.norm is not None and not _routed(structure):
            scale_outputs(stages_of(module)[-1], torch.ones(geometry.outputs), torch.zeros(geometry.outputs))
        writer.layer(module, x, y, layer.name, geometry, unit.source)
        if unit.norm is not None and _routed(structure):
            writer.norm(FrozenNorm(geometry.outputs), y, unit.norm, unit.norm, 4)
        return _Written(_weight(writer), {name: _function_bytes(f) for name, f in writer.functions.items()})

    def _tensor_bytes(self, layer: Layer, geometry: Geometry, structure: Choice, precision: Choice) -> int:
        normed = self.marked.skeleton.units[layer.name].norm is not None
        key = geometry, structure, precision, normed
        if key not in self._stored:
            self._stored[key] = self._add_up(*key)
        return self._stored[key]

    def _add_up(self, geometry: Geometry, structure: Choice, precision: Choice, normed: bool) -> int:
        routed = _routed(structure)
        found = stages(geometry, structure)
        total = 0
        for number, stage in enumerate(found):
            how = self.target.realisation(stage, precision, routed=routed)
            folded = normed and not routed and number == len(found) - 1
            total += _stage_bytes(stage, how, precision, folded=folded)
        if routed:
            total += 2 * (found[1].geometry.outputs + geometry.outputs) + 8 * geometry.outputs * normed
        return total


def _marked(node: NodeProto) -> str:
    """Name of what a marker stands for."""
    name: bytes = next(attribute.s for attribute in node.attribute if attribute.name == "name")
    return name.decode()


def _routed(structure: Choice) -> bool:
    return (structure.method, structure.granularity) == (Method.DISTILL, Granularity.CHANNEL)


def _stage_bytes(stage: Stage, how: Realisation, precision: Choice, *, folded: bool) -> int:
    """Bytes of a stage's tensors as the file keeps them. folded: a batch norm was folded in: a bias, a scale a row."""
    g = stage.geometry
    kept = g.weights if stage.kept is None else stage.kept
    total = 4 * g.outputs if g.bias or folded else 0
    if precision.method is Method.QUANTIZE:
        assert precision.granularity is not None and precision.level is not None
        sharing = precision.granularity
        if folded and sharing is Granularity.LAYER:
            sharing = Granularity.CHANNEL
        total += ceil(kept * int(precision.level) / 8) + 2 * scale_count(g, sharing)
    else:
        total += 4 * kept
    if how is Realisation.SPARSE:
        return total + 2 * kept // stage.tile_rows
    if stage.kept is not None:
        total += ceil(g.weights // max(1, stage.tile_rows) / 8)
    return total


class _Message(Protocol):
    def ByteSize(self) -> int: ...


def _framed(message: _Message) -> int:
    """Bytes of a message inside of another: a tag and its length stand before it."""
    size = message.ByteSize()
    return 1 + _length_bytes(size) + size


def _function_bytes(function: FunctionProto) -> int:
    return 1 + _framed(function)  # its tag is a number above 15, which takes two bytes


def _length_bytes(size: int) -> int:
    """Seven bits of a length a byte."""
    return max(1, ceil(size.bit_length() / 7))


def _head_bytes(data: int) -> int:
    """What holds the lengths of a tensor and of its data."""
    return 2 + _length_bytes(data) + _length_bytes(data + 64)


def _weight(writer: GraphWriter) -> int:
    """Bytes of nodes, of 8-bit values' scales and zero points, and of other tensors without their data."""
    of_points = (".y_scale", ".y_zero")
    data = sum(len(t.raw_data) for name, t in writer.tensors.items() if not name.endswith(of_points))
    return sum(map(_framed, writer.nodes)) + sum(map(_framed, writer.tensors.values())) - data


def other_tensors(marked: MarkedGraph, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the float32 tensors of the file beside the layers, by the network's names."""
    found = {t.name: tuple(t.dims) for t in marked.model.graph.initializer if t.data_type == 1}
    for name in marked.free_norms():
        channels = model.get_buffer(f"{name}.running_mean").shape
        found |= {f"{name}.{part}": (*channels, 1, 1) for part in ("weight", "bias")}
    return found
