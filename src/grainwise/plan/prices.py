"""What a target charges: bytes and milliseconds of each entry, and what entries of different layers share.

Letters: L layers, S structures, P precisions, K shared parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from grainwise.plan.choices import Choice
from grainwise.plan.layers import Geometry, Layer
from grainwise.plan.shapes import routing_tensors, stage_tensors, stages

COSTS = ("size", "macs", "latency")
Cost = NDArray[np.float64]
"""`[3]`: bytes of the file, multiply-accumulates per sample, milliseconds (0 where the target has no table of them)."""

SIZE, MACS, LATENCY = range(3)

Numbers = Sequence[tuple[int, int]]
"""Structure and precision number of each layer."""

Row = tuple[int, Sequence[int]]
"""A layer that takes other entries, and other layers that lose their structure when it does."""

Boundary = Callable[[frozenset[int]], Cost]
"""(numbers of the layers that run in static 8 bits) -> `[3]` cost of what converts between them and the others."""


@dataclass(frozen=True)
class Shared:
    """What a profile costs beyond the sum of its entries.

    parts: bool `[L, S, P, K]`, parts of the file that an entry needs; a part is paid for once. part_bytes: `[K]`.
    static: bool `[L, S, P]`, entries that run in static 8 bits.
    """

    parts: NDArray[np.bool_]
    part_bytes: NDArray[np.float64]
    static: NDArray[np.bool_]
    boundary: Boundary

    def of(self, numbers: Numbers) -> Cost:
        """`[3]` shared cost of a whole profile."""
        needed = np.logical_or.reduce([self.parts[index][found] for index, found in enumerate(numbers)], axis=0)
        return np.array([self.part_bytes @ needed, 0.0, 0.0]) + self.boundary(self._static(numbers))

    def tables(self, numbers: Numbers, rows: Sequence[Row]) -> NDArray[np.float64]:
        """`[N, S, P, 3]` shared cost of the profile with each entry in the place of one layer's, for N rows."""
        layers, (s, p) = np.arange(len(numbers)), np.array(numbers).T
        needs, runs = self.parts[layers, s, p].astype(np.int64), self.static[layers, s, p]
        owners, static = np.array([index for index, _ in rows]), frozenset(np.flatnonzero(runs).tolist())
        others, ends = needs.sum(axis=0) - needs[owners], np.empty((2, len(rows), len(COSTS)))
        lost, plain_runs = self.parts[layers, 0, p] - needs, self.static[layers, 0, p]
        for row, (index, plain) in enumerate(rows):
            around = static - {index}
            if plain:
                others[row] += lost[plain].sum(axis=0)
                around = around.difference(plain).union(i for i in plain if plain_runs[i])
            ends[:, row] = self.boundary(around), self.boundary(around | {index})
        which = self._sets[1][owners]
        sizes = np.stack([self._sizes(row.tobytes()) for row in others > 0])
        runs = self.static[owners].reshape(len(rows), -1)
        tables = np.zeros((*runs.shape, len(COSTS)))
        for cost in np.flatnonzero(ends.any(axis=(0, 1))):  # one by one: along an axis of three numpy is slow
            tables[..., cost] = np.where(runs, ends[1, :, cost, None], ends[0, :, cost, None])
        tables[..., SIZE] += sizes[np.arange(len(rows))[:, None], which]
        return tables.reshape(len(rows), *self.static.shape[1:], len(COSTS))

    def _sizes(self, paid: bytes) -> NDArray[np.float64]:
        """`[sets]` bytes of the parts that are paid for anyway (bool `[K]`) and of those that each set adds; the same
        few come again and again.
        """
        if paid not in self._sized:
            given = np.frombuffer(paid, dtype=np.bool_)
            self._sized[paid] = given @ self.part_bytes + np.where(given, 0.0, self.part_bytes) @ self._sets[0].T
        return self._sized[paid]

    @cached_property
    def _sized(self) -> dict[bytes, NDArray[np.float64]]:
        return {}

    @cached_property
    def _sets(self) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """The different sets of parts that entries need, `[sets, K]`, and the number of each entry's, `[L, S * P]`."""
        sets, which = np.unique(self.parts.reshape(-1, len(self.part_bytes)), axis=0, return_inverse=True)
        return sets.astype(np.float64), which.reshape(len(self.parts), -1)

    def _static(self, numbers: Numbers) -> frozenset[int]:
        return frozenset(index for index, found in enumerate(numbers) if self.static[index][found])


class Prices(Protocol):
    """The price list of a target for one network."""

    @property
    def fixed(self) -> Cost:
        """`[3]`: what is paid whatever the profile says (macs: 0)."""
        ...

    @property
    def shared(self) -> Shared | None:
        """What entries share, or None where every entry pays for itself."""
        ...

    def layer_bytes(self, layer: Layer, geometry: Geometry, structure: Choice, precision: Choice) -> float:
        """Bytes of an entry at a (narrowed) geometry."""
        ...

    def layer_ms(self, layer: Layer, geometry: Geometry, structure: Choice, precision: Choice) -> float:
        """Milliseconds of an entry's kernels."""
        ...

    def tensor_bytes(self, name: str, shape: tuple[int, ...]) -> float:
        """Bytes of a float32 tensor beside the layers."""
        ...


_HEADER_PER_TENSOR = len('"":{"dtype":"F32","shape":[],"data_offsets":[,]},')


@dataclass(frozen=True)
class PackedPrices:
    """The packed weights file: every tensor and its line in the safetensors header.

    digits: of the longest offset; the lines' offsets are taken at their longest, so that a prediction is never too
    small and exceeds the file by some bytes a tensor.
    """

    digits: int

    @staticmethod
    def of(layers: Sequence[Layer], others: Sequence[tuple[int, ...]]) -> PackedPrices:
        """others: shapes of the tensors beside the layers."""
        full = sum(layer.geometry.weights for layer in layers) + sum(map(prod, others))
        return PackedPrices(len(str(4 * full)))

    @property
    def fixed(self) -> Cost:
        return np.array([64.0, 0.0, 0.0])

    @property
    def shared(self) -> None:
        return None

    def layer_bytes(self, layer: Layer, geometry: Geometry, structure: Choice, precision: Choice) -> float:
        found = [size for stage in stages(geometry, structure) for size in stage_tensors(stage, precision).values()]
        found += routing_tensors(geometry, structure).values()
        line = self._line(f"{layer.name}.primary.packed.support", len(geometry.weight_shape))
        return float(sum(found) + len(found) * line)

    def layer_ms(self, layer: Layer, geometry: Geometry, structure: Choice, precision: Choice) -> float:
        return 0.0

    def tensor_bytes(self, name: str, shape: tuple[int, ...]) -> float:
        return 4 * prod(shape) + self._line(name, len(shape))

    def _line(self, name: str, dimensions: int) -> int:
        return _HEADER_PER_TENSOR + len(name) + 2 * self.digits + 4 * dimensions
