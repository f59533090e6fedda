"""A skeleton in the place of a user's module that is deployed without one, so that its candidates can share runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grainwise.evaluate.data import Batch, take
from grainwise.graph.forward import tensors_in
from grainwise.graph.proof import TOLERANCE, fault
from grainwise.graph.skeleton import Skeleton, build_skeleton, skeleton_forward
from grainwise.realise.norms import norms
from grainwise.realise.reference import Reference, channels_last

SAMPLES = 2  # a batch of one would hide the batch dimension


def stand_in(reference: Reference, batches: Sequence[Batch]) -> Skeleton | None:
    """The skeleton of the reference's module if it computes the same in all that a search changes on these batches.

    None for a network that torch.export cannot show, with layers that the graph hides, or pictures of several sizes.
    """
    inputs = take(batches, SAMPLES)[0].inputs
    if len(set(shapes_of(batches))) > 1:
        return None
    graph = reference.graph
    try:
        skeleton = build_skeleton(reference.model, inputs, reference.forward, graph)
        skeleton = replace(skeleton, module=channels_last(skeleton.module))
        with torch.inference_mode():
            found = skeleton_forward(skeleton.module, inputs)
            expected = reference.forward(reference.model, inputs)
    except Exception:  # neither torch.export nor the network's own code have a common error class
        return None
    hidden = skeleton.missing or {n for n, _ in norms(reference.model)} != {n for n, _ in norms(skeleton.module)}
    if hidden or not _close(found, expected):
        return None
    free = [coupling for coupling in graph.couplings if coupling.frozen is None]
    return None if free and fault(skeleton.module, inputs, skeleton_forward, free) else skeleton


def shapes_of(batches: Sequence[Batch]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """By batch and tensor what a graph takes as constant: all dimensions but those of samples and of tokens."""
    return tuple(
        tuple(tuple(t.shape[1:]) if t.is_floating_point() else (t.dim(),) for t in tensors_in(batch.inputs))
        for batch in batches
    )


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp_min(1.0))
