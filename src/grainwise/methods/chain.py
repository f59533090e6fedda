"""Stages one after the other: what a later stage has to do once the stages before it have lost precision.

Letters: K fan-in of the whole layer, n inputs of a stage (unfolded), O outputs of a stage. A map `[n, K]` takes the
whole layer's unfolded input x to what a stage sees; for an Embedding x is a token, one-hot, and K the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grainwise.methods.problem import LayerProblem, StageProblem, by_group, damped, times_hessian
from grainwise.plan.layers import Geometry, Kind


def first_map(whole: LayerProblem, first: StageProblem) -> Tensor | None:
    """The map to the first stage's inputs: the identity, or None where the stage is a look-up."""
    return None if first.problem.geometry.kind is Kind.EMBEDDING else torch.eye(whole.geometry.fan_in)


def next_map(seen: Tensor | None, stage: StageProblem, matrix: Tensor, whole: Geometry) -> Tensor:
    """The map to the inputs of the stage after `stage`, when its weight matrix `[O, n]` is `matrix`."""
    if seen is None:
        return matrix.T
    geometry = stage.problem.geometry
    if stage.stage.at_input:  # runs at every tap of the windows to come
        return torch.kron(matrix, torch.eye(whole.taps)) @ seen
    return torch.bmm(by_group(matrix, geometry.groups), seen.reshape(geometry.groups, -1, seen.shape[1])).flatten(0, 1)


def adapted(stage: StageProblem, wanted: Tensor, seen: Tensor, whole: LayerProblem) -> StageProblem:
    """The stage's problem on the inputs that it will really see: the regression of `wanted` on them, and their H.

    wanted: `[O, K]` what the stage should give, as a map of x. seen: `[n, K]` what the stages before it give. With
    T = wanted H seenᵀ (seen H seenᵀ)⁻¹ the error that is left to choose is tr((T−B)(seen H seenᵀ)(T−B)ᵀ) for any B.
    """
    geometry = stage.problem.geometry
    image = _times(seen, whole.hessian)
    groups = geometry.groups
    grouped, images = by_group(seen, groups), by_group(image, groups)
    hessian = torch.bmm(images, grouped.transpose(1, 2))
    cross = torch.bmm(images, by_group(wanted, groups).transpose(1, 2))
    target = torch.linalg.solve(_ridged(hessian), cross).transpose(1, 2)
    problem = LayerProblem(geometry, target.reshape(geometry.weight_shape), stage.problem.bias, hessian)
    return StageProblem(problem, stage.stage, stage.support)


def _times(rows: Tensor, hessian: Tensor) -> Tensor:
    """Rows `[n, K]` times H `[1, K, K]` or its diagonal `[K]`, damped."""
    return rows * damped(hessian) if hessian.dim() == 1 else times_hessian(rows, damped(hessian))


def _ridged(hessian: Tensor) -> Tensor:
    """A ridge of 1e-5 of the mean diagonal: inputs quantised to few levels may be dependent."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-20)
    return hessian + torch.diag_embed((1e-5 * mean)[:, None].expand(-1, hessian.shape[1]))


def wanted_of(stages: tuple[StageProblem, ...], whole: LayerProblem) -> list[Tensor]:
    """For each stage the map `[O, K]` of x that it should give: its own at full precision, of the last the layer's."""
    maps: list[Tensor] = []
    seen = first_map(whole, stages[0])
    for stage in stages[:-1]:
        seen = next_map(seen, stage, stage.problem.matrix, whole.geometry)
        maps.append(seen)
    return [*maps, whole.matrix.T if whole.geometry.kind is Kind.EMBEDDING else whole.matrix]
