"""Layers that the methods are tested on: those of the trained ResNet-20, and small ones of every other kind."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from examples import cifar10, resnet20
from grainwise.methods.hessian import POSITIONS, HessianAccumulator
from grainwise.methods.layers import geometry_of
from grainwise.methods.problem import LayerProblem
from grainwise.plan.choices import STRUCTURES, Choice, Granularity, Method
from grainwise.plan.layers import Geometry, Kind

PICTURES = 128
REAL = ("layer1.1.conv1", "layer2.0.conv1", "layer2.0.shortcut.0", "layer3.1.conv2", "fc")
GEOMETRIES = {
    "conv2d stride 2": Geometry(Kind.CONV2D, 16, 32, (3, 3), (2, 2), (1, 1), (1, 1)),
    "conv2d uneven": Geometry(Kind.CONV2D, 6, 20, (3, 5), (1, 2), (0, 2), (2, 1), bias=True),
    "conv1d": Geometry(Kind.CONV1D, 12, 24, (5,), (1,), (2,), (1,), bias=True),
    "depthwise": Geometry(Kind.CONV2D, 16, 16, (3, 3), (1, 1), (1, 1), (1, 1), groups=16),
    "depthwise x2": Geometry(Kind.CONV1D, 8, 16, (3,), (1,), (1,), (1,), groups=8, bias=True),
    "grouped": Geometry(Kind.CONV2D, 16, 32, (3, 3), (1, 1), (1, 1), (1, 1), groups=4, bias=True),
    "pointwise": Geometry(Kind.CONV2D, 32, 64, (1, 1), (1, 1), (0, 0), (1, 1)),
    "linear": Geometry(Kind.LINEAR, 64, 40, bias=True),
    "embedding": Geometry(Kind.EMBEDDING, 100, 48),
}


def smooth_pictures(count: int, channels: int, *size: int, seed: int = 0) -> Tensor:
    """Random pictures `[count, channels, *size]` whose neighbours and channels are correlated, as natural ones are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, *size, generator=generator)
    mixing = torch.randn(channels, channels, generator=generator) / channels**0.5
    x = torch.einsum("ij,bj...->bi...", mixing, x)
    for dim in range(2, 2 + len(size)):
        x = x + x.roll(1, dim) + x.roll(-1, dim)
    return x / x.std()


def pictures() -> Tensor:
    """CIFAR-10 training pictures when they are cached on this machine, else smooth random ones."""
    if (cifar10.cache_directory() / "cifar10.npz").exists():
        return cifar10.normalise(cifar10.load()["train_images"][:PICTURES])
    return smooth_pictures(PICTURES, 3, 32, 32)


def sample_inputs(geometry: Geometry) -> Tensor:
    """Inputs of a layer of this geometry: rectified smooth pictures or vectors, or tokens of unequal frequency."""
    match geometry.kind:
        case Kind.CONV2D:
            return smooth_pictures(32, geometry.inputs, 14, 14).relu()
        case Kind.CONV1D:
            return smooth_pictures(64, geometry.inputs, 30).relu()
        case Kind.LINEAR:
            return smooth_pictures(512, geometry.inputs).relu()
        case Kind.EMBEDDING:
            uniform = torch.rand(64, 20, generator=torch.Generator().manual_seed(0))
            return (uniform**3 * geometry.inputs).long()


def problem_of(geometry: Geometry, weight: Tensor, bias: Tensor | None, inputs: Tensor) -> LayerProblem:
    accumulator = HessianAccumulator(geometry, positions=POSITIONS)
    accumulator.update(inputs)
    return LayerProblem(geometry, weight, bias, accumulator.hessian())


@cache
def synthetic(name: str) -> tuple[LayerProblem, Tensor]:
    """(problem, inputs) of a layer of `GEOMETRIES` with random weights whose rows differ in size."""
    g = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(1)
    size = torch.rand(g.weight_shape[0], *[1] * (len(g.weight_shape) - 1), generator=generator) + 0.1
    weight = torch.randn(g.weight_shape, generator=generator) * size / g.columns**0.5
    bias = torch.randn(g.outputs, generator=generator) if g.bias else None
    inputs = sample_inputs(g)
    return problem_of(g, weight, bias, inputs), inputs


@cache
def real(name: str) -> tuple[LayerProblem, Tensor]:
    """(problem, inputs) of a layer of the trained ResNet-20 on pictures."""
    return _real_layers()[name]


@cache
def _real_layers() -> dict[str, tuple[LayerProblem, Tensor]]:
    model = resnet20.pretrained()
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]

        model.get_submodule(name).register_forward_pre_hook(hook)

    for name in REAL:
        keep(name)
    with torch.no_grad():
        model(pictures())
    found = {}
    for name in REAL:
        module = model.get_submodule(name)
        bias = None if module.bias is None else module.bias.detach()
        found[name] = problem_of(geometry_of(module), module.weight.detach(), bias, seen[name]), seen[name]
    return found


def structures_of(geometry: Geometry) -> list[Choice]:
    """Every structural choice that changes a layer of this geometry by itself, in the order of the vocabulary."""
    return [choice for choice in STRUCTURES if _takes(geometry, choice)]


def _takes(g: Geometry, choice: Choice) -> bool:
    match choice.method, choice.granularity:
        case (Method.PRUNE, Granularity.CHANNEL) | (Method.DISTILL, Granularity.BLOCK):
            return False
        case Method.FACTORIZE, Granularity.CHANNEL:
            return g.groups == 1 and g.taps > 1
        case Method.FACTORIZE, Granularity.BLOCK:
            return g.groups == 1 and ((g.rows % 4 == 0 and g.rows >= 16) or (g.rows % 2 == 0 and g.rows >= 8))
        case Method.FACTORIZE, _:
            return g.groups == 1
        case Method.PRUNE, Granularity.BLOCK:
            return g.rows % 4 == 0
        case Method.DISTILL, _:
            return g.groups == 1 and g.kind is not Kind.EMBEDDING
        case _:
            return True
