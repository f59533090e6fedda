"""What each layer may take at each combination of the widths around it, and at what cost.

Letters: L layers, S structures, P precisions, O options of a layer, W couplings that are told apart around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grainwise.plan.choices import STRUCTURES
from grainwise.plan.projection import BLOCK_STUDENTS, NARROWING, Projection
from grainwise.plan.space import units_left
from grainwise.search.prior import Table

_COMBINATIONS = 64  # of widths around one layer that are told apart


@dataclass(frozen=True, slots=True)
class Options:
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

    def only(self, kept: NDArray[np.intp]) -> Options:
        return Options(self.couplings, self.widths[kept], self.numbers[kept], self.costs[kept], self.group[kept])


class OptionTables:
    """The options of every layer of a projection's network.

    units: of each coupling that can be narrowed the units of its widths, the full width first. Couplings of which more
    than _COMBINATIONS widths meet at one layer (dense concatenations) are not told apart: they are pinned.
    """

    def __init__(self, projection: Projection) -> None:
        self._projection = projection
        self._cost = projection.cost
        self._finite = np.flatnonzero(np.isfinite(projection.budget))
        self.units = {}
        for index, layer in enumerate(projection.space.layers):
            legal = [s for s in NARROWING if self._cost.pairs(index)[s].any()]
            if legal and (coupling := projection.space.led_by(layer.name)):
                left = {units_left(coupling, STRUCTURES[s]) for s in legal}
                self.units[layer.name] = [coupling.width, *sorted(left, reverse=True)]
        self._pinned = frozenset(c for index in range(len(projection.space.layers)) for c in self._too_many(index))
        self._tabulated: dict[tuple[int, tuple[tuple[str, int | None], ...]], Options] = {}

    def _related(self, index: int) -> list[str]:
        """Couplings around a layer that can be narrowed; first the one that it leads."""
        name = self._projection.space.layers[index].name
        return sorted((c for c in self._cost.related(index) if c in self.units), key=lambda c: c != name)

    def _too_many(self, index: int) -> list[str]:
        """Those of a layer's couplings whose widths would make more than _COMBINATIONS."""
        related = self._related(index)
        counts = np.cumprod([len(self.units[coupling]) for coupling in related])
        return [coupling for coupling, count in zip(related, counts, strict=True) if count > _COMBINATIONS]

    def all(self, index: int, around: Mapping[str, int]) -> Options:
        """All options of a layer; couplings that are not searched have the widths of `around`."""
        pinned = tuple((c, around.get(c)) for c in self._related(index) if c in self._pinned)
        if (index, pinned) not in self._tabulated:
            free = tuple(c for c in self._related(index) if c not in self._pinned)
            self._tabulated[index, pinned] = self._tabulate(index, free, dict(pinned))
        return self._tabulated[index, pinned]

    def _tabulate(self, index: int, free: tuple[str, ...], pinned: Mapping[str, int | None]) -> Options:
        name = self._projection.space.layers[index].name
        inside = any(name in block.layers for block in self._projection.space.graph.blocks)
        leads = self._projection.space.led_by(name) if name in self.units else None
        parts: list[tuple[NDArray[Any], ...]] = []
        for number, widths in enumerate(product(*(range(len(self.units[c])) for c in free))):
            cut = {c: units for c, units in pinned.items() if units is not None}
            cut |= {c: self.units[c][k] for c, k in zip(free, widths, strict=True) if k}
            legal = self._cost.pairs(index).copy()
            for s in NARROWING if leads is not None else ():
                assert leads is not None
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
        return Options(free, *(np.concatenate(column) for column in zip(*parts, strict=True)))

    def useful(self, index: int, around: Mapping[str, int], scores: Table, limit: float) -> Options:
        """Options that an optimum may hold: of a score up to the limit, none in their group as good and as cheap."""
        options = self.all(index, around)
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
