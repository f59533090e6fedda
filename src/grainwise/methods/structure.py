"""The entry points: a layer problem to its structure, and a structure at a precision to a deployable module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from grainwise.methods.chain import adapted, first_map, next_map, wanted_of
from grainwise.methods.distill import student
from grainwise.methods.factorize import low_rank, low_rank_blocks, tucker
from grainwise.methods.ghost import ghost
from grainwise.methods.layers import Ghost, filled_stage
from grainwise.methods.problem import LayerProblem, StageProblem, Structure
from grainwise.methods.prune import prune_tiles, prune_weights
from grainwise.methods.quantize import quantize
from grainwise.plan import shapes
from grainwise.plan.choices import NONE, Choice, Granularity, Method
from grainwise.plan.layers import Kind

__all__ = ["StageProblem", "Structure", "realise", "restructure"]


def _plain(problem: LayerProblem, choice: Choice) -> Structure:
    """One stage: the layer itself, whose widths the caller has already cut where `choice` acts through them."""
    (stage,) = shapes.stages(problem.geometry, choice)
    return Structure((StageProblem(problem, stage),))


RESTRUCTURERS: dict[tuple[Method, Granularity | None], Callable[[LayerProblem, Choice], Structure]] = {
    (Method.NONE, None): _plain,
    (Method.PRUNE, Granularity.LAYER): prune_weights,
    (Method.PRUNE, Granularity.BLOCK): prune_tiles,
    (Method.PRUNE, Granularity.CHANNEL): _plain,
    (Method.FACTORIZE, Granularity.LAYER): low_rank,
    (Method.FACTORIZE, Granularity.BLOCK): low_rank_blocks,
    (Method.FACTORIZE, Granularity.CHANNEL): tucker,
    (Method.DISTILL, Granularity.LAYER): student,
    (Method.DISTILL, Granularity.BLOCK): _plain,
}
"""Every structural choice but `distill/channel`, which alone needs a sample of inputs."""


@torch.no_grad()
def restructure(problem: LayerProblem, choice: Choice, inputs: Tensor | None = None) -> Structure:
    """What `choice` makes of a layer: stages of exactly the shapes of `plan.shapes.stages`.

    inputs: a sample of the layer's inputs, needed by `distill/channel` alone.
    Raises ValueError when the layer does not take the choice.
    """
    if (choice.method, choice.granularity) == (Method.DISTILL, Granularity.CHANNEL):
        if inputs is None:
            raise ValueError(f"{choice} needs a sample of the layer's inputs")
        return ghost(problem, choice, inputs)
    if choice.method is Method.QUANTIZE:
        raise ValueError(f"{choice} is a precision, not a structure")
    structure = RESTRUCTURERS[choice.method, choice.granularity](problem, choice)
    return replace(structure, whole=problem) if len(structure.stages) > 1 else structure


@torch.no_grad()
def realise(structure: Structure, precision: Choice = NONE) -> nn.Module:
    """The deployable module: an ordinary layer, `nn.Sequential` of stages, or a `Ghost`.

    Raises ValueError when `precision` is a structure.
    """
    if precision.method not in (Method.NONE, Method.QUANTIZE):
        raise ValueError(f"{precision} is a structure, not a precision")
    if precision.method is Method.NONE:
        layers = [_float_module(stage) for stage in structure.stages]
    elif structure.whole is not None:
        layers = _quantised_chain(structure.stages, structure.whole, precision)
    else:
        layers = [_quantised(stage, precision)[0] for stage in structure.stages]
    if structure.source is not None and structure.order is not None:
        primary, cheap = layers
        dim = -1 if structure.stages[0].problem.geometry.kind is Kind.LINEAR else 1
        module = Ghost(primary, cheap, len(structure.source), len(structure.order), dim)
        module.source.copy_(structure.source)
        module.order.copy_(structure.order)
        return module
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _float_module(stage: StageProblem) -> nn.Module:
    return filled_stage(stage.stage, NONE, stage.problem.matrix, support=stage.support, bias=stage.problem.bias)


def _quantised(stage: StageProblem, precision: Choice) -> tuple[nn.Module, Tensor]:
    """A quantised stage's module, and its weight matrix `[R, C]` as it is read back."""
    found = quantize(stage, precision)
    bias = stage.problem.bias
    module = filled_stage(stage.stage, precision, found.codes, scale=found.scale, support=stage.support, bias=bias)
    assert isinstance(module.weight, Tensor)
    return module, module.weight.reshape(stage.problem.matrix.shape)


def _quantised_chain(stages: tuple[StageProblem, ...], whole: LayerProblem, precision: Choice) -> list[nn.Module]:
    """Each stage quantised for the inputs that the stages before it, quantised, really give."""
    module, matrix = _quantised(stages[0], precision)
    modules, seen = [module], first_map(whole, stages[0])
    for before, stage, wanted in zip(stages, stages[1:], wanted_of(stages, whole)[1:], strict=False):
        seen = next_map(seen, before, matrix, whole.geometry)
        module, matrix = _quantised(adapted(stage, wanted, seen, whole), precision)
        modules.append(module)
    return modules
