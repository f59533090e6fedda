"""A whole profile under revision: what it would cost with another entry for one of its layers, exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from grainwise.plan.choices import PRECISIONS, STRUCTURES, UNCOMPRESSED, Entry, entry_of, numbers_of
from grainwise.plan.cost import CostModel, Widths
from grainwise.plan.prices import COSTS, Cost, Row, Shared
from grainwise.plan.projection import BLOCK_STUDENTS, NARROWING
from grainwise.plan.space import Mask, units_left

_REMEMBERED = 4000  # tables of changes, 7 kB each
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
        self._widths: dict[str, int] = dict(cost.widths(entries))
        self.total: Cost = cost.total(entries)
        self._paid: list[Cost] = [cost.table(i, self._widths)[n] for i, n in enumerate(self.numbers)]  # by each layer
        self._additive = np.empty((len(self.layers), len(STRUCTURES), len(PRECISIONS), len(COSTS)))  # but for shared
        self._stale = set(range(len(self.layers)))  # layers whose additive changes are to be computed
        self._changes: NDArray[np.float64] | None = None

    def copy(self) -> Draft:
        """Another draft of the same profile; what both need is computed once."""
        self.changes()
        other = copy.copy(self)
        other.numbers, other._paid = list(self.numbers), list(self._paid)
        other._stale, other._additive = set(self._stale), self._additive.copy()
        return other

    def entries(self) -> dict[str, Entry]:
        return {layer.name: entry_of(*found) for layer, found in zip(self.layers, self.numbers, strict=True)}

    def changes(self) -> NDArray[np.float64]:
        """`[L, S, P, 3]`, read-only: change of the total when a layer takes the entry instead, infinite if illegal."""
        if self._changes is None:
            for index in self._stale:
                self._additive[index] = self._additive_of(index)
            self._stale.clear()
            shared = self.cost.prices.shared
            self._changes = self._additive + (0.0 if shared is None else self._shared_changes(shared))
        return self._changes

    def _shared_changes(self, shared: Shared) -> NDArray[np.float64]:
        """`[L, S, P, 3]` change of what the entries share."""
        every: list[Row] = [(index, ()) for index in range(len(self.layers))]
        stripped = self.stripped()
        tables = shared.tables(self.numbers, every + list(stripped.items()))
        changes, students = np.split(tables, [len(every)])
        for index, table in zip(stripped, students, strict=True):
            changes[index, BLOCK_STUDENTS] = table[list(BLOCK_STUDENTS)]
        now = shared.of(self.numbers)
        for cost in np.flatnonzero(now):
            changes[..., cost] -= now[cost]
        return changes

    def _additive_of(self, index: int) -> NDArray[np.float64]:
        """`[S, P, 3]` change of what layers pay for themselves when layer `index` takes the entry instead."""
        read = tuple(self.numbers[i] for i in self.cost.dependencies[index])
        around = self._widths if self.cost.leads(index) else self.cost.related(index)
        key = index, read, tuple((name, self._widths[name]) for name in sorted(around) if name in self._widths)
        known = self.cost.revisions
        if key not in known:
            if len(known) > _REMEMBERED:
                known.clear()
            known[key] = self._compute_additive(index)
        return known[key]

    def _compute_additive(self, index: int) -> NDArray[np.float64]:
        legal = self._legal(index)
        rest, widths = self._rest(index, 0)
        table = rest + self.cost.table(index, widths)
        for s in NARROWING:
            if legal[s].any():
                rest, widths = self._rest(index, s)
                table[s] = rest + self.cost.table(index, widths)[s]
        table[~legal] = np.inf
        return table

    def _legal(self, index: int) -> Mask:
        legal = self.cost.pairs(index).copy()
        for leader, inside in self.cost.blocks.items():
            if index in inside and index != leader and self.numbers[leader][0] in BLOCK_STUDENTS:
                legal[1:] = False
        return legal

    def stripped(self) -> dict[int, list[int]]:
        """Layers that lose their own structure when one becomes the student of its block, by that one."""
        found = {
            leader: [i for i in inside if i != leader and self.numbers[i][0]]
            for leader, inside in self.cost.blocks.items()
        }
        return {leader: layers for leader, layers in found.items() if layers}

    def _strips(self, index: int, structure: int) -> list[int]:
        return self.stripped().get(index, []) if structure in BLOCK_STUDENTS else []

    def _revised_widths(self, index: int, structure: int) -> dict[str, int]:
        widths = dict(self._widths)
        for i in (index, *self._strips(index, structure)):
            widths.pop(self.layers[i].name, None)
        if structure in NARROWING:
            name = self.layers[index].name
            widths[name] = units_left(self.cost.coupling(name), STRUCTURES[structure])
        return widths

    def _rest(self, index: int, structure: int) -> tuple[Cost, Widths]:
        """`[3]` change of all but layer `index` once it takes `structure`, less its own cost, and the widths then."""
        widths, stripped = self._revised_widths(index, structure), self._strips(index, structure)
        touched = self._touched(widths, (index, *stripped)).union(stripped)
        rest = -self._paid[index]
        if touched:
            rest = rest + self.cost.fixed(widths) - self.cost.fixed(self._widths)
        for i in sorted(touched - {index}):
            s, p = self.numbers[i]
            rest = rest + self.cost.table(i, widths)[0 if i in stripped else s, p] - self._paid[i]
        return rest, widths

    def _touched(self, widths: Widths, revised: Iterable[int]) -> set[int]:
        """Layers whose tensors are narrower or wider than now, once some layers are revised so that these are the
        widths.
        """
        names = (self.layers[i].name for i in revised)
        return {i for name in names if widths.get(name) != self._widths.get(name) for i in self.cost.touching(name)}

    def replace(self, index: int, structure: int, precision: int) -> None:
        """Revise layer `index`; the entry must be legal (finite in `changes`)."""
        stripped = self._strips(index, structure)
        self.total = self.total + self.changes()[index, structure, precision]
        widths = self._revised_widths(index, structure)
        narrowed = self._touched(widths, (index, *stripped))
        touched = {index, *stripped, *narrowed}
        for i in stripped:
            self.numbers[i] = 0, self.numbers[i][1]
        self.numbers[index] = structure, precision
        self._widths, self._changes = widths, None
        for i in touched:
            self._paid[i] = self.cost.table(i, widths)[self.numbers[i]]
        self._stale.update(i for i, found in enumerate(self.cost.dependencies) if not found.isdisjoint(touched))
        if narrowed:  # a tensor that two couplings cut joins their leaders' prices
            self._stale.update(i for i in range(len(self.layers)) if self.cost.leads(i))
