"""Sensitivity scores from gradients: the divergence that each choice is expected to cause, to second order.

Letters: N samples of a batch, D draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grainwise.evaluate.data import Batch, take
from grainwise.evaluate.evaluator import BUILD_ERRORS, Scoring
from grainwise.evaluate.measures import kl_divergence
from grainwise.evaluate.timing import Progress
from grainwise.plan.choices import NONE, PRECISIONS, STRUCTURES, Choice, Entry, Granularity, Method
from grainwise.plan.layers import Layer
from grainwise.plan.space import SearchSpace, narrows, units_left
from grainwise.realise.library import VariantLibrary
from grainwise.study.sensitivity import Sensitivity

DRAWS = 4


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a module read and wrote on a batch, and `[D, N, ...]` gradients of the D log-likelihoods by its output."""

    inputs: Tensor
    outputs: Tensor
    gradients: Tensor


def fisher_sensitivity(
    library: VariantLibrary,
    space: SearchSpace,
    calibration: Sequence[Batch],
    scoring: Scoring,
    *,
    samples: int = 128,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Sensitivity:
    """Half the quadratic form of the Fisher information with the change d that a choice makes: KL(reference || changed)
    = 1/2 dᵀ F d to second order (Martens 2020, section 5), F = E[g gᵀ] with g the gradient of log p(y | x), y drawn
    from the reference's own outputs, so that no label is read. For each sample g·d is the sum of the gradient by the
    layer's output times the change of that output, which holds for any form that the layer takes.
    Removed channels are seen where they are read, a student at the output of its block. Outputs that are no logits:
    y is Gaussian, which gives the relative squared error.

    Costs one forward and DRAWS backward passes of `samples` samples, and every variant of every layer once on the
    inputs of that layer: about as much as (choices / layers) forward passes. Not seen: that batch norm is estimated
    anew, and the rounding of activations; scores of shifts that batch norm absorbs are therefore too high.
    """
    generator = torch.Generator().manual_seed(seed)
    choices = _choices(space)
    sums = dict.fromkeys(choices, 0.0)
    seen_samples = 0
    batches = take(calibration, samples)
    for number, batch in enumerate(batches):
        seen, scale = _watch(library, space, batch, scoring, generator)
        seen_samples += len(next(iter(seen.values())).outputs)
        for done, (index, choice) in enumerate(choices, 1):
            sums[index, choice] += scale * _quadratic(library, space.layers[index], choice, seen)
            progress(number * len(choices) + done, len(batches) * len(choices))
    tables = [np.where(legal, 0.0, np.inf) for legal in (space.structures, space.precisions)]
    for (index, choice), total in sums.items():
        value = total / seen_samples
        precision = choice.method is Method.QUANTIZE
        column = (PRECISIONS if precision else STRUCTURES).index(choice)
        tables[precision][index, column] = value if np.isfinite(value) else np.inf
    return Sensitivity(*tables)


def _choices(space: SearchSpace) -> list[tuple[int, Choice]]:
    found = []
    for legal, choices in ((space.structures, STRUCTURES), (space.precisions, PRECISIONS)):
        found += [(int(index), choices[action]) for index, action in np.argwhere(legal) if choices[action] != NONE]
    return found


def _watch(
    library: VariantLibrary, space: SearchSpace, batch: Batch, scoring: Scoring, generator: torch.Generator
) -> tuple[Mapping[str, _Seen], float]:
    """What every layer and every block saw on a batch, and the factor from squares of g·d to divergence."""
    reference = library.reference
    names = [layer.name for layer in space.layers if not layer.blocked]
    names += [block.name for block in space.graph.blocks]
    with torch.enable_grad(), _probed(reference.model, names) as passed:
        outputs = reference.forward(reference.model, batch.inputs)
        probes = [passed[name][2] for name in names]
        logits = scoring.divergence is kl_divergence
        drawn = [_log_likelihood(outputs, generator, logits=logits) for _ in range(DRAWS)]
        gradients = [torch.autograd.grad(value, probes, retain_graph=True, allow_unused=True) for value in drawn]
    seen = {}
    for name, rows in zip(names, zip(*gradients, strict=True), strict=True):
        inputs, written, _ = passed[name]
        filled = [torch.zeros_like(written) if row is None else row for row in rows]
        seen[name] = _Seen(inputs.detach(), written.detach(), torch.stack(filled))
    positions = outputs[0].numel() / (outputs.shape[-1] if logits else 1)  # the divergence is a mean over them
    scale = 0.5 if logits else 1 / float(outputs.detach().double().var().clamp_min(1e-12))
    return seen, scale / positions / DRAWS


@contextmanager
def _probed(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Inside, a call of the model records (input, output, zero that was added to the output) of each named module."""
    passed: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            probe = torch.zeros_like(output, requires_grad=True)
            passed[name] = inputs[0].clone(), output.clone(), probe
            return output + probe

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def _log_likelihood(outputs: Tensor, generator: torch.Generator, *, logits: bool) -> Tensor:
    """Sum of log p(y) for one y drawn from what the outputs say: a label each, or a Gaussian around each."""
    if not logits:
        return (outputs * torch.randn(outputs.shape, generator=generator)).sum()
    log_probs = outputs.log_softmax(-1).flatten(0, -2)
    labels = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
    return log_probs.gather(1, labels).sum()


@torch.no_grad()
def _quadratic(library: VariantLibrary, layer: Layer, choice: Choice, seen: Mapping[str, _Seen]) -> float:
    """Sum over samples of the mean over draws times D of (g·d)²; infinite where the choice cannot be built."""
    try:
        changes = list(_changes(library, layer, choice, seen))
    except BUILD_ERRORS:
        return np.inf
    if not changes:  # nothing that could be seen reads what is removed
        return np.inf
    products = sum(((found.gradients * change).flatten(2).sum(-1) for found, change in changes), torch.zeros(()))
    return float(products.double().square().sum())


def _changes(
    library: VariantLibrary, layer: Layer, choice: Choice, seen: Mapping[str, _Seen]
) -> Iterator[tuple[_Seen, Tensor]]:
    """Where the choice changes an output, and by how much."""
    graph = library.reference.graph
    if not narrows(choice):
        entry = Entry(precision=choice) if choice.method is Method.QUANTIZE else Entry(structure=choice)
        found = seen[layer.name]
        yield found, library.layer(layer, entry, {})(found.inputs) - found.outputs
        return
    coupling = graph.coupling(layer.name)
    units = units_left(coupling, choice)
    if choice.granularity is Granularity.BLOCK:
        block = next(b for b in graph.blocks if b.coupling == coupling.name)
        found = seen[block.name]
        yield found, library.student(block, units)(found.inputs) - found.outputs
        return
    kept = {coupling.name: library.kept_units(coupling.name, units)}
    for name in coupling.consumers():
        reader, found = graph.layer(name), seen[name]
        inputs, outputs = library.positions(reader, kept)
        channels = 1 if reader.geometry.kernel else -1
        read = found.inputs if inputs is None else found.inputs.index_select(channels, inputs)
        written = library.layer(reader, Entry(), kept)(read)
        if outputs is None:
            yield found, written - found.outputs
        else:  # what it loses itself is seen at its readers
            change = torch.zeros_like(found.outputs)
            axis = channels % change.dim()
            yield found, change.index_copy(axis, outputs, written - found.outputs.index_select(axis, outputs))
