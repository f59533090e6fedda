"""Exact budget projection: a profile is chosen layer by layer; entries that can no longer meet the budgets are masked.

At each layer every entry is completed by a concrete, cheap choice for all layers that follow; an entry is allowed when
that completion meets every budget. The completion is itself a legal profile, so a walk never ends in a dead end.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np
from numpy.typing import NDArray

from grainwise.plan.choices import NONE, PRECISIONS, STRUCTURES, Choice, Entry, Granularity, Method, numbers_of
from grainwise.plan.cost import CostModel, Widths
from grainwise.plan.prices import COSTS, Cost, Numbers
from grainwise.plan.space import Mask, narrows, units_left

BLOCK_STUDENTS = tuple(
    i for i, c in enumerate(STRUCTURES) if c.method is Method.DISTILL and c.granularity is Granularity.BLOCK
)
_Option = tuple[Cost, tuple[int, int]]
_After = tuple[Cost, Widths, dict[int, _Option]]
"""`[3]` cost of the completed profile without the current layer and without what is shared, its widths, and cost and
numbers of the other layers that differ."""

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
        self._cheapest: dict[tuple[int | None, ...], _Option] = {}
        self._squeezed: dict[str, tuple[int, int]] = {}
        self._squeezed = self._squeeze()
        self.start_widths = self.squeezed_widths(0, {}, frozenset())
        options = [self.cheapest(index, self.start_widths, frozenset()) for index in range(len(self.space.layers))]
        self.start_costs: Cost = np.stack([cost for cost, _ in options])
        self.start_numbers: Numbers = [found for _, found in options]
        self.numbers = {layer.name: index for index, layer in enumerate(self.space.layers)}
        start = self.start_costs.sum(axis=0) + cost.fixed(self.start_widths) + cost.shared(self.start_numbers)
        if (start > self.budget).any():
            short = int(np.argmax(start / self.budget))
            raise Unreachable(
                f"the {COSTS[short]} budget of {self.budget[short]:.4g} cannot be met: the cheapest profile that the "
                f"allowed methods give has {start[short]:.4g} of {reference[short]:.4g}"
            )

    def _squeeze(self) -> dict[str, tuple[int, int]]:
        """(layer index, narrowest structure) of couplings not decided yet, where completing with it is the cheaper."""
        without = self._completed()
        self._cheapest.clear()
        for index, layer in enumerate(self.space.layers):
            coupling = self.space.led_by(layer.name)
            options = [s for s in NARROWING if self.space.structures[index, s] and s not in BLOCK_STUDENTS]
            if coupling and options:
                narrowest = min(options, key=lambda s: units_left(coupling, STRUCTURES[s]))
                self._squeezed[layer.name] = index, narrowest
        squeezed = self._completed()
        self._cheapest.clear()
        return self._squeezed if (squeezed * self.weight).max() < (without * self.weight).max() else {}

    def squeezed_widths(self, start: int, widths: Widths, students: Set[str]) -> dict[str, int]:
        """Widths when every coupling led by layer `start` or later is at its narrowest."""
        squeezed = dict(widths)
        for name, (index, structure) in self._squeezed.items():
            if index >= start and name not in widths and name not in students:
                squeezed[name] = units_left(self.cost.coupling(name), STRUCTURES[structure])
        return squeezed

    def cheapest(self, index: int, widths: Widths, students: Set[str]) -> _Option:
        """The completion's entry for layer `index` at these widths: its `[3]` cost and its numbers; layers of
        `students` take no structure of their own.
        """
        name = self.space.layers[index].name
        student = name in students
        key = (index, student, *(widths.get(coupling) for coupling in self.cost.related(index)))
        if key not in self._cheapest:
            rows = [0] if student else [self._squeezed[name][1]] if name in self._squeezed else self._plain_rows(index)
            options = self.cost.table(index, widths)[rows].reshape(-1, len(COSTS))
            best = int(np.argmin((options * self.weight).sum(axis=1)))
            row, precision = divmod(best, len(PRECISIONS))
            self._cheapest[key] = options[best], (rows[row], precision)
        return self._cheapest[key]

    def _completed(self) -> Cost:
        """`[3]` cost of the cheapest completion of the empty profile."""
        widths = self.squeezed_widths(0, {}, frozenset())
        layers = [self.cheapest(index, widths, frozenset()) for index in range(len(self.space.layers))]
        shared = self.cost.shared([numbers for _, numbers in layers])
        return sum((cost for cost, _ in layers), self.cost.fixed(widths) + shared)

    def _plain_rows(self, index: int) -> list[int]:
        return [int(s) for s in np.flatnonzero(self.space.structures[index]) if s not in NARROWING]


class Walk:
    """One profile while it is chosen, layer by layer.

    entries: what was chosen so far. widths: units left of the couplings that were narrowed.
    completed: `[3]` cost of the profile if all later layers take the cheapest completion.
    """

    def __init__(self, projection: Projection) -> None:
        self._projection = projection
        self.space = projection.space
        self.entries: dict[str, Entry] = {}
        self.widths: dict[str, int] = {}
        self._students: frozenset[str] = frozenset()
        self._structured: set[str] = set()
        self._numbers = list(projection.start_numbers)  # of each layer in the completed profile, chosen or not
        self._completion: Widths = projection.start_widths
        self._costs = projection.start_costs.copy()  # [L, 3] of each layer in the completed profile
        self._shared: Cost = projection.cost.shared(self._numbers)
        self.completed: Cost = self._costs.sum(axis=0) + projection.cost.fixed(self._completion) + self._shared
        self._known: dict[Choice, _After] = {}  # at this step

    @property
    def step(self) -> int:
        return len(self.entries)

    @property
    def done(self) -> bool:
        return self.step == len(self.space.layers)

    def legal(self) -> Mask:
        """`[S, P]` entries that the current layer may take after what was chosen, whatever they cost."""
        index = self.step
        layer = self.space.layers[index]
        pairs = self._projection.cost.pairs(index).copy()
        if layer.name in self._students:
            pairs[1:] = False
        elif (block := self.space.block_led_by(layer.name)) and self._structured & set(block.layers):
            pairs[list(BLOCK_STUDENTS)] = False
        return pairs

    def costs(self) -> tuple[Mask, NDArray[np.float64]]:
        """`[S, P]` entries that are legal here, and `[S, P, 3]` the cost of the whole profile when the entry is taken
        and the cheapest completion follows (infinite where illegal).
        """
        index, cost = self.step, self._projection.cost
        legal = self.legal()
        revised, widths, touched = self._after(NONE)
        numbers = self._revised_numbers(touched)
        plain = cost.shared_table(index, numbers)
        table = revised + cost.table(index, widths) + plain
        for s in NARROWING:
            if legal[s].any():
                revised, widths, touched = self._after(STRUCTURES[s])
                found = self._revised_numbers(touched)
                shared = plain if found == numbers else cost.shared_table(index, found)
                table[s] = revised + cost.table(index, widths)[s] + shared[s]
        table[~legal] = np.inf
        return legal, table

    def _revised_numbers(self, touched: Mapping[int, _Option]) -> list[tuple[int, int]]:
        numbers = list(self._numbers)
        for index, (_, found) in touched.items():
            numbers[index] = found
        return numbers

    def _after(self, structure: Choice) -> _After:
        """What follows when the current layer takes `structure`; all that narrow nothing are alike."""
        kind = structure if narrows(structure) else NONE
        if kind not in self._known:
            self._known[kind] = self._follow(kind)
        return self._known[kind]

    def _follow(self, structure: Choice) -> _After:
        shared, index = self._projection, self.step
        widths, students = self._decided(structure)
        completion = shared.squeezed_widths(index + 1, widths, students)
        touched = {shared.numbers[name] for name in students - self._students}
        for name in completion.keys() | self._completion.keys():
            if completion.get(name) != self._completion.get(name):
                touched.update(shared.cost.touching(name))
        touched.discard(index)
        options = {i: self._option_of(i, completion, students) for i in touched}
        revised = self.completed - self._shared - self._costs[index]
        if touched:
            revised = revised + shared.cost.fixed(completion) - shared.cost.fixed(self._completion)
            for i, (cost, _) in options.items():
                revised = revised + (cost - self._costs[i])
        return revised, completion, options

    def _option_of(self, index: int, completion: Widths, students: Set[str]) -> _Option:
        if index < self.step:
            numbers = self._numbers[index]
            cost: Cost = self._projection.cost.table(index, completion)[numbers]
            return cost, numbers
        return self._projection.cheapest(index, completion, students)

    def _decided(self, structure: Choice) -> tuple[Widths, frozenset[str]]:
        """Widths, and layers that follow a block's student, once the current layer takes `structure`."""
        if not narrows(structure):
            return self.widths, self._students
        name = self.space.layers[self.step].name
        widths = {**self.widths, name: units_left(self._projection.cost.coupling(name), structure)}
        block = self.space.block_led_by(name)
        inside = block.layers if block and structure.method is Method.DISTILL else ()
        return widths, self._students.union(inside)

    def allowed(self) -> Mask:
        """`[S, P]` entries that are legal and can still meet every budget; never empty."""
        legal, costs = self.costs()
        budget = self._projection.budget
        fits = legal & (costs <= budget).all(axis=2)
        if not fits.any():  # only after `take` of an entry that was not allowed
            excess = (costs * self._projection.weight).max(axis=2)
            fits = legal & (excess == excess[legal].min())
        return fits

    def take(self, entry: Entry) -> None:
        """Choose `entry` for the current layer."""
        index, layer = self.step, self.space.layers[self.step]
        revised, completion, options = self._after(entry.structure)
        widths, self._students = self._decided(entry.structure)
        self.widths = dict(widths)
        if entry.structure != NONE:
            self._structured.add(layer.name)
        self._completion = completion
        for i, (cost, numbers) in options.items():
            self._costs[i], self._numbers[i] = cost, numbers
        self.entries[layer.name] = entry
        self._numbers[index] = numbers_of(entry)
        self._costs[index] = self._projection.cost.table(index, completion)[self._numbers[index]]
        self._shared = self._projection.cost.shared(self._numbers)
        self.completed = revised + self._costs[index] + self._shared
        self._known.clear()
