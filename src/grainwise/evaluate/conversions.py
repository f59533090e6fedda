"""What runs between the layers of a deployed network, where float32 and 8-bit values meet, and what it costs.

A float convolution of ONNX Runtime keeps its values in blocks of channels, other float kernels in plain order, 8-bit
convolutions channels last in one byte. Each change of form is a kernel of its own (docs/decisions/0006).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from grainwise.graph.skeleton import Join, Point, Skeleton, Unit


class Kernel(StrEnum):
    """Kernels between layers, by ONNX Runtime's names."""

    REORDER_INPUT = "ReorderInput"
    REORDER_OUTPUT = "ReorderOutput"
    QUANTIZE = "QuantizeLinear"
    DEQUANTIZE = "DequantizeLinear"
    TRANSPOSE = "Transpose"
    ADD = "Add"
    RELU = "Relu"
    QUANTISED_ADD = "QLinearAdd"


@dataclass(frozen=True, slots=True)
class Line:
    """Milliseconds of a kernel that writes n numbers: base_ms + n * element_ms."""

    base_ms: float
    element_ms: float

    def of(self, elements: float) -> float:
        return self.base_ms + elements * self.element_ms


_RESOLUTION_MS = 2e-3  # differences below are the profiler's whole microseconds


def fit_line(samples: Sequence[tuple[int, float]]) -> Line:
    """The line through (elements, ms) of least squared relative error; neither part is negative.

    Raises ValueError without samples.
    """
    if not samples:
        raise ValueError("a line needs at least one measured kernel")
    elements, ms = np.array(samples, dtype=np.float64).T
    weights = 1 / np.maximum(ms, _RESOLUTION_MS)

    def solve(columns: Sequence[np.ndarray[tuple[int], np.dtype[np.float64]]]) -> list[float]:
        matrix = np.stack(columns, axis=1) * weights[:, None]
        return [float(x) for x in np.linalg.lstsq(matrix, ms * weights, rcond=None)[0]]

    ones = np.ones_like(elements)
    base, slope = solve([ones, elements])
    if slope < 0:
        return Line(solve([ones])[0], 0.0)
    return Line(0.0, max(0.0, solve([elements])[0])) if base < 0 else Line(base, slope)


@dataclass(frozen=True, slots=True)
class Form:
    """How a float layer takes and gives its values: in blocks of channels or in plain order."""

    reads_blocked: bool = False
    writes_blocked: bool = False


PLAIN = Form()
Conversions = Counter[tuple[Kernel, str]]
"""How often each kernel runs on the value at the point of that name."""


@dataclass(frozen=True, slots=True)
class Circuit:
    """Layers, sums and the points between them, as `graph.skeleton` finds them; joins and points in running order.

    clipped: results of sums that are clipped first.
    """

    units: Mapping[str, Unit]
    joins: tuple[Join, ...]
    points: Mapping[str, Point]
    clipped: Collection[str] = ()

    @staticmethod
    def of(skeleton: Skeleton, clipped: Collection[str]) -> Circuit:
        return Circuit(skeleton.units, skeleton.joins, skeleton.points, frozenset(clipped))

    def widths(self, left: Mapping[str, float]) -> dict[str, float]:
        """Share of the channels left at each point that a layer or a sum makes. left: of the layers' outputs."""
        found = {unit.result: left[name] for name, unit in self.units.items() if unit.result and name in left}
        for join in self.joins:
            found[join.result] = min((found[name] for name in join.operands if name in found), default=1.0)
        return found

    def conversions(self, static: Collection[str], active: Collection[str], forms: Mapping[str, Form]) -> Conversions:
        """Kernels between the layers when those named `static` run in 8 bits.

        active: points kept in 8 bits (`Skeleton.active`). forms: of the float layers; what is not named is plain.
        """
        return _Count(self, frozenset(static), frozenset(active), forms).count()


class _Count:
    """One pass over the points, in running order."""

    def __init__(
        self, circuit: Circuit, static: frozenset[str], active: frozenset[str], forms: Mapping[str, Form]
    ) -> None:
        self.circuit, self.static, self.active, self.forms = circuit, static, active, forms
        self.joins = {join.name: join for join in circuit.joins}
        self.found: Conversions = Counter()
        self.blocked: set[str] = set()  # points whose value is float32 in blocks

    def count(self) -> Conversions:
        for point in sorted(self.circuit.points.values(), key=self._order()):
            if self._written_blocked(point):
                self.blocked.add(point.name)
        for join in self.circuit.joins:
            self._sum(join)
        for point in self.circuit.points.values():
            self._active(point) if point.name in self.active else self._float(point)
        return self.found

    def _order(self) -> Callable[[Point], int]:
        """Results of sums after the results of all layers and of the sums before."""
        numbers = {join.name: number for number, join in enumerate(self.circuit.joins, start=1)}
        return lambda point: numbers.get(point.maker or "", 0)

    def _eight_bit(self, name: str) -> bool:
        """True for a layer or sum that reads and writes 8 bits."""
        join = self.joins.get(name)
        return name in self.static if join is None else self.active.issuperset((*join.operands, join.result))

    def _sum_blocked(self, join: Join) -> bool:
        """True for a float sum of two blocked values: it is fused into a convolution or runs on blocks."""
        return self.blocked.issuperset(join.operands) and self.active.isdisjoint(join.operands)

    def _written_blocked(self, point: Point) -> bool:
        if point.maker is None or self._eight_bit(point.maker):
            return False
        join = self.joins.get(point.maker)
        return self.forms.get(point.maker, PLAIN).writes_blocked if join is None else self._sum_blocked(join)

    def _reads_blocked(self, name: str) -> bool:
        join = self.joins.get(name)
        return self.forms.get(name, PLAIN).reads_blocked if join is None else self._sum_blocked(join)

    def _sum(self, join: Join) -> None:
        if self._eight_bit(join.name):
            self.found[Kernel.QUANTISED_ADD, join.result] += 1
        elif not self._sum_blocked(join):
            self.found[Kernel.ADD, join.result] += 1
            if join.result in self.circuit.clipped:
                self.found[Kernel.RELU, join.result] += 1

    def _active(self, point: Point) -> None:
        made = point.maker is not None and self._eight_bit(point.maker)
        eight_bit = [name for name in point.readers if self._eight_bit(name)]
        others = [name for name in point.readers if not self._eight_bit(name)]
        if not made:
            if point.name in self.blocked:
                self.found[Kernel.REORDER_OUTPUT, point.name] += 1
            self.found[Kernel.QUANTIZE, point.name] += 1
            if eight_bit:
                self.found[Kernel.TRANSPOSE, point.name] += 1
        if others or point.floats:
            if made:
                self.found[Kernel.TRANSPOSE, point.name] += 1
            self.found[Kernel.DEQUANTIZE, point.name] += 1
            if any(map(self._reads_blocked, others)):
                self.found[Kernel.REORDER_INPUT, point.name] += 1

    def _float(self, point: Point) -> None:
        blocked = [self._reads_blocked(name) for name in point.readers]
        if point.name in self.blocked and (point.floats or not all(blocked)):
            self.found[Kernel.REORDER_OUTPUT, point.name] += 1
        if point.name not in self.blocked and any(blocked):
            self.found[Kernel.REORDER_INPUT, point.name] += 1
