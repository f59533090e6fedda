"""How to tell another process what pickle alone cannot: graphs of torch.fx, ATen operators, caches that belong to an
object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import _lru_cache_wrapper, lru_cache
from types import MethodType
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket, _Ops

Told = tuple[Callable[..., Any], tuple[Any, ...]]
"""What makes the value anew, and from what."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A node of a graph, by its number."""

    number: int


def told(value: Any) -> Told | None:
    """None for what pickle tells by itself."""
    if isinstance(value, _Ops):
        return _operators, ()
    if isinstance(value, OpOverload | OpOverloadPacket):
        return _operator, (str(value),)
    if isinstance(value, fx.Graph):
        numbers = {node: _Place(number) for number, node in enumerate(value.nodes)}
        return _graph, ([_node(node, numbers) for node in value.nodes],)
    if isinstance(value, fx.Node):
        return _node_of, (value.graph, list(value.graph.nodes).index(value))
    if isinstance(value, _lru_cache_wrapper) and isinstance(value.__wrapped__, MethodType):
        return _cached, (value.__wrapped__, value.cache_parameters()["maxsize"])
    return None


def _operators() -> Any:
    return torch.ops


def _operator(path: str) -> Any:
    found: Any = torch.ops
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _node(node: fx.Node, numbers: dict[fx.Node, _Place]) -> tuple[Any, ...]:
    """A node without its metadata, which nothing reads once the graph is made."""
    arguments: Any = fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)  # type: ignore[arg-type]
    return node.op, node.target, *arguments, node.name


def _graph(parts: list[tuple[Any, ...]]) -> fx.Graph:
    graph, nodes = fx.Graph(), list[fx.Node]()
    for op, target, args, kwargs, name in parts:
        found = fx.node.map_aggregate((args, kwargs), lambda a: nodes[a.number] if isinstance(a, _Place) else a)
        assert isinstance(found, tuple)
        nodes.append(graph.create_node(op, target, *found, name=name))
    return graph


def _node_of(graph: fx.Graph, number: int) -> Any:
    return list(graph.nodes)[number]


def _cached(method: Callable[..., Any], size: int | None) -> Any:
    return lru_cache(maxsize=size)(method)
