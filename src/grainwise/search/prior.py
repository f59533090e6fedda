"""What sensitivity scores say before anything is tried: log-weights for the entries of a walk, aimed at the budgets."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from grainwise.plan.choices import PRECISIONS, STRUCTURES, Entry, entry_of, numbers_of
from grainwise.plan.prices import COSTS, Cost
from grainwise.plan.projection import BLOCK_STUDENTS, Projection, Walk
from grainwise.search.draft import Draft
from grainwise.study.sensitivity import Sensitivity

_FACTORS = np.geomspace(1 / 64, 64, 49)  # of the multiplier, tried at every step of a walk
_ROUNDS, _HALVINGS = 3, 14

Table = NDArray[np.float64]


class Prior:
    """Log-weights -(score + multiplier * cost) / temperature over the entries of each layer.

    The multipliers, one for each budget, make the additive (Lagrangian) solution meet the budgets: Everett 1963, and
    HAWQ-V2 / SPDY for compression. The cost of an entry is what it changes in the whole solution, so narrowing is
    credited with what it saves in the layers that read the channels. Along a walk the multipliers are scaled such that
    what the remaining layers are expected to cost fits what is left.

    temperature: in units of the additive solution's score per layer. sensitivity None: all weights are equal.
    known: a profile within the budgets that the solution must not be worse than.
    """

    def __init__(
        self,
        projection: Projection,
        sensitivity: Sensitivity | None,
        temperature: float = 0.5,
        known: Mapping[str, Entry] | None = None,
    ) -> None:
        self.projection = projection
        self.sensitivity = sensitivity
        self._layers = len(projection.space.layers)
        self._best: tuple[float, dict[str, Entry]] | None = None
        if sensitivity is None:
            return
        self.scores = finite_scores(projection, sensitivity)
        self._solve(Draft(projection.cost, known or cheapest(projection)))
        self.set_temperature(temperature)

    def set_temperature(self, temperature: float) -> None:
        """Change how far from the additive solution the weights let a walk go."""
        if temperature <= 0:
            raise ValueError(f"the temperature of a prior must be above 0, got {temperature}")
        if self.sensitivity is not None:
            self.temperature = temperature
            self._expect()

    def learn(self, sensitivity: Sensitivity) -> None:
        """Take better scores; the multipliers stay, a walk scales them to its budget anyway."""
        self.scores = finite_scores(self.projection, sensitivity)
        self._expect()

    def improved(self, start: Draft, scores: Table | None = None) -> dict[str, Entry]:
        """The Lagrangian solution of some scores (the current ones) that coordinate descent reaches from a profile, its
        slack filled; when that exceeds a budget, the given profile with its slack filled.
        """
        scores = self.scores if scores is None else scores
        draft = start.copy()
        for factor in _FACTORS[len(_FACTORS) // 2 :: 4]:
            self._descend(draft, self.multipliers * self._unit * factor, scores)
            if (draft.total <= self.projection.budget).all():
                break
        else:
            draft = start.copy()
        fill(draft, scores, self.projection.budget)
        return draft.entries()

    def batch_log_weights(self, factors: Table) -> Table:
        """`[.., L, S, P]` log-weights under the current scores, for multiplier factors `[.., L]` of earlier walks."""
        if self.sensitivity is None:
            return np.zeros((*factors.shape, len(STRUCTURES), len(PRECISIONS)))
        value = -(self.scores + factors[..., None, None] * self._priced) / self._tau
        floored: Table = np.maximum(value - value.max(axis=(-2, -1), keepdims=True), -60.0)
        return floored

    def _solve(self, draft: Draft) -> None:
        """Coordinate bisection on the multipliers; each solution is the Lagrangian one by coordinate descent from a
        draft within the budgets.
        """
        shared = self.projection
        self._remember(draft)
        multipliers = np.zeros(len(COSTS))
        tried: set[tuple[tuple[int, int], ...]] = set()
        unit = self.scores[np.isfinite(self.scores)].max()
        finite = np.flatnonzero(np.isfinite(shared.budget)).tolist()
        for _ in range(_ROUNDS if len(finite) > 1 else 1):
            for k in finite:
                low, high = 1e-9, 1e3
                for _ in range(_HALVINGS):
                    multipliers[k] = unit * np.sqrt(low * high) / shared.budget[k]
                    self._descend(draft, multipliers, self.scores)
                    low, high = (
                        (low, np.sqrt(low * high)) if self._fits(draft, k, tried) else (np.sqrt(low * high), high)
                    )
                multipliers[k] = unit * high / shared.budget[k]
        self._descend(draft, multipliers, self.scores)
        assert self._best is not None
        self.multipliers: Cost = np.maximum(multipliers, 0.0)
        solved = Draft(shared.cost, self._best[1])
        self._reference = solved
        self._margins = solved.changes()  # [L, S, P, 3]
        self._moves = np.where(np.isfinite(self._margins), self._margins, 0.0)
        self._first = max(self._best[0], 1e-9)
        self._scale = self._first / self._layers

    def _fits(self, draft: Draft, k: int, tried: set[tuple[tuple[int, int], ...]]) -> bool:
        """True when budget k holds; a solution that meets all budgets is filled and remembered, once."""
        numbers = tuple(draft.numbers)
        if (draft.total <= self.projection.budget).all() and numbers not in tried:
            tried.add(numbers)
            filled = draft.copy()
            fill(filled, self.scores, self.projection.budget)
            self._remember(filled)
        return bool(draft.total[k] <= self.projection.budget[k])

    def _remember(self, draft: Draft) -> None:
        score = score_of(draft, self.scores)
        if self._best is None or score < self._best[0]:
            self._best = score, draft.entries()

    def _descend(self, draft: Draft, multipliers: Cost, scores: Table, sweeps: int = 4) -> None:
        """Coordinate descent: one layer after the other takes its best entry."""
        for _ in range(sweeps):
            first, moved = 0, False
            while (found := _first_better(draft, multipliers, scores, first)) is not None:
                draft.replace(*found)
                first, moved = found[0] + 1, True
            if not moved:
                return

    def _expect(self) -> None:
        """Expected change of cost against the solution of layers l.., for each factor of the multipliers."""
        margins = self._moves
        now = score_of(self._reference, self.scores)
        self._unit = now / max(self._first, 1e-12)  # multipliers are in score per cost: they grow with the scores
        self._tau = self.temperature * self._scale * self._unit
        priced = margins @ self.multipliers * self._unit  # [L, S, P]
        legal = np.isfinite(self._margins[..., 0])
        value = -(self.scores + _FACTORS[:, None, None, None] * priced) / self._tau
        value = np.where(legal, value, -np.inf)
        weights = np.exp(value - value.max(axis=(2, 3), keepdims=True))
        weights /= weights.sum(axis=(2, 3), keepdims=True)
        cost = np.einsum("flsp,lspk->flk", weights, margins)
        self._priced = priced
        self._ahead = np.flip(np.cumsum(np.flip(cost, axis=1), axis=1), axis=1)  # [factors, L, 3]
        self._left = self.projection.budget - self._reference.total

    def factor(self, walk: Walk) -> float:
        """Scale of the multipliers at the walk's step: above 1 when what was chosen so far spent more than planned."""
        if self.sensitivity is None:
            return 1.0
        chosen = [(index, *numbers_of(entry)) for index, entry in enumerate(walk.entries.values())]
        layers, s, p = np.array(chosen, dtype=np.intp).reshape(-1, 3).T
        spent = self._moves[layers, s, p].sum(axis=0)
        over = ((spent + self._ahead[:, walk.step] - self._left) * self.projection.weight).max(axis=1)
        fitting = np.flatnonzero(over <= 0)
        return float(_FACTORS[fitting[0]] if len(fitting) else _FACTORS[-1])

    def log_weights(self, walk: Walk, factor: float | None = None) -> Table:
        """`[S, P]` finite log-weights of the entries of the walk's current layer, legal or not.

        factor: what `factor(walk)` gave, when it is known already.
        """
        if self.sensitivity is None:
            return np.zeros((len(STRUCTURES), len(PRECISIONS)))
        scale = self.factor(walk) if factor is None else factor
        value: Table = -(self.scores[walk.step] + scale * self._priced[walk.step]) / self._tau
        floored: Table = np.maximum(value - value.max(), -60.0)
        return floored

    def solution(self) -> dict[str, Entry]:
        """The additive solution with its slack filled; without scores the cheapest completion."""
        return cheapest(self.projection) if self._best is None else dict(self._best[1])


