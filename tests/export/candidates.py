"""Deployed candidates of small networks, with their files, for the tests of this package."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from grainwise.export.graph import MarkedGraph
from grainwise.graph.forward import Forward, default_forward
from grainwise.graph.skeleton import Skeleton, build_skeleton, skeleton_forward
from grainwise.graph.trace import trace
from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.plan.layers import LayerGraph
from grainwise.plan.target import Target, resolve_target
from grainwise.realise.build import build
from grainwise.realise.deploy import deploy
from grainwise.realise.library import VariantLibrary
from grainwise.realise.reference import Reference, channels_last
from tests.networks import pictures, tiny

LAYERS = ("stem", "block.0", "block.3", "down", "fc")  # of `tiny`


def quantised(bits: int, sharing: Granularity = Granularity.CHANNEL) -> Choice:
    return Choice(Method.QUANTIZE, sharing, bits)


def everywhere(bits: int) -> dict[str, Entry]:
    return dict.fromkeys(LAYERS, Entry(precision=quantised(bits)))


PLANS: dict[str, dict[str, Entry]] = {
    "float": {},
    "int8": everywhere(8),
    "int4": everywhere(4),
    "int2": everywhere(2),
    "mixed": dict.fromkeys(("stem", "block.3"), Entry(precision=quantised(8))),
    "factorized": dict.fromkeys(
        ("block.0", "down"), Entry(Choice(Method.FACTORIZE, Granularity.CHANNEL, 0.5), quantised(8))
    ),
    "ghost": {
        "stem": Entry(precision=quantised(8)),
        "block.0": Entry(Choice(Method.DISTILL, Granularity.CHANNEL, 0.5), quantised(8)),
    },
    "bitmask": {
        "block.0": Entry(Choice(Method.PRUNE, Granularity.LAYER, 0.5), quantised(8)),
        "down": Entry(Choice(Method.PRUNE, Granularity.LAYER, 0.5)),
        "fc": Entry(Choice(Method.PRUNE, Granularity.LAYER, 0.5), quantised(8)),
    },
    "narrowed": {
        "stem": Entry(Choice(Method.PRUNE, Granularity.CHANNEL, 0.3), quantised(4)),
        "block.0": Entry(Choice(Method.DISTILL, Granularity.BLOCK, 0.5)),
    },
}
"""Of `tiny`, by what is special about them."""


HERE = resolve_target("ort-cpu")


@dataclass(frozen=True)
class Source:
    """A network prepared for an ONNX target: candidates are made from it."""

    network: nn.Module
    example: Any
    graph: LayerGraph
    marked: MarkedGraph
    library: VariantLibrary

    @staticmethod
    def of(
        network: nn.Module,
        calibration: Sequence[Any],
        example: Any,
        forward: Forward = default_forward,
        target: Target = HERE,
    ) -> Source:
        graph = trace(network, example, forward)
        skeleton = build_skeleton(network, example, forward, graph)
        marked = MarkedGraph.export(skeleton, graph, example)
        reference = Reference.gather(network, graph, calibration, forward, target, skeleton)
        return Source(network, example, graph, marked, VariantLibrary(reference))

    @property
    def skeleton(self) -> Skeleton:
        return self.marked.skeleton

    def candidate(self, entries: Mapping[str, Entry]) -> tuple[nn.Module, ModelProto]:
        """The deployed module and its file."""
        model = channels_last(copy.deepcopy(build(self.library, entries)))
        deploy(model, self.skeleton, self.library.reference.calibration, skeleton_forward)
        return model, self.marked.write(model, {})


@cache
def tiny_source() -> Source:
    batches = images(64, 1)
    return Source.of(tiny(), batches, batches[0][:2])


@cache
def tiny_candidate(plan: str) -> tuple[nn.Module, ModelProto]:
    """Shared: must not be changed."""
    return tiny_source().candidate(PLANS[plan])


def images(count: int, seed: int) -> list[Tensor]:
    """Batches of pictures as `tiny` takes them."""
    return [inputs for inputs, _ in pictures(count, seed)]


def with_fault(file: ModelProto, tensor: str, *, factor: float | None = None) -> ModelProto:
    """A copy of a file with a stored tensor times `factor`, or with the highest bit of its middle byte flipped."""
    changed = ModelProto()
    changed.CopyFrom(file)
    (stored,) = (t for t in changed.graph.initializer if t.name == tensor)
    if factor is not None:
        values = numpy_helper.to_array(stored)
        stored.CopyFrom(numpy_helper.from_array(np.array(values * factor, dtype=values.dtype), tensor))
    else:
        raw = bytearray(stored.raw_data)
        raw[len(raw) // 2] ^= 0x80
        stored.raw_data = bytes(raw)
    return changed
