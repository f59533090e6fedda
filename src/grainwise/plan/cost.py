"""What a profile costs before anything is built: bytes of the artefact and multiply-accumulates, layer by layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cached_property, lru_cache

import numpy as np

from grainwise.plan.choices import PRECISIONS, STRUCTURES, UNCOMPRESSED, Entry, numbers_of
from grainwise.plan.layers import Coupling, Geometry, Layer
from grainwise.plan.prices import COSTS, Cost, Numbers, PackedPrices, Prices
from grainwise.plan.shapes import stage_macs, stages
from grainwise.plan.space import Mask, SearchSpace, narrows, units_left

_NOTHING: Cost = np.zeros((len(STRUCTURES), len(PRECISIONS), len(COSTS)))

Widths = Mapping[str, int]
"""Units left of each coupling that was narrowed."""

_Other = tuple[str, tuple[int, ...], tuple[tuple[str, int, int], ...]]  # name, shape, cuts


class CostModel:
    """Costs of entries, given the widths that earlier decisions left; cost arrays end in `[3]`, as COSTS names them.

    other_tensors: shapes of the float32 parameters and buffers that are stored beside the layers, by name. prices: what
    the target charges, by default that of the packed weights file.
    """

    def __init__(
        self, space: SearchSpace, other_tensors: Mapping[str, tuple[int, ...]], prices: Prices | None = None
    ) -> None:
        self.space = space
        self.prices: Prices = prices or PackedPrices.of(space.layers, list(other_tensors.values()))
        self._others = dict(other_tensors)
        self._couplings = {c.name: c for c in space.graph.couplings if c.frozen is None}
        self._cuts = {layer.name: self._layer_cuts(layer) for layer in space.layers}
        self._related = tuple(tuple(dict.fromkeys(cut[0] for cut in self._cuts[la.name])) for la in space.layers)
        self._touching = {
            name: tuple(i for i, found in enumerate(self._related) if name in found) for name in self._couplings
        }
        self._pairs = tuple(space.pairs(index) for index in range(len(space.layers)))
        for pairs in self._pairs:
            pairs.flags.writeable = False
        self._table = lru_cache(maxsize=None)(self._compute_table)
        self._other_groups = self._grouped_others()
        self._other_sizes: dict[tuple[int, ...], float] = {}
        self._fixed: dict[frozenset[tuple[str, int]], Cost] = {}
        self.revisions: dict[Hashable, Cost] = {}  # what drafts have computed, by what it depends on

    def _layer_cuts(self, layer: Layer) -> tuple[tuple[str, bool, int], ...]:
        """(coupling, cuts outputs, positions per unit) for each coupling that narrows the layer's weight."""
        return tuple(
            (c.name, slot.produces, len(slot.indices[0]))
            for c in self._couplings.values()
            for slot in c.slots
            if slot.layer == layer.name and slot.parameter == f"{layer.name}.weight"
        )

    def _grouped_others(self) -> tuple[tuple[tuple[str, ...], tuple[_Other, ...]], ...]:
        """Tensors beside the layers by the couplings that narrow them, with (coupling, dimension, positions per unit)
        of each cut: groups, because a width is decided far less often than a cost is asked for.
        """
        cuts: dict[str, list[tuple[str, int, int]]] = {name: [] for name in self._others}
        for coupling in self._couplings.values():
            for slot in coupling.slots:
                if slot.parameter in self._others:
                    cuts[slot.parameter].append((coupling.name, slot.dim, len(slot.indices[0])))
        groups: dict[tuple[str, ...], list[_Other]] = {}
        for name, found in cuts.items():
            couplings = tuple(dict.fromkeys(cut[0] for cut in found))
            groups.setdefault(couplings, []).append((name, self._others[name], tuple(found)))
        return tuple((couplings, tuple(tensors)) for couplings, tensors in groups.items())

    def coupling(self, name: str) -> Coupling:
        return self._couplings[name]

    def related(self, index: int) -> tuple[str, ...]:
        """Couplings that narrow layer `index`."""
        return self._related[index]

    def touching(self, coupling: str) -> tuple[int, ...]:
        """Numbers of the layers whose weight `coupling` narrows."""
        return self._touching[coupling]

    @cached_property
    def blocks(self) -> Mapping[int, tuple[int, ...]]:
        """Layers of each block by the one that leads it, in numbers."""
        numbers = {layer.name: index for index, layer in enumerate(self.space.layers)}
        return {numbers[b.coupling]: tuple(numbers[name] for name in b.layers) for b in self.space.graph.blocks}

    @cached_property
    def dependencies(self) -> tuple[frozenset[int], ...]:
        """For each layer those whose entry decides what a revision of it changes, or whether it is legal."""
        found = []
        for index in range(len(self.space.layers)):
            inside = {index, *self.blocks.get(index, ())}
            leaders = {leader for leader, layers in self.blocks.items() if index in layers}
            read = (self.touching(self.space.layers[i].name) for i in inside if self.leads(i))
            found.append(frozenset(inside.union(leaders, *read)))
        return tuple(found)

    def leads(self, index: int) -> bool:
        """Whether the width of a coupling is decided at layer `index`."""
        return self.space.led_by(self.space.layers[index].name) is not None

    def pairs(self, index: int) -> Mask:
        """`[S, P]`, read-only: `SearchSpace.pairs` of layer `index`, computed once."""
        return self._pairs[index]

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
        """`[S, P, 3]` cost of each entry of layer `index` at these widths; its own narrowing is in `widths` already."""
        relevant = tuple((name, widths[name]) for name in self._related[index] if name in widths)
        found: Cost = self._table(index, relevant)
        return found

    def _compute_table(self, index: int, relevant: tuple[tuple[str, int], ...]) -> Cost:
        layer = self.space.layers[index]
        geometry = self.narrowed(layer, dict(relevant))
        table = np.full((len(STRUCTURES), len(PRECISIONS), len(COSTS)), np.inf)
        pairs = self.pairs(index)
        plain = self._row(layer, geometry, 0)
        for s in np.flatnonzero(pairs.any(axis=1)).tolist():  # a narrowing structure leaves one plain stage
            row = plain if s == 0 or narrows(STRUCTURES[s]) else self._row(layer, geometry, s)
            table[s] = np.where(pairs[s][:, None], row, np.inf)
        table.flags.writeable = False
        return table

    def _row(self, layer: Layer, geometry: Geometry, structure: int) -> Cost:
        """`[P, 3]` cost of one structure at every precision."""
        choice, prices = STRUCTURES[structure], self.prices
        if layer.tied_to:
            return np.tile(np.array([0.0, layer.macs, 0.0]), (len(PRECISIONS), 1))
        macs = float(sum(stage_macs(s, layer.positions_in, layer.positions_out) for s in stages(geometry, choice)))
        given = ((layer, geometry, choice, precision) for precision in PRECISIONS)
        return np.array([[prices.layer_bytes(*entry), macs, prices.layer_ms(*entry)] for entry in given])

    def fixed(self, widths: Widths) -> Cost:
        """`[3]`, read-only: what is stored and computed beside the layers."""
        decided = frozenset(widths.items())
        if decided not in self._fixed:
            self._fixed[decided] = self._compute_fixed(widths)
            self._fixed[decided].flags.writeable = False
        return self._fixed[decided]

    def _compute_fixed(self, widths: Widths) -> Cost:
        size = 0.0
        for number, (couplings, tensors) in enumerate(self._other_groups):
            key = (number, *(widths.get(coupling, -1) for coupling in couplings))
            if key not in self._other_sizes:
                self._other_sizes[key] = sum(self._other_size(tensor, widths) for tensor in tensors)
            size += self._other_sizes[key]
        beside: Cost = self.prices.fixed + np.array([size, float(self.space.graph.other_macs), 0.0])
        return beside

    def _other_size(self, tensor: _Other, widths: Widths) -> float:
        name, shape, cuts = tensor
        left = list(shape)
        for coupling, dim, positions in cuts:
            width = self._couplings[coupling].width
            left[dim] -= (width - widths.get(coupling, width)) * positions
        return self.prices.tensor_bytes(name, tuple(left))

    def shared(self, numbers: Numbers) -> Cost:
        """`[3]` what a profile costs beyond the sum of its entries."""
        found = self.prices.shared
        return np.zeros(len(COSTS)) if found is None else found.of(numbers)

    def shared_table(self, index: int, numbers: Numbers) -> Cost:
        """`[S, P, 3]` shared cost of the profile with each entry in the place of layer `index`'s."""
        found = self.prices.shared
        return _NOTHING if found is None else found.tables(numbers, [(index, ())])[0]

    def total(self, entries: Mapping[str, Entry]) -> Cost:
        """`[3]` cost of a whole profile; layers that it does not name stay uncompressed."""
        widths = self.widths(entries)
        numbers = [numbers_of(entries.get(layer.name, UNCOMPRESSED)) for layer in self.space.layers]
        total = self.fixed(widths) + self.shared(numbers)
        for index, found in enumerate(numbers):
            total = total + self.table(index, widths)[found]
        return total
