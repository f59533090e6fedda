"""Pruning by optimal-brain-surgeon saliency: single weights, tiles, and the score of whole input channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grainwise.methods.problem import LayerProblem, StageProblem, Structure, damped, energy, inverse
from grainwise.methods.solve import refit
from grainwise.plan.choices import Choice
from grainwise.plan.shapes import Stage, stages

ROUNDS = 4  # of ranking and re-fitting; one shot loses what the re-fit moves between correlated inputs
UNITS_AT_ONCE = 64


def prune_weights(problem: LayerProblem, choice: Choice) -> Structure:
    """`prune/layer`: all weights of the tensor compete in one ranking; exactly the plan's number is kept."""
    (stage,) = stages(problem.geometry, choice)

    def select(saliency: Tensor, share: float) -> Tensor:
        count = _kept(stage, saliency.numel(), share)
        mask = torch.zeros(saliency.numel(), dtype=torch.bool)
        mask[saliency.reshape(-1).topk(count).indices] = True
        return mask.reshape(saliency.shape)

    return _prune(problem, stage, select)


def prune_tiles(problem: LayerProblem, choice: Choice) -> Structure:
    """`prune/block`: tiles of `tile_rows` x 1 weights compete within each block row, which all keep the same number.

    Raises ValueError when no tile height divides the rows.
    """
    (stage,) = stages(problem.geometry, choice)
    if not stage.tile_rows:
        raise ValueError(f"{problem.geometry.rows} rows cannot be cut into tiles of 16, 8 or 4 rows")
    rows, columns = problem.geometry.rows, problem.geometry.columns

    def select(saliency: Tensor, share: float) -> Tensor:
        count = _kept(stage, rows * columns, share) // rows
        tiles = saliency.reshape(-1, stage.tile_rows, columns).sum(1)
        mask = torch.zeros(tiles.shape, dtype=torch.bool)
        mask.scatter_(1, tiles.topk(count, dim=1).indices, True)
        return mask.repeat_interleave(stage.tile_rows, dim=0)

    return _prune(problem, stage, select)


def _kept(stage: Stage, weights: int, share: float) -> int:
    """Weights kept when `share` of the way to the plan's number is gone; a multiple of the rows for tiles."""
    assert stage.kept is not None
    if share == 1:
        return stage.kept
    unit = stage.geometry.rows if stage.tile_rows else 1
    return weights - round(share * (weights - stage.kept) / unit) * unit


def _prune(problem: LayerProblem, stage: Stage, select: Callable[[Tensor, float], Tensor]) -> Structure:
    """Rounds of saliency w²/[H⁻¹]_jj (Hassibi & Stork 1993, eq. 5), selection and re-fit (Frantar & Alistarh 2022)."""
    h = problem.hessian
    cost = problem.curvature()
    if h.dim() == 3:
        inverse_diagonal = inverse(damped(h)).diagonal(dim1=1, dim2=2)
        cost = inverse_diagonal.reciprocal().repeat_interleave(cost.shape[0] // h.shape[0], dim=0)
    weights, mask = problem.matrix, torch.ones_like(problem.matrix, dtype=torch.bool)
    rounds = ROUNDS if h.dim() == 3 else 1  # nothing moves without a re-fit
    for round_number in range(1, rounds + 1):
        # What is gone stays gone: it ranks below a kept weight that happens to be zero.
        saliency = torch.where(mask, weights.square() * cost, -1.0)
        mask = select(saliency, round_number / rounds)
        weights = refit(problem.matrix, mask, h, start=weights)
    pruned = LayerProblem(problem.geometry, weights.reshape(problem.weight.shape), problem.bias, h)
    return Structure((StageProblem(pruned, stage, mask),))


def unit_saliency(problem: LayerProblem, units: Tensor) -> Tensor:
    """`[U]`: relative error of removing each unit of input channels and re-fitting the rest.

    units: int64 `[U, P]` positions along weight dimension 1. With S the columns of a unit the error is
    tr(W_S ([H⁻¹]_SS)⁻¹ W_Sᵀ) (ZipLM, Kurtic et al. 2023, eq. 2), divided by tr(WHWᵀ) so that a unit's consumers can be
    summed. A depthwise consumer scores zero: who reads its outputs decides. Raises ValueError for grouped layers.
    """
    g = problem.geometry
    total = energy(problem.matrix, problem.hessian)
    if g.depthwise or total == 0:
        return torch.zeros(len(units))
    if g.groups > 1 or problem.hessian.dim() == 1:
        raise ValueError(f"input channels of a {g.kind} layer with {g.groups} groups cannot be removed")
    inverted = inverse(damped(problem.hessian))[0]
    columns = (units[:, :, None] * g.taps + torch.arange(g.taps)).flatten(1)
    scores = []
    for part in torch.split(columns, UNITS_AT_ONCE):
        weights = problem.matrix[:, part].permute(1, 2, 0)  # [U, S, O]
        curvature = inverted[part[:, :, None], part[:, None, :]]
        scores.append((weights * torch.linalg.solve(curvature, weights)).sum((1, 2)))
    return torch.cat(scores).clamp_min(0) / total