def finite_scores(projection: Projection, sensitivity: Sensitivity) -> Table:
    """`[L, S, P]` scores; entries that are legal but have no finite score count as worse than all others."""
    scores = np.stack([sensitivity.pairs(index) for index in range(len(projection.space.layers))])
    finite = scores[np.isfinite(scores)]
    return np.where(np.isfinite(scores), scores, 10 * finite.max() + 1.0)


def score_of(draft: Draft, scores: Table) -> float:
    """Sum of the scores of a profile's entries. scores: `[L, S, P]`."""
    return float(sum(scores[index, s, p] for index, (s, p) in enumerate(draft.numbers)))


def rises(draft: Draft, scores: Table) -> Table:
    """`[L, S, P]` how much the profile's score rises when a layer takes the entry instead, legal or not."""
    now = scores[np.arange(len(scores)), *np.array(draft.numbers).T]
    rise: Table = scores - now[:, None, None]
    for index, stripped in draft.stripped().items():  # the structures that a block student replaces
        rise[index, BLOCK_STUDENTS] -= sum(now[i] - scores[i, 0, draft.numbers[i][1]] for i in stripped)
    return rise


def _first_better(draft: Draft, multipliers: Cost, scores: Table, first: int) -> tuple[int, int, int] | None:
    """The first layer from `first` on that another entry suits better, at these prices, and its best one."""
    changes = draft.changes()
    legal = np.isfinite(changes[..., 0])
    value = rises(draft, scores) + np.where(legal[..., None], changes, 0.0) @ multipliers
    value = np.where(legal, value, np.inf).reshape(len(draft.layers), -1)
    best = value.argmin(axis=1)
    better = np.flatnonzero(value[np.arange(len(best)), best] < -1e-12)
    better = better[better >= first]
    return (int(better[0]), *divmod(int(best[better[0]]), len(PRECISIONS))) if len(better) else None


