from __future__ import annotations

from functools import cache
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn

from grainwise.methods.modules import effective_matrix
from grainwise.methods.problem import LayerProblem
from grainwise.methods.storage import PackedWeight, unpack_bits
from grainwise.methods.structure import Structure, realise, restructure
from grainwise.plan import shapes
from grainwise.plan.choices import LEVELS, NONE, PRECISIONS, STRUCTURES, Choice, Granularity, Method
from tests.methods.samples import GEOMETRIES, real, structures_of, synthetic

REAL_LAYER = "layer2.0.conv1"  # 16 to 32 channels, 3x3, stride 2
SOME_PRECISIONS = (
    NONE,
    Choice(Method.QUANTIZE, Granularity.LAYER, 2),
    Choice(Method.QUANTIZE, Granularity.BLOCK, 4),
    Choice(Method.QUANTIZE, Granularity.CHANNEL, 8),
)
NAMES = [REAL_LAYER, *(name for name in GEOMETRIES if name != "conv2d stride 2")]


def _layer(name: str) -> tuple[LayerProblem, Tensor]:
    return synthetic(name) if name in GEOMETRIES else real(name)


@cache
def cell(name: str, choice: Choice, precision: Choice = NONE) -> nn.Module:
    return realise(_structure(name, choice), precision)


@cache
def _structure(name: str, choice: Choice) -> Structure:
    problem, inputs = _layer(name)
    return restructure(problem, choice, inputs)


def relative_error(problem: LayerProblem, inputs: Tensor, module: nn.Module) -> float:
    """Squared error of the outputs over their energy, on the inputs themselves: also defined for ghost modules."""
    wanted = realise(restructure(problem, NONE))(inputs)
    return float((module(inputs) - wanted).square().sum() / wanted.square().sum())


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_stored_in_exactly_the_planned_bytes(name: str) -> None:
    g = _layer(name)[0].geometry
    for choice in structures_of(g):
        plan = shapes.stages(g, choice)
        assert tuple(s.stage for s in _structure(name, choice).stages) == plan
        for precision in PRECISIONS if name == REAL_LAYER else SOME_PRECISIONS:
            module = cell(name, choice, precision)
            planned = sum(sum(shapes.stage_tensors(s, precision).values()) for s in plan)
            assert _bytes(module) == planned + sum(shapes.routing_tensors(g, choice).values()), f"{choice}, {precision}"
            _check_codes(module)


def _check_codes(module: nn.Module) -> None:
    """Every packed weight really has no more than 2^bits values for each scale, and none off its support."""
    for packed in (m for m in module.modules() if isinstance(m, PackedWeight)):
        dense = packed.unpack()
        assert bool(dense.isfinite().all())
        assert int((dense != 0).sum()) <= packed.kept
        if packed.bits:
            codes = unpack_bits(packed.weight, packed.bits, packed.kept)
            assert len(codes.unique()) <= 2**packed.bits
            if packed.scale is not None and packed.scale.numel() == 1:
                assert len(dense.unique()) <= 2**packed.bits + (packed.support is not None)


@pytest.mark.parametrize("name", [*NAMES, "layer2.0.shortcut.0"])
def test_error_grows_with_the_level(name: str) -> None:
    problem, inputs = _layer(name)
    legal = structures_of(problem.geometry)
    for method, granularity in product((Method.PRUNE, Method.FACTORIZE, Method.DISTILL), Granularity):
        levels = [c for level in LEVELS[method] if (c := Choice(method, granularity, level)) in legal]
        errors = [relative_error(problem, inputs, cell(name, c)) for c in levels]
        for (milder, a), (harder, b) in pairwise(zip(levels, errors, strict=True)):
            same = shapes.stages(problem.geometry, milder) == shapes.stages(problem.geometry, harder)
            assert a == b if same else a < b, f"{milder}: {a}, {harder}: {b}"
        assert all(e < 1 for e in errors)


@pytest.mark.parametrize("name", [REAL_LAYER, "embedding"])
def test_precision_adds_to_structure(name: str) -> None:
    problem, inputs = _layer(name)
    for choice in structures_of(problem.geometry):
        base = relative_error(problem, inputs, cell(name, choice))
        for granularity in Granularity:
            errors = [
                relative_error(problem, inputs, cell(name, choice, Choice(Method.QUANTIZE, granularity, bits)))
                for bits in (8, 4, 2)
            ]
            assert errors[0] < base + 2e-3 and errors[1] < base + 0.06 and errors[2] < base + 0.3, f"{choice}: {errors}"
            assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("name", NAMES)
def test_modules_do_what_their_matrix_says(name: str) -> None:
    problem, inputs = _layer(name)
    for choice in structures_of(problem.geometry):
        if (choice.method, choice.granularity) == (Method.DISTILL, Granularity.CHANNEL):
            continue
        module = cell(name, choice, SOME_PRECISIONS[2])
        matrix = effective_matrix(module, problem.geometry)
        dense = LayerProblem(problem.geometry, matrix.reshape(problem.weight.shape), problem.bias, problem.hessian)
        expected = realise(restructure(dense, NONE))(inputs[:4])
        assert torch.allclose(module(inputs[:4]), expected, atol=1e-4 * float(expected.abs().max()))


def test_widths_are_the_callers_business() -> None:
    problem, _ = synthetic("conv2d stride 2")
    for choice in (c for c in STRUCTURES if c not in structures_of(problem.geometry)):
        assert torch.equal(realise(restructure(problem, choice)).weight, problem.weight)  # type: ignore[arg-type]


def test_refusals() -> None:
    problem, _ = synthetic("linear")
    with pytest.raises(ValueError, match="needs a sample"):
        restructure(problem, Choice(Method.DISTILL, Granularity.CHANNEL, 0.5))
    with pytest.raises(ValueError, match="is a precision"):
        restructure(problem, PRECISIONS[1])
    with pytest.raises(ValueError, match="is a structure"):
        realise(restructure(problem, NONE), STRUCTURES[1])
    with pytest.raises(ValueError, match="no core"):
        restructure(problem, Choice(Method.FACTORIZE, Granularity.CHANNEL, 0.5))
    grouped, inputs = synthetic("grouped")
    for choice in (c for c in STRUCTURES if c.method in (Method.FACTORIZE, Method.DISTILL)):
        if (choice.method, choice.granularity) != (Method.DISTILL, Granularity.BLOCK):
            with pytest.raises(ValueError, match="groups"):
                restructure(grouped, choice, inputs)


def test_the_same_problem_gives_the_same_module() -> None:
    problem, inputs = real(REAL_LAYER)
    for choice in structures_of(problem.geometry)[::3]:
        one, two = (realise(restructure(problem, choice, inputs), PRECISIONS[3]).state_dict() for _ in range(2))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_nothing_is_nan_for_a_dead_layer() -> None:
    for name in ("conv2d stride 2", "linear", "embedding", "depthwise"):
        problem, inputs = synthetic(name)
        g = problem.geometry
        dead = LayerProblem(g, torch.zeros(g.weight_shape), problem.bias, torch.zeros_like(problem.hessian))
        unseen = LayerProblem(g, problem.weight, problem.bias, torch.zeros_like(problem.hessian))
        for choice, case in product(structures_of(g)[::2], (dead, unseen)):
            for precision in (NONE, PRECISIONS[3], PRECISIONS[8]):
                assert bool(realise(restructure(case, choice, inputs), precision)(inputs[:2]).isfinite().all())
