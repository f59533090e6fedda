from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from grainwise.methods.problem import LayerProblem, damped, energy, inverse
from grainwise.plan.layers import Geometry, Kind
from tests.methods.samples import real, synthetic

LINEAR = Geometry(Kind.LINEAR, 2, 1)


def test_relative_error_by_hand() -> None:
    problem = LayerProblem(LINEAR, torch.tensor([[1.0, 2.0]]), None, torch.tensor([[[2.0, 1.0], [1.0, 1.0]]]))
    # W H W' = 2 + 4 + 4 = 10; dropping the second weight leaves 2² * 1 = 4.
    assert problem.relative_error(torch.tensor([[1.0, 0.0]])) == pytest.approx(0.4)
    assert problem.relative_error(problem.weight) == 0


def test_relative_error_is_that_of_the_outputs() -> None:
    problem, inputs = synthetic("conv2d stride 2")
    g = problem.geometry
    other = problem.weight + 0.01 * torch.randn(g.weight_shape, generator=torch.Generator().manual_seed(0))
    outputs, changed = (F.conv2d(inputs, w, None, g.stride, g.padding) for w in (problem.weight, other))
    measured = (changed - outputs).square().sum() / outputs.square().sum()
    assert problem.relative_error(other) == pytest.approx(float(measured), rel=1e-3)


def test_damping_makes_any_hessian_invertible() -> None:
    dead = torch.diag_embed(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    assert damped(dead)[0].tolist() == [[pytest.approx(4.02), 0], [0, pytest.approx(0.02)]]
    assert bool(damped(dead)[1].diagonal().gt(0).all())
    assert torch.equal(damped(torch.zeros(1, 3, 3)), torch.eye(3)[None])
    assert torch.equal(damped(torch.zeros(3)), torch.ones(3))
    h = damped(real("layer3.1.conv2")[0].hessian)
    assert torch.allclose(h @ inverse(h), torch.eye(h.shape[1])[None], atol=1e-2)
    with pytest.raises(ValueError, match="not finite"):
        damped(torch.full((1, 2, 2), float("nan")))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="weight of shape"):
        LayerProblem(LINEAR, torch.zeros(2, 1), None, torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="hessian of shape"):
        LayerProblem(LINEAR, torch.zeros(1, 2), None, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="bias"):
        LayerProblem(LINEAR, torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 2, 2))


@pytest.mark.parametrize("name", ["layer3.1.conv2", "fc"])
def test_narrowing_refits_what_is_left(name: str) -> None:
    problem, _ = real(name)
    g = problem.geometry
    kept = torch.arange(0, g.inputs, 2)
    narrow = problem.narrowed(kept, None)
    columns = (kept[:, None] * g.taps + torch.arange(g.taps)).reshape(-1)

    def spread(matrix: torch.Tensor) -> torch.Tensor:
        return torch.zeros(g.rows, g.columns).index_copy(1, columns, matrix)

    refitted = problem.relative_error(spread(narrow.matrix))
    cut = problem.relative_error(spread(problem.matrix[:, columns]))
    assert refitted < 0.6 * cut
    assert narrow.geometry.inputs == len(kept) and narrow.hessian.shape[1] == len(columns)
    assert torch.equal(narrow.hessian[0], problem.hessian[0][columns][:, columns])


def test_refit_is_a_minimum() -> None:
    problem, _ = real("layer2.0.conv1")
    kept = torch.arange(8)
    narrow = problem.narrowed(kept, None)
    h = damped(problem.hessian)
    columns = torch.arange(8 * 9)
    error = problem.matrix.clone()
    error[:, columns] -= narrow.matrix
    gradient = (error @ h[0])[:, columns]
    assert float(gradient.abs().max()) < 1e-3 * float((problem.matrix @ h[0]).abs().max())
    assert energy(error, h) > 0


def test_outputs_and_bias_are_sliced() -> None:
    problem, _ = real("fc")
    rows = torch.tensor([1, 3])
    narrow = problem.narrowed(None, rows)
    assert problem.bias is not None and narrow.bias is not None
    assert torch.equal(narrow.weight, problem.weight[rows]) and torch.equal(narrow.bias, problem.bias[rows])
    assert problem.narrowed(None, None) is problem


def test_depthwise_and_embedding_narrow_as_one() -> None:
    problem, _ = synthetic("depthwise x2")
    narrow = problem.narrowed(torch.tensor([1, 4]), torch.tensor([2, 3, 8, 9]))
    assert (narrow.geometry.inputs, narrow.geometry.outputs, narrow.geometry.groups) == (2, 4, 2)
    assert torch.equal(narrow.weight, problem.weight[[2, 3, 8, 9]])
    assert torch.equal(narrow.hessian, problem.hessian[[1, 4]])
    with pytest.raises(ValueError, match="are not those"):
        problem.narrowed(torch.tensor([1, 4]), torch.tensor([2, 3, 8, 10]))
    vectors, _ = synthetic("embedding")
    assert torch.equal(vectors.narrowed(None, torch.arange(8)).weight, vectors.weight[:, :8])
    with pytest.raises(ValueError, match="cannot be narrowed"):
        vectors.narrowed(torch.arange(8), None)
    with pytest.raises(ValueError, match="cannot be narrowed"):
        synthetic("grouped")[0].narrowed(torch.arange(8), None)


def test_inputs_too_faint_for_float32_are_as_good_as_none() -> None:
    """A depthwise layer behind a nearly dead channel: subnormal products must not break the factorisation."""
    hessian = torch.stack([torch.eye(9) * 1e-39, torch.eye(9)])
    assert bool(torch.isfinite(torch.linalg.cholesky(damped(hessian))).all())
    torch.linalg.cholesky(damped(hessian[:1]))
