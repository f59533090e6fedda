"""Sampling profiles: many walks in step, with or without budget projection, slack filled, nothing tried twice.

Letters: N walks, L layers, S structures, P precisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grainwise.plan.choices import PRECISIONS, UNCOMPRESSED, Entry, entry_of, numbers_of
from grainwise.plan.projection import Projection, Walk
from grainwise.search.draft import Draft
from grainwise.search.prior import fill

# (walks that stand at the same layer, [N, S, P] mask) -> [N, S, P] log-weights
Policy = Callable[[Sequence[Walk], NDArray[np.bool_]], NDArray[np.float64]]

# (how many, temperature) -> profiles
Draw = Callable[[int, float], list[dict[str, Entry]]]

Key = tuple[int, ...]
_TRIES = 4
_WARMER = 1.6  # temperature rise after a draw that gave only known profiles


@dataclass(frozen=True, slots=True)
class Guide:
    """A profile that a walk follows where it may, except at the layers of `released`, which are chosen anew."""

    entries: Mapping[str, Entry]
    released: frozenset[int]


def uniform(walks: Sequence[Walk], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The policy without an opinion."""
    return np.zeros(mask.shape)


def key_of(projection: Projection, entries: Mapping[str, Entry]) -> Key:
    """Flat entry number s * P + p of each layer: what makes two profiles the same."""
    numbers = (numbers_of(entries.get(layer.name, UNCOMPRESSED)) for layer in projection.space.layers)
    return tuple(s * len(PRECISIONS) + p for s, p in numbers)


def entries_of(projection: Projection, key: Sequence[int]) -> dict[str, Entry]:
    """Inverse of `key_of`."""
    names = (layer.name for layer in projection.space.layers)
    return {name: entry_of(*divmod(int(number), len(PRECISIONS))) for name, number in zip(names, key, strict=True)}


def sample(
    projection: Projection,
    count: int,
    policy: Policy,
    rng: np.random.Generator,
    *,
    guides: Sequence[Guide | None] | None = None,
    projected: bool = True,
    temperature: float = 1.0,
) -> list[dict[str, Entry]]:
    """`count` profiles, each entry drawn from softmax(policy / temperature) over what the walk allows.

    guides: for each walk a profile to follow, or None. projected: without it only legality is respected, so that the
    profiles may exceed the budgets.
    """
    walks = [Walk(projection) for _ in range(count)]
    for index in range(len(projection.space.layers)):
        mask = np.stack([walk.allowed() if projected else walk.legal() for walk in walks])
        weights = policy(walks, mask) / temperature
        keys = np.where(mask, weights + rng.gumbel(size=mask.shape), -np.inf).reshape(count, -1)  # Gumbel-max
        drawn = keys.argmax(axis=1)
        for number, walk in enumerate(walks):
            guide = guides[number] if guides else None
            entry = entry_of(*divmod(int(drawn[number]), len(PRECISIONS)))
            if guide is not None and index not in guide.released:
                followed = guide.entries.get(projection.space.layers[index].name, UNCOMPRESSED)
                entry = followed if mask[number][numbers_of(followed)] else entry
            walk.take(entry)
    return [walk.entries for walk in walks]


def filled(
    projection: Projection,
    profiles: Sequence[Mapping[str, Entry]],
    scores: NDArray[np.float64] | None,
    guides: Sequence[Guide | None] | None = None,
) -> list[dict[str, Entry]]:
    """The profiles with their slack spent where `scores` (`[L, S, P]`) gain most; as they are without scores.

    Layers that a guide released keep their entry: filling would undo what was to be tried.
    """
    if scores is None:
        return [dict(profile) for profile in profiles]
    done = []
    for number, profile in enumerate(profiles):
        draft = Draft(projection.cost, profile)
        guide = guides[number] if guides else None
        fill(draft, scores, projection.budget, guide.released if guide else ())
        done.append(draft.entries())
    return done


def distinct(
    projection: Projection,
    count: int,
    draw: Draw,
    seen: set[Key],
    rng: np.random.Generator,
    *,
    projected: bool = True,
) -> list[dict[str, Entry]]:
    """`count` profiles of `draw` that are not in `seen` nor among themselves; their keys are added to `seen`.

    What is known already is drawn again, each time warmer, and at last mutated uniformly; when nothing new comes of
    that (a tiny space) it is accepted.
    """
    if count < 1:
        return []
    new: list[dict[str, Entry]] = []
    spare: list[dict[str, Entry]] = []

    def mutated() -> list[dict[str, Entry]]:
        layers = len(projection.space.layers)
        some = [frozenset(rng.choice(layers, min(4, layers), replace=False).tolist()) for _ in range(count - len(new))]
        guides = [Guide(spare[i], released) for i, released in enumerate(some)]
        return sample(projection, len(guides), uniform, rng, guides=guides, projected=projected)

    temperature = 1.0
    for attempt in range(2 * _TRIES):
        for profile in draw(count - len(new), temperature) if attempt < _TRIES else mutated():
            key = key_of(projection, profile)
            if key in seen:
                spare.append(profile)
            else:
                seen.add(key)
                new.append(profile)
        if len(new) >= count:
            return new
        temperature *= _WARMER
    return new + spare[: count - len(new)]
