"""What measurements teach about sensitivity scores: Bayesian regression of divergence on the entries of the profiles.

Letters: T trials, L layers, S structures, P precisions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from grainwise.plan.choices import PRECISIONS
from grainwise.study.sensitivity import Sensitivity

# Relative standard deviations of a score's error: its own, its layer's in common, and that of all scores together.
_OWN, _LAYER, _ALL = 0.8, 0.4, 1.0
_NOISE = 0.1  # of a divergence, relative: what the additive model cannot express
_FLOOR = 0.1  # a score is never believed to be below this share of its first estimate


def posterior(prior: Sensitivity, keys: Sequence[Sequence[int]], divergences: Sequence[float]) -> Sensitivity:
    """The scores after T trials: the posterior mean of Gaussian-process regression with a linear kernel (Rasmussen &
    Williams 2006, eq. 2.25), every score multiplied by one plus the errors found.

    keys: `[T, L]` flat entry numbers s * P + p. divergences: `[T]`, in nats.
    """
    if not keys:
        return prior
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
    noise = (_NOISE * np.maximum(y, 1e-6)) ** 2
    alpha = np.linalg.solve(kernel + np.diag(noise + 1e-12), y - total)
    shared = 1 + _ALL**2 * total @ alpha + _LAYER**2 * layer.T @ alpha  # [L]
    return Sensitivity(
        _corrected(prior.structures, shared, np.einsum("tla,t->la", own_s, alpha)),
        _corrected(prior.precisions, shared, np.einsum("tla,t->la", own_p, alpha)),
    )


def _one_hot(numbers: NDArray[np.int64], values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    table = np.zeros((*numbers.shape, count))
    np.put_along_axis(table, numbers[..., None], values[..., None], axis=-1)
    return table


def _corrected(
    scores: NDArray[np.float64], shared: NDArray[np.float64], own: NDArray[np.float64]
) -> NDArray[np.float64]:
    factors: NDArray[np.float64] = np.maximum(_FLOOR, shared[:, None] + _OWN**2 * own)
    return np.where(np.isfinite(scores), np.where(np.isfinite(scores), scores, 0.0) * factors, np.inf)
