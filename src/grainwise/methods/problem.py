"""The one problem under all methods: the best weight of a feasible set, as the layer's own inputs see it.

Letters: O output channels, I input channels, G groups, K = `Geometry.fan_in`, R and C = rows and columns of the weight
matrix (`[O, K]`; for an Embedding `[tokens, width]`), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.shapes import Stage

DAMPING = 0.01  # share of the mean diagonal, GPTQ (Frantar et al. 2022), section 4
FAINT = 1e-30  # mean squared input that counts as none
EXACT_SIZE = 1024  # up to this K inverses are taken in float64; beyond, time and memory forbid it


def damped(hessian: Tensor) -> Tensor:
    """H + 1 % of its mean diagonal, so that it can be inverted; shape as given (`[G, K, K]`, or a diagonal `[G, K]`, or
    `[V]` for an Embedding).

    Inputs that were never active get the damping alone; an all-zero H becomes the identity.
    Raises ValueError for values that are not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(f"hessian of shape {tuple(hessian.shape)} holds values that are not finite; check the inputs")
    if hessian.dim() == 1:
        mean = hessian.mean()
        return hessian + (DAMPING * mean if mean > 0 else 1.0)
    mean = diagonal(hessian).mean(1)
    # A group that saw next to nothing (below 1e-30 products underflow) borrows the mean of the others.
    spare = mean.mean() if bool(mean.mean() > FAINT) else torch.ones((), dtype=hessian.dtype)
    added = torch.where(mean > max(FAINT, 1e-12 * float(mean.max())), DAMPING * mean, spare)
    if hessian.dim() == 2:
        return hessian + added[:, None]
    return hessian + torch.diag_embed(added[:, None].expand(-1, hessian.shape[1]))


def diagonal(hessian: Tensor) -> Tensor:
    """`[G, K]` of an H that is whole or a diagonal."""
    return hessian if hessian.dim() == 2 else hessian.diagonal(dim1=1, dim2=2)


def inverse(hessian: Tensor) -> Tensor:
    """Inverse `[G, K, K]` of a damped H, in float64 inside up to `EXACT_SIZE`."""
    exact = hessian.double() if hessian.shape[-1] <= EXACT_SIZE else hessian
    return torch.cholesky_inverse(torch.linalg.cholesky(exact)).to(hessian.dtype)


def by_group(matrix: Tensor, groups: int) -> Tensor:
    """Rows `[R, C]` as `[G, R/G, C]`: the rows of one group follow each other."""
    return matrix.reshape(groups, -1, matrix.shape[1])


def times_hessian(matrix: Tensor, hessian: Tensor) -> Tensor:
    """Each row `[R, C]` times the H of its group; a diagonal H `[R]` weighs whole rows (Embedding)."""
    if hessian.dim() == 1:
        return matrix * hessian[:, None]
    if hessian.dim() == 2:
        return (by_group(matrix, hessian.shape[0]) * hessian[:, None]).reshape(matrix.shape)
    return torch.bmm(by_group(matrix, hessian.shape[0]), hessian).reshape(matrix.shape)


def energy(matrix: Tensor, hessian: Tensor) -> float:
    """tr(M H Mᵀ), never negative."""
    return max(0.0, float((times_hessian(matrix, hessian) * matrix).sum(dtype=torch.float64)))


