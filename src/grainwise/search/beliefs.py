"""What measurements teach about sensitivity scores: Bayesian regression of divergence on the entries of the profiles.

Letters: T trials, L layers, S structures, P precisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lu_factor, lu_solve

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


class Beliefs:
    """The scores after T trials: Gaussian-process regression with a linear kernel (Rasmussen & Williams 2006, section
    2.2), every score multiplied by one plus the errors found.

    keys: `[T, L]` flat entry numbers s * P + p. divergences: `[T]`, in nats. What does not depend on a sample is
    computed once.
    """

    def __init__(self, prior: Sensitivity, keys: Sequence[Sequence[int]], divergences: Sequence[float]) -> None:
        self._prior = prior
        layers = np.arange(len(prior.structures))
        s, p = np.divmod(np.array(keys, dtype=np.int64).reshape(-1, len(layers)), len(PRECISIONS))
        self._y = np.array(divergences, dtype=np.float64)
        structure, precision = prior.structures[layers, s], prior.precisions[layers, p]  # [T, L]
        structure, precision = (np.where(np.isfinite(part), part, 0.0) for part in (structure, precision))
        self._layer = structure + precision
        self._total = self._layer.sum(axis=1)
        self._structures = _one_hot(s, structure, prior.structures.shape[1])  # [T, L * S]
        self._precisions = _one_hot(p, precision, prior.precisions.shape[1])
        kernel = _ALL**2 * np.outer(self._total, self._total) + _LAYER**2 * self._layer @ self._layer.T
        for own in (self._structures, self._precisions):
            kernel += _OWN**2 * own @ own.T
        noise = (_NOISE * np.maximum(self._y, 1e-6)) ** 2 + 1e-12
        self._deviation = np.sqrt(noise)
        self._factors = lu_factor(kernel + np.diag(noise)) if len(self._y) else None

    def mean(self) -> Sensitivity:
        """The posterior mean (eq. 2.25)."""
        return self._explained(_Errors.none(self._prior), np.zeros_like(self._y))

    def sample(self, rng: np.random.Generator, spread: float = 1.0) -> Sensitivity:
        """A sample of the posterior: errors drawn from the prior, corrected by what they leave of the measurements
        (Matheron's rule; Wilson et al. 2020, eq. 9). spread: factor of its distance from the mean.
        """
        drawn = _Errors.drawn(self._prior, rng, spread)
        return self._explained(drawn, spread * self._deviation * rng.normal(size=len(self._y)))

    def _explained(self, guess: _Errors, noise: NDArray[np.float64]) -> Sensitivity:
        """The scores with guessed errors, and with what these and the noise leave of the measurements explained."""
        guessed = self._total * (1 + guess.all) + self._layer @ guess.layers + noise
        guessed += self._structures @ guess.structures.ravel() + self._precisions @ guess.precisions.ravel()
        alpha = guessed if self._factors is None else lu_solve(self._factors, self._y - guessed)
        shared = 1 + guess.all + guess.layers + _ALL**2 * self._total @ alpha + _LAYER**2 * self._layer.T @ alpha
        found = []
        for scores, own, error in (
            (self._prior.structures, self._structures, guess.structures),
            (self._prior.precisions, self._precisions, guess.precisions),
        ):
            found.append(_corrected(scores, shared, error + _OWN**2 * (own.T @ alpha).reshape(scores.shape)))
        return Sensitivity(*found)


def _one_hot(numbers: NDArray[np.int64], values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """`[T, L * count]` with each value at its number."""
    table = np.zeros((*numbers.shape, count))
    np.put_along_axis(table, numbers[..., None], values[..., None], axis=-1)
    return table.reshape(len(numbers), numbers.shape[1] * count)


def _corrected(
    scores: NDArray[np.float64], shared: NDArray[np.float64], own: NDArray[np.float64]
) -> NDArray[np.float64]:
    factors: NDArray[np.float64] = np.maximum(_FLOOR, shared[:, None] + own)
    return np.where(np.isfinite(scores), np.where(np.isfinite(scores), scores, 0.0) * factors, np.inf)