def cheapest(projection: Projection) -> dict[str, Entry]:
    """A profile that meets the budgets: at every layer the allowed entry of the lowest weighted cost."""
    walk = Walk(projection)
    while not walk.done:
        allowed, (_, costs) = walk.allowed(), walk.costs()
        value = np.where(allowed, (np.where(allowed[..., None], costs, 0.0) * projection.weight).sum(axis=2), np.inf)
        s, p = np.unravel_index(np.argmin(value), value.shape)
        walk.take(entry_of(int(s), int(p)))
    return walk.entries


def fill(draft: Draft, scores: Table, budget: Cost, keep: Collection[int] = ()) -> None:
    """Spend the slack: again and again the revision that lowers the score most per cost, while the budgets hold.

    scores: `[L, S, P]`. keep: layers that stay as they are. A revision that saves cost and score at once comes first.
    Changes `draft` in place.
    """
    weight = np.where(np.isfinite(budget), 1 / np.where(np.isfinite(budget), budget, 1.0), 0.0)
    for _ in range(4 * len(draft.layers)):
        changes = draft.changes()
        gain = -rises(draft, scores)
        gain[list(keep)] = 0.0
        fits = (gain > 1e-12) & np.isfinite(changes[..., 0]) & (changes <= budget - draft.total).all(axis=-1)
        numbers = np.flatnonzero(fits)
        if not len(numbers):
            return
        value = gain.ravel()[numbers] / np.maximum(changes.reshape(-1, len(COSTS))[numbers] @ weight, 1e-6)
        draft.replace(*(int(i) for i in np.unravel_index(numbers[value.argmax()], fits.shape)))
