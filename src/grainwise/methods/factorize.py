"""Low-rank structures in closed form: a pair for a layer, one for each row block, Tucker-2 over both channel modes.

Letters: O, I channels, K fan-in, T taps, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grainwise.methods.problem import LayerProblem, StageProblem, Structure, damped
from grainwise.methods.solve import conjugate_gradients
from grainwise.plan.choices import Choice
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.shapes import Stage, row_blocks, stages

ALTERNATIONS = 6  # of Tucker's input factor and the rest


def leading_outputs(matrix: Tensor, hessian: Tensor, rank: int) -> Tensor:
    """`[O, r]` orthonormal: the leading eigenvectors of W H Wᵀ, for W `[O, K]` and a positive definite H `[K, K]`.

    U Uᵀ W is then the best rank-r weight under H (Eckart & Young 1936 on W H^½; SVD-LLM, Wang et al. 2024).
    """
    if matrix.shape[0] <= matrix.shape[1]:
        return _leading(matrix @ hessian @ matrix.T, rank)
    # Many outputs (a vocabulary): the same vectors through the smaller Gram matrix of W L, H = L Lᵀ.
    factored = matrix @ torch.linalg.cholesky(hessian)
    return _orthonormal(factored @ _leading(factored.T @ factored, rank))


def _leading(gram: Tensor, rank: int) -> Tensor:
    """`[n, r]`: eigenvectors of the largest eigenvalues of a symmetric `[n, n]`, falling."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -rank:].flip(1)


def _orthonormal(columns: Tensor) -> Tensor:
    """`[n, r]`: an orthonormal basis of the columns."""
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def _spread(columns: Tensor) -> Tensor:
    """Another basis of the same columns `[n, r]`, turned at random (seeded), so that each carries like energy.

    Leading singular vectors differ by orders of magnitude in what they carry, which a shared scale rounds badly; the
    idea of QuIP's incoherence (Chee et al. 2023, section 4).
    """
    generator = torch.Generator().manual_seed(columns.shape[1])
    return columns @ _orthonormal(torch.randn(columns.shape[1], columns.shape[1], generator=generator))


def _pointwise(geometry: Geometry, weight: Tensor, bias: Tensor | None, hessian: Tensor) -> LayerProblem:
    return LayerProblem(geometry, weight.reshape(geometry.weight_shape), bias, hessian)


def _structure(plan: tuple[Stage, ...], problems: tuple[LayerProblem, ...]) -> Structure:
    return Structure(tuple(StageProblem(p, s) for p, s in zip(problems, plan, strict=True)))


def _refuse_groups(geometry: Geometry, what: str) -> None:
    if geometry.groups > 1:
        raise ValueError(f"a layer of {geometry.groups} groups takes no {what}")


def low_rank(problem: LayerProblem, choice: Choice) -> Structure:
    """`factorize/layer`, and the bottleneck that `distill/layer` makes of a layer with one tap: I → r → O.

    Raises ValueError for grouped layers.
    """
    g = problem.geometry
    _refuse_groups(g, "low-rank pair")
    if g.kind is Kind.EMBEDDING:
        return _low_rank_embedding(problem, choice)
    plan = stages(g, choice)
    h = damped(problem.hessian)[0]
    outer = _spread(leading_outputs(problem.matrix, h, plan[0].geometry.outputs))
    inner = outer.T @ problem.matrix
    middle = inner @ problem.hessian[0] @ inner.T
    return _structure(
        plan,
        (
            LayerProblem(plan[0].geometry, inner.reshape(plan[0].geometry.weight_shape), None, problem.hessian),
            _pointwise(plan[1].geometry, outer, problem.bias, middle[None]),
        ),
    )


def _low_rank_embedding(problem: LayerProblem, choice: Choice) -> Structure:
    """Tokens x r, then r x width: the SVD of the vectors weighted by the root of their frequency."""
    if choice.granularity is None or len(plan := stages(problem.geometry, choice)) != 2:
        raise ValueError(f"{choice} is not defined for an Embedding")
    frequency = damped(problem.hessian)
    vectors = problem.weight
    basis = _leading((vectors.T * frequency) @ vectors, plan[0].geometry.outputs)
    basis = _spread(basis)  # [width, r]
    inner = vectors @ basis
    middle = (inner.T * problem.hessian) @ inner
    return _structure(
        plan,
        (
            LayerProblem(plan[0].geometry, inner, None, problem.hessian),
            _pointwise(plan[1].geometry, basis, None, middle[None]),
        ),
    )


def low_rank_blocks(problem: LayerProblem, choice: Choice) -> Structure:
    """`factorize/block`: each block of output rows has its own pair; the second factor is a grouped layer.

    Raises ValueError for grouped layers and for rows that cannot be cut.
    """
    g = problem.geometry
    _refuse_groups(g, "low-rank pairs")
    if g.kind is Kind.EMBEDDING:
        return _low_rank_embedding(problem, choice)
    if not (blocks := row_blocks(g.rows)):
        raise ValueError(f"{g.rows} rows cannot be cut into 4 or 2 blocks of at least 4")
    plan = stages(g, choice)
    rank = plan[0].geometry.outputs // blocks
    h = damped(problem.hessian)[0]
    outer = torch.stack(
        [_spread(leading_outputs(rows, h, rank)) for rows in problem.matrix.reshape(blocks, -1, g.fan_in)]
    )
    inner = outer.transpose(1, 2) @ problem.matrix.reshape(blocks, -1, g.fan_in)  # [blocks, r, K]
    middle = inner @ problem.hessian[0] @ inner.transpose(1, 2)
    return _structure(
        plan,
        (
            LayerProblem(plan[0].geometry, inner.reshape(plan[0].geometry.weight_shape), None, problem.hessian),
            _pointwise(plan[1].geometry, outer, problem.bias, middle),
        ),
    )


