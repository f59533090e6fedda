"""What a profile costs before anything is built: bytes of the artefact and multiply-accumulates, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray

from grainwise.plan.choices import PRECISIONS, STRUCTURES, UNCOMPRESSED, Choice, Entry
from grainwise.plan.layers import Coupling, Geometry, Layer
from grainwise.plan.shapes import routing_tensors, stage_macs, stage_tensors, stages
from grainwise.plan.space import SearchSpace, narrows, units_left

COSTS = ("size", "macs")
Cost = NDArray[np.float64]
"""`[2]`: bytes in the artefact, multiply-accumulates per sample."""

Widths = Mapping[str, int]
"""Units left of each coupling that was narrowed."""

_HEADER_PER_TENSOR = len('"":{"dtype":"F32","shape":[],"data_offsets":[,]},')


class CostModel:
    """Exact costs of entries, given the widths that earlier decisions left.

    other_tensors: shapes of the float32 parameters and buffers that are stored beside the layers, by name.

    The size is that of the safetensors file, header included; only the digits of the header's offsets are taken at
    their longest, so a prediction is never too small and exceeds the file by some bytes a tensor.
    """

    def __init__(self, space: SearchSpace, other_tensors: Mapping[str, tuple[int, ...]]) -> None:
        self.space = space
        self._others = dict(other_tensors)
        self._couplings = {c.name: c for c in space.graph.couplings if c.frozen is None}
        self._cuts = {layer.name: self._layer_cuts(layer) for layer in space.layers}
        self._related = tuple(tuple(dict.fromkeys(cut[0] for cut in self._cuts[la.name])) for la in space.layers)
        self._norm_cuts = self._other_cuts()
        self._table = lru_cache(maxsize=None)(self._compute_table)
        full = sum(layer.geometry.weights for layer in space.layers) + sum(map(prod, self._others.values()))
        self._digits = len(str(4 * full))

    def _layer_cuts(self, layer: Layer) -> tuple[tuple[str, bool, int], ...]:
        """(coupling, cuts outputs, positions per unit) for each coupling that narrows the layer's weight."""
        return tuple(
            (c.name, slot.produces, len(slot.indices[0]))
            for c in self._couplings.values()
            for slot in c.slots
            if slot.layer == layer.name and slot.parameter == f"{layer.name}.weight"
        )

    def _other_cuts(self) -> dict[str, tuple[tuple[str, int, int], ...]]:
        """(coupling, dimension, positions per unit) for each narrowed tensor beside the layers."""
        cuts: dict[str, list[tuple[str, int, int]]] = {}
        for coupling in self._couplings.values():
            for slot in coupling.slots:
                if slot.parameter in self._others:
                    cuts.setdefault(slot.parameter, []).append((coupling.name, slot.dim, len(slot.indices[0])))
        return {name: tuple(found) for name, found in cuts.items()}

    def coupling(self, name: str) -> Coupling:
        return self._couplings[name]

    def related(self, index: int) -> tuple[str, ...]:
        """Couplings that narrow layer `index`."""
        return self._related[index]

    def narrowed(self, layer: Layer, widths: Widths) -> Geometry:
        """The layer's geometry after its couplings lost units."""
        inputs, outputs = layer.geometry.inputs, layer.geometry.outputs
        for name, produces, positions in self._cuts[layer.name]:
            removed = (self._couplings[name].width - widths.get(name, self._couplings[name].width)) * positions
            if produces:
                outputs -= removed
            else:
                inputs -= removed
        if layer.geometry.depthwise:
            inputs = outputs // (layer.geometry.outputs // layer.geometry.inputs)
        return layer.geometry.resized(inputs=inputs, outputs=outputs)

    def widths(self, entries: Mapping[str, Entry]) -> dict[str, int]:
        """Units left of each coupling whose leader takes a narrowing structure."""
        return {
            name: units_left(coupling, entries[name].structure)
            for name, coupling in self._couplings.items()
            if name in entries and narrows(entries[name].structure)
        }

    def table(self, index: int, widths: Widths) -> Cost:
        """`[S, P, 2]` cost of each entry of layer `index` at these widths; its own narrowing is in `widths` already."""
        relevant = tuple((name, widths[name]) for name in self._related[index] if name in widths)
        found: Cost = self._table(index, relevant)
        return found

    def _compute_table(self, index: int, relevant: tuple[tuple[str, int], ...]) -> Cost:
        layer = self.space.layers[index]
        geometry = self.narrowed(layer, dict(relevant))
        table = np.full((len(STRUCTURES), len(PRECISIONS), 2), np.inf)
        pairs = self.space.pairs(index)
        for s, p in np.argwhere(pairs):
            table[s, p] = self._layer_cost(layer, geometry, STRUCTURES[s], PRECISIONS[p])
        table.flags.writeable = False
        return table

    def _layer_cost(self, layer: Layer, geometry: Geometry, structure: Choice, precision: Choice) -> Cost:
        if layer.tied_to:
            return np.array([0.0, layer.macs])
        found = stages(geometry, structure)
        nesting = f"{layer.name}.primary.packed.support"
        tensors = [t for stage in found for t in stage_tensors(stage, precision).values()]
        tensors += routing_tensors(geometry, structure).values()
        size = sum(tensors) + len(tensors) * self._header(nesting, len(geometry.weight_shape))
        macs = sum(stage_macs(stage, layer.positions_in, layer.positions_out) for stage in found)
        return np.array([size, macs], dtype=np.float64)

    def _header(self, name: str, dimensions: int) -> int:
        return _HEADER_PER_TENSOR + len(name) + 2 * self._digits + 4 * dimensions

    def fixed(self, widths: Widths) -> Cost:
        """`[2]`: what is stored and computed beside the layers."""
        size = 64.0
        for name, shape in self._others.items():
            left = list(shape)
            for coupling, dim, positions in self._norm_cuts.get(name, ()):
                width = self._couplings[coupling].width
                left[dim] -= (width - widths.get(coupling, width)) * positions
            size += 4 * prod(left) + self._header(name, len(shape))
        return np.array([size, float(self.space.graph.other_macs)])

    def total(self, entries: Mapping[str, Entry]) -> Cost:
        """`[2]` cost of a whole profile; layers that it does not name stay uncompressed."""
        widths = self.widths(entries)
        total = self.fixed(widths)
        for index, layer in enumerate(self.space.layers):
            entry = entries.get(layer.name, UNCOMPRESSED)
            total = (
                total + self.table(index, widths)[STRUCTURES.index(entry.structure), PRECISIONS.index(entry.precision)]
            )
        return total
