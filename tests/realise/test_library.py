from __future__ import annotations

import torch

from grainwise.methods.problem import LayerProblem, damped, energy
from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.plan.layers import Geometry, Kind
from grainwise.realise.library import VariantLibrary
from tests.export.candidates import quantised
from tests.recover.candidates import library


def test_a_quick_library_makes_up_for_removed_channels_alone() -> None:
    full = library()
    quick = VariantLibrary(full.reference, quick=True)
    layer = full.reference.graph.layer("block.0")
    kept = {"stem": full.kept_units("stem", 8)}
    assert torch.equal(quick.problem(layer, kept).matrix, full.problem(layer, kept).matrix)
    dense = full.reference.problem("block.0")
    pruned = Entry(Choice(Method.PRUNE, Granularity.LAYER, 0.5))
    left = quick.layer(layer, pruned, {}).weight
    assert torch.equal(left, dense.weight * (left != 0))
    errors = {}
    for name, found in {"full": full, "quick": quick}.items():
        errors[name] = [dense.relative_error(found.layer(layer, entry, {}).weight) for entry in ENTRIES]
    assert all(best < fast for best, fast in zip(errors["full"], errors["quick"], strict=True))
    assert all(fast < 0.9 for fast in errors["quick"])


ENTRIES = [Entry(Choice(Method.PRUNE, Granularity.LAYER, 0.5)), Entry(precision=quantised(4))]


def test_a_diagonal_is_the_same_problem_without_what_its_inputs_have_in_common() -> None:
    """By hand: W = (1, 2), H = ((2, 1), (1, 1)): W H W' = 10, and 2 + 4 = 6 by the diagonal alone."""
    hessian = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]])
    problem = LayerProblem(Geometry(Kind.LINEAR, 2, 1), torch.tensor([[1.0, 2.0]]), None, hessian)
    diagonal = problem.uncompensated()
    assert (energy(problem.matrix, hessian), energy(problem.matrix, diagonal.hessian)) == (10.0, 6.0)
    assert torch.equal(diagonal.curvature(), problem.curvature())
    assert torch.allclose(damped(diagonal.hessian), damped(hessian).diagonal(dim1=1, dim2=2))
    assert diagonal.uncompensated() is diagonal
