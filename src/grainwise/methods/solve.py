"""Solvers of the layer problem on given supports and grids: conjugate gradients, compensated rounding, descent.

Letters as in `problem`: R x C the weight matrix, G groups of rows, each with its own H `[C, C]`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grainwise.methods.problem import by_group, damped, times_hessian

Column = NDArray[np.float32]
RoundColumn = Callable[[int, Column], Column]
"""(column number, wanted values `[R]`) -> nearest feasible values `[R]`."""

LAZY = 128  # columns whose effect on the rest is applied as one matrix product (GPTQ, section 4, "lazy batch updates")


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    target: Tensor,
    start: Tensor,
    inverse_diagonal: Tensor,
    *,
    dims: tuple[int, ...],
    iterations: int,
) -> Tensor:
    """Solves apply(x) = target for a symmetric positive semidefinite `apply`, preconditioned by a diagonal.

    Systems are independent along the dimensions that are not in `dims`. Ends at a relative residual of 1e-4.
    Source: Hestenes & Stiefel 1952.
    """

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(b > 0, a / b.clamp_min(torch.finfo(b.dtype).tiny), 0.0)

    x = start
    residual = target - apply(x)
    direction = residual * inverse_diagonal
    size = (residual * direction).sum(dims, keepdim=True)
    goal = 1e-8 * (target * target * inverse_diagonal).sum(dims, keepdim=True)
    for _ in range(iterations):
        if bool((size <= goal).all()):
            break
        image = apply(direction)
        step = ratio(size, (direction * image).sum(dims, keepdim=True))
        x = x + step * direction
        residual = residual - step * image
        preconditioned = residual * inverse_diagonal
        new_size = (residual * preconditioned).sum(dims, keepdim=True)
        direction = preconditioned + ratio(new_size, size) * direction
        size = new_size
    return x


def refit(
    matrix: Tensor, mask: Tensor, hessian: Tensor, *, start: Tensor | None = None, iterations: int = 80
) -> Tensor:
    """Best `[R, C]` weights on the bool support `mask` `[R, C]`: solves (H_SS) w_S = (H w)_S of each row.

    start: a guess on the support, to go on from an earlier solution. A diagonal H leaves kept weights as they are.
    """
    if hessian.dim() < 3:
        return matrix * mask
    h = damped(hessian)
    keep = mask.to(matrix.dtype)
    scale = h.diagonal(dim1=1, dim2=2).reciprocal().repeat_interleave(matrix.shape[0] // h.shape[0], dim=0)
    return conjugate_gradients(
        lambda v: keep * times_hessian(v, h),
        keep * times_hessian(matrix, h),
        keep * (matrix if start is None else start),
        scale,
        dims=(-1,),
        iterations=iterations,
    )


def _visit(wanted: Tensor, error: Tensor, coupling: Tensor, order: list[int], round_column: RoundColumn) -> None:
    """Sets each column in turn to the nearest feasible value of w_j + Σ e_i c_ij; `error` e = w − q changes in place.

    wanted, error: `[G, C, R/G]`, columns in visiting order; order: their numbers in the weight matrix.
    coupling: `[G, C, C]` with a zero diagonal.
    """
    columns = wanted.numpy()
    for begin in range(0, wanted.shape[1], LAZY):
        end = min(begin + LAZY, wanted.shape[1])
        block, inner = slice(begin, end), coupling[:, begin:end, begin:end].transpose(1, 2).contiguous()
        base = wanted[:, block] + torch.bmm(coupling[:, :, block].transpose(1, 2), error)
        base -= torch.bmm(inner, error[:, block])
        local = error[:, block].clone()
        # Column by column the arrays are tiny: numpy costs a quarter of what torch's dispatch does.
        bases, locals_, weights = base.numpy(), local.numpy(), inner.numpy()
        for j in range(begin, end):
            column = bases[:, j - begin] + np.matmul(weights[:, j - begin, None], locals_)[:, 0]
            feasible = round_column(order[j], column.reshape(-1)).reshape(column.shape)
            locals_[:, j - begin] = columns[:, j] - feasible
        error[:, block] = local


def sweep(matrix: Tensor, hessian: Tensor, round_column: RoundColumn) -> Tensor:
    """`[R, C]` feasible weights: columns are rounded once, each with the error of its predecessors compensated.

    GPTQ (Frantar et al. 2022, algorithm 1), columns by falling diagonal of H, in the equal form of QuIP (Chee et al.
    2023, theorem 6): with H = U D Uᵀ, U unit upper triangular, column j is rounded at w_j + Σ_i<j (w_i − q_i) U_ij. It
    needs one Cholesky factor and no inverse. `hessian` is `[G, C, C]`.
    """
    order = hessian.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True, stable=True)
    h = damped(hessian)[:, order][:, :, order]
    # H = V Vᵀ with V upper triangular is the Cholesky factor of the reversed matrix, reversed.
    upper = torch.linalg.cholesky(h.flip(1, 2)).flip(1, 2)
    coupling = torch.triu(upper / upper.diagonal(dim1=1, dim2=2)[:, None], diagonal=1)
    wanted = by_group(matrix, h.shape[0]).transpose(1, 2)[:, order]
    error = torch.zeros_like(wanted)
    _visit(wanted, error, coupling, order.tolist(), round_column)
    return (wanted - error)[:, order.argsort()].transpose(1, 2).reshape(matrix.shape)


def descend(matrix: Tensor, start: Tensor, hessian: Tensor, round_column: RoundColumn, *, passes: int = 1) -> Tensor:
    """Improves feasible weights `start` `[R, C]` by cyclic coordinate descent: each column to its best feasible value.

    Never increases the error under the damped H. Source: QuantEase (Behdin et al. 2023), algorithm 1.
    """
    h = damped(hessian)
    coupling = h / h.diagonal(dim1=1, dim2=2)[:, None]
    coupling.diagonal(dim1=1, dim2=2).zero_()
    wanted = by_group(matrix, h.shape[0]).transpose(1, 2).contiguous()
    error = wanted - by_group(start, h.shape[0]).transpose(1, 2)
    order = list(range(matrix.shape[1]))
    for _ in range(passes):
        _visit(wanted, error, coupling, order, round_column)
    return (wanted - error).transpose(1, 2).reshape(matrix.shape)
