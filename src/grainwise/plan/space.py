"""Which entries each layer may take, decided before the search, with the reason for everything that is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from grainwise.plan.choices import LEVELS, NONE, PRECISIONS, STRUCTURES, Choice, Entry, Granularity, Method
from grainwise.plan.layers import Block, Coupling, Geometry, Kind, Layer, LayerGraph
from grainwise.plan.shapes import (
    kept_width,
    routing_tensors,
    row_blocks,
    stage_tensors,
    stages,
    tile_rows,
)

Mask = NDArray[np.bool_]


class SpaceKind(StrEnum):
    """`single`: a layer takes a structure or a precision. `chain`: first a structure, then a precision."""

    SINGLE = "single"
    CHAIN = "chain"


def units_left(coupling: Coupling, structure: Choice) -> int:
    """Units of `coupling` that are left when its leader takes `structure` (`prune/channel` or `distill/block`)."""
    assert structure.level is not None
    removed = structure.level if structure.method is Method.PRUNE else 1 - structure.level
    return kept_width(coupling.width, removed)


def narrows(structure: Choice) -> bool:
    """True for the two structures that act through widths: `prune/channel` and `distill/block`."""
    return (structure.method, structure.granularity) in (
        (Method.PRUNE, Granularity.CHANNEL),
        (Method.DISTILL, Granularity.BLOCK),
    )


def stored_bytes(geometry: Geometry, structure: Choice, precision: Choice) -> int:
    """Bytes of everything stored for a layer of this geometry under an entry."""
    parts = [stage_tensors(stage, precision) for stage in stages(geometry, structure)]
    return sum(sum(p.values()) for p in [*parts, routing_tensors(geometry, structure)])


def _grouped_refusal(geometry: Geometry) -> str | None:
    if geometry.depthwise:
        return "a depthwise convolution has nothing to share between channels"
    return "grouped convolutions keep their structure" if geometry.groups > 1 else None


def _factorize_refusal(g: Geometry, choice: Choice) -> str | None:
    if refusal := _grouped_refusal(g):
        return refusal
    if choice.granularity is Granularity.CHANNEL and g.taps == 1:
        return "Tucker-2 over both channel modes needs a kernel larger than 1"
    if choice.granularity is Granularity.BLOCK and (g.kind is Kind.EMBEDDING or not row_blocks(g.rows)):
        return "its rows cannot be cut into equal blocks of at least 4"
    return None


def _distill_refusal(g: Geometry, choice: Choice) -> str | None:
    if g.kind is Kind.EMBEDDING:
        return "a look-up has no cheaper student; factorize it"
    if refusal := _grouped_refusal(g):
        return refusal
    if choice.granularity is Granularity.CHANNEL and g.outputs < 8:
        return "fewer than 8 outputs leave nothing to regenerate"
    return None


def _prune_refusal(g: Geometry, choice: Choice) -> str | None:
    if choice.granularity is Granularity.BLOCK:
        if g.kind is Kind.EMBEDDING:
            return "a token's vector is read whole"
        if g.depthwise or not tile_rows(g):
            return "its rows cannot be cut into tiles of 16, 8 or 4"
    return None


def _quantize_refusal(g: Geometry, choice: Choice) -> str | None:
    if choice.granularity is Granularity.CHANNEL and g.rows == 1:
        return "one row: the same as quantize/layer"
    return None


_REFUSALS = {
    Method.PRUNE: _prune_refusal,
    Method.QUANTIZE: _quantize_refusal,
    Method.FACTORIZE: _factorize_refusal,
    Method.DISTILL: _distill_refusal,
}


@dataclass(frozen=True)
class SearchSpace:
    """The legal entries of every layer of a graph.

    structures: `[L, S]`, precisions: `[L, P]` booleans over STRUCTURES and PRECISIONS; column 0 (none) is always True.
    reasons: why the choice of a layer (by name) is refused.
    """

    graph: LayerGraph
    kind: SpaceKind
    structures: Mask
    precisions: Mask
    reasons: Mapping[tuple[str, Choice], str]
    _led: Mapping[str, Coupling] = field(repr=False)
    _blocks: Mapping[str, Block] = field(repr=False)

    @staticmethod
    def of(
        graph: LayerGraph, kind: SpaceKind | str = SpaceKind.CHAIN, methods: Iterable[Method | str] | None = None
    ) -> SearchSpace:
        """The space of `graph` with the given methods (all by default)."""
        allowed = set(Method) if methods is None else {Method.NONE, *map(Method, methods)}
        led = {c.name: c for c in graph.couplings if c.frozen is None}
        blocks = {b.coupling: b for b in graph.blocks}
        reasons: dict[tuple[str, Choice], str] = {}
        for layer in graph.layers:
            for choice in (*STRUCTURES[1:], *PRECISIONS[1:]):
                refusal = _refusal(graph, led, blocks, layer, choice)
                if choice.method not in allowed:
                    refusal = "the method is switched off"
                if refusal:
                    reasons[layer.name, choice] = refusal
            _refuse_repeats(layer, led, reasons)

        def mask(choices: tuple[Choice, ...]) -> Mask:
            return np.array([[(layer.name, c) not in reasons for c in choices] for layer in graph.layers])

        return SearchSpace(graph, SpaceKind(kind), mask(STRUCTURES), mask(PRECISIONS), reasons, led, blocks)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.graph.layers

    def led_by(self, layer: str) -> Coupling | None:
        """The coupling whose width is decided at `layer`, if any."""
        return self._led.get(layer)

    def block_led_by(self, layer: str) -> Block | None:
        return self._blocks.get(layer)

    def pairs(self, index: int) -> Mask:
        """`[S, P]`: entries that layer `index` may take by itself, whatever the other layers take."""
        pairs: Mask = self.structures[index][:, None] & self.precisions[index][None, :]
        if self.kind is SpaceKind.SINGLE:
            pairs[1:, 1:] = False
        geometry = self.layers[index].geometry
        for s in np.flatnonzero(pairs[1:].any(axis=1)) + 1:
            structure = STRUCTURES[s]
            if structure.method is Method.PRUNE and structure.granularity is not Granularity.CHANNEL:
                for p in np.flatnonzero(pairs[s]):  # the bitmask can cost more than the pruned bits save
                    plain, sparse = (stored_bytes(geometry, c, PRECISIONS[p]) for c in (NONE, structure))
                    pairs[s, p] = sparse < plain
        return pairs

    def check(self, entries: Mapping[str, Entry]) -> None:
        """Raise ValueError with the layer and the reason when `entries` asks for something that cannot be done."""
        names = {layer.name for layer in self.layers}
        if unknown := sorted(set(entries) - names):
            raise ValueError(f"the profile names layer {unknown[0]!r}, which the network does not have")
        for index, layer in enumerate(self.layers):
            entry = entries.get(layer.name, Entry())
            for choice in (entry.structure, entry.precision):
                if reason := self.reasons.get((layer.name, choice)):
                    raise ValueError(f"layer {layer.name!r} cannot take {choice}: {reason}")
            if not self.pairs(index)[STRUCTURES.index(entry.structure), PRECISIONS.index(entry.precision)]:
                raise ValueError(f"layer {layer.name!r} cannot take {entry}: the pair is not in the {self.kind} space")
            self._check_block(layer, entry, entries)

    def _check_block(self, layer: Layer, entry: Entry, entries: Mapping[str, Entry]) -> None:
        if entry.structure.method is not Method.DISTILL or entry.structure.granularity is not Granularity.BLOCK:
            return
        for other in self._blocks[layer.name].layers:
            if other != layer.name and entries.get(other, Entry()).structure != NONE:
                raise ValueError(f"layer {other!r} has a structure of its own inside the student block {layer.name!r}")


def _refusal(
    graph: LayerGraph, led: Mapping[str, Coupling], blocks: Mapping[str, Block], layer: Layer, choice: Choice
) -> str | None:
    if layer.blocked:
        return layer.blocked
    if layer.tied_to:
        return f"shares its weight with {layer.tied_to}, which keeps it as it is"
    if any(other.tied_to == layer.name for other in graph.layers):
        return "its weight is shared with another layer"
    if narrows(choice):
        return _narrowing_refusal(graph, led, blocks, layer, choice)
    if refusal := _REFUSALS[choice.method](layer.geometry, choice):
        return refusal
    pair = (NONE, choice) if choice.method is Method.QUANTIZE else (choice, NONE)
    if stored_bytes(layer.geometry, *pair) >= stored_bytes(layer.geometry, NONE, NONE):
        return "it would not save a byte"
    return None


def _narrowing_refusal(
    graph: LayerGraph, led: Mapping[str, Coupling], blocks: Mapping[str, Block], layer: Layer, choice: Choice
) -> str | None:
    coupling = led.get(layer.name)
    if coupling is None:
        if layer.output_coupling:
            return f"its channels follow the decision at {layer.output_coupling}"
        frozen = next((c.frozen for c in graph.couplings if c.frozen and layer.name in c.producers()), None)
        return f"its channels cannot be removed: {frozen or 'the couplings of the network are not known'}"
    if choice.method is Method.DISTILL and layer.name not in blocks:
        return "no module with one tensor in and one out encloses its channels"
    if units_left(coupling, choice) >= coupling.width:
        return f"{coupling.width} channels, rounded to a multiple of 8, stay as they are"
    return None


def _refuse_repeats(layer: Layer, led: Mapping[str, Coupling], reasons: dict[tuple[str, Choice], str]) -> None:
    """Levels that round to the same shape as a milder one are refused, so that no two actions mean the same."""
    for method in (Method.PRUNE, Method.FACTORIZE, Method.DISTILL):
        for granularity in Granularity:
            seen: dict[object, Choice] = {}
            for choice in (Choice(method, granularity, level) for level in LEVELS[method]):
                if (layer.name, choice) in reasons:
                    continue
                shape = units_left(led[layer.name], choice) if narrows(choice) else stages(layer.geometry, choice)
                if shape in seen:
                    reasons[layer.name, choice] = f"rounds to the same shape as {seen[shape]}"
                seen.setdefault(shape, choice)
