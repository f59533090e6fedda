from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grainwise.methods.factorize import leading_outputs
from grainwise.methods.modules import effective_matrix
from grainwise.methods.problem import LayerProblem, damped
from grainwise.methods.structure import realise, restructure
from grainwise.plan.choices import Choice, Granularity, Method
from tests.methods.samples import GEOMETRIES, real, structures_of, synthetic

LEVELS = (0.5, 0.25, 0.125)


def _truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def _hosvd(weight: Tensor, rank_in: int, rank_out: int) -> Tensor:
    """Plain Tucker-2: both channel modes projected on their leading singular vectors."""
    u = torch.linalg.svd(weight.flatten(1), full_matrices=False).U[:, :rank_out]
    v = torch.linalg.svd(weight.transpose(0, 1).flatten(1), full_matrices=False).U[:, :rank_in]
    return torch.einsum("oithw,oa,ib,pa,jb->pjthw", weight[:, :, None], u, v, u, v)[:, :, 0]


def _naive(problem: LayerProblem, choice: Choice) -> Tensor:
    stages = restructure(problem, choice).stages
    first, last = stages[0].stage.geometry, stages[-1].stage.geometry
    match choice.granularity:
        case Granularity.LAYER:
            return _truncated(problem.matrix, first.outputs)
        case Granularity.BLOCK:
            rank = first.outputs // last.groups
            return torch.cat([_truncated(rows, rank) for rows in problem.matrix.chunk(last.groups)])
        case _:
            return _hosvd(problem.weight, first.outputs, last.inputs).flatten(1)


@pytest.mark.parametrize("name", ["layer1.1.conv1", "layer2.0.conv1", "layer3.1.conv2"])
@pytest.mark.parametrize("granularity", Granularity)
def test_beats_the_plain_decomposition_on_real_layers(name: str, granularity: Granularity) -> None:
    problem, _ = real(name)
    for level in LEVELS:
        choice = Choice(Method.FACTORIZE, granularity, level)
        ours = problem.relative_error(effective_matrix(realise(restructure(problem, choice)), problem.geometry))
        assert ours < 0.9 * problem.relative_error(_naive(problem, choice))


def test_low_rank_is_optimal() -> None:
    problem, _ = real("layer2.0.conv1")
    choice = Choice(Method.FACTORIZE, Granularity.LAYER, 0.25)
    module = realise(restructure(problem, choice))
    h = damped(problem.hessian)[0].double()
    values = torch.linalg.eigvalsh(problem.matrix.double() @ h @ problem.matrix.double().T)
    best = float(values[:-8].sum() / values.sum())
    assert problem.relative_error(effective_matrix(module, problem.geometry)) == pytest.approx(best, rel=0.05)


def test_both_ways_to_the_leading_outputs_agree() -> None:
    problem, _ = real("layer3.1.conv2")
    tall = problem.matrix.T.contiguous()  # more rows than columns
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(64, 64, generator=generator)
    h = root @ root.T + 64 * torch.eye(64)
    found = leading_outputs(tall, h, 8)
    exact = torch.linalg.eigh(tall @ h @ tall.T).eigenvectors[:, -8:]
    assert torch.allclose(found @ found.T, exact @ exact.T, atol=1e-3)


@pytest.mark.parametrize("name", [n for n in GEOMETRIES if n != "embedding"])
def test_second_stage_hessians_are_those_of_its_inputs(name: str) -> None:
    problem, inputs = synthetic(name)
    for choice in (c for c in structures_of(problem.geometry) if c.method is Method.FACTORIZE and c.level == 0.5):
        structure = restructure(problem, choice)
        last = structure.stages[-1].problem
        module = realise(structure)
        assert isinstance(module, torch.nn.Sequential)
        seen = module[:-1](inputs)
        rows = seen.movedim(1, -1).reshape(-1, seen.shape[1]) if seen.dim() > 2 else seen
        grouped = rows.reshape(len(rows), last.geometry.groups, -1).transpose(0, 1)
        measured = grouped.transpose(1, 2) @ grouped / len(rows)
        difference = (measured - last.hessian).norm() / measured.norm()
        assert float(difference) < 0.1, f"{choice}: {float(difference)}"  # H is sampled, the inputs are not


def test_embedding_factors_weigh_frequent_tokens() -> None:
    problem, _ = synthetic("embedding")
    module = realise(restructure(problem, Choice(Method.FACTORIZE, Granularity.LAYER, 0.25)))
    ours = problem.relative_error(effective_matrix(module, problem.geometry))
    assert ours < 0.95 * problem.relative_error(_truncated(problem.matrix, 12))
