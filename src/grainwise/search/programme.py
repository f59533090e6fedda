"""The additive problem as an integer programme: an entry a layer, least summed scores, budgets that layers share.

Letters: L layers, S structures, P precisions, O options of a layer, W couplings that are told apart around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grainwise.plan.choices import STRUCTURES, Entry, entry_of
from grainwise.plan.prices import COSTS, SIZE, Cost
from grainwise.plan.projection import BLOCK_STUDENTS, NARROWING, Projection
from grainwise.plan.space import units_left
from grainwise.search.draft import Draft
from grainwise.search.local import reduced, score_of
from grainwise.search.milp import Rows, minimise
from grainwise.search.prior import Table, fill

_COMBINATIONS = 64  # of widths around one layer that are told apart
_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class _Options:
    """What a layer may take at each combination of the widths around it.

    couplings: the W couplings. widths: `[O, W]` numbers of their widths. numbers: `[O, 2]` structure and precision.
    costs: `[O, 3]`. group: `[O]`; only within one group may an option make another superfluous.
    """

    couplings: tuple[str, ...]
    widths: NDArray[np.int64]
    numbers: NDArray[np.int64]
    costs: NDArray[np.float64]
    group: NDArray[np.int64]

    def of(self, table: NDArray[Any]) -> NDArray[Any]:
        """`[O, ...]` the options' elements of a table `[S, P, ...]`."""
        found: NDArray[Any] = table[tuple(self.numbers.T)]
        return found

    def only(self, kept: NDArray[np.intp]) -> _Options:
        return _Options(self.couplings, self.widths[kept], self.numbers[kept], self.costs[kept], self.group[kept])


