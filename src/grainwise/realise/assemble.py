"""Candidates that share every module with each other: a fresh tree of containers over parts that exist once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from grainwise.graph.narrow import refresh_widths
from grainwise.plan.layers import Coupling, Slot

_Made = TypeVar("_Made")
_Cuts = Mapping[str, Sequence[tuple[Slot, tuple[int, ...]]]]  # by attribute: where units sit, and those that stay


class Once(Protocol):
    """(key, make) -> the value under the key, made at the first call."""

    def __call__(self, key: Hashable, make: Callable[[], _Made]) -> _Made: ...


class _Very:
    """A part of a key that only the very same object equals; it lives as long as the key."""

    def __init__(self, held: object) -> None:
        self._held = held

    def __hash__(self) -> int:
        return id(self._held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Very) and other._held is self._held


def fresh_tree(module: nn.Module) -> nn.Module:
    """The same modules under new containers, to replace parts of; tensors and childless modules are shared."""
    return _fresh(module, {})


def _fresh(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if not module._modules:
        return module
    if id(module) not in made:
        twin = made[id(module)] = _shallow(module)
        for name, child in module._modules.items():
            twin._modules[name] = child if child is None else _fresh(child, made)
    return made[id(module)]


def _shallow(module: nn.Module) -> nn.Module:
    """A copy with dictionaries of its own, over the same tensors and children."""
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for part in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[part] = module.__dict__[part].copy()
    return twin


class Narrower:
    """Narrows fresh trees of one network: what `graph.narrow.narrow` does, each cut tensor and module made once.

    skip: paths of modules that are replaced anyway.
    """

    def __init__(self, couplings: Sequence[Coupling], skip: Collection[str]) -> None:
        self._slots: dict[str, dict[str, list[tuple[str, Slot]]]] = {}  # by path and attribute
        for coupling in couplings:
            for slot in coupling.slots if coupling.frozen is None else ():
                path, _, attribute = slot.parameter.rpartition(".")
                if path not in skip:
                    self._slots.setdefault(path, {}).setdefault(attribute, []).append((coupling.name, slot))

    def narrow(self, tree: nn.Module, kept: Mapping[str, tuple[int, ...]], once: Once) -> None:
        """Leave only the kept units of each named coupling, in place of a `fresh_tree`."""
        for path, attributes in self._slots.items():
            cuts = {a: [(s, kept[c]) for c, s in slots if c in kept] for a, slots in attributes.items()}
            if not any(cuts.values()):
                continue
            source = tree.get_submodule(path)
            if source._modules or not path:  # a container, which is this tree's own
                _cut(source, cuts, once)
                continue
            units = frozenset((c, kept[c]) for slots in attributes.values() for c, _ in slots if c in kept)
            tree.set_submodule(path, once(("narrowed", source, units), partial(_narrowed, source, cuts, once)))


def _narrowed(module: nn.Module, cuts: _Cuts, once: Once) -> nn.Module:
    twin = _shallow(module)
    _cut(twin, cuts, once)
    refresh_widths(twin)
    return twin


def _cut(module: nn.Module, cuts: _Cuts, once: Once) -> None:
    for attribute, slots in cuts.items():
        if slots:
            tensor = getattr(module, attribute)  # several modules may hold one tensor, and hold one afterwards
            units = tuple((slot.dim, slot.indices, left) for slot, left in slots)
            setattr(module, attribute, once(("cut", _Very(tensor), units), partial(_left, tensor, slots)))


def _left(tensor: Tensor, slots: Sequence[tuple[Slot, tuple[int, ...]]]) -> Tensor:
    """What is left of a tensor; of a parameter a parameter."""
    stays: dict[int, Tensor] = {}
    for slot, units in slots:
        mask = stays.setdefault(slot.dim, torch.ones(tensor.shape[slot.dim], dtype=torch.bool))
        removed = set(range(len(slot.indices))) - set(units)
        mask[[position for unit in removed for position in slot.indices[unit]]] = False
    cut = tensor.detach()
    for dim, mask in stays.items():
        cut = cut.index_select(dim, mask.nonzero().flatten())
    return nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut
