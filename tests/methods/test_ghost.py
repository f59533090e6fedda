from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from grainwise.methods.ghost import layer_outputs
from grainwise.methods.problem import LayerProblem
from grainwise.methods.structure import realise, restructure
from grainwise.plan.choices import NONE, Choice, Granularity, Method
from tests.methods.samples import real, synthetic


def _choice(level: float) -> Choice:
    return Choice(Method.DISTILL, Granularity.CHANNEL, level)


def _share(problem: LayerProblem, inputs: torch.Tensor, outputs: torch.Tensor) -> float:
    wanted = realise(restructure(problem, NONE))(inputs)
    return float((outputs - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("name", ["layer1.1.conv1", "layer2.0.conv1", "layer2.0.shortcut.0", "fc"])
def test_better_than_keeping_the_largest_channels(name: str) -> None:
    problem, inputs = real(name)
    module = realise(restructure(problem, _choice(0.5), inputs))
    wanted = realise(restructure(problem, NONE))(inputs)
    energy = wanted.transpose(0, 1).flatten(1).square().mean(1)
    primaries = len(module.order) - len(module.source)  # type: ignore[arg-type]
    dropped = energy.sort().values[: problem.geometry.outputs - primaries].sum() / energy.sum()
    assert _share(problem, inputs, module(inputs)) < (0.95 if name == "fc" else 0.8) * float(dropped)


def test_primaries_pass_unchanged_and_in_place() -> None:
    problem, inputs = real("layer2.0.conv1")
    structure = restructure(problem, _choice(0.5), inputs)
    assert structure.order is not None and structure.source is not None
    kept = (structure.order < 16).nonzero()[:, 0]
    outputs, wanted = (realise(s)(inputs[:2]) for s in (structure, restructure(problem, NONE)))
    assert torch.allclose(outputs[:, kept], wanted[:, kept], atol=1e-5)
    assert structure.order.sort().values.tolist() == list(range(32)) and int(structure.source.max()) < 16


def test_planted_ghosts_are_found() -> None:
    for name in ("conv2d stride 2", "conv1d", "linear"):
        problem, inputs = synthetic(name)
        g = problem.geometry
        half = g.outputs // 2
        scale = torch.linspace(0.5, 0.9, half).reshape(-1, *[1] * (problem.weight.dim() - 1))
        weight = torch.cat([problem.weight[:half], problem.weight[:half] * scale])
        planted = LayerProblem(g, weight, problem.bias, problem.hessian)
        module = realise(restructure(planted, _choice(0.5), inputs))
        assert _share(planted, inputs, module(inputs)) < 1e-4


def test_the_sample_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, inputs = synthetic("conv2d stride 2")
    monkeypatch.setattr("grainwise.methods.ghost.OUTPUTS_AT_ONCE", 5 * 32 * 49)
    assert torch.equal(layer_outputs(problem, inputs), F.conv2d(inputs[:5], problem.weight, None, 2, 1))


def test_cheap_maps_see_their_own_inputs_hessian() -> None:
    problem, inputs = synthetic("pointwise")
    structure = restructure(problem, _choice(0.5), inputs)
    assert structure.source is not None
    primary = realise(restructure(structure.stages[0].problem, NONE))(inputs)
    columns = F.unfold(primary[:, structure.source[:1]], 3, padding=1).transpose(0, 1).flatten(1)
    found = structure.stages[1].problem.hessian[0]
    assert torch.allclose(found, columns @ columns.T / columns.shape[1], rtol=1e-3, atol=1e-4 * float(found.max()))