class Programme:
    """Chooses entries of least summed scores within the budgets of a projection.

    A column is a layer's entry *at* the widths that the couplings around it have, so that what a cut saves in the
    layers that read or write its channels is exact; rows tie those widths to the entries of the couplings' leaders.
    Parts of a file that several entries need are columns too. Couplings of which too many meet at one layer (dense
    concatenations) are not searched: they keep the width that they have in the greedy solution. What is not linear is
    left out, checked with the cost model, and corrected by tightening the budgets until they hold: conversions between
    kernels (`Shared.boundary`) and tensors that two couplings cut.
    """

    def __init__(self, projection: Projection) -> None:
        self._projection = projection
        self._cost = projection.cost
        self._finite = np.flatnonzero(np.isfinite(projection.budget))
        self._units = {}
        for index, layer in enumerate(projection.space.layers):
            legal = [s for s in NARROWING if self._cost.pairs(index)[s].any()]
            if legal and (coupling := projection.space.led_by(layer.name)):
                left = {units_left(coupling, STRUCTURES[s]) for s in legal}
                self._units[layer.name] = [coupling.width, *sorted(left, reverse=True)]
        self._pinned = frozenset(c for index in range(len(projection.space.layers)) for c in self._too_many(index))
        self._tabulated: dict[tuple[int, tuple[tuple[str, int | None], ...]], _Options] = {}

    def _related(self, index: int) -> list[str]:
        """Couplings around a layer that can be narrowed; first the one that it leads."""
        name = self._projection.space.layers[index].name
        return sorted((c for c in self._cost.related(index) if c in self._units), key=lambda c: c != name)

    def _too_many(self, index: int) -> list[str]:
        """Those of a layer's couplings whose widths would make more than _COMBINATIONS."""
        related = self._related(index)
        counts = np.cumprod([len(self._units[coupling]) for coupling in related])
        return [coupling for coupling, count in zip(related, counts, strict=True) if count > _COMBINATIONS]

    def solve(self, scores: Table) -> dict[str, Entry]:
        """The profile of least summed scores (`[L, S, P]`, >= 0) that is found within the budgets, slack filled; never
        worse than the greedy one.
        """
        start = reduced(self._projection, scores)
        limit = score_of(Draft(self._cost, start), scores)
        around, offset = self._cost.widths(start), np.zeros(len(COSTS))
        for _ in range(_ROUNDS):
            found = self._solve(scores, limit, around, self._projection.budget - offset)
            if found is None:
                break
            draft = Draft(self._cost, found[0])
            if (draft.total <= self._projection.budget).all():
                fill(draft, scores, self._projection.budget)
                return draft.entries() if score_of(draft, scores) <= limit else start
            offset = np.maximum(offset, draft.total - found[1])
        return start

    def _solve(
        self, scores: Table, limit: float, around: Mapping[str, int], budget: Cost
    ) -> tuple[dict[str, Entry], Cost] | None:
        """Entries and their modelled cost, or None when there is no solution."""
        names = [layer.name for layer in self._projection.space.layers]
        options = [self._useful(index, self._options(index, around), scores, limit) for index in range(len(names))]
        first = np.cumsum([0, *(len(found.numbers) for found in options)])
        columns = [np.arange(*pair) for pair in pairwise(first)]
        shared = self._cost.prices.shared
        costs = np.concatenate([found.costs for found in options])
        objective = np.concatenate([found.of(scores[index]) for index, found in enumerate(options)])
        if shared is not None:
            bytes_ = np.zeros((len(shared.part_bytes), len(COSTS)))
            bytes_[:, SIZE] = shared.part_bytes
            costs, objective = np.concatenate([costs, bytes_]), np.append(objective, np.zeros(len(bytes_)))
        rows = Rows(len(objective))
        for mine in columns:
            rows.add(mine, 1.0, 1.0, 1.0)
        self._tie_widths(rows, options, columns)
        self._keep_students_plain(rows, options, columns)
        if shared is not None:
            for index, found in enumerate(options):
                needs = found.of(shared.parts[index])
                for part in np.flatnonzero(needs.any(axis=0)):
                    mine = columns[index][needs[:, part]]
                    rows.add(np.append(mine, first[-1] + part), np.append(np.ones(len(mine)), -1.0), -np.inf, 0.0)
        base = self._cost.fixed({})
        for k in self._finite:
            unit = self._projection.budget[k]
            rows.add(np.arange(len(objective)), costs[:, k] / unit, -np.inf, (budget[k] - base[k]) / unit)
        taken = minimise(objective, rows, limit)
        if taken is None:
            return None
        chosen = np.searchsorted(first, taken[taken < first[-1]], side="right") - 1
        numbers = [options[i].numbers[column - first[i]] for i, column in zip(chosen, taken, strict=False)]
        entries = {name: entry_of(int(s), int(p)) for name, (s, p) in zip(names, numbers, strict=True)}
        return entries, base + costs[taken].sum(axis=0)

    def _tie_widths(self, rows: Rows, options: list[_Options], columns: list[NDArray[np.intp]]) -> None:
        """A layer's option at a width is taken only with an entry of the coupling's leader that gives this width."""
        for index, found in enumerate(options):
            for position, coupling in enumerate(found.couplings):
                leader = self._projection.numbers[coupling]
                if leader == index:
                    continue
                decided = options[leader].widths[:, options[leader].couplings.index(coupling)]
                for width in range(len(self._units[coupling])):
                    mine = columns[index][found.widths[:, position] == width]
                    theirs = columns[leader][decided == width]
                    signs = np.repeat([1.0, -1.0], [len(mine), len(theirs)])
                    rows.add(np.concatenate([mine, theirs]), signs, 0.0, 0.0)

    def _keep_students_plain(self, rows: Rows, options: list[_Options], columns: list[NDArray[np.intp]]) -> None:
        """Layers of a block that is distilled take no structure of their own."""
        for block in self._projection.space.graph.blocks:
            leader = self._projection.numbers[block.coupling]
            student = columns[leader][np.isin(options[leader].numbers[:, 0], BLOCK_STUDENTS)]
            for index in (self._projection.numbers[name] for name in block.layers):
                own = columns[index][options[index].numbers[:, 0] != 0]
                if index != leader and len(student) and len(own):
                    rows.add(np.concatenate([student, own]), 1.0, -np.inf, 1.0)

    # -- options

    def _options(self, index: int, around: Mapping[str, int]) -> _Options:
        """All options of a layer; couplings that are not searched have the widths of `around`."""
        pinned = tuple((c, around.get(c)) for c in self._related(index) if c in self._pinned)
        if (index, pinned) not in self._tabulated:
            free = tuple(c for c in self._related(index) if c not in self._pinned)
            self._tabulated[index, pinned] = self._tabulate(index, free, dict(pinned))
        return self._tabulated[index, pinned]

    def _tabulate(self, index: int, free: tuple[str, ...], pinned: Mapping[str, int | None]) -> _Options:
        name = self._projection.space.layers[index].name
        inside = any(name in block.layers for block in self._projection.space.graph.blocks)
        leads = self._projection.space.led_by(name) if name in self._units else None
        parts: list[tuple[NDArray[Any], ...]] = []
        for number, widths in enumerate(product(*(range(len(self._units[c])) for c in free))):
            cut = {c: units for c, units in pinned.items() if units is not None}
            cut |= {c: self._units[c][k] for c, k in zip(free, widths, strict=True) if k}
            legal = self._cost.pairs(index).copy()
            for s in NARROWING if leads else ():
                legal[s] &= cut.get(name) == units_left(leads, STRUCTURES[s])
            if name in cut:
                legal[[s for s in range(len(STRUCTURES)) if s not in NARROWING]] = False
            numbers = np.argwhere(legal)
            costs = self._cost.table(index, cut)[legal]
            if name in cut:  # what its cut saves beside the layers
                costs = costs + self._cost.fixed({name: cut[name]}) - self._cost.fixed({})
            apart = np.isin(numbers[:, 0], BLOCK_STUDENTS) + 2 * ((numbers[:, 0] == 0) & inside)
            given = np.tile(np.array(widths, dtype=np.int64), (len(numbers), 1))
            parts.append((given, numbers, costs, 4 * number + apart))
        return _Options(free, *(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _useful(self, index: int, options: _Options, scores: Table, limit: float) -> _Options:
        """Options that an optimum may hold: of a score up to the limit, none in their group as good and as cheap."""
        score = options.of(scores[index])
        figures = [score[:, None], options.costs[:, self._finite]]
        if (shared := self._cost.prices.shared) is not None:
            figures += [options.of(shared.parts[index]), options.of(shared.static[index])[:, None]]
        joined = np.concatenate(figures, axis=1).astype(np.float64)
        kept: list[int] = []
        for group in np.unique(options.group):
            members = np.flatnonzero((options.group == group) & (score <= limit))
            rivals = joined[members]
            as_good = (rivals[:, None] <= rivals[None]).all(axis=2)  # [rival, member]
            same = as_good & as_good.T  # of equal ones the first stays
            beaten = (as_good & ~same) | np.triu(same, 1)
            kept += members[~beaten.any(axis=0)].tolist()
        return options.only(np.array(kept, dtype=np.intp))
