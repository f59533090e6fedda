"""A whole profile under revision: what it would cost with another entry for one of its layers, exactly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from grainwise.plan.choices import STRUCTURES, UNCOMPRESSED, Entry, Method, entry_of, numbers_of
from grainwise.plan.cost import CostModel, Widths
from grainwise.plan.prices import Cost, Signature
from grainwise.plan.projection import BLOCK_STUDENTS, NARROWING
from grainwise.plan.space import Mask, units_left

_Numbers = tuple[int, int]


class Draft:
    """A legal profile, its exact cost, and the cost of every revision of one layer.

    numbers: structure and precision number of each layer. total: `[3]` cost of the profile.
    A revision that makes a layer the student of its block takes the structures of the block's other layers away.
    """

    def __init__(self, cost: CostModel, entries: Mapping[str, Entry]) -> None:
        self.cost = cost
        self.layers = cost.space.layers
        self.numbers: list[_Numbers] = [numbers_of(entries.get(layer.name, UNCOMPRESSED)) for layer in self.layers]
        self._index = {layer.name: index for index, layer in enumerate(self.layers)}
        self._leaders = {index for name, index in self._index.items() if cost.space.led_by(name)}
        self._depends = [self._dependencies(layer.name) for layer in self.layers]
        self._widths: dict[str, int] = dict(cost.widths(entries))
        self.total: Cost = cost.total(entries)
        self._shared: Cost = cost.shared(self.numbers)
        self._additive: dict[int, NDArray[np.float64]] = {}  # changes but for what is shared
        self._full: dict[int, tuple[tuple[object, ...], NDArray[np.float64]]] = {}
        self._current: set[int] = set()  # layers whose full changes are those of the profile as it is
        self._signatures: list[Signature] = []

    def entries(self) -> dict[str, Entry]:
        return {layer.name: entry_of(*found) for layer, found in zip(self.layers, self.numbers, strict=True)}

    def changes(self, index: int) -> NDArray[np.float64]:
        """`[S, P, 3]` change of the total when layer `index` takes the entry instead; infinite where illegal."""
        if index in self._current:
            return self._full[index][1]
        if index not in self._additive:
            self._additive[index] = self._compute_additive(index)
        additive = self._additive[index]
        if self.cost.prices.shared is None:
            return additive
        tables = self._shared_tables(index)
        made_of = (additive, *tables.values(), self._shared)
        before = self._full[index][0] if index in self._full else ()
        if len(before) != len(made_of) or any(a is not b for a, b in zip(before, made_of, strict=True)):
            table = additive + (tables[None] - self._shared)
            for s, shared in tables.items():
                if s is not None:
                    table[s] = additive[s] + (shared[s] - self._shared)
            self._full[index] = made_of, table
        self._current.add(index)
        return self._full[index][1]

    def _shared_tables(self, index: int) -> dict[int | None, NDArray[np.float64]]:
        """`[S, P, 3]` shared costs; under None for the profile as it is, and for each structure that takes the
        structures of other layers away.
        """
        if not self._signatures and self.cost.prices.shared is not None:
            self._signatures = self.cost.prices.shared.signatures(self.numbers)
        tables: dict[int | None, NDArray[np.float64]] = {
            None: self.cost.shared_table(index, self.numbers, self._signatures[index])
        }
        for s in BLOCK_STUDENTS:
            if stripped := self.stripped(index, s):
                numbers = [(0, p) if i in stripped else (found, p) for i, (found, p) in enumerate(self.numbers)]
                tables[s] = self.cost.shared_table(index, numbers)
        return tables

    def _compute_additive(self, index: int) -> NDArray[np.float64]:
        legal = self._legal(index)
        rest, widths = self._rest(index, 0)
        table = rest + self.cost.table(index, widths)
        for s in NARROWING:
            if legal[s].any():
                rest, widths = self._rest(index, s)
                table[s] = rest + self.cost.table(index, widths)[s]
        table -= self.total
        table[~legal] = np.inf
        return table

    def _legal(self, index: int) -> Mask:
        legal = self.cost.pairs(index).copy()
        name = self.layers[index].name
        for leader, block in ((self._index[b.coupling], b) for b in self.cost.space.graph.blocks):
            if name in block.layers and leader != index and self.numbers[leader][0] in BLOCK_STUDENTS:
                legal[1:] = False
        return legal

    def stripped(self, index: int, structure: int) -> tuple[int, ...]:
        """Layers that lose their own structure when layer `index` becomes the student of its block."""
        block = self.cost.space.block_led_by(self.layers[index].name)
        if block is None or STRUCTURES[structure].method is not Method.DISTILL or structure not in BLOCK_STUDENTS:
            return ()
        inside = (self._index[name] for name in block.layers)
        return tuple(i for i in inside if i != index and self.numbers[i][0])

    def _revised_widths(self, index: int, structure: int) -> dict[str, int]:
        widths = dict(self._widths)
        for i in (index, *self.stripped(index, structure)):
            widths.pop(self.layers[i].name, None)
        if structure in NARROWING:
            name = self.layers[index].name
            widths[name] = units_left(self.cost.coupling(name), STRUCTURES[structure])
        return widths

    def _rest(self, index: int, structure: int) -> tuple[Cost, Widths]:
        """`[3]` cost of all but layer `index` once it takes `structure`, and the widths that follow."""
        widths, stripped = self._revised_widths(index, structure), self.stripped(index, structure)
        touched = set(stripped)
        for name in widths.keys() | self._widths.keys():
            if widths.get(name) != self._widths.get(name):
                touched.update(self.cost.touching(name))
        rest = self.total - self.cost.table(index, self._widths)[self.numbers[index]]
        if touched:
            rest = rest + self.cost.fixed(widths) - self.cost.fixed(self._widths)
        for i in touched - {index}:
            s, p = self.numbers[i]
            new = (0, p) if i in stripped else (s, p)
            rest = rest + self.cost.table(i, widths)[new] - self.cost.table(i, self._widths)[s, p]
        return rest, widths

    def replace(self, index: int, structure: int, precision: int) -> None:
        """Revise layer `index`; the entry must be legal (finite in `changes`)."""
        stripped = self.stripped(index, structure)
        total = self.total + self.changes(index)[structure, precision]
        widths = self._revised_widths(index, structure)
        changed = [n for n in widths.keys() | self._widths.keys() if widths.get(n) != self._widths.get(n)]
        self._forget({index, *stripped, *(i for name in changed for i in self.cost.touching(name))}, bool(changed))
        for i in stripped:
            self.numbers[i] = 0, self.numbers[i][1]
        self.numbers[index] = structure, precision
        self._widths, self.total = widths, total
        self._current.clear()
        self._signatures.clear()
        shared = self.cost.shared(self.numbers)
        if (shared != self._shared).any():  # the same array while it says the same, see `changes`
            self._shared = shared

    def _dependencies(self, name: str) -> set[int]:
        """Layers whose entry decides what a revision of layer `name` changes, or whether it is legal."""
        found = {self._index[name]}
        found.update(self._index[b.coupling] for b in self.cost.space.graph.blocks if name in b.layers)
        block = self.cost.space.block_led_by(name)
        inside = {name, *(block.layers if block else ())}
        for other in inside:
            found.add(self._index[other])
            if self.cost.space.led_by(other):
                found.update(self.cost.touching(other))
        return found

    def _forget(self, touched: set[int], narrowed: bool) -> None:
        """Drop what is remembered of layers that depend on `touched`; after other widths, of all leaders as well,
        since a tensor that two couplings cut joins their prices.
        """
        for index, depends in enumerate(self._depends):
            if depends & touched or (narrowed and index in self._leaders):
                self._additive.pop(index, None)
