"""The network as one function over its layers: the form that is compressed, quantised, evaluated and exported alike.

A user's module can have its layers swapped, but the sums and rectifiers between them are code, out of reach. The
skeleton is the exported ATen graph whose layers and batch norms are calls of the user's own modules again, at the
user's own paths, with a `Point` at every value that a deployment may keep in 8 bits, and sums of such values as modules
of their own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from grainwise.graph.forward import Forward, tensors_in
from grainwise.graph.walk import PREFIX, export_program
from grainwise.plan.layers import Kind, LayerGraph

POINTS, JOINS = "points", "joins"

_LAYER_OPS: dict[Any, int] = {
    torch.ops.aten.conv1d.default: 1,
    torch.ops.aten.conv1d.padding: 1,
    torch.ops.aten.conv2d.default: 1,
    torch.ops.aten.conv2d.padding: 1,
    torch.ops.aten.linear.default: 1,
    torch.ops.aten.embedding.default: 0,
}
"""Operators that a layer's module may run as, with the position of the weight; the data stand at the other position."""

_ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_RECTIFIERS = (
    torch.ops.aten.relu.default,
    torch.ops.aten.relu_.default,
    torch.ops.aten.relu6.default,
    torch.ops.aten.relu6_.default,
)
_CLIPS: dict[Any, float | None] = {
    torch.ops.aten.hardtanh.default: -1.0,
    torch.ops.aten.hardtanh_.default: -1.0,
    torch.ops.aten.clamp.default: None,
    torch.ops.aten.clamp_.default: None,
}
"""Operators with bounds as arguments, by the lower one that they take when none is given."""

_DROPOUTS = (torch.ops.aten.dropout.default, torch.ops.aten.dropout_.default)


@dataclass(frozen=True, slots=True)
class Point:
    """A value that a deployment may keep in 8 bits.

    maker: the layer or sum whose kernel can write it so, None when something else makes it. readers: layers and sums
    that can read it so. floats: True where something else reads it too. elements: numbers that a sample's value holds.
    """

    name: str
    maker: str | None
    readers: tuple[str, ...]
    floats: bool
    elements: int


@dataclass(frozen=True, slots=True)
class Unit:
    """A layer and what follows it directly. source, result: names of the points at its input and output; None for
    layers whose activations are not quantised beforehand (Linear, Embedding). norm: the batch norm that is folded in.
    """

    layer: str
    source: str | None = None
    result: str | None = None
    norm: str | None = None


@dataclass(frozen=True, slots=True)
class Join:
    """A sum of two values of one shape: points at its operands and at its result."""

    name: str
    operands: tuple[str, str]
    result: str


@dataclass(frozen=True)
class Skeleton:
    """module: maps the batch's tensors, in their order, to the output; children at the user's paths, points at
    `points.NAME`, sums at `joins.NAME`. units: by layer. joins, points: in the order in which they run. graph: all that
    runs, in order. inputs: names of the inputs. missing: layers that the graph does not show as one plain operation,
    with the reason.
    """

    module: SkeletonModule
    units: Mapping[str, Unit]
    joins: tuple[Join, ...]
    points: Mapping[str, Point]
    inputs: tuple[str, ...]
    graph: fx.Graph
    missing: Mapping[str, str] = field(default_factory=dict)

    def active(self, quantised: Collection[str]) -> frozenset[str]:
        """Points kept in 8 bits when the kernels of the layers `quantised` read and write 8 bits: those at their inputs
        and outputs, and every sum of two such values.
        """
        found = {p for name in quantised for p in (self.units[name].source, self.units[name].result) if p}
        for join in self.joins:  # in running order, so that chains of sums follow
            if found.issuperset(join.operands):
                found.add(join.result)
        return frozenset(found)


class Sum(nn.Module):
    """a + b, as a module, so that a deployment can round it."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class SkeletonModule(nn.Module):
    """Runs the graph's code over a tree of modules. The code is shared by all copies; modules are found by path."""

    def __init__(self, compiled: fx.GraphModule) -> None:
        super().__init__()
        for name, child in compiled.named_children():
            self.add_module(name, child)
        for name, parameter in compiled.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in compiled.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self._code: Callable[..., Tensor] = type(compiled).forward

    def forward(self, *tensors: Tensor) -> Tensor:
        return self._code(self, *tensors)


def skeleton_forward(model: nn.Module, inputs: Any) -> Tensor:
    """How a batch goes through a skeleton."""
    output: Tensor = model(*tensors_in(inputs))
    return output


def build_skeleton(model: nn.Module, inputs: Any, forward: Forward, graph: LayerGraph) -> Skeleton:
    """The skeleton of `model` in eval mode; raises whatever torch.export raises.

    inputs: a batch of at least 2 samples. Dimension 0 of every tensor, and all dimensions of token tensors, may vary.
    """
    program = export_program(model, inputs, forward, dynamic=True)
    return _Builder(model, graph, program, inputs).build()


