"""The entry points: a layer problem to its structure, and a structure at a precision to a deployable module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from grainwise.methods.activations import EightBit, StaticConv1d, StaticConv2d
from grainwise.methods.chain import adapted, first_map, next_map, wanted_of
from grainwise.methods.distill import student
from grainwise.methods.factorize import low_rank, low_rank_blocks, tucker
from grainwise.methods.ghost import ghost
from grainwise.methods.layers import Ghost, empty_stage, filled_stage, realisation_of
from grainwise.methods.problem import LayerProblem, StageProblem, Structure
from grainwise.methods.prune import prune_tiles, prune_weights
from grainwise.methods.quantize import quantize
from grainwise.methods.storage import PackedWeight, encode_support
from grainwise.plan import shapes
from grainwise.plan.choices import NONE, Choice, Granularity, Method
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.target import PACKED, Realisation, Target

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
def realise(structure: Structure, precision: Choice = NONE, target: Target = PACKED) -> nn.Module:
    """The deployable module: an ordinary layer, `nn.Sequential` of stages, or a `Ghost`.

    Between stages that run in 8 bits stands an `EightBit`. Raises ValueError when `precision` is a structure.
    """
    if precision.method not in (Method.NONE, Method.QUANTIZE):
        raise ValueError(f"{precision} is a structure, not a precision")
    make = _Maker(precision, target, routed=structure.source is not None)
    if precision.method is Method.QUANTIZE and structure.whole is not None:
        layers = make.chain(structure.stages, structure.whole)
    else:
        layers = [make.stage(stage)[0] for stage in structure.stages]
    if structure.source is not None and structure.order is not None:
        primary, cheap = layers
        dim = -1 if structure.stages[0].problem.geometry.kind is Kind.LINEAR else 1
        module = Ghost(primary, cheap, len(structure.source), len(structure.order), dim)
        module.source.copy_(structure.source)
        module.order.copy_(structure.order)
        return module
    return layers[0] if len(layers) == 1 else nn.Sequential(*_joined(layers))


@torch.no_grad()
def blank(geometry: Geometry, structure: Choice, precision: Choice, target: Target) -> nn.Module:
    """A module of the form that `realise` gives an entry, with scales 1 and contents 0: for what form alone decides."""
    routed = (structure.method, structure.granularity) == (Method.DISTILL, Granularity.CHANNEL)
    layers = []
    for stage in shapes.stages(geometry, structure):
        layer = empty_stage(stage, precision, target.realisation(stage, precision, routed=routed))
        if isinstance(packed := getattr(layer, "packed", None), PackedWeight):
            if packed.scale is not None:
                packed.scale.fill_(1.0)
            if packed.support is not None:  # the first columns of every row, or the first weights
                g = stage.geometry
                first = torch.arange(g.columns).expand(g.rows, -1) if stage.tile_rows else torch.arange(g.weights)
                kept = packed.kept // g.rows if stage.tile_rows else packed.kept
                packed.support.copy_(encode_support((first < kept).reshape(g.rows, g.columns), stage))
        if isinstance(layer, StaticConv1d | StaticConv2d):
            layer.x_scale.fill_(1.0)
            layer.y_scale.fill_(1.0)
        layers.append(layer.requires_grad_(False))
    if not routed:
        return layers[0] if len(layers) == 1 else nn.Sequential(*_joined(layers))
    (primary, cheap), ghosts = layers, shapes.stages(geometry, structure)[1].geometry.outputs
    return Ghost(primary, cheap, ghosts, geometry.outputs, -1 if geometry.kind is Kind.LINEAR else 1)


def _joined(layers: list[nn.Module]) -> Iterator[nn.Module]:
    """The layers, with an `EightBit` between two that run in 8 bits of fixed range."""
    for before, layer in zip([None, *layers], layers, strict=False):
        if before is not None and {realisation_of(before), realisation_of(layer)} == {Realisation.STATIC}:
            yield EightBit()
        yield layer


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes stages' modules at one precision for one target."""

    precision: Choice
    target: Target
    routed: bool

    def stage(self, stage: StageProblem) -> tuple[nn.Module, Tensor]:
        """A stage's module, and its weight matrix `[R, C]` as it is read back."""
        how = self.target.realisation(stage.stage, self.precision, routed=self.routed)
        bias = stage.problem.bias
        if self.precision.method is Method.NONE:
            matrix = stage.problem.matrix
            return filled_stage(stage.stage, NONE, matrix, support=stage.support, bias=bias, realisation=how), matrix
        assert self.precision.level is not None
        found = quantize(stage, self.precision, self.target.largest_code(how, int(self.precision.level)))
        module = filled_stage(
            stage.stage,
            self.precision,
            found.codes,
            scale=found.scale,
            support=stage.support,
            bias=bias,
            realisation=how,
        )
        assert isinstance(module.weight, Tensor)
        return module, module.weight.reshape(stage.problem.matrix.shape)

    def chain(self, stages: tuple[StageProblem, ...], whole: LayerProblem) -> list[nn.Module]:
        """Each stage quantised for the inputs that the stages before it, quantised, really give."""
        module, matrix = self.stage(stages[0])
        modules, seen = [module], first_map(whole, stages[0])
        for before, stage, wanted in zip(stages, stages[1:], wanted_of(stages, whole)[1:], strict=False):
            seen = next_map(seen, before, matrix, whole.geometry)
            module, matrix = self.stage(adapted(stage, wanted, seen, whole))
            modules.append(module)
        return modules
