from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from grainwise.methods.hessian import HessianAccumulator, sampling_stride
from grainwise.methods.problem import LayerProblem, StageProblem
from grainwise.methods.quantize import quantize
from grainwise.methods.storage import CENTRE, spread_scales
from grainwise.plan.choices import NONE, Choice, Granularity, Method
from grainwise.plan.layers import Kind
from grainwise.plan.shapes import stages
from tests.methods.samples import GEOMETRIES, sample_inputs, smooth_pictures, synthetic


@pytest.mark.parametrize("name", [n for n, g in GEOMETRIES.items() if g.kind is Kind.CONV2D])
def test_equals_unfolding(name: str) -> None:
    g = GEOMETRIES[name]
    x = sample_inputs(g)[:6]
    accumulator = HessianAccumulator(g, positions=10**9)
    accumulator.update(x[:4])
    accumulator.update(x[4:])
    columns = F.unfold(x, g.kernel, g.dilation, g.padding, g.stride).reshape(len(x), g.groups, g.fan_in, -1)
    expected = torch.einsum("bgkl,bgml->gkm", columns, columns) / (len(x) * columns.shape[-1])
    assert torch.allclose(accumulator.hessian(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_energy_is_that_of_the_outputs(name: str) -> None:
    problem, inputs = synthetic(name)
    g = problem.geometry
    accumulator = HessianAccumulator(g, positions=10**9)
    accumulator.update(inputs)
    match g.kind:
        case Kind.CONV2D:
            outputs = F.conv2d(inputs, problem.weight, None, g.stride, g.padding, g.dilation, g.groups).flatten(2)
        case Kind.CONV1D:
            outputs = F.conv1d(inputs, problem.weight, None, g.stride, g.padding, g.dilation, g.groups)
        case Kind.LINEAR:
            outputs = F.linear(inputs, problem.weight)[..., None]
        case Kind.EMBEDDING:
            outputs = F.embedding(inputs, problem.weight).transpose(1, 2)
    from grainwise.methods.problem import energy

    measured = float(outputs.square().sum()) / (outputs.numel() / g.outputs)
    assert energy(problem.matrix, accumulator.hessian()) == pytest.approx(measured, rel=1e-3)


def test_sampled_positions_stand_for_all() -> None:
    g = GEOMETRIES["conv2d stride 2"]
    x = torch.cat([sample_inputs(g)] * 4)
    few, all_positions = HessianAccumulator(g, positions=700), HessianAccumulator(g, positions=10**9)
    for batch in x.split(32):
        few.update(batch)
        all_positions.update(batch)
    assert few.count <= 4 * 700 < all_positions.count
    difference = (few.hessian() - all_positions.hessian()).norm() / all_positions.hessian().norm()
    assert float(difference) < 0.1


def test_layers_of_few_inputs_are_gathered_on_fewer_positions() -> None:
    g = GEOMETRIES["depthwise"]
    x = torch.cat([sample_inputs(g)] * 4)
    few, all_positions = HessianAccumulator(g), HessianAccumulator(g, positions=10**9)
    for batch in x.split(32):
        few.update(batch)
        all_positions.update(batch)
    assert few.count <= 4 * 256 < all_positions.count
    assert float((few.hessian() - all_positions.hessian()).norm() / all_positions.hessian().norm()) < 0.15


@given(st.integers(1, 10**6), st.integers(1, 5000), st.integers(1, 5000))
def test_stride_is_coprime_and_within_the_limit(total: int, period: int, limit: int) -> None:
    step = sampling_stride(total, period, limit)
    assert math.gcd(step, period) == 1 and math.ceil(total / step) <= limit


def test_linear_takes_sequences() -> None:
    g = GEOMETRIES["linear"]
    x = sample_inputs(g)
    flat, sequences = HessianAccumulator(g), HessianAccumulator(g)
    flat.update(x)
    sequences.update(x.reshape(8, 4, 16, 64))
    assert torch.allclose(flat.hessian(), sequences.hessian(), atol=1e-5)


def test_few_rows_are_trusted_less() -> None:
    """A layer of 64 inputs that saw 32 samples, in 4 bits: less error on other samples, more on the ones it saw."""
    g = GEOMETRIES["linear"]
    x = smooth_pictures(4096, 64).relu()
    seen, others = HessianAccumulator(g), HessianAccumulator(g)
    seen.update(x[:32])
    others.update(x[32:])
    weight = torch.randn(g.weight_shape, generator=torch.Generator().manual_seed(1))
    bias = torch.zeros(g.outputs) if g.bias else None

    def errors(hessian: Tensor) -> list[float]:
        """Of the layer that is fitted to `hessian`, on what was seen and on others."""
        fitted = LayerProblem(g, weight, bias, hessian)
        choice = Choice(Method.QUANTIZE, Granularity.CHANNEL, 4)
        found = quantize(StageProblem(fitted, stages(g, NONE)[0]), choice)
        values = (found.codes.float() - CENTRE[4]) * spread_scales(found.scale.float(), g, Granularity.CHANNEL)
        on = (LayerProblem(g, weight, bias, accumulator.hessian()) for accumulator in (seen, others))
        return [problem.relative_error(values) for problem in on]

    plain, shrunk = errors(seen.hessian()), errors(seen.shrunk())
    assert shrunk[0] > plain[0] and shrunk[1] < 0.9 * plain[1]
    assert torch.equal(seen.shrunk().diagonal(dim1=1, dim2=2), seen.hessian().diagonal(dim1=1, dim2=2))
    many = (others.shrunk() - others.hessian()).norm() / others.hessian().norm()
    assert many < 0.01


def test_refusals() -> None:
    accumulator = HessianAccumulator(GEOMETRIES["linear"])
    with pytest.raises(ValueError, match="no inputs were seen"):
        accumulator.hessian()
    with pytest.raises(ValueError, match="do not fit"):
        accumulator.update(torch.zeros(4, 63))
    with pytest.raises(ValueError, match="do not fit"):
        HessianAccumulator(GEOMETRIES["conv1d"]).update(torch.zeros(4, 11, 30))
