from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grainwise.methods.distill import LOSSES, StudentOptions, block_error, train_block
from grainwise.methods.modules import effective_matrix
from grainwise.methods.problem import LayerProblem
from grainwise.methods.structure import realise, restructure
from grainwise.plan.choices import Choice, Granularity, Method
from grainwise.plan.shapes import depth_multiplier
from tests.methods.samples import real, smooth_pictures, synthetic


def _plain_separable(problem: LayerProblem, multiplier: int) -> Tensor:
    """SVD of each input channel's kernel (Guo et al. 2018), blind to the inputs."""
    kernels = problem.weight.flatten(2).transpose(0, 1)
    u, s, vh = torch.linalg.svd(kernels, full_matrices=False)
    cut = u[:, :, :multiplier] * s[:, None, :multiplier] @ vh[:, :multiplier]
    return cut.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("level", [0.5, 0.25])
@pytest.mark.parametrize("name", ["layer1.1.conv1", "layer2.0.conv1", "layer3.1.conv2"])
def test_student_beats_the_plain_separable_fit(name: str, level: float) -> None:
    problem, _ = real(name)
    structure = restructure(problem, Choice(Method.DISTILL, Granularity.LAYER, level))
    multiplier = depth_multiplier(problem.geometry, level)
    ours = problem.relative_error(effective_matrix(realise(structure), problem.geometry))
    assert ours < 0.8 * problem.relative_error(_plain_separable(problem, multiplier))


def test_one_tap_takes_a_bottleneck() -> None:
    for problem, _ in (real("layer2.0.shortcut.0"), synthetic("linear")):
        student = realise(restructure(problem, Choice(Method.DISTILL, Granularity.LAYER, 0.5)))
        pair = realise(restructure(problem, Choice(Method.FACTORIZE, Granularity.LAYER, 0.5)))
        found, expected = (effective_matrix(m, problem.geometry) for m in (student, pair))
        assert torch.equal(found, expected)


def test_a_separable_layer_is_found_again() -> None:
    problem, _ = synthetic("conv2d stride 2")
    g = problem.geometry
    generator = torch.Generator().manual_seed(5)
    multiplier = depth_multiplier(g, 0.25)
    filters = torch.randn(16, multiplier, 9, generator=generator)
    mixing = torch.randn(32, 16, multiplier, generator=generator)
    weight = torch.einsum("oim,imt->oit", mixing, filters).reshape(g.weight_shape)
    planted = LayerProblem(g, weight, None, problem.hessian)
    module = realise(restructure(planted, Choice(Method.DISTILL, Granularity.LAYER, 0.25)))
    assert planted.relative_error(effective_matrix(module, g)) < 1e-4


def _block(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(8, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 8, 1)
    )


def _pairs() -> list[tuple[Tensor, Tensor]]:
    teacher = _block(16).eval()
    x = smooth_pictures(64, 8, 8, 8)
    return [(part, teacher(part)) for part in x.split(16)]


@pytest.mark.parametrize("loss", LOSSES)
def test_training_a_block_lowers_its_error_and_repeats(loss: str) -> None:
    pairs = _pairs()
    start = _block(8).eval()
    students = [copy.deepcopy(start) for _ in range(2)]
    before_random = torch.random.get_rng_state()
    errors = [train_block(s, pairs, StudentOptions(60, loss, 1e-2), seed=3) for s in students]
    assert errors[0] == errors[1] == pytest.approx(block_error(students[0], pairs), rel=1e-6)
    assert errors[0] < 0.5 * block_error(start, pairs)
    assert not students[0].training and torch.equal(before_random, torch.random.get_rng_state())


@pytest.mark.parametrize("rate", [1e6, float("inf")])
def test_training_that_diverges_is_taken_back(rate: float) -> None:
    pairs = _pairs()
    student = _block(8).eval()
    train_block(student, pairs, StudentOptions(30, learning_rate=1e-2), seed=0)
    start = copy.deepcopy(student.state_dict())
    before = block_error(student, pairs)
    assert train_block(student, pairs, StudentOptions(5, learning_rate=rate), seed=0) == pytest.approx(before)
    assert all(torch.equal(start[key], value) for key, value in student.state_dict().items())


def test_no_steps_or_parameters_change_nothing() -> None:
    pairs = _pairs()
    frozen = _block(8).requires_grad_(False)
    assert train_block(frozen, pairs, StudentOptions(5, learning_rate=1e-2), seed=0) == block_error(frozen, pairs)
    bad = [(x, y * float("nan")) for x, y in pairs]
    student = _block(8)
    start = copy.deepcopy(student.state_dict())
    train_block(student, bad, StudentOptions(3, learning_rate=1e-2), seed=0)
    assert all(torch.equal(start[key], value) for key, value in student.state_dict().items())


def test_filters_are_as_large_as_their_effect() -> None:
    problem, _ = real("layer2.0.conv1")
    _, mixing = restructure(problem, Choice(Method.DISTILL, Granularity.LAYER, 0.5)).stages
    norms = mixing.problem.matrix.norm(dim=0)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-3)


@pytest.mark.parametrize("wrong", [{"loss": "cubed"}, {"steps": -1}, {"batches": 0}, {"learning_rate": float("nan")}])
def test_options_of_training_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a student"):
        StudentOptions(**wrong)
