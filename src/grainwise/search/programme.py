"""The additive problem as an integer programme: an entry a layer, least summed scores, budgets that layers share.

Letters: L layers, S structures, P precisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from grainwise.plan.choices import Entry, entry_of
from grainwise.plan.prices import COSTS, SIZE, Cost
from grainwise.plan.projection import BLOCK_STUDENTS, Projection
from grainwise.search.draft import Draft
from grainwise.search.local import reduced, reductions, uniform
from grainwise.search.milp import Rows, minimise
from grainwise.search.options import Options, OptionTables
from grainwise.search.prior import Prior, Table, fill, finite_scores, score_of
from grainwise.study.sensitivity import Sensitivity

_ROUNDS = 6
_STARTS = 2  # of the greedy solution, once it is known which are good


def solved_prior(programme: Programme, sensitivity: Sensitivity | None, temperature: float = 0.5) -> Prior:
    """The prior of measured scores, around the programme's solution where that is the better one."""
    projection = programme.projection
    known = None if sensitivity is None else programme.solve(finite_scores(projection, sensitivity))
    return Prior(projection, sensitivity, temperature, known=known)


class Programme:
    """Chooses entries of least summed scores within the budgets of a projection.

    A column is a layer's entry *at* the widths that the couplings around it have, so that what a cut saves in the
    layers that read or write its channels is exact; rows tie those widths to the entries of the couplings' leaders.
    Parts of a file that several entries need are columns too. Couplings that are pinned (`OptionTables`) keep the width
    that they have in the greedy solution. What is not linear is
    left out, checked with the cost model, and corrected by tightening the budgets until they hold: conversions between
    kernels (`Shared.boundary`) and tensors that two couplings cut.
    """

    def __init__(self, projection: Projection) -> None:
        self.projection = projection
        self._cost = projection.cost
        self._finite = np.flatnonzero(np.isfinite(projection.budget))
        self._tables = OptionTables(projection)
        self._starts = uniform(projection)

    def solve(self, scores: Table, start: Mapping[str, Entry] | None = None) -> dict[str, Entry]:
        """The profile of least summed scores (`[L, S, P]`, >= 0) that is found within the budgets, slack filled; never
        worse than `start`, a profile within the budgets, by default the greedy one.
        """
        start = dict(start) if start is not None else self._greedy(scores)
        limit = score_of(Draft(self._cost, start), scores)
        around, offset = self._cost.widths(start), np.zeros(len(COSTS))
        for _ in range(_ROUNDS):
            found = self._solve(scores, limit, around, self.projection.budget - offset)
            if found is None:
                break
            draft = Draft(self._cost, found[0])
            if (draft.total <= self.projection.budget).all():
                fill(draft, scores, self.projection.budget)
                return draft.entries() if score_of(draft, scores) <= limit else start
            offset = np.maximum(offset, draft.total - found[1])
        return start

    def _greedy(self, scores: Table) -> dict[str, Entry]:
        """Scores that follow the first ones are thought to be like them: what was not among the best `_STARTS` starts
        then is not tried again.
        """
        found = reductions(self.projection, scores, self._starts)
        if len(self._starts) > _STARTS:
            self._starts = [start for start, _ in found[:_STARTS]]
        return found[0][1] if found else reduced(self.projection, scores)

    def _solve(
        self, scores: Table, limit: float, around: Mapping[str, int], budget: Cost
    ) -> tuple[dict[str, Entry], Cost] | None:
        """Entries and their modelled cost, or None when there is no solution."""
        names = [layer.name for layer in self.projection.space.layers]
        options = [self._tables.useful(index, around, scores, limit) for index in range(len(names))]
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
        self._pay_for_parts(rows, options, columns)
        base = self._cost.fixed({})
        for k in self._finite:
            unit = self.projection.budget[k]
            rows.add(np.arange(len(objective)), costs[:, k] / unit, -np.inf, (budget[k] - base[k]) / unit)
        taken = minimise(objective, rows, limit)
        if taken is None:
            return None
        chosen = np.searchsorted(first, taken[taken < first[-1]], side="right") - 1
        numbers = [options[i].numbers[column - first[i]] for i, column in zip(chosen, taken, strict=False)]
        entries = {name: entry_of(int(s), int(p)) for name, (s, p) in zip(names, numbers, strict=True)}
        return entries, base + costs[taken].sum(axis=0)

    def _tie_widths(self, rows: Rows, options: list[Options], columns: list[NDArray[np.intp]]) -> None:
        """A layer's option at a width is taken only with an entry of the coupling's leader that gives this width."""
        for index, found in enumerate(options):
            for position, coupling in enumerate(found.couplings):
                leader = self.projection.numbers[coupling]
                if leader == index:
                    continue
                decided = options[leader].widths[:, options[leader].couplings.index(coupling)]
                for width in range(len(self._tables.units[coupling])):
                    mine = columns[index][found.widths[:, position] == width]
                    theirs = columns[leader][decided == width]
                    signs = np.repeat([1.0, -1.0], [len(mine), len(theirs)])
                    rows.add(np.concatenate([mine, theirs]), signs, 0.0, 0.0)

    def _keep_students_plain(self, rows: Rows, options: list[Options], columns: list[NDArray[np.intp]]) -> None:
        """Layers of a block that is distilled take no structure of their own."""
        for block in self.projection.space.graph.blocks:
            leader = self.projection.numbers[block.coupling]
            student = columns[leader][np.isin(options[leader].numbers[:, 0], BLOCK_STUDENTS)]
            for index in (self.projection.numbers[name] for name in block.layers):
                own = columns[index][options[index].numbers[:, 0] != 0]
                if index != leader and len(student) and len(own):
                    rows.add(np.concatenate([student, own]), 1.0, -np.inf, 1.0)

    def _pay_for_parts(self, rows: Rows, options: list[Options], columns: list[NDArray[np.intp]]) -> None:
        """An option is taken only with the parts of the file that it needs; their columns follow the layers' ones."""
        shared, first = self._cost.prices.shared, sum(map(len, columns))
        if shared is None:
            return
        for index, found in enumerate(options):
            needs = found.of(shared.parts[index])
            for part in np.flatnonzero(needs.any(axis=0)):
                mine = columns[index][needs[:, part]]
                rows.add(np.append(mine, first + part), np.append(np.ones(len(mine)), -1.0), -np.inf, 0.0)
