from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grainwise.methods.problem import damped, energy
from grainwise.methods.solve import Column, conjugate_gradients, descend, refit, sweep
from tests.methods.samples import real, synthetic


def _round(_j: int, column: Column) -> Column:
    return (column * 20).round() / 20


def test_conjugate_gradients_by_hand() -> None:
    system = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    found = conjugate_gradients(
        lambda v: v @ system,
        torch.tensor([[1.0, 2.0]]),
        torch.zeros(1, 2),
        torch.tensor([0.25, 1 / 3]),
        dims=(-1,),
        iterations=5,
    )
    assert torch.allclose(found, torch.tensor([[1 / 11, 7 / 11]]), atol=1e-5)


@pytest.mark.parametrize("name", ["layer3.1.conv2", "layer2.0.conv1"])
def test_refit_equals_the_normal_equations(name: str) -> None:
    problem, _ = real(name)
    matrix, h = problem.matrix, damped(problem.hessian)
    mask = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    found = refit(matrix, mask, problem.hessian)
    assert bool((found[~mask] == 0).all())
    exact = torch.zeros_like(matrix)
    for row in range(len(matrix)):
        s = mask[row]
        exact[row, s] = torch.linalg.solve(h[0][s][:, s].double(), (h[0] @ matrix[row])[s].double()).float()
    least, reached = (energy(matrix - m, h) for m in (exact, found))
    assert least <= reached * 1.0001 and reached <= 1.02 * least
    assert reached < 0.7 * energy(matrix * ~mask, h)


@pytest.mark.parametrize("name", ["depthwise", "grouped", "conv1d", "linear"])
def test_sweep_is_gptq_and_descent_improves_it(name: str) -> None:
    problem, _ = synthetic(name)
    matrix, h = problem.matrix, damped(problem.hessian)
    swept = sweep(matrix, problem.hessian, _round)
    assert torch.allclose(swept, _gptq(matrix, h), atol=1e-6)
    nearest = _round(0, matrix)
    improved = descend(matrix, swept, problem.hessian, _round)
    errors = [energy(matrix - m, h) for m in (improved, swept, nearest)]
    assert errors[0] <= errors[1] * (1 + 1e-6) and errors[1] < errors[2]


def _gptq(matrix: Tensor, h: Tensor) -> Tensor:
    """Algorithm 1 of Frantar et al. 2022 as it is written, for columns by falling diagonal."""
    rows = matrix.shape[0] // len(h)
    order = h.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True, stable=True)
    result = torch.zeros_like(matrix)
    for group in range(len(h)):
        part = slice(group * rows, (group + 1) * rows)
        w, q = matrix[part][:, order].double().clone(), torch.zeros(rows, matrix.shape[1])
        inverse = torch.linalg.inv(h[group][order][:, order].double())
        upper = torch.linalg.cholesky(inverse, upper=True)
        for j in range(w.shape[1]):
            q[:, j] = _round(j, w[:, j]).float()
            w[:, j:] -= ((w[:, j] - q[:, j]) / upper[j, j])[:, None] * upper[j, j:]
        result[part] = q[:, order.argsort()]
    return result


def test_nothing_gives_nan() -> None:
    zero = torch.zeros(1, 5, 5)
    matrix = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 5, dtype=torch.bool).tril()
    for h in (zero, torch.ones(1, 5, 5), torch.full((1, 5, 5), 1e-30), torch.full((1, 5, 5), 1e20)):
        for m in (matrix, torch.zeros(4, 5)):
            assert bool(refit(m, mask, h).isfinite().all())
            assert bool(descend(m, sweep(m, h, _round), h, _round).isfinite().all())
