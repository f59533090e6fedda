"""Widths at which a layer's entries are measured, and interpolation between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from grainwise.plan.choices import STRUCTURES, Method
from grainwise.plan.cost import CostModel
from grainwise.plan.layers import Geometry
from grainwise.plan.space import SearchSpace, narrows, units_left

FEWEST_WIDTHS, MOST_WIDTHS = 3, 6
MOST_ENTRIES = 6000
"""Of one network that are measured before its first search, at 6 to 8 ms each."""

_MOST_COUPLED = 2  # widths of each coupling, for layers that more than two couplings narrow

_CPUINFO = Path("/proc/cpuinfo")


def block_width() -> int:
    """Channels that ONNX Runtime's float convolutions compute at once: those missing to a multiple cost time too."""
    flags = _CPUINFO.read_text(encoding="utf-8").split() if _CPUINFO.exists() else []
    return 16 if "avx512f" in flags else 8


@dataclass(frozen=True, slots=True)
class Grid:
    """Measured widths, ascending. tied: outputs follow the inputs (depthwise layers), number for number.

    Raises ValueError for an empty side, or tied sides of different lengths.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    tied: bool = False

    def __post_init__(self) -> None:
        if not self.inputs or not self.outputs or (self.tied and len(self.inputs) != len(self.outputs)):
            raise ValueError(f"{len(self.inputs)} input and {len(self.outputs)} output widths make no grid")

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(inputs, outputs) of every corner."""
        return zip(self.inputs, self.outputs, strict=True) if self.tied else product(self.inputs, self.outputs)

    def geometries(self, geometry: Geometry) -> Iterator[Geometry]:
        """The layer at every corner."""
        return (geometry.resized(inputs=i, outputs=o) for i, o in self.pairs())

    def corners(self, inputs: int, outputs: int, *, block: int = 1) -> dict[tuple[int, int], float]:
        """Corners around a point, with the share that each has in a bilinear interpolation of the widths rounded up to
        multiples of `block`. Beyond the ends the nearest corner counts alone. Shares add up to 1.
        """
        along = shares(self.inputs, inputs, block)
        if self.tied:
            return {(i, self.outputs[self.inputs.index(i)]): share for i, share in along.items()}
        return {
            (i, o): a * b for (i, a), (o, b) in product(along.items(), shares(self.outputs, outputs, block).items())
        }


def shares(axis: Sequence[int], at: int, block: int) -> dict[int, float]:
    """The one or two numbers of an ascending axis around `at`, and what each counts, all rounded up to whole blocks."""
    if at in axis:
        return {at: 1.0}
    place = _up(at, block)
    below = [x for x in axis if _up(x, block) <= place]
    above = [x for x in axis if _up(x, block) >= place]
    if not below or not above:
        return {axis[-1] if below else axis[0]: 1.0}
    low, high = below[-1], above[0]
    if place in (_up(low, block), _up(high, block)):
        return {low if _up(low, block) == place else high: 1.0}
    share = (place - _up(low, block)) / (_up(high, block) - _up(low, block))
    return {low: 1 - share, high: share}


def _up(width: int, block: int) -> int:
    return -(-width // block) * block


def thinned(widths: Iterable[int], most: int) -> tuple[int, ...]:
    """At most `most` of the widths, ascending: both ends, and those nearest to even steps between them."""
    found = sorted(set(widths))
    if len(found) <= most:
        return tuple(found)
    steps = np.linspace(found[0], found[-1], most)
    return tuple(sorted({min(found, key=lambda width: abs(width - step)) for step in steps}))


def reachable(space: SearchSpace) -> dict[str, frozenset[tuple[int, int]]]:
    """(inputs, outputs) that each layer can be left with, by name."""
    cost = CostModel(space, {})
    widths = {coupling.name: _coupling_widths(space, coupling.name) for coupling in space.graph.couplings}
    found = {}
    for index, layer in enumerate(space.layers):
        related = cost.related(index)
        options = product(*(widths[n] if len(related) <= 2 else thinned(widths[n], _MOST_COUPLED) for n in related))
        shapes = (cost.narrowed(layer, dict(zip(related, option, strict=True))) for option in options)
        found[layer.name] = frozenset((g.inputs, g.outputs) for g in shapes)
    return found


def _coupling_widths(space: SearchSpace, name: str) -> tuple[int, ...]:
    """Units that a coupling can be left with."""
    coupling = space.graph.coupling(name)
    if space.led_by(name) is None:
        return (coupling.width,)
    index = next(number for number, layer in enumerate(space.layers) if layer.name == name)
    taken = (STRUCTURES[s] for s in np.flatnonzero(space.structures[index]).tolist())
    return tuple(sorted({coupling.width, *(units_left(coupling, choice) for choice in taken if narrows(choice))}))


def grids(space: SearchSpace, most: int | None = None) -> dict[str, Grid]:
    """Where each layer's entries are measured, by name: at most `most` widths on each side. By default as many as
    `MOST_ENTRIES` allow, but `FEWEST_WIDTHS`: interpolated entries are off by a tenth, since kernels are slower for
    ranks that are no multiples of 4, and only some widths give such ranks.
    """
    left = reachable(space)
    if most is not None:
        return _grids(space, left, most)
    options = (_grids(space, left, number) for number in range(MOST_WIDTHS, FEWEST_WIDTHS, -1))
    return next((g for g in options if _entries(space, g) <= MOST_ENTRIES), _grids(space, left, FEWEST_WIDTHS))


def _entries(space: SearchSpace, found: Mapping[str, Grid]) -> int:
    """About how many entries are measured on these grids: structures that run differently, in float and in 8 bits."""
    counts = {}
    for index, layer in enumerate(space.layers):
        taken = [STRUCTURES[s] for s in np.flatnonzero(space.structures[index]).tolist()]
        own = sum(choice.method in (Method.FACTORIZE, Method.DISTILL) and not narrows(choice) for choice in taken)
        counts[layer.geometry, found[layer.name]] = 2 * (1 + own) * len(list(found[layer.name].pairs()))
    return sum(counts.values())


def _grids(space: SearchSpace, left: Mapping[str, Iterable[tuple[int, int]]], most: int) -> dict[str, Grid]:
    found = {}
    for name, pairs in left.items():
        geometry = space.graph.layer(name).geometry
        inputs = thinned((i for i, _ in pairs), most)
        if geometry.depthwise:
            outputs = tuple(i * (geometry.outputs // geometry.inputs) for i in inputs)
        else:
            outputs = thinned((o for _, o in pairs), most)
        found[name] = Grid(inputs, outputs, tied=geometry.depthwise)
    return found
