"""Exact budget projection: a profile is chosen layer by layer; entries that can no longer meet the budgets are masked.

At each layer every entry is completed by a concrete, cheap choice for all layers that follow; an entry is allowed when
that completion meets every budget. The completion is itself a legal profile, so a walk never ends in a dead end.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np
from numpy.typing import NDArray

from grainwise.plan.choices import NONE, PRECISIONS, STRUCTURES, Choice, Entry, Granularity, Method
from grainwise.plan.cost import COSTS, Cost, CostModel, Widths
from grainwise.plan.space import Mask, narrows, units_left

BLOCK_STUDENTS = tuple(
    i for i, c in enumerate(STRUCTURES) if c.method is Method.DISTILL and c.granularity is Granularity.BLOCK
)
NARROWING = tuple(i for i, c in enumerate(STRUCTURES) if narrows(c))


class Unreachable(ValueError):
    """No profile of the space meets the budgets; the message says what the smallest reachable cost is."""


class Projection:
    """Budgets over one cost model, and what every walk shares.

    budgets: absolute, by name of COSTS (`size` in bytes, `macs` per sample). Without budgets nothing is masked.
    Raises Unreachable when even the cheapest completion of the empty profile exceeds a budget.
    """

    def __init__(self, cost: CostModel, budgets: Mapping[str, float]) -> None:
        if unknown := sorted(set(budgets) - set(COSTS)):
            raise ValueError(f"no cost is called {unknown[0]!r}; budgets can be set for {', '.join(COSTS)}")
        self.cost = cost
        self.space = cost.space
        self.budget: Cost = np.array([budgets.get(name, np.inf) for name in COSTS])
        reference = cost.total({})
        finite = np.isfinite(self.budget)
        self.weight: Cost = np.where(finite, 1 / np.where(finite, self.budget, 1.0), 1e-9 / np.maximum(reference, 1.0))
        self._cheapest: dict[tuple[int | None, ...], Cost] = {}
        self._squeezed: dict[str, tuple[int, int]] = {}
        self._squeezed = self._squeeze()
        start = Walk(self).completed
        if (start > self.budget).any():
            short = int(np.argmax(start / self.budget))
            raise Unreachable(
                f"the {COSTS[short]} budget of {self.budget[short]:.0f} cannot be met: the cheapest profile that the "
                f"allowed methods give has {start[short]:.0f} of {reference[short]:.0f}"
            )

    def _squeeze(self) -> dict[str, tuple[int, int]]:
        """(layer index, narrowest structure) of couplings not decided yet, where completing with it is the cheaper."""
        without, _ = self.ahead(0, {}, frozenset())
        self._cheapest.clear()
        for index, layer in enumerate(self.space.layers):
            coupling = self.space.led_by(layer.name)
            options = [s for s in NARROWING if self.space.structures[index, s] and s not in BLOCK_STUDENTS]
            if coupling and options:
                narrowest = min(options, key=lambda s: units_left(coupling, STRUCTURES[s]))
                self._squeezed[layer.name] = index, narrowest
        squeezed, _ = self.ahead(0, {}, frozenset())
        self._cheapest.clear()
        return self._squeezed if (squeezed * self.weight).max() < (without * self.weight).max() else {}

    def squeezed_widths(self, start: int, widths: Widths, students: Set[str]) -> dict[str, int]:
        """Widths when every coupling led by layer `start` or later is at its narrowest."""
        squeezed = dict(widths)
        for name, (index, structure) in self._squeezed.items():
            if index >= start and name not in widths and name not in students:
                squeezed[name] = units_left(self.cost.coupling(name), STRUCTURES[structure])
        return squeezed

    def cheapest(self, index: int, widths: Widths, students: Set[str]) -> Cost:
        """`[2]` cost of the completion's entry for layer `index` at these widths; layers of `students` take no
        structure of their own.
        """
        name = self.space.layers[index].name
        student = name in students
        key = (index, student, *(widths.get(coupling) for coupling in self.cost.related(index)))
        if key not in self._cheapest:
            rows = [0] if student else [self._squeezed[name][1]] if name in self._squeezed else self._plain_rows(index)
            options = self.cost.table(index, widths)[rows].reshape(-1, len(COSTS))
            self._cheapest[key] = options[np.argmin((options * self.weight).sum(axis=1))]
        return self._cheapest[key]

    def ahead(self, start: int, widths: Widths, students: Set[str]) -> tuple[Cost, dict[str, int]]:
        """Cost of the cheapest completion from layer `start` on, what stands beside layers included; and its widths."""
        squeezed = self.squeezed_widths(start, widths, students)
        total = self.cost.fixed(squeezed)
        for index in range(start, len(self.space.layers)):
            total = total + self.cheapest(index, squeezed, students)
        return total, squeezed

    def _plain_rows(self, index: int) -> list[int]:
        return [int(s) for s in np.flatnonzero(self.space.structures[index]) if s not in NARROWING]


class Walk:
    """One profile while it is chosen, layer by layer.

    entries: what was chosen so far. widths: units left of the couplings that were narrowed.
    completed: `[2]` cost of the profile if all later layers take the cheapest completion.
    """

    def __init__(self, projection: Projection) -> None:
        self._projection = projection
        self.space = projection.space
        self.entries: dict[str, Entry] = {}
        self.widths: dict[str, int] = {}
        self._spent: Cost = np.zeros(len(COSTS))
        self._students: set[str] = set()
        self._structured: set[str] = set()
        self.completed, _ = projection.ahead(0, {}, frozenset())

    @property
    def step(self) -> int:
        return len(self.entries)

    @property
    def done(self) -> bool:
        return self.step == len(self.space.layers)

    def _legal(self) -> Mask:
        index = self.step
        layer = self.space.layers[index]
        pairs = self.space.pairs(index)
        if layer.name in self._students:
            pairs[1:] = False
        elif (block := self.space.block_led_by(layer.name)) and self._structured & set(block.layers):
            pairs[list(BLOCK_STUDENTS)] = False
        return pairs

    def costs(self) -> tuple[Mask, NDArray[np.float64]]:
        """`[S, P]` entries that are legal here, and `[S, P, 2]` the cost of the whole profile when the entry is taken
        and the cheapest completion follows (infinite where illegal).
        """
        index, shared = self.step, self._projection
        legal = self._legal()
        ahead, squeezed = shared.ahead(index + 1, self.widths, self._students)
        table = self._spent + ahead + shared.cost.table(index, squeezed)
        for s in NARROWING:
            if legal[s].any():
                name = self.space.layers[index].name
                narrowed = {**self.widths, name: self._units(STRUCTURES[s])}
                ahead, squeezed = shared.ahead(index + 1, narrowed, self._students | self._block_of(STRUCTURES[s]))
                table[s] = self._spent + ahead + shared.cost.table(index, squeezed)[s]
        table[~legal] = np.inf
        return legal, table

    def _block_of(self, structure: Choice) -> frozenset[str]:
        """Layers that share the decision when the current layer takes `structure`."""
        block = self.space.block_led_by(self.space.layers[self.step].name)
        return frozenset(block.layers) if block and structure.method is Method.DISTILL else frozenset()

    def _units(self, structure: Choice) -> int:
        return units_left(self._projection.cost.coupling(self.space.layers[self.step].name), structure)

    def allowed(self) -> Mask:
        """`[S, P]` entries that are legal and can still meet every budget; never empty."""
        legal, costs = self.costs()
        fits = legal & (costs <= self._projection.budget).all(axis=2)
        if not fits.any():  # only after `take` of an entry that was not allowed
            fits = legal & (costs.max(axis=2) == costs.max(axis=2)[legal].min())
        return fits

    def take(self, entry: Entry) -> None:
        """Choose `entry` for the current layer."""
        layer = self.space.layers[self.step]
        if narrows(entry.structure):
            self.widths[layer.name] = self._units(entry.structure)
            self._students |= self._block_of(entry.structure)
        if entry.structure != NONE:
            self._structured.add(layer.name)
        self.entries[layer.name] = entry
        ahead, squeezed = self._projection.ahead(self.step, self.widths, self._students)
        self._spent = sum(
            (self._projection.cost.table(i, squeezed)[_index(e)] for i, e in enumerate(self.entries.values())),
            np.zeros(len(COSTS)),
        )
        self.completed = self._spent + ahead


def _index(entry: Entry) -> tuple[int, int]:
    return STRUCTURES.index(entry.structure), PRECISIONS.index(entry.precision)
