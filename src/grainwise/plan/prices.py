"""What a target charges: bytes and milliseconds of each entry, and what entries of different layers share.

Letters: L layers, S structures, P precisions, K shared parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
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

Signature = tuple[bytes, frozenset[int]]
"""Of what a layer's neighbours share: parts of the file that they need, and those that run in static 8 bits."""

_NONE: Mapping[int, Sequence[int]] = MappingProxyType({})

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

    def table(self, index: int, numbers: Numbers) -> NDArray[np.float64]:
        """`[S, P, 3]` shared cost of the profile with each entry in the place of layer `index`'s."""
        others = [self.parts[i][found] for i, found in enumerate(numbers) if i != index]
        needed = np.logical_or.reduce(others, axis=0) if others else np.zeros(len(self.part_bytes), dtype=bool)
        table = np.zeros((*self.static.shape[1:], 3))
        table[..., SIZE] = self.part_bytes @ needed + self.parts[index] @ np.where(needed, 0.0, self.part_bytes)
        around = self._static(numbers) - {index}
        without, within = self.boundary(around), self.boundary(around | {index})
        return table + np.where(self.static[index][..., None], within, without)

    def signatures(self, numbers: Numbers, plain: Mapping[int, Sequence[int]] = _NONE) -> list[Signature]:
        """For each layer: equal for profiles in which its `table` is the same.

        plain: for some layers the others that count as without structure.
        """
        layers, (s, p) = np.arange(len(numbers)), np.array(numbers).T
        needs = self.parts[layers, s, p].astype(np.int64)
        others = needs.sum(axis=0) - needs
        static = frozenset(np.flatnonzero(self.static[layers, s, p]).tolist())
        around = [static - {index} for index in layers.tolist()]
        for index, changed in plain.items():
            others[index] += (self.parts[changed, 0, p[changed]] - needs[changed]).sum(axis=0)
            around[index] = around[index].difference(changed).union(i for i in changed if self.static[i, 0, p[i]])
        return [(needed.tobytes(), found) for needed, found in zip(others > 0, around, strict=True)]

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
