"""The variant library: every compressed layer is solved once and shared by all candidates that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grainwise.methods.structure import realise, restructure
from grainwise.plan.choices import Entry, Granularity, Method
from grainwise.plan.layers import Layer
from grainwise.realise.channels import Kept, kept_positions, rank_units
from grainwise.realise.reference import Reference, recording

SAMPLE_BATCHES = 1  # input batches that a ghost's filters are fitted on


class VariantLibrary:
    """Realised layers of one reference, by layer, entry and the channels its couplings left.

    The modules are shared between candidates: they are in eval mode, without gradients, and must not be written to.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._couplings = {c.name: c for c in reference.graph.couplings if c.frozen is None}
        self._found: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value under `key`, made at the first call."""
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]

    def kept_units(self, coupling: str, count: int) -> tuple[int, ...]:
        """The `count` units of a coupling that its readers need most, ascending."""
        order = self.once(("units", coupling), lambda: rank_units(self.reference, self._couplings[coupling]))
        return tuple(sorted(order[:count].tolist()))

    def positions(self, layer: Layer, kept: Kept) -> tuple[Tensor | None, Tensor | None]:
        return kept_positions(self._couplings, layer, kept)

    def layer(self, layer: Layer, entry: Entry, kept: Kept, source: nn.Module | None = None) -> nn.Module:
        """The realised module of `layer` under `entry`, with only the kept channels.

        source: takes the place of the reference's layer as the one that has been narrowed already (a layer of a trained
        student block); such variants are not shared here.
        """
        inputs, outputs = self.positions(layer, kept)
        if source is not None:
            return self._realise(layer, entry, inputs, outputs, source)
        key = (layer.name, entry, *(None if p is None else tuple(p.tolist()) for p in (inputs, outputs)))
        found = self.once(key, lambda: self._realise(layer, entry, inputs, outputs, None))
        assert isinstance(found, nn.Module)
        return found

    def _realise(
        self, layer: Layer, entry: Entry, inputs: Tensor | None, outputs: Tensor | None, source: nn.Module | None
    ) -> nn.Module:
        problem = self.reference.problem(layer.name).narrowed(inputs, outputs)
        if source is not None:
            assert isinstance(source.weight, Tensor)
            bias = source.bias if isinstance(source.bias, Tensor) else None
            problem = replace(problem, weight=source.weight.detach(), bias=None if bias is None else bias.detach())
        with torch.no_grad():
            choice = entry.structure
            ghost = choice.method is Method.DISTILL and choice.granularity is Granularity.CHANNEL
            structure = restructure(problem, choice, self._sample(layer, inputs) if ghost else None)
            return realise(structure, entry.precision).eval().requires_grad_(False)

    def _sample(self, layer: Layer, kept_inputs: Tensor | None) -> Tensor:
        """Reference inputs of `layer`, its kept channels only."""

        pairs: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad(), recording(self.reference.model.get_submodule(layer.name), pairs):
            for batch in self.reference.calibration[:SAMPLE_BATCHES]:
                self.reference.forward(self.reference.model, batch)
        sample = torch.cat([inputs for inputs, _ in pairs])
        if kept_inputs is None:
            return sample
        dim = 1 if layer.geometry.kernel else -1
        return sample.index_select(dim, kept_inputs)
