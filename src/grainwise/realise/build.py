"""From a profile to a really compressed network: the user's own module with layers swapped."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grainwise.graph.narrow import narrow
from grainwise.methods.distill import train_block
from grainwise.plan.choices import NONE, UNCOMPRESSED, Entry, Granularity, Method
from grainwise.plan.layers import Block
from grainwise.plan.space import narrows, units_left
from grainwise.realise.channels import Kept
from grainwise.realise.library import VariantLibrary
from grainwise.realise.norms import reestimate_norms
from grainwise.realise.reference import recording

STUDENT_STEPS = 60
STUDENT_LEARNING_RATE = 3e-3
STUDENT_PAIRS = 4  # calibration batches whose activations a student is trained on


def build(library: VariantLibrary, entries: Mapping[str, Entry]) -> nn.Module:
    """The compressed network, in eval mode, batch-norm statistics as they were.

    Realised layers are shared with the library (see there): deep-copy the result before writing to it. The entries
    must be legal (`SearchSpace.check`).
    """
    return _assemble(library, entries, students=True)


def kept_units(library: VariantLibrary, entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """Units kept of each coupling that `entries` narrow."""
    return {
        name: library.kept_units(name, units_left(library.reference.graph.coupling(name), entry.structure))
        for name, entry in entries.items()
        if narrows(entry.structure)
    }


def _assemble(library: VariantLibrary, entries: Mapping[str, Entry], *, students: bool) -> nn.Module:
    reference = library.reference
    kept = kept_units(library, entries)
    model = narrow(reference.model, reference.graph.couplings, kept)
    trained = _swap_students(library, model, entries, kept) if students else {}
    for layer in reference.graph.layers:
        entry = entries.get(layer.name, UNCOMPRESSED)
        if layer.blocked or layer.tied_to:
            continue
        if layer.name in trained:
            if entry.precision != NONE:
                module = library.layer(layer, Entry(NONE, entry.precision), kept, trained[layer.name])
                model.set_submodule(layer.name, module)
        elif entry != UNCOMPRESSED or any(p is not None for p in library.positions(layer, kept)):
            model.set_submodule(layer.name, library.layer(layer, entry, kept))
    return model.eval().requires_grad_(False)


def _swap_students(
    library: VariantLibrary, model: nn.Module, entries: Mapping[str, Entry], kept: Kept
) -> dict[str, nn.Module]:
    """Put trained students in the place of the blocks that `entries` distill; their layers by name."""
    trained: dict[str, nn.Module] = {}
    for block in library.reference.graph.blocks:
        entry = entries.get(block.coupling, UNCOMPRESSED)
        if (entry.structure.method, entry.structure.granularity) != (Method.DISTILL, Granularity.BLOCK):
            continue
        student = _student(library, block, entries, kept)
        model.set_submodule(block.name, copy.deepcopy(student))
        for name in block.layers:
            trained[name] = student.get_submodule(name.removeprefix(block.name + "."))
    return trained


def _touching(library: VariantLibrary, block: Block, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The channel decisions, other than the block's own, that change the widths of the block's layers."""
    graph = library.reference.graph
    around = {c for name in block.layers for c in _couplings_of(library, name)} - {block.coupling}
    return {
        name: Entry(entries[name].structure)
        for name in (c.name for c in graph.couplings)
        if name in around and name in entries and narrows(entries[name].structure)
    }


def _couplings_of(library: VariantLibrary, layer: str) -> set[str]:
    couplings = library.reference.graph.couplings
    return {c.name for c in couplings if any(slot.layer == layer for slot in c.slots)}


def _student(library: VariantLibrary, block: Block, entries: Mapping[str, Entry], kept: Kept) -> nn.Module:
    """The narrower twin of `block`, trained on the outputs of the block at full inner width."""
    around = _touching(library, block, entries)
    own = {block.coupling: Entry(entries[block.coupling].structure)}
    key = ("student", block.name, tuple(sorted((n, kept[n]) for n in {**around, **own})))

    def train() -> nn.Module:
        reference = library.reference
        teacher = copy.deepcopy(_assemble(library, around, students=False))
        if around:
            reestimate_norms(teacher, reference.calibration, reference.forward)
        pairs: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad(), recording(teacher.get_submodule(block.name), pairs):
            for batch in reference.calibration[:STUDENT_PAIRS]:
                reference.forward(teacher, batch)
        student = copy.deepcopy(_assemble(library, {**around, **own}, students=False).get_submodule(block.name))
        student.requires_grad_(True)
        train_block(student, pairs, steps=STUDENT_STEPS, learning_rate=STUDENT_LEARNING_RATE, seed=0)
        return student.eval().requires_grad_(False)

    found = library.once(key, train)
    assert isinstance(found, nn.Module)
    return found
