"""Quantisation of any stage: searched float16 scales, error-compensated rounding, then descent on codes and scales.

Letters: R x C the weight matrix, S scales, P weights that share one (short groups are padded).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grainwise.methods.problem import LayerProblem, StageProblem, by_group, damped, energy, times_hessian
from grainwise.methods.solve import Column, descend, sweep
from grainwise.methods.storage import CENTRE, spread_scales, storable
from grainwise.plan.choices import Choice, Granularity
from grainwise.plan.layers import Geometry
from grainwise.plan.shapes import group_size
from grainwise.plan.target import WIDEST

COARSE = tuple(0.1 * 1.1**i for i in range(25))  # shares of the range that the largest code may reach, 0.1 to 0.98
FINE = (0.95, 1.0, 1.02, 1.05)
ROUNDS = 3  # of re-fitted scales; later rounds gain less than 1 %


@dataclass(frozen=True, slots=True)
class Quantised:
    """codes: uint8 `[R, C]` (of pruned weights meaningless). scale: float16 `[S]`, as `spread_scales` reads it."""

    codes: Tensor
    scale: Tensor


def sharing_rows(matrix: Tensor, geometry: Geometry, granularity: Granularity) -> Tensor:
    """`[R, C]` as `[S, P]`: one row for each scale; the end of a short group is padded with zeros."""
    match granularity:
        case Granularity.LAYER:
            return matrix.reshape(1, -1)
        case Granularity.CHANNEL:
            return matrix
        case Granularity.BLOCK:
            size = group_size(geometry.columns)
            return F.pad(matrix, (0, -geometry.columns % size)).reshape(-1, size)


def to_codes(values: Tensor, scale: Tensor, bits: int, reach: float | None = None) -> Tensor:
    """Nearest codes (as float) of values; `scale` broadcasts. reach: largest distance from the code of zero."""
    most = WIDEST[bits] if reach is None else reach
    return (values / scale + CENTRE[bits]).round_().clamp_(CENTRE[bits] - most, CENTRE[bits] + most)


def search_scale(rows: Tensor, importance: Tensor, bits: int, reach: float | None = None) -> Tensor:
    """float32 (float16-exact) `[S]`: for each row of `[S, P]` the scale of least importance-weighted rounding error.

    importance: `[S, P]`, zero for weights that do not count. A grid search, as `mse` range setting in OBC (2022).
    """
    peak = torch.where(importance > 0, rows.abs(), 0.0).amax(1) / (WIDEST[bits] if reach is None else reach)

    def error(scale: Tensor) -> Tensor:
        wide = scale[:, None]
        back = (to_codes(rows, wide, bits, reach) - CENTRE[bits]) * wide
        return ((back - rows).square_() * importance).sum(1)

    best = storable(peak)
    least = error(best)
    for shares in (COARSE, FINE):
        centre = peak if shares is COARSE else best
        for share in shares:
            candidate = storable(centre * share)
            found = error(candidate)
            best, least = torch.where(found < least, candidate, best), torch.minimum(found, least)
    return best


def refit_scale(problem: LayerProblem, levels: Tensor, granularity: Granularity) -> Tensor:
    """float32 (float16-exact) `[S]`: best scales of given levels `[R, C]` (codes − centre, zero where pruned).

    The normal equations of min tr((W − s∘Q) H (W − s∘Q)ᵀ) in the scales: one number for a tensor or row, one small
    system a row for groups.
    """
    h = damped(problem.hessian)
    rows, columns = levels.shape
    size = group_size(columns) if granularity is Granularity.BLOCK else columns
    parts = [slice(at, min(at + size, columns)) for at in range(0, columns, size)]
    target = times_hessian(problem.matrix, h) * levels
    right = torch.stack([target[:, p].sum(1) for p in parts], 1)
    left = torch.empty(rows, len(parts), len(parts))
    grouped = by_group(levels, h.shape[0])
    for a, part in enumerate(parts):
        image = torch.bmm(grouped[..., part], h[:, part]).reshape(rows, columns) * levels
        left[:, a] = torch.stack([image[:, p].sum(1) for p in parts], 1)
    if granularity is Granularity.LAYER:
        return storable((right.sum() / left.sum().clamp_min(torch.finfo(torch.float32).tiny)).reshape(1))
    ridge = 1e-6 * left.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-30)
    left += torch.diag_embed(ridge[:, None].expand(-1, len(parts)))
    return storable(torch.linalg.solve(left, right).reshape(-1))


def quantize(stage: StageProblem, choice: Choice, reach: float | None = None) -> Quantised:
    """Codes and scales of a stage at `choice.level` bits; weights outside of the support stay zero.

    reach: largest distance of a code from that of zero, by default all that the bits hold.

    The error that rounding and pruning leave is compensated in the weights still to come (`sweep`), then codes and
    scales are improved in turn as long as the error under the damped H falls.
    """
    assert choice.granularity is not None and choice.level is not None
    problem, g, bits, granularity = stage.problem, stage.problem.geometry, int(choice.level), choice.granularity
    keep = torch.ones_like(problem.matrix) if stage.support is None else stage.support.to(problem.matrix.dtype)
    importance = problem.curvature() * keep
    scale = search_scale(
        sharing_rows(problem.matrix, g, granularity), sharing_rows(importance, g, granularity), bits, reach
    )
    if problem.hessian.dim() < 3:  # H is diagonal: nothing can be compensated
        return _coded(problem.matrix, scale, g, granularity, bits, reach)

    def rounder(scale: Tensor) -> _ColumnRounder:
        wide = spread_scales(scale, g, granularity).T.contiguous()
        return _ColumnRounder(wide.numpy(), (wide * keep.T).numpy(), bits, reach or WIDEST[bits])

    def cost(values: Tensor) -> float:
        return energy(problem.matrix - values, h)

    h = damped(problem.hessian)
    values = sweep(problem.matrix, problem.hessian, rounder(scale))
    values = descend(problem.matrix, values, problem.hessian, rounder(scale))
    least = cost(values)
    for _ in range(ROUNDS if bits < 8 else 0):
        levels = (_codes(values, scale, g, granularity, bits, reach) - CENTRE[bits]) * keep
        new_scale = refit_scale(problem, levels, granularity)
        start = levels * spread_scales(new_scale, g, granularity)
        new_values = descend(problem.matrix, start, problem.hessian, rounder(new_scale))
        if not cost(new_values) < least:
            break
        scale, values, least = new_scale, new_values, cost(new_values)
    return _coded(values, scale, g, granularity, bits, reach)


def _codes(
    values: Tensor, scale: Tensor, g: Geometry, granularity: Granularity, bits: int, reach: float | None
) -> Tensor:
    return to_codes(values, spread_scales(scale, g, granularity), bits, reach)


def _coded(
    values: Tensor, scale: Tensor, g: Geometry, granularity: Granularity, bits: int, reach: float | None
) -> Quantised:
    return Quantised(_codes(values, scale, g, granularity, bits, reach).to(torch.uint8), scale.half())


@dataclass(frozen=True, slots=True)
class _ColumnRounder:
    """Rounds column j `[R]` to the grid of its scales. scale: `[C, R]`; kept_scale: the same, zero where pruned."""

    scale: Column
    kept_scale: Column
    bits: int
    reach: float

    def __call__(self, j: int, column: Column) -> Column:
        centre = np.float32(CENTRE[self.bits])
        codes = np.rint(column / self.scale[j] + centre)
        codes = np.minimum(np.maximum(codes, centre - self.reach), centre + self.reach)
        rounded: Column = (codes - centre) * self.kept_scale[j]
        return rounded
