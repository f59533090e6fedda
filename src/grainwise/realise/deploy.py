"""From a built candidate to exactly what its file computes: norms folded, ranges set, biases on the integer grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from grainwise.graph.forward import Forward
from grainwise.graph.skeleton import JOINS, POINTS, Skeleton, Sum
from grainwise.methods.activations import EightBit, EightBitSum, StaticConv1d, StaticConv2d
from grainwise.methods.layers import Ghost, realisation_of, refresh, scale_outputs
from grainwise.methods.storage import PackedWeight
from grainwise.plan.target import Realisation
from grainwise.realise.norms import FrozenNorm, Standard, freeze_norms, reestimate_norms

LARGEST_BIAS = 2.0**30  # of an int32 sum, so that products still fit beside it


def stages_of(module: nn.Module) -> tuple[nn.Module, ...]:
    """The stages of a realised layer, `EightBit`s between them included."""
    if isinstance(module, Ghost):
        return module.primary, module.cheap
    return tuple(module) if isinstance(module, nn.Sequential) else (module,)


def static_layers(model: nn.Module, skeleton: Skeleton) -> tuple[str, ...]:
    """Layers of `model` that read and write activations of 8 bits."""
    return tuple(
        name
        for name in skeleton.units
        if any(realisation_of(stage) is Realisation.STATIC for stage in stages_of(model.get_submodule(name)))
    )


def activate_points(model: nn.Module, skeleton: Skeleton, point: Callable[[str], EightBit]) -> None:
    """Put an `EightBit` at every point where the layers of `model` need one, in place. point: gives it by name."""
    for name in skeleton.active(static_layers(model, skeleton)):
        model.set_submodule(f"{POINTS}.{name}", point(name))


def deploy(
    model: nn.Module,
    skeleton: Skeleton,
    calibration: Sequence[Any],
    forward: Forward,
    standards: Sequence[Standard] | None = None,
) -> None:
    """Turn a built candidate, in place, into what its file computes.

    Batch norm is estimated on the calibration batches and folded into the layer before it; where that is no plain
    stage (a ghost module) it stays as a scale and a shift. Then the ranges of all 8-bit values are set on the same
    batches, and the biases of 8-bit kernels are rounded to the grid of their sums. standards: what the norms match on
    each batch (`build.standards_of`). An uncompressed network keeps the statistics that it has: pass no batches.
    """
    if calibration:
        reestimate_norms(model, calibration, forward, standards)
    fold_norms(model, skeleton)
    freeze_norms(model)
    set_ranges(model, skeleton, calibration, forward)


def set_ranges(model: nn.Module, skeleton: Skeleton, calibration: Sequence[Any], forward: Forward) -> None:
    """Set the ranges of all 8-bit values on the calibration batches and all that follows from them, in place: anew
    where they were set before.
    """
    for _, stage, _ in _static_stages(model, skeleton):
        stage.x_scale.zero_()
        stage.y_scale.zero_()
    for join in skeleton.joins:
        model.set_submodule(f"{JOINS}.{join.name}", Sum())
    points = [module for module in model.modules() if isinstance(module, EightBit)]
    for point in points:
        point.observe()
    with torch.no_grad():
        for batch in calibration if points else ():
            forward(model, batch)
        for point in points:
            point.settle()
        for source, stage, result in _static_stages(model, skeleton):
            _fix_grid(source, stage, result)
        _settle_sums(model, skeleton)


def fold_norms(model: nn.Module, skeleton: Skeleton) -> None:
    """Fold each batch norm that directly follows a layer into it, in place; the norm becomes an Identity."""
    for unit in skeleton.units.values():
        module = model.get_submodule(unit.layer)
        if unit.norm is None or isinstance(module, Ghost):
            continue
        norm = model.get_submodule(unit.norm)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        frozen = FrozenNorm.of(norm)
        scale_outputs(stages_of(module)[-1], frozen.weight, frozen.bias)
        model.set_submodule(unit.norm, nn.Identity())


def _static_stages(
    model: nn.Module, skeleton: Skeleton
) -> Iterator[tuple[EightBit, StaticConv1d | StaticConv2d, EightBit]]:
    """Every stage that runs in 8 bits of fixed range, between the points that it reads and writes."""
    for name in static_layers(model, skeleton):
        unit = skeleton.units[name]
        source, result = (model.get_submodule(f"{POINTS}.{point}") for point in (unit.source, unit.result))
        parts = (source, *stages_of(model.get_submodule(name)), result)
        for before, stage, after in zip(parts[:-1:2], parts[1::2], parts[2::2], strict=True):
            assert isinstance(before, EightBit) and isinstance(after, EightBit)
            assert isinstance(stage, StaticConv1d | StaticConv2d)
            yield before, stage, after


def _settle_sums(model: nn.Module, skeleton: Skeleton) -> None:
    """Round each sum of 8-bit values as its kernel does."""
    for join in skeleton.joins:
        points = [model.get_submodule(f"{POINTS}.{name}") for name in (*join.operands, join.result)]
        settled = [point for point in points if isinstance(point, EightBit)]
        if len(settled) == len(points):
            model.set_submodule(f"{JOINS}.{join.name}", EightBitSum(*settled))


def _fix_grid(source: EightBit, stage: StaticConv1d | StaticConv2d, result: EightBit) -> None:
    """Tell a stage the scales of its input and output, and round its bias to the grid of its sums."""
    stage.x_scale.copy_(source.scale)
    stage.y_scale.copy_(result.scale)
    if stage.bias is None:
        return
    packed = stage.packed
    assert isinstance(packed, PackedWeight) and packed.scale is not None
    # A channel whose weights all but vanish would need sums beyond int32: its scale is raised, the weights with it.
    least = stage.bias.abs() / (LARGEST_BIAS * source.scale) * (packed.scale / packed.row_scale())
    packed.scale.copy_(torch.maximum(packed.scale, (least if len(packed.scale) > 1 else least.max()).half()))
    refresh(stage)
    unit = source.scale * packed.row_scale()
    stage.bias.copy_((stage.bias / unit).round() * unit)
