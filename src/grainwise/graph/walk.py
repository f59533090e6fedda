"""Export a model to its ATen graph and carry atoms through it, node by node."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_map

from grainwise.graph.atoms import Atoms, Dims, Tagged
from grainwise.graph.call import Call
from grainwise.graph.forward import Forward, tensors_in
from grainwise.graph.operators import RULES, opaque, unknown

OUTPUTS = "the network's outputs"
PREFIX = "model."  # of parameter names: the adapter below holds the model under it


@dataclass(frozen=True, slots=True)
class Walked:
    """atoms: their classes after the whole network. names: for each numbered tensor its names (several when tied)."""

    atoms: Atoms
    names: tuple[tuple[str, ...], ...]


class _Adapter(nn.Module):
    """The model behind its forward function, so that one tensor comes out whatever the model returns."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, inputs: Any) -> Tensor:
        return self._forward(self.model, inputs)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Run nn.TransformerEncoder and MultiheadAttention by their visible operations, not by one fused kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def export_program(model: nn.Module, inputs: Any, forward: Forward, *, dynamic: bool = False) -> ExportedProgram:
    """The network as ATen operations on these inputs; raises whatever torch.export raises.

    dynamic: dimension 0 of every tensor, and all dimensions of integer tensors (tokens), may vary afterwards.
    """
    plain = dict(inputs) if isinstance(inputs, Mapping) else inputs  # BatchEncoding and the like are no pytrees
    sizes = (tree_map(_varying, plain),) if dynamic else None
    with warnings.catch_warnings(), plain_attention(), torch.no_grad():
        warnings.simplefilter("ignore")  # export warns of recurrent weights, constants and its own deprecations
        return torch.export.export(_Adapter(model, forward), (plain,), dynamic_shapes=sizes, strict=False)


def _varying(value: Any) -> dict[int, Any] | None:
    if not isinstance(value, Tensor) or not value.dim():
        return None
    return {dim: Dim.AUTO for dim in range(1 if value.is_floating_point() else value.dim())}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it has."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


class _Walk:
    """Values of the nodes seen so far: a `Tagged`, a list of them, or None for what is no tensor."""

    def __init__(self, model: nn.Module, program: ExportedProgram) -> None:
        self.atoms = Atoms()
        self._tensors = named_tensors(model)
        self._numbers: dict[int, int] = {}
        self._tagged: list[Tagged] = []
        self._used: set[int] = set()
        self._values: dict[Node, Any] = {}
        signature = program.graph_signature
        self._stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def names(self) -> tuple[tuple[str, ...], ...]:
        names: list[list[str]] = [[] for _ in self._tagged]
        for name, tensor in self._tensors.items():
            if id(tensor) in self._numbers:
                names[self._numbers[id(tensor)]].append(name)
        return tuple(map(tuple, names))

    def visit(self, node: Node) -> None:
        if node.op == "placeholder":
            self._values[node] = self._placeholder(node)
        elif node.op == "output":
            for value in self._flat(node.args):
                for array in value.dims:
                    self.atoms.freeze(array, OUTPUTS)
        elif node.target is operator.getitem:
            source, index = self._read(node.args[0]), node.args[1]
            self._values[node] = source[index] if isinstance(source, list) and isinstance(index, int) else None
        elif node.op == "call_function":
            self._values[node] = self._call(node)

    def freeze_unused(self) -> None:
        """Parameters that no operation reads keep their shape."""
        for number, tagged in enumerate(self._tagged):
            if number not in self._used:
                for array in tagged.dims:
                    self.atoms.freeze(array, "never used by the network")

    def _placeholder(self, node: Node) -> Tagged | None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        tensor = self._tensors.get(self._stored.get(node.name, "").removeprefix(PREFIX))
        if tensor is None:
            return Tagged(tuple(value.shape), (None,) * value.ndim)
        number = self._numbers.get(id(tensor))
        if number is None:
            number = self._numbers[id(tensor)] = len(self._tagged)
            shape = tuple(tensor.shape)
            self._tagged.append(Tagged(shape, self.atoms.tag(number, shape), weight=True))
        if node.users:
            self._used.add(number)
        return self._tagged[number]

    def _read(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            return self._values.get(argument)
        if isinstance(argument, list | tuple):
            return [self._read(item) for item in argument]
        return argument

    def _flat(self, argument: Any) -> list[Tagged]:
        value = self._read(argument)
        items = value if isinstance(value, list) else [value]
        return [t for item in items for t in (item if isinstance(item, list) else [item]) if isinstance(t, Tagged)]

    def _arguments(self, node: Node) -> dict[str, Any]:
        if not isinstance(node.target, torch._ops.OpOverload):
            flat = [t for argument in node.all_input_nodes for t in self._flat(argument)]
            return {"inputs": flat}
        arguments: dict[str, Any] = {}
        for position, spec in enumerate(node.target._schema.arguments):
            given = node.args[position] if position < len(node.args) else node.kwargs.get(spec.name, spec.default_value)
            arguments[spec.name] = self._read(given)
        return arguments

    def _call(self, node: Node) -> Any:
        value = node.meta.get("val")
        listed = isinstance(value, list | tuple)
        outputs = tensors_in(value)
        if not outputs:
            return None
        shapes = tuple(tuple(t.shape) for t in outputs)
        call = Call(self.atoms, _name(node), self._arguments(node), shapes)
        inputs = call.tensors()
        weight = bool(inputs) and all(t.weight for t in inputs)
        results = [Tagged(shape, dims, weight) for shape, dims in zip(shapes, _apply(call), strict=True)]
        return results if listed else results[0]


def _name(node: Node) -> str:
    """The operator without namespace, overload and the underscores of private and in-place variants."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).partition("::")[2].strip("_")
    return str(node.target)


def _apply(call: Call) -> list[Dims]:
    """The atoms of the outputs; where no rule fits, the inputs are frozen."""
    if not all(isinstance(size, int) for shape in call.shapes for size in shape):
        return opaque(f"{call.name} has an output of data-dependent size")(call)
    try:
        dims = RULES.get(call.name, unknown)(call)
    except (IndexError, KeyError, TypeError, ValueError):  # an overload with other arguments than the rule expects
        return unknown(call)
    fits = [len(d) for d in dims] == [len(shape) for shape in call.shapes]
    return dims if fits else unknown(call)


def walk(model: nn.Module, program: ExportedProgram) -> Walked:
    """Carry atoms from the model's parameters to the network's outputs."""
    state = _Walk(model, program)
    for node in program.graph.nodes:
        state.visit(node)
    state.freeze_unused()
    return Walked(state.atoms, state.names())
