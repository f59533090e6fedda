"""What measurements teach about sensitivity scores: Bayesian regression of divergence on the entries of the profiles.

Letters: T trials, L layers, S structures, P precisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grainwise.plan.choices import PRECISIONS
from grainwise.study.sensitivity import Sensitivity

# Relative standard deviations of a score's error: its own, its layer's in common, and that of all scores together.
_OWN, _LAYER, _ALL = 0.8, 0.4, 1.0
_NOISE = 0.1  # of a divergence, relative: what the additive model cannot express
_FLOOR = 0.1  # a score is never believed to be below this share of its first estimate


@dataclass(frozen=True, slots=True)
class _Errors:
    """Relative errors of the scores: of all `[]`, of each layer `[L]`, of each choice `[L, S]` and `[L, P]`."""

    all: float
    layers: NDArray[np.float64]
    structures: NDArray[np.float64]
    precisions: NDArray[np.float64]

    @staticmethod
    def none(prior: Sensitivity) -> _Errors:
        structures, precisions = np.zeros_like(prior.structures), np.zeros_like(prior.precisions)
        return _Errors(0.0, np.zeros(len(structures)), structures, precisions)

    @staticmethod
    def drawn(prior: Sensitivity, rng: np.random.Generator, spread: float) -> _Errors:
        own = (spread * _OWN * rng.normal(size=table.shape) for table in (prior.structures, prior.precisions))
        return _Errors(spread * _ALL * rng.normal(), spread * _LAYER * rng.normal(size=len(prior.structures)), *own)


def posterior(
    prior: Sensitivity,
    keys: Sequence[Sequence[int]],
    divergences: Sequence[float],
    rng: np.random.Generator | None = None,
    spread: float = 1.0,
) -> Sensitivity:
    """The scores after T trials: Gaussian-process regression with a linear kernel, every score multiplied by one plus
    the errors found. The posterior mean (Rasmussen & Williams 2006, eq. 2.25), or with `rng` a sample of the posterior:
    errors drawn from the prior, corrected by what they leave of the measurements (Matheron's rule; Wilson et al. 2020,
    eq. 9).

    keys: `[T, L]` flat entry numbers s * P + p. divergences: `[T]`, in nats. spread: factor of a sample's distance from
    the mean; 1 for the posterior itself.
    """
    guess = _Errors.none(prior) if rng is None else _Errors.drawn(prior, rng, spread)
    if not keys:
        shared = 1 + guess.all + guess.layers
        tables = (prior.structures, guess.structures), (prior.precisions, guess.precisions)
        return Sensitivity(*(_corrected(scores, shared, own) for scores, own in tables)) if rng else prior
    numbers, y = np.array(keys), np.array(divergences)
    s, p = np.divmod(numbers, len(PRECISIONS))
    layers = np.arange(numbers.shape[1])
    structure, precision = prior.structures[layers, s], prior.precisions[layers, p]  # [T, L]
    structure, precision = (np.where(np.isfinite(part), part, 0.0) for part in (structure, precision))
    layer = structure + precision
    total = layer.sum(axis=1)
    kernel = _ALL**2 * np.outer(total, total) + _LAYER**2 * layer @ layer.T
    own_s = _one_hot(s, structure, prior.structures.shape[1])  # [T, L, S]
    own_p = _one_hot(p, precision, prior.precisions.shape[1])
    for own in (own_s, own_p):
        flat = own.reshape(len(y), -1)
        kernel += _OWN**2 * flat @ flat.T
    noise = (_NOISE * np.maximum(y, 1e-6)) ** 2 + 1e-12
    guessed = total * (1 + guess.all) + layer @ guess.layers
    for own, errors in ((own_s, guess.structures), (own_p, guess.precisions)):
        guessed += np.einsum("tla,la->t", own, errors)
    if rng is not None:
        guessed += spread * np.sqrt(noise) * rng.normal(size=len(y))
    alpha = np.linalg.solve(kernel + np.diag(noise), y - guessed)
    shared = 1 + guess.all + guess.layers + _ALL**2 * total @ alpha + _LAYER**2 * layer.T @ alpha  # [L]
    return Sensitivity(
        _corrected(prior.structures, shared, guess.structures + _OWN**2 * np.einsum("tla,t->la", own_s, alpha)),
        _corrected(prior.precisions, shared, guess.precisions + _OWN**2 * np.einsum("tla,t->la", own_p, alpha)),
    )


def _one_hot(numbers: NDArray[np.int64], values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    table = np.zeros((*numbers.shape, count))
    np.put_along_axis(table, numbers[..., None], values[..., None], axis=-1)
    return table


def _corrected(
    scores: NDArray[np.float64], shared: NDArray[np.float64], own: NDArray[np.float64]
) -> NDArray[np.float64]:
    factors: NDArray[np.float64] = np.maximum(_FLOOR, shared[:, None] + own)
    return np.where(np.isfinite(scores), np.where(np.isfinite(scores), scores, 0.0) * factors, np.inf)
