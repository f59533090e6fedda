"""Milliseconds of any plan at batch 1, without building it: kernels measured once, conversions counted, a fitted line.

Kernels of the layers and conversions between them come from ONNX Runtime's profiler; a network's time comes from their
sum and number by a `Calibration` on a few whole networks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from grainwise.evaluate.calibration import Calibration, Work, fit
from grainwise.evaluate.conversions import Circuit, Form, Kernel
from grainwise.evaluate.grids import Grid, block_width
from grainwise.evaluate.kernels import KernelTimes, Key
from grainwise.evaluate.places import clips_of, places_of
from grainwise.evaluate.profiling import Measured
from grainwise.evaluate.timing import Progress
from grainwise.export.graph import MarkedGraph
from grainwise.plan.choices import NONE, PRECISIONS, STRUCTURES, UNCOMPRESSED, Choice, Entry
from grainwise.plan.cost import CostModel
from grainwise.plan.layers import Geometry, Layer
from grainwise.plan.space import SearchSpace

UNCALIBRATED = Calibration()


class LatencyTable:
    """Predicts one network's milliseconds at batch 1.

    shapes: of each layer's input without the batch (`places.input_shapes`). grids: where entries are measured
    (`grids.grids`). parts: calibration of `layer_ms` and `boundary_ms`. whole: of `predict_ms`.
    """

    def __init__(
        self,
        marked: MarkedGraph,
        shapes: Mapping[str, tuple[int, ...]],
        grids: Mapping[str, Grid],
        times: KernelTimes,
        parts: Calibration = UNCALIBRATED,
        whole: Calibration = UNCALIBRATED,
    ) -> None:
        self.marked, self.shapes, self.grids, self.times = marked, shapes, grids, times
        self.parts, self.whole = parts, whole
        self.places = places_of(marked, shapes)
        self._skeleton = marked.skeleton
        self._circuit = Circuit.of(marked.skeleton, clips_of(marked.model))
        self._layers = {layer.name: layer for layer in marked.layers.layers}
        self._block = block_width()
        self._found: dict[tuple[str, int, int, Choice, Choice], Measured] = {}

    @property
    def offset_ms(self) -> float:
        """Of every run, beside `layer_ms` and `boundary_ms`."""
        return self.parts.offset_ms

    def calibrated(self, cost: CostModel, runs: Sequence[tuple[Mapping[str, Entry], float]]) -> LatencyTable:
        """The same table, all its milliseconds on the lines through these profiles and their measured milliseconds.

        Raises ValueError for fewer than two.
        """
        measured = [ms for _, ms in runs]
        parts = fit([self._summed(entries, cost) for entries, _ in runs], measured)
        whole = fit([self._known(entries, cost) for entries, _ in runs], measured)
        return LatencyTable(self.marked, self.shapes, self.grids, self.times, parts, whole)

    # -- measuring

    def prepare(self, space: SearchSpace, progress: Progress = lambda done, total: None) -> int:
        """Measures, in one go, all that the table can be asked for in a search over `space`; the number of entries that
        were not in the cache. progress: (done, total) of them.
        """
        keys: dict[Key, None] = {}
        seen = set()
        for index, layer in enumerate(space.layers):
            pairs = space.pairs(index)
            alike = (layer.geometry, self.places.get(layer.name), self.grids[layer.name], pairs.tobytes())
            if layer.name in self.places and alike not in seen:
                seen.add(alike)
                geometries = [layer.geometry, *self.grids[layer.name].geometries(layer.geometry)]
                for s, p in np.argwhere(pairs).tolist():
                    keys |= dict.fromkeys(self._key(layer, g, STRUCTURES[s], PRECISIONS[p]) for g in geometries)
        return self.times.ensure(keys, progress)

    def _key(self, layer: Layer, geometry: Geometry, structure: Choice, precision: Choice) -> Key:
        return Key.of(self.times.target, geometry, structure, precision, self.places[layer.name])

    # -- a layer by itself

    def layer_ms(self, layer: Layer, geometry: Geometry, structure: Choice, precision: Choice) -> float:
        """Milliseconds of an entry's kernels at a (narrowed) geometry, and of what changes the form of its values where
        the uncompressed layer needs no such change. 0 for a layer that does not run or shares another's weight.
        """
        return self.parts.part(self._work(layer, geometry, structure, precision))

    def _work(self, layer: Layer, geometry: Geometry, structure: Choice, precision: Choice) -> Work:
        if layer.name not in self.places:
            return Work()
        found = self.measured(layer, geometry, structure, precision)
        total = Work(found.ms, found.kernels)
        if not self.times.target.static(geometry, structure, precision):
            usual = self._usual_forms[layer.name]
            if usual.reads_blocked and not found.reads_blocked:
                total += Work(self.times.line(Kernel.REORDER_OUTPUT).of(layer.positions_in * geometry.inputs), 1)
            if usual.writes_blocked and not found.writes_blocked:
                total += Work(self.times.line(Kernel.REORDER_INPUT).of(layer.positions_out * geometry.outputs), 1)
        return total

    def measured(self, layer: Layer, geometry: Geometry, structure: Choice, precision: Choice) -> Measured:
        """Kernels of an entry, interpolated between measured widths; forms are those of the nearest ones."""
        place = layer.name, geometry.inputs, geometry.outputs, structure, precision
        if place not in self._found:
            self._found[place] = self._interpolated(layer, geometry, structure, precision)
        return self._found[place]

    def _interpolated(self, layer: Layer, geometry: Geometry, structure: Choice, precision: Choice) -> Measured:
        key = self._key(layer, geometry, structure, precision)
        if geometry == layer.geometry:
            return self.times[key]
        block = self._block if key.precision == NONE and geometry.kernel else 1
        corners = self.grids[layer.name].corners(geometry.inputs, geometry.outputs, block=block)
        parts = [
            (self._key(layer, layer.geometry.resized(inputs=i, outputs=o), structure, precision), share)
            for (i, o), share in corners.items()
        ]
        self.times.ensure(corner for corner, _ in parts)
        nearest = self.times[max(parts, key=lambda part: part[1])[0]]
        return replace(nearest, ms=sum(share * self.times[corner].ms for corner, share in parts))

    @cached_property
    def _usual_forms(self) -> dict[str, Form]:
        """Of the uncompressed layers."""
        layers = [self._layers[name] for name in self.places]
        keys = {layer.name: self._key(layer, layer.geometry, NONE, NONE) for layer in layers}
        self.times.ensure(keys.values())
        return {name: _form(self.times[key]) for name, key in keys.items()}

    # -- between layers

    def boundary_ms(self, static: Collection[str]) -> float:
        """Milliseconds of what runs between the layers when those of these names run in static 8 bits, all layers at
        their full widths.
        """
        return self.parts.part(self._between(frozenset(static), self._usual_forms, {}))

    def conversions(self, static: Collection[str]) -> Counter[Kernel]:
        """How often each kernel runs between the layers when those of these names run in static 8 bits."""
        found: Counter[Kernel] = Counter()
        counts = self._circuit.conversions(static, self._skeleton.active(static), self._usual_forms)
        for (kernel, _), count in counts.items():
            found[kernel] += count
        return found

    def _between(self, static: frozenset[str], forms: Mapping[str, Form], widths: Mapping[str, float]) -> Work:
        """All conversions. widths: share of the channels left at a point, 1 where it does not say."""
        counts = self._circuit.conversions(static, self._skeleton.active(static), forms)
        points = self._skeleton.points
        ms = sum(
            count * self.times.line(kernel).of(points[point].elements * widths.get(point, 1.0))
            for (kernel, point), count in counts.items()
        )
        return Work(ms, counts.total())

    # -- a whole network

    def sum_ms(self, entries: Mapping[str, Entry], cost: CostModel) -> float:
        """What a search adds up for a profile: every `layer_ms`, `boundary_ms` and `offset_ms`."""
        found = self._entries(entries, cost)
        layers = (self.layer_ms(self._layers[n], g, e.structure, e.precision) for n, (g, e) in found.items())
        return self.offset_ms + sum(layers) + self.boundary_ms(self._static(found))

    def _summed(self, entries: Mapping[str, Entry], cost: CostModel) -> Work:
        """What `sum_ms` is made of."""
        found = self._entries(entries, cost)
        layers = (self._work(self._layers[n], g, e.structure, e.precision) for n, (g, e) in found.items())
        return sum(layers, self._between(self._static(found), self._usual_forms, {}))

    def predict_ms(self, entries: Mapping[str, Entry], cost: CostModel) -> float:
        """Milliseconds of a profile, forms and widths of all layers known: closer than `sum_ms`, which adds up parts
        that know nothing of each other.
        """
        return self.whole.whole(self._known(entries, cost))

    def _known(self, entries: Mapping[str, Entry], cost: CostModel) -> Work:
        """What `predict_ms` is made of."""
        found = self._entries(entries, cost)
        kernels = {
            name: self.measured(self._layers[name], g, e.structure, e.precision) for name, (g, e) in found.items()
        }
        forms = {name: _form(times) for name, times in kernels.items()}
        left = {name: g.outputs / self._layers[name].geometry.outputs for name, (g, _) in found.items()}
        between = self._between(self._static(found), forms, self._circuit.widths(left))
        return sum((Work(times.ms, times.kernels) for times in kernels.values()), between)

    def _static(self, found: Mapping[str, tuple[Geometry, Entry]]) -> frozenset[str]:
        """Layers that run in static 8 bits."""
        static = self.times.target.static
        return frozenset(name for name, (g, e) in found.items() if static(g, e.structure, e.precision))

    def _entries(self, entries: Mapping[str, Entry], cost: CostModel) -> dict[str, tuple[Geometry, Entry]]:
        """Geometry and entry of each layer that runs."""
        widths = cost.widths(entries)
        return {
            name: (cost.narrowed(self._layers[name], widths), entries.get(name, UNCOMPRESSED)) for name in self.places
        }


def _form(times: Measured) -> Form:
    return Form(times.reads_blocked, times.writes_blocked)