class _Builder:
    """One pass over the exported graph: parameters by name, layers and norms as calls, points."""

    def __init__(self, model: nn.Module, graph: LayerGraph, program: torch.export.ExportedProgram, inputs: Any) -> None:
        self._root = copy.deepcopy(model)
        layers = [layer for layer in graph.layers if not layer.blocked and not layer.tied_to]
        self._norms = {n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
        self._inputs = _input_names(inputs)
        self._program = program
        self._repeated = [layer.name for layer in layers if self._runs(layer.name) > 1]
        self._layers = {layer.name: layer for layer in layers if layer.name not in self._repeated}
        self.graph = fx.Graph()
        self._stored: dict[fx.Node, str] = {}  # parameters and buffers by the user's name
        self._calls: dict[str, list[fx.Node]] = {}
        self._points: dict[str, tuple[fx.Node, str | None]] = {}  # with the layer or sum that makes the value

    def _runs(self, layer: str) -> int:
        """How often an operation reads the layer's weight; one that runs twice stays as it is."""
        signature = self._program.graph_signature
        names = {p for p, name in signature.inputs_to_parameters.items() if name == f"{PREFIX}{layer}.weight"}
        return sum(len(node.users) for node in self._program.graph.nodes if node.name in names)

    def build(self) -> Skeleton:
        self._copy()
        self._root.add_module(POINTS, nn.Module())
        self._root.add_module(JOINS, nn.Module())
        units, joins = self._mark()
        compiled = fx.GraphModule(self._root, self.graph)
        compiled.graph.eliminate_dead_code()
        compiled.recompile()
        module = SkeletonModule(compiled).eval().requires_grad_(False)
        points = self._describe(units, joins)
        unseen = "the exported graph does not show it as one plain operation"
        missing = {name: unseen for name in self._layers if name not in units}
        missing |= {name: "it runs more than once" for name in self._repeated}
        return Skeleton(module, units, joins, points, self._inputs, compiled.graph, missing)

    # -- copying the graph

    def _copy(self) -> None:
        signature = self._program.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = {**signature.inputs_to_lifted_tensor_constants}
        made: dict[fx.Node, fx.Node] = {}
        named = iter(self._inputs)
        for node in self._program.graph.nodes:
            if node.op == "placeholder" and node.name in stored:
                made[node] = self._attribute(stored[node.name].removeprefix(PREFIX))
            elif node.op == "placeholder" and node.name in constants:
                made[node] = self._constant(constants[node.name])
            elif node.op == "placeholder":
                if isinstance(node.meta.get("val"), Tensor):
                    made[node] = self.graph.placeholder(next(named).replace(".", "_"))
            elif node.op == "output":
                self.graph.output(made[node.args[0][0]])
                break
            elif node.target in _DROPOUTS:
                made[node] = made[node.args[0]]
            else:
                made[node] = self._call(node, made)
            if node in made and "val" in node.meta:
                made[node].meta.setdefault("val", node.meta["val"])

    def _attribute(self, name: str) -> fx.Node:
        node = self.graph.get_attr(name)
        self._stored[node] = name
        return node

    def _constant(self, name: str) -> fx.Node:
        attribute = f"constant_{len(self._stored)}"
        self._root.register_buffer(attribute, self._program.constants[name].clone())
        node = self.graph.get_attr(attribute)
        self._stored[node] = attribute
        return node

    def _call(self, node: fx.Node, made: Mapping[fx.Node, fx.Node]) -> fx.Node:
        args = fx.node.map_arg(node.args, made.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, made.__getitem__)
        path = self._layer_path(node, args) or self._norm_path(node, args)
        if path:
            data = args[1] if node.target is torch.ops.aten.embedding.default else args[0]
            call = self.graph.call_module(path, (data,))
            self._calls.setdefault(path, []).append(call)
            return call
        return self.graph.create_node(node.op, node.target, tuple(args), dict(kwargs), name=node.name)

    def _layer_path(self, node: fx.Node, args: tuple[Any, ...]) -> str | None:
        position = _LAYER_OPS.get(node.target)
        if position is None:
            return None
        path, _, attribute = self._stored.get(args[position], "").rpartition(".")
        return path if attribute == "weight" and path in self._layers else None

    def _norm_path(self, node: fx.Node, args: tuple[Any, ...]) -> str | None:
        if node.target is not torch.ops.aten.batch_norm.default:
            return None
        path = self._stored.get(args[3], "").rpartition(".")[0]
        return path if path in self._norms else None

    # -- points

    def _mark(self) -> tuple[dict[str, Unit], tuple[Join, ...]]:
        units: dict[str, Unit] = {}
        joins: list[Join] = []
        for node in list(self.graph.nodes):
            if node.op == "call_module" and node.target in self._layers:
                units[str(node.target)] = self._unit(str(node.target), node)
            elif node.target in _ADDS and _is_sum(node) and all(map(_is_point, node.args[:2])):
                joins.append(self._join(node))
        return units, tuple(joins)

    def _unit(self, name: str, call: fx.Node) -> Unit:
        norm = self._following_norm(call)
        path = None if norm is None else str(norm.target)
        if self._layers[name].geometry.kind not in (Kind.CONV1D, Kind.CONV2D):
            return Unit(name, norm=path)
        return Unit(name, self._point(_unpadded(call.args[0])), self._point(_clipped(norm or call), maker=name), path)

    def _following_norm(self, call: fx.Node) -> fx.Node | None:
        """The batch norm that alone reads a layer's output and normalises its output channels."""
        (user, *others) = call.users or (None,)
        if user is None or others or user.op != "call_module" or user.target not in self._norms:
            return None
        convolved = self._layers[str(call.target)].geometry.kernel
        channels_first = bool(convolved) or call.meta["val"].dim() == 2
        return user if channels_first and len(self._calls[str(user.target)]) == 1 else None

    def _join(self, node: fx.Node) -> Join:
        first, second = (self._point(argument) for argument in node.args[:2])
        with self.graph.inserting_before(node):
            call = self.graph.call_module(f"{JOINS}.{node.name}", node.args[:2])
        call.meta["val"] = node.meta["val"]
        self._root.get_submodule(JOINS).add_module(node.name, Sum())
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)
        return Join(node.name, (first, second), self._point(_clipped(call), maker=node.name))

    def _point(self, value: Any, maker: str | None = None) -> str:
        """Name of the point at `value`, placed there at the first call; every reader of the value reads it then."""
        if _is_point(value):
            return str(value.target).removeprefix(f"{POINTS}.")
        name = str(value.name)
        readers = list(value.users)
        with self.graph.inserting_after(value):
            point = self.graph.call_module(f"{POINTS}.{name}", (value,))
        point.meta["val"] = value.meta.get("val")
        for reader in readers:
            reader.replace_input_with(value, point)
        self._root.get_submodule(POINTS).add_module(name, nn.Identity())
        self._points[name] = point, maker
        return name

    def _describe(self, units: Mapping[str, Unit], joins: tuple[Join, ...]) -> dict[str, Point]:
        names = {join.name for join in joins}
        static = {unit.layer for unit in units.values() if unit.source}
        points = {}
        for name, (node, maker) in self._points.items():
            users = [_name(reader) for user in node.users for reader in _readers(user)]
            readers = tuple(dict.fromkeys(u for u in users if u in static or u in names))
            elements = math.prod(int(size) for size in node.meta["val"].shape[1:])
            points[name] = Point(name, maker, readers, any(u not in readers for u in users), elements)
        return points


