"""Which channels a narrowed coupling keeps, and where they sit in each layer's weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grainwise.methods.prune import unit_saliency
from grainwise.plan.layers import Coupling, Kind, Layer
from grainwise.realise.reference import Reference

Kept = Mapping[str, tuple[int, ...]]
"""Units kept of each narrowed coupling, ascending, by the coupling's name."""


def rank_units(reference: Reference, coupling: Coupling) -> Tensor:
    """`[U]` units of `coupling` from the most to the least needed: what removing each would cost its readers, re-fitted
    (ZipLM, Kurtic et al. 2023, eq. 3), summed over the readers.
    """
    saliency = torch.zeros(coupling.width)
    for slot in coupling.slots:
        if slot.layer and not slot.produces and slot.layer in reference.hessians:
            units = torch.tensor(slot.indices)
            saliency += unit_saliency(reference.problem(slot.layer), units)
    return torch.argsort(saliency, descending=True, stable=True)


def kept_positions(couplings: Mapping[str, Coupling], layer: Layer, kept: Kept) -> tuple[Tensor | None, Tensor | None]:
    """(input channels, output channels) of `layer` that are left, ascending; None where nothing was cut."""
    geometry = layer.geometry
    sizes = (geometry.outputs, geometry.inputs)
    left: list[Tensor | None] = [None, None]  # outputs, inputs
    for name, units in kept.items():
        for slot in couplings[name].slots:
            if slot.parameter != f"{layer.name}.weight":
                continue
            side = 0 if slot.produces else 1
            mask = left[side] if left[side] is not None else torch.ones(sizes[side], dtype=torch.bool)
            assert mask is not None
            removed = set(range(len(slot.indices))) - set(units)
            mask[[position for unit in removed for position in slot.indices[unit]]] = False
            left[side] = mask
    outputs, inputs = (None if mask is None else mask.nonzero().flatten() for mask in left)
    if geometry.depthwise and outputs is not None:  # a depthwise layer's inputs and outputs are the same channels
        multiplier = geometry.outputs // geometry.inputs
        inputs = outputs[::multiplier] // multiplier
    assert geometry.kind is not Kind.EMBEDDING or inputs is None
    return inputs, outputs
