"""From a profile to a really compressed network: the user's own module with layers swapped."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from grainwise.graph.narrow import narrow
from grainwise.plan.choices import UNCOMPRESSED, Entry, Granularity, Method
from grainwise.plan.layers import Block
from grainwise.plan.space import narrows, units_left
from grainwise.realise.deploy import activate_points
from grainwise.realise.library import VariantLibrary
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


def build(library: VariantLibrary, entries: Mapping[str, Entry]) -> nn.Module:
    """The compressed network, in eval mode, batch-norm statistics as they were.

    Realised layers are shared with the library (see there): deep-copy the result before writing to it. The entries
    must be legal (`SearchSpace.check`).
    """
    reference = library.reference
    kept = kept_units(library, entries)
    students = _students(library, entries)
    model = reference.base
    if students:
        model = copy.deepcopy(model)
        for block, units in students:
            model.set_submodule(block.name, library.student(block, units))
    distilled = {block.coupling for block, _ in students}  # students have their inner width already
    around = {name: units for name, units in kept.items() if name not in distilled}
    model = narrow(model, reference.graph.couplings, around)
    owner = {name: (block, units) for block, units in students for name in block.layers}
    for layer in reference.graph.layers:
        entry = entries.get(layer.name, UNCOMPRESSED)
        if layer.blocked or layer.tied_to:
            continue
        plain = Entry(precision=entry.precision) if layer.name in owner else entry
        if layer.name in owner or entry != UNCOMPRESSED or any(p is not None for p in library.positions(layer, kept)):
            swap(model, layer.name, library.layer(layer, plain, kept, owner.get(layer.name)))
    if reference.skeleton is not None:
        activate_points(model, reference.skeleton)
    return model.eval().requires_grad_(False)
