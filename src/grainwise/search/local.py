"""Changing a whole profile by single entries: reduce it until the budgets hold, and exchange entries around it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from grainwise.plan.choices import PRECISIONS, Entry
from grainwise.plan.prices import COSTS
from grainwise.plan.projection import Projection
from grainwise.search.draft import Draft
from grainwise.search.prior import Table, cheapest, fill, rises, score_of

Profile = dict[str, Entry]
_FREE = 1e-9  # nats: changes that cost less than this are as good as free


def reduce(draft: Draft, scores: Table, projection: Projection, keep: Collection[int] = ()) -> bool:
    """Take, again and again, the one change that saves most cost per score, until every budget holds.

    Cost is the sum of what exceeds the budgets, each in units of its budget; more is not saved by going below one.
    scores: `[L, S, P]`. keep: layers that stay as they are. False when the budgets are still exceeded and no single
    change saves any more. Changes `draft` in place.
    """
    budget = projection.budget
    weight = np.where(np.isfinite(budget), projection.weight, 0.0)
    excess = np.where(np.isfinite(budget), draft.total - budget, 0.0)
    while (excess > 0).any():
        changes = draft.changes()
        legal = np.isfinite(changes[..., 0])
        legal[list(keep)] = False
        after = np.maximum(0.0, excess + np.where(legal[..., None], changes, 0.0))
        saved = np.where(legal, (np.maximum(0.0, excess) - after) @ weight, 0.0)
        value = np.where(saved > 1e-12, saved / np.maximum(_FREE, rises(draft, scores)), 0.0)
        number = int(value.argmax())
        if value.flat[number] <= 0:
            return False
        draft.replace(*(int(i) for i in np.unravel_index(number, value.shape)))
        excess = np.where(np.isfinite(budget), draft.total - budget, 0.0)
    return True


def reduced(projection: Projection, scores: Table) -> dict[str, Entry]:
    """The greedy solution: the best of `reductions` of all `uniform` profiles, or the cheapest profile where they all
    end in corners above a budget.
    """
    if found := reductions(projection, scores, uniform(projection)):
        return found[0][1]
    draft = Draft(projection.cost, cheapest(projection))
    fill(draft, scores, projection.budget)
    return draft.entries()


def reductions(projection: Projection, scores: Table, starts: Sequence[Profile]) -> list[tuple[Profile, Profile]]:
    """(start, what it gives): starts that can be reduced to the budgets, slack then filled, best score first."""
    found = []
    for start in starts:
        draft = Draft(projection.cost, start)
        if reduce(draft, scores, projection):
            fill(draft, scores, projection.budget)
            found.append((score_of(draft, scores), start, draft.entries()))
    return [(start, entries) for _, start, entries in sorted(found, key=lambda one: one[0])]


def uniform(projection: Projection) -> list[Profile]:
    """No compression, then each precision in all layers that may take it.

    What a conversion between kernels costs is only saved once both of its neighbours have changed: single changes from
    one end alone never find the other.
    """
    space = projection.space
    return [
        {
            layer.name: Entry(precision=precision)
            for index, layer in enumerate(space.layers)
            if space.precisions[index, number]
        }
        for number, precision in enumerate(PRECISIONS)
    ]


def exchange(
    projection: Projection,
    entries: Mapping[str, Entry],
    scores: Table,
    rng: np.random.Generator,
    temperature: float = 1.0,
) -> dict[str, Entry] | None:
    """A neighbour of a profile: one layer takes another entry, others pay for it, and what is left over is spent.

    The layer is drawn uniformly and its entry by rank, with weight rank ** (-2 / temperature): entries rank by how much
    the score rises for what they save, as in the Lagrangian at the price that the profile itself pays for its last
    byte. None when the budgets cannot be met around the change.
    """
    draft = Draft(projection.cost, entries)
    index = int(rng.integers(len(draft.layers)))
    changes = draft.changes()[index]
    legal = np.isfinite(changes[..., 0])
    legal[draft.numbers[index]] = False
    numbers = np.flatnonzero(legal)
    if not len(numbers):
        return None
    costs = changes.reshape(-1, len(COSTS))[numbers] @ np.where(np.isfinite(projection.budget), projection.weight, 0.0)
    value = rises(draft, scores)[index].ravel()[numbers] + _price(draft, scores, projection) * costs
    chances = np.arange(1, len(numbers) + 1, dtype=np.float64) ** (-2 / temperature)
    drawn = int(numbers[np.argsort(value, kind="stable")][rng.choice(len(numbers), p=chances / chances.sum())])
    draft.replace(index, *divmod(drawn, len(PRECISIONS)))
    if not reduce(draft, scores, projection, keep={index}):
        return None
    fill(draft, scores, projection.budget, keep={index})
    return draft.entries()


def _price(draft: Draft, scores: Table, projection: Projection) -> float:
    """Score per (relative) cost at which the profile trades: its mean over the layers."""
    full = projection.cost.total({})
    finite = np.isfinite(projection.budget)
    saved = float(((full - draft.total)[finite] * projection.weight[finite]).sum())
    return score_of(draft, scores) / max(saved, 1e-9)
