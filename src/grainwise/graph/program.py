"""A skeleton's graph as single steps, so that a run can begin wherever values are known already."""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from grainwise.graph.skeleton import POINTS

Key = bytes
"""Of a value: equal only for equal operations on equal values, with the very same modules and tensors."""


class NotShared(ValueError):
    """Values of this graph cannot be kept: it draws random numbers, or writes where other steps still read."""


class Kind(Enum):
    """What a step does."""

    INPUT = auto()
    STORED = auto()
    MODULE = auto()
    CALL = auto()


@dataclass(frozen=True, slots=True)
class _Value:
    """Stands in arguments for the value of a step."""

    step: int


@dataclass(frozen=True, slots=True)
class Step:
    """One operation. target: number of the input, path of the tensor or module, or the function to call.
    inputs: steps whose values it reads. flat: whether they stand in `args` themselves, not in lists.
    """

    kind: Kind
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    flat: bool

    def run(self, values: Sequence[Any], actor: Any) -> Any:
        """The value. actor: the module (or what stands for it) or stored tensor of the model that runs."""
        if self.kind is Kind.STORED:
            return actor
        call = actor if self.kind is Kind.MODULE else self.target
        if self.flat:
            args = [values[a.step] if type(a) is _Value else a for a in self.args]
            return call(*args, **self.kwargs)
        return call(*_filled(self.args, values), **_filled(self.kwargs, values))


class Program:
    """The steps of a skeleton in running order; `output` is the last one's number.

    Raises NotShared.
    """

    def __init__(self, graph: fx.Graph) -> None:
        number = {node: index for index, node in enumerate(graph.nodes)}
        nodes = list(graph.nodes)
        inputs = itertools.count()
        functions = {node: _function(node) for node in nodes if node.op == "call_function"}
        self.steps = tuple(
            _step(node, number, inputs, functions.get(node, node.target)) for node in nodes if node.op != "output"
        )
        (self.output,) = (number[node.args[0]] for node in nodes if node.op == "output")
        self._serials = itertools.count()
        self._modules: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._tensors = WeakTensorKeyDictionary()

    def actors(self, model: nn.Module) -> list[Any]:
        """For each step the module or stored tensor of `model` that it uses, None for the others."""
        return [_at(model, step.target) if step.kind in (Kind.MODULE, Kind.STORED) else None for step in self.steps]

    def keys(self, actors: Sequence[Any]) -> list[Key]:
        """For each step the key of its value on any one batch."""
        found: list[Key] = []
        for index, (step, actor) in enumerate(zip(self.steps, actors, strict=True)):
            digest = hashlib.blake2b(b"%d,%d;" % (index, self._serial(actor)), digest_size=16)
            for source in step.inputs:
                digest.update(found[source])
            found.append(digest.digest())
        return found

    def _serial(self, actor: Any) -> int:
        """A number that no other module or tensor of this process ever had."""
        if actor is None:
            return -1
        known: Any = self._modules if isinstance(actor, nn.Module) else self._tensors
        serial: int | None = known.get(actor)
        if serial is None:
            serial = known[actor] = next(self._serials)
        return serial


def _at(model: nn.Module, path: str) -> Any:
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _step(node: fx.Node, number: dict[fx.Node, int], inputs: Iterator[int], function: Any) -> Step:
    kinds = {"placeholder": Kind.INPUT, "get_attr": Kind.STORED, "call_module": Kind.MODULE}
    kind = kinds.get(node.op, Kind.CALL)
    target = next(inputs) if kind is Kind.INPUT else function

    def value(read: fx.Node) -> Any:
        return _Value(number[read])

    args: Any = () if kind is Kind.INPUT else fx.node.map_arg(node.args, value)
    kwargs: Any = fx.node.map_arg(node.kwargs, value)
    flat = len(_values((args, kwargs))) == sum(isinstance(a, _Value) for a in args)
    return Step(kind, target, tuple(args), dict(kwargs), tuple(map(number.__getitem__, node.all_input_nodes)), flat)


def _values(argument: Any) -> list[_Value]:
    match argument:
        case _Value():
            return [argument]
        case dict():
            return [v for item in argument.values() for v in _values(item)]
        case tuple() | list():
            return [v for item in argument for v in _values(item)]
        case slice():
            return _values((argument.start, argument.stop, argument.step))
    return []


def _filled(argument: Any, values: Sequence[Any]) -> Any:
    match argument:
        case _Value():
            return values[argument.step]
        case dict():
            return {name: _filled(item, values) for name, item in argument.items()}
        case tuple() | list():
            return [_filled(item, values) for item in argument]
        case slice():
            return slice(*_filled((argument.start, argument.stop, argument.step), values))
    return argument


# -- functions that write to what they are given


def _function(node: fx.Node) -> Any:
    """What a node calls; the twin that leaves its argument alone where it writes to it. Raises NotShared."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target
    if torch.Tag.nondeterministic_seeded in target.tags and not _drops_nothing(node):
        raise NotShared(f"{target} draws random numbers")
    if not target._schema.is_mutable:
        return target
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    twin = getattr(packet, target._overloadname, None)
    written = node.args[0] if node.args else None
    if twin is None or twin._schema.is_mutable or not isinstance(written, fx.Node) or _read_later(written, node):
        raise NotShared(f"{target} writes to a value that other operations read")
    return twin


def _drops_nothing(node: fx.Node) -> bool:
    """Attention whose dropout is off: it alone is said to draw random numbers when it does not."""
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    return bool(node.target is torch.ops.aten.scaled_dot_product_attention.default and dropout == 0.0)


def _read_later(written: fx.Node, writer: fx.Node) -> bool:
    """Whether anything reads the memory of `written` after `writer` other than through what the writer returns."""
    base = written
    while (source := _viewed(base)) is not None:
        base = source
    if base.op in ("placeholder", "get_attr"):
        return True
    same_memory = [base]
    for node in same_memory:
        for user in node.users:
            if user > writer:
                return True
            if user is not writer and _viewed(user) is node:
                same_memory.append(user)
    return False


def _viewed(node: fx.Node) -> fx.Node | None:
    """The value whose memory `node` may be, if any."""
    target: Any = node.target
    point = node.op == "call_module" and str(target).startswith(f"{POINTS}.")
    part = target is operator.getitem
    view = isinstance(target, torch._ops.OpOverload) and any(r.alias_info for r in target._schema.returns)
    source = node.args[0] if (point or part or view) and node.args else None
    return source if isinstance(source, fx.Node) else None