def spread_inputs(factor: Tensor, taps: int) -> Tensor:
    """A ⊗ 1_T `[r T, I T]`: the input factor `[r, I]` applied at every tap of an unfolded input."""
    return torch.kron(factor, torch.eye(taps))


def tucker(problem: LayerProblem, choice: Choice) -> Structure:
    """`factorize/channel`: Tucker-2 (Kim et al. 2016): 1x1 into r_i channels, k x k core to r_o, 1x1 to O.

    Input modes start from the H-whitened kernel; then, in turn, output factor and core are the exact reduced-rank
    regression on the reduced inputs (Izenman 1975), and the input factor the least-squares fit given both. Raises
    ValueError for grouped layers and those of one tap.
    """
    g = problem.geometry
    _refuse_groups(g, "Tucker decomposition")
    if g.taps == 1:
        raise ValueError("a layer of one tap has no core: use factorize/layer")
    plan = stages(g, choice)
    h = damped(problem.hessian)[0]
    image = problem.matrix @ h
    rank_in, rank_out = plan[1].geometry.inputs, plan[1].geometry.outputs
    inner = _input_modes(problem.weight.flatten(2), h, rank_in)
    outer, core = _fit_outputs(image, h, spread_inputs(inner, g.taps), rank_out)
    for _ in range(ALTERNATIONS):
        full = (outer @ core).reshape(g.outputs, rank_in, g.taps)
        inner = _orthonormal(_fit_inputs(image, full, h, inner).T).T
        outer, core = _fit_outputs(image, h, spread_inputs(inner, g.taps), rank_out)
    outer, inner = _spread(outer), _balance(inner, core)
    lift = spread_inputs(inner, g.taps)
    core = _core(image, h, lift, outer)
    seen = lift @ problem.hessian[0] @ lift.T
    return _structure(
        plan,
        (
            _pointwise(plan[0].geometry, inner, None, _channel_covariance(problem.hessian[0], g.taps)[None]),
            LayerProblem(plan[1].geometry, core.reshape(plan[1].geometry.weight_shape), None, seen[None]),
            _pointwise(plan[2].geometry, outer, problem.bias, (core @ seen @ core.T)[None]),
        ),
    )


def _channel_covariance(hessian: Tensor, taps: int) -> Tensor:
    """`[I, I]`: E[x xᵀ] of the channels at one place, as the mean over taps of the unfolded H."""
    inputs = hessian.shape[0] // taps
    return hessian.reshape(inputs, taps, inputs, taps).diagonal(dim1=1, dim2=3).mean(-1)


def _input_modes(weight: Tensor, hessian: Tensor, rank: int) -> Tensor:
    """`[r, I]` orthonormal rows that span the leading input modes of the kernel `[O, I, T]`, inputs whitened."""
    covariance = _channel_covariance(hessian, weight.shape[2])
    root = torch.linalg.cholesky(covariance)
    whitened = torch.einsum("oit,ij->ojt", weight, root).transpose(0, 1).flatten(1)
    # Coordinates z = Vᵀ L⁻¹ x keep what matters of x = L z.
    factor = torch.linalg.solve_triangular(root.T, _leading(whitened @ whitened.T, rank), upper=True)
    return _orthonormal(factor).T


def _fit_outputs(image: Tensor, hessian: Tensor, lift: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best orthonormal output factor `[O, r]` and core `[r, n]`; `lift` `[n, K]` reduces the inputs, `image` is W H."""
    reduced = lift @ hessian @ lift.T
    regression = torch.linalg.solve(reduced, lift @ image.T).T  # [O, n]
    outer = leading_outputs(regression, reduced, rank)
    return outer, outer.T @ regression


def _core(image: Tensor, hessian: Tensor, lift: Tensor, outer: Tensor) -> Tensor:
    """Best core `[r, n]` between an orthonormal output factor and reduced inputs."""
    core: Tensor = torch.linalg.solve(lift @ hessian @ lift.T, lift @ image.T @ outer)
    return core.T


def _balance(inner: Tensor, core: Tensor) -> Tensor:
    """Another basis of the same reduced inputs `[r, I]`, in which an error costs the same wherever it falls.

    The core `[r_o, r T]` passes errors of the input factor on with the Gram matrix S of its input modes; in the basis
    S^½ A it is the identity. Its eigenvalues are held within 1 to 10⁴, so that A stays well conditioned.
    """
    rank = inner.shape[0]
    modes = core.reshape(core.shape[0], rank, -1).transpose(0, 1).flatten(1)
    values, vectors = torch.linalg.eigh(modes @ modes.T)
    root = values.clamp_min(1e-4 * float(values.max()) + 1e-20).sqrt()
    balanced: Tensor = _spread(vectors * root).T @ (vectors.T @ inner)
    return balanced


def _fit_inputs(image: Tensor, rest: Tensor, hessian: Tensor, start: Tensor) -> Tensor:
    """Best input factor `[r, I]` given output factor times core `rest` `[O, r, T]`; `image` is W H `[O, K]`."""
    outputs, _, taps = rest.shape

    def weight(factor: Tensor) -> Tensor:
        return torch.einsum("oat,ai->oit", rest, factor).reshape(outputs, -1)

    def project(rows: Tensor) -> Tensor:
        return torch.einsum("oat,oit->ai", rest, rows.reshape(outputs, -1, taps))

    curvature = _channel_covariance(hessian, taps).diagonal()
    scale = (rest.square().sum((0, 2))[:, None] * curvature).clamp_min(1e-30).reciprocal()
    return conjugate_gradients(
        lambda v: project(weight(v) @ hessian), project(image), start, scale, dims=(0, 1), iterations=20
    )