@dataclass(frozen=True, slots=True)
class LayerProblem:
    """Minimise tr((W−Ŵ) H (W−Ŵ)ᵀ) over a feasible set of Ŵ.

    geometry: shape of the layer.
    weight: float32, shape as torch stores it (`geometry.weight_shape`).
    bias: `[O]`, or None.
    hessian: `[G, K, K]` E[x xᵀ] of the unfolded inputs of each group, ordered as `weight.reshape(O, K)`; for an
        Embedding `[V]` token frequencies. Not damped. By its diagonal `[G, K]` alone nothing is compensated or
        re-fitted: pruning and quantisation are then solved in a small part of the time.
    Raises ValueError for shapes that do not fit the geometry.
    """

    geometry: Geometry
    weight: Tensor
    bias: Tensor | None
    hessian: Tensor

    def __post_init__(self) -> None:
        g = self.geometry
        expected = (
            (g.inputs,) if g.kind is Kind.EMBEDDING else (g.groups, g.fan_in, g.fan_in)[: max(2, self.hessian.dim())]
        )
        if tuple(self.weight.shape) != g.weight_shape:
            raise ValueError(f"weight of shape {tuple(self.weight.shape)} does not fit the geometry's {g.weight_shape}")
        if tuple(self.hessian.shape) != expected:
            raise ValueError(f"hessian of shape {tuple(self.hessian.shape)} does not fit the geometry's {expected}")
        if (self.bias is not None) != g.bias:
            raise ValueError(
                f"geometry says bias={g.bias}, but a bias was {'' if self.bias is not None else 'not '}given"
            )

    @property
    def matrix(self) -> Tensor:
        """Weight as `[R, C]`."""
        return self.weight.reshape(self.geometry.rows, self.geometry.columns)

    def curvature(self) -> Tensor:
        """`[R, C]`: the damped diagonal of H for each weight: what an error of 1 in it costs without compensation."""
        h = damped(self.hessian)
        shape = (self.geometry.rows, self.geometry.columns)
        if h.dim() == 1:
            return h[:, None].expand(shape)
        return diagonal(h).repeat_interleave(shape[0] // h.shape[0], dim=0)

    def relative_error(self, weight: Tensor) -> float:
        """tr(ΔHΔᵀ) / tr(WHWᵀ) of a weight in any shape that holds `[R, C]`; 0 is perfect, 1 is as bad as zero."""
        difference = self.matrix - weight.reshape(self.matrix.shape)
        return energy(difference, self.hessian) / max(
            energy(self.matrix, self.hessian), torch.finfo(torch.float32).tiny
        )

    def uncompensated(self) -> LayerProblem:
        """The problem with the diagonal of H alone."""
        return self if self.hessian.dim() < 3 else replace(self, hessian=diagonal(self.hessian))

    def narrowed(self, kept_inputs: Tensor | None, kept_outputs: Tensor | None) -> LayerProblem:
        """The layer with fewer channels: `kept_inputs`, `kept_outputs` int64 indices, or None for all.

        What is left of a cut input is re-fitted: W_S = W H[:, S] H_SS⁻¹ (He et al. 2017, eq. 3; ZipLM 2023, eq. 3).
        Depthwise: inputs and outputs are the same channels, nothing is re-fitted. Embedding: vectors get shorter.
        Raises ValueError for grouped layers, and for depthwise outputs that do not follow the inputs.
        """
        if kept_inputs is None and kept_outputs is None:
            return self
        if self.geometry.depthwise:
            return self._narrowed_depthwise(kept_inputs, kept_outputs)
        if self.geometry.groups > 1:
            raise ValueError(f"a layer of {self.geometry.groups} groups cannot be narrowed")
        if self.geometry.kind is Kind.EMBEDDING:
            if kept_inputs is not None or kept_outputs is None:
                raise ValueError("the tokens of an Embedding cannot be narrowed")
            resized = self.geometry.resized(outputs=len(kept_outputs))
            return LayerProblem(resized, self.weight[:, kept_outputs], None, self.hessian)
        matrix, hessian, g = self.matrix, self.hessian, self.geometry
        if kept_inputs is not None and len(kept_inputs) < g.inputs:
            columns = (kept_inputs[:, None] * g.taps + torch.arange(g.taps)).reshape(-1)
            h = damped(hessian)[0]
            factor = torch.linalg.cholesky(h[columns][:, columns])
            matrix = torch.cholesky_solve((matrix @ h[:, columns]).T, factor).T
            hessian = hessian[:, columns][:, :, columns]
            g = g.resized(inputs=len(kept_inputs))
        bias = self.bias
        if kept_outputs is not None:
            matrix, bias = matrix[kept_outputs], None if bias is None else bias[kept_outputs]
            g = g.resized(outputs=len(kept_outputs))
        return LayerProblem(g, matrix.reshape(g.weight_shape), bias, hessian)

    def _narrowed_depthwise(self, kept_inputs: Tensor | None, kept_outputs: Tensor | None) -> LayerProblem:
        if kept_inputs is None:
            raise ValueError("a depthwise layer is narrowed at its inputs; its outputs follow")
        multiplier = self.geometry.outputs // self.geometry.inputs
        follow = (kept_inputs[:, None] * multiplier + torch.arange(multiplier)).reshape(-1)
        if kept_outputs is not None and not torch.equal(kept_outputs, follow):
            raise ValueError(
                f"outputs {kept_outputs.tolist()} are not those of the depthwise inputs {kept_inputs.tolist()}"
            )
        g = self.geometry.resized(inputs=len(kept_inputs), outputs=len(follow))
        bias = None if self.bias is None else self.bias[follow]
        return LayerProblem(g, self.weight[follow], bias, self.hessian[kept_inputs])


@dataclass(frozen=True, slots=True)
class StageProblem:
    """One primitive layer of a structure with the inputs it will see.

    problem: the stage's own layer problem; weights outside of the support are zero.
    stage: what the plan says of its shape and storage.
    support: bool `[R, C]`, the weights that may differ from zero, or None for all.
    """

    problem: LayerProblem
    stage: Stage
    support: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Structure:
    """What stands in a layer's place: stages in the order in which they run.

    source: int64 `[ghosts]`, the primary channel of each ghost; order: int64 `[O]`, where each output channel stands
    among primaries and ghosts. Both None unless the structure is a ghost module (two stages: primary, cheap).
    whole: the layer problem that a chain of stages solves together, so that a later stage can make up for what an
    earlier one loses in precision; None for one stage and for ghosts.
    """

    stages: tuple[StageProblem, ...]
    source: Tensor | None = None
    order: Tensor | None = None
    whole: LayerProblem | None = None