def _unpadded(value: Any) -> Any:
    """The value that a layer's input is padded from with zeros, which have a code in 8 bits; else the input itself."""
    if len(value.users) > 1:
        return value
    match value.target, value.args:
        case torch.ops.aten.pad.default, (inner, _):
            return inner
        case torch.ops.aten.pad.default, (inner, _, "constant", None | 0 | 0.0):
            return inner
        case torch.ops.aten.constant_pad_nd.default, (inner, _, *fill) if not any(fill):
            return inner
    return value


def _clipped(node: fx.Node) -> fx.Node:
    """The value after the activation that alone reads `node` and is nothing but a clip at zero, or `node` itself.

    A quantised kernel takes such a clip over for free: codes end at that of zero anyway. At another lower bound they
    need not end, and the kernel is lost.
    """
    users = list(node.users)
    return users[0] if len(users) == 1 and _is_clip(users[0]) else node


def _is_clip(node: fx.Node) -> bool:
    if node.target not in _CLIPS:
        return node.target in _RECTIFIERS
    lower = node.args[1] if len(node.args) > 1 else node.kwargs.get("min", _CLIPS[node.target])
    return bool(lower == 0)


def _readers(user: fx.Node) -> list[fx.Node]:
    """The user itself; in place of padding with zeros, what reads the padded value."""
    return list(user.users) if _unpadded(user) is not user else [user]


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix(f"{JOINS}.") if node.op == "call_module" else node.name


def _is_sum(node: fx.Node) -> bool:
    """Two float tensors of one shape, nothing scaled."""
    values = [a.meta.get("val") if isinstance(a, fx.Node) else None for a in node.args[:2]]
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    plain = len(tensors) == 2 and node.kwargs.get("alpha", 1) == 1
    return bool(plain and tuple(tensors[0].shape) == tuple(tensors[1].shape))


def _is_point(value: Any) -> bool:
    return isinstance(value, fx.Node) and str(value.target).startswith(f"{POINTS}.")


def _input_names(inputs: Any) -> tuple[str, ...]:
    """Names of the tensors of a batch, in their order."""
    if isinstance(inputs, Mapping):
        return tuple(str(name) for name, value in inputs.items() if isinstance(value, Tensor))
    count = len(tensors_in(inputs))
    return ("input",) if count == 1 else tuple(f"input_{number}" for number in range(count))
