"""From a profile to a really compressed network: the user's own module with layers swapped."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from grainwise.graph.narrow import narrow
from grainwise.graph.skeleton import Skeleton
from grainwise.plan.choices import UNCOMPRESSED, Entry, Granularity, Method
from grainwise.plan.layers import Block
from grainwise.plan.space import narrows, units_left
from grainwise.realise.assemble import fresh_tree
from grainwise.realise.channels import Kept
from grainwise.realise.deploy import activate_points
from grainwise.realise.library import VariantLibrary
from grainwise.realise.norms import Standard
from grainwise.realise.swap import swap


def kept_units(library: VariantLibrary, entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """Units kept of each coupling that `entries` narrow."""
    return {
        name: library.kept_units(name, units_left(library.reference.graph.coupling(name), entry.structure))
        for name, entry in entries.items()
        if narrows(entry.structure)
    }


def _students(library: VariantLibrary, entries: Mapping[str, Entry]) -> list[tuple[Block, int]]:
    """The blocks that `entries` distill, with the inner units of their students."""
    graph = library.reference.graph
    return [
        (block, units_left(graph.coupling(block.coupling), entries[block.coupling].structure))
        for block in graph.blocks
        if block.coupling in entries
        and (entries[block.coupling].structure.method, entries[block.coupling].structure.granularity)
        == (Method.DISTILL, Granularity.BLOCK)
    ]


def standards_of(
    library: VariantLibrary, entries: Mapping[str, Entry], standards: Sequence[Standard]
) -> Sequence[Standard]:
    """What the norms of the network that `build` gives are to match: the uncompressed network's moments of the channels
    that are left. The norms of students are trained by themselves and match nothing.
    """
    graph = library.reference.graph
    blocks = tuple(f"{block.name}." for block, _ in _students(library, entries))
    removed: dict[str, list[int]] = {}
    for name, units in kept_units(library, entries).items():
        for slot in graph.coupling(name).slots:
            norm = slot.parameter.removesuffix(".running_mean")
            if norm != slot.parameter:
                gone = set(range(len(slot.indices))) - set(units)
                removed.setdefault(norm, []).extend(i for unit in gone for i in slot.indices[unit])

    def left(name: str, moments: Tensor) -> Tensor:
        if name not in removed:
            return moments
        stays = torch.ones(moments.shape[1], dtype=torch.bool)
        stays[removed[name]] = False
        return moments[:, stays]

    return [
        {name: left(name, moments) for name, moments in standard.items() if not name.startswith(blocks)}
        for standard in standards
    ]


def build(library: VariantLibrary, entries: Mapping[str, Entry]) -> nn.Module:
    """The compressed network, in eval mode, batch-norm statistics as they were.

    Modules are shared with the library, and with the reference where candidates are built from its skeleton:
    deep-copy the result before writing to it. The entries must be legal (`SearchSpace.check`).
    """
    reference = library.reference
    if reference.skeleton is not None:
        return assemble(library, entries, reference.skeleton)
    # A user's module may reach its parts by other ways than its tree, which only a deep copy follows.
    kept, students = kept_units(library, entries), _students(library, entries)
    model = reference.base
    if students:
        model = copy.deepcopy(model)
        for block, units in students:
            model.set_submodule(block.name, library.student(block, units))
    model = narrow(model, reference.graph.couplings, _around(kept, students))
    _place_layers(model, library, entries, kept, students)
    return model.eval().requires_grad_(False)


def assemble(library: VariantLibrary, entries: Mapping[str, Entry], base: Skeleton | nn.Module) -> nn.Module:
    """What `build` gives, over `base` and without copying a tensor: equal parts of candidates are one module.

    base: a skeleton; or a user's module, for what its tensors are but not to be run (see `build`).
    """
    kept, students = kept_units(library, entries), _students(library, entries)
    model = fresh_tree(base.module if isinstance(base, Skeleton) else base)
    for block, units in students:
        model.set_submodule(block.name, fresh_tree(library.student(block, units)))
    library.narrow(model, _around(kept, students))
    _place_layers(model, library, entries, kept, students)
    if isinstance(base, Skeleton):
        activate_points(model, base, library.point)
    return model


def _around(kept: Kept, students: Sequence[tuple[Block, int]]) -> Kept:
    """What is cut beside the students, which have their inner width already."""
    distilled = {block.coupling for block, _ in students}
    return {name: units for name, units in kept.items() if name not in distilled}


def _place_layers(
    model: nn.Module,
    library: VariantLibrary,
    entries: Mapping[str, Entry],
    kept: Kept,
    students: Sequence[tuple[Block, int]],
) -> None:
    owner = {name: (block, units) for block, units in students for name in block.layers}
    for layer in library.reference.graph.layers:
        entry = entries.get(layer.name, UNCOMPRESSED)
        if layer.blocked or layer.tied_to:
            continue
        plain = Entry(precision=entry.precision) if layer.name in owner else entry
        if layer.name in owner or entry != UNCOMPRESSED or any(p is not None for p in library.positions(layer, kept)):
            swap(model, layer.name, library.layer(layer, plain, kept, owner.get(layer.name)))
