"""Trace a model into its `LayerGraph`: layers in execution order, couplings that were seen to work, blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from grainwise.graph.blocks import find_blocks
from grainwise.graph.couplings import find_couplings, link
from grainwise.graph.forward import Forward, default_forward
from grainwise.graph.proof import prove
from grainwise.graph.recording import LAYER_TYPES, Recording, record
from grainwise.graph.walk import export_program, walk
from grainwise.plan.layers import Coupling, Geometry, Kind, Layer, LayerGraph

NEVER_CALLED = "its module is never called: the weight is unused, or its parent reads it directly"


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own training flag restored outside."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _conv_padding(module: nn.Conv1d | nn.Conv2d) -> tuple[tuple[int, ...], str | None]:
    """Padding in numbers, and why it has none: 'same' needs an even total to be split into two equal sides."""
    zeros = (0,) * len(module.kernel_size)
    if module.padding == "valid":
        return zeros, None
    if not isinstance(module.padding, str):
        return tuple(module.padding), None
    totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(total % 2 for total in totals):
        return zeros, f"padding 'same' of kernel {tuple(module.kernel_size)} has two unequal sides"
    return tuple(total // 2 for total in totals), None


def _geometry(module: nn.Module) -> tuple[Geometry, str | None]:
    """A layer's shape, and why it cannot be compressed."""
    match module:
        case nn.Conv1d() | nn.Conv2d():
            padding, blocked = _conv_padding(module)
            if module.padding_mode != "zeros":
                blocked = f"padding mode '{module.padding_mode}' is not supported"
            geometry = Geometry(
                kind=Kind.CONV1D if isinstance(module, nn.Conv1d) else Kind.CONV2D,
                inputs=module.in_channels,
                outputs=module.out_channels,
                kernel=tuple(module.kernel_size),
                stride=tuple(module.stride),
                padding=padding,
                dilation=tuple(module.dilation),
                groups=module.groups,
                bias=module.bias is not None,
            )
            return geometry, blocked
        case nn.Linear():
            return Geometry(Kind.LINEAR, module.in_features, module.out_features, bias=module.bias is not None), None
        case nn.Embedding():
            return Geometry(Kind.EMBEDDING, module.num_embeddings, module.embedding_dim), None
        case _:
            raise TypeError(f"{type(module).__name__} is no layer")


def _weight(module: nn.Module) -> nn.Parameter | None:
    """The stored weight; None where a parametrisation computes it anew at each access."""
    return dict(module.named_parameters(recurse=False)).get("weight")


def _layer(name: str, module: nn.Module, recording: Recording) -> Layer:
    geometry, blocked = _geometry(module)
    weight = _weight(module)
    if weight is None:
        blocked = "its weight is computed from other parameters"
    elif tuple(weight.shape) != geometry.weight_shape:
        blocked = f"its weight has shape {[*weight.shape]} instead of {[*geometry.weight_shape]}"
    positions = recording.positions.get(name)
    if positions is None:
        return Layer(name, geometry, 0, 0, blocked=NEVER_CALLED)
    return Layer(name, geometry, *positions, blocked=blocked)


def _layers(model: nn.Module, recording: Recording) -> tuple[Layer, ...]:
    """All layers: first those that ran, in their order, then those that never did."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, LAYER_TYPES)}
    names = [*recording.positions, *(name for name in modules if name not in recording.positions)]
    owners: dict[int, str] = {}
    layers: list[Layer] = []
    for name in names:
        layer, weight = _layer(name, modules[name], recording), _weight(modules[name])
        owner = name if weight is None else owners.setdefault(id(weight), name)
        layers.append(layer if owner == name else replace(layer, tied_to=owner))
    return tuple(layers)


def _notes(model: nn.Module) -> list[str]:
    """Weights of other module types, which are left as they are."""
    others: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LAYER_TYPES) and any(p.ndim > 1 for p in module.parameters(recurse=False)):
            others.setdefault(type(module).__name__, []).append(name or "the model itself")
    return [f"{kind} is not compressed: {', '.join(names)}" for kind, names in others.items()]


def _couplings(
    model: nn.Module, inputs: Any, forward: Forward, layers: tuple[Layer, ...]
) -> tuple[tuple[Coupling, ...], list[str]]:
    try:
        program = export_program(model, inputs, forward)
    except Exception as error:  # torch.export has no common error class
        first = next(iter(str(error).strip().splitlines()), "no message")
        note = (
            f"torch.export failed ({type(error).__name__}: {first}): how channels depend on each other is unknown, "
            "so channel pruning and block distillation are not offered"
        )
        return (), [note]
    return prove(model, inputs, forward, find_couplings(walk(model, program), layers)), []


def trace(model: nn.Module, inputs: Any, forward: Forward = default_forward) -> LayerGraph:
    """The network as the search sees it, traced in evaluation mode on one batch of example inputs.

    Couplings are offered only after pruned and masked outputs were seen to agree. Where torch.export fails, layers,
    positions and MACs are still found and a note says what is missing. Raises TraceError when the model does not run.
    """
    with eval_mode(model), torch.random.fork_rng():
        recording = record(model, inputs, forward)
        layers = _layers(model, recording)
        couplings, notes = _couplings(model, inputs, forward, layers)
    layers = link(layers, couplings)
    return LayerGraph(
        layers=layers,
        couplings=couplings,
        blocks=find_blocks(couplings, layers, recording),
        other_macs=max(0, recording.macs - sum(layer.macs for layer in layers)),
        norms=tuple(name for name, module in model.named_modules() if isinstance(module, _BatchNorm)),
        notes=(*_notes(model), *notes),
    )
