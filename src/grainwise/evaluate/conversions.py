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
            if join.result in self.circuit.clipped and join.result not in self.active:  # else quantising clips
                self.found[Kernel.RELU, join.result] += 1

    def _made_last(self, point: Point) -> bool:
        """True for an 8-bit value whose kernel writes channels last: that of a convolution, or a sum of such values."""
        if point.maker is None or not self._eight_bit(point.maker):
            return False
        join = self.joins.get(point.maker)
        return join is None or self._sum_last(join)

    def _sum_last(self, join: Join) -> bool:
        """An 8-bit sum has channels last when both its operands have; else they are put in plain order for it."""
        return all(self._made_last(self.circuit.points[name]) for name in join.operands)

    def _rounded_twice(self, name: str) -> bool:
        """True for a float sum whose result is quantised: ONNX Runtime moves the transposition of an operand behind its
        dequantisation, and then quantises and dequantises it once more.
        """
        join = self.joins.get(name)
        return join is not None and not self._eight_bit(name) and join.result in self.active

    def _active(self, point: Point) -> None:
        made = point.maker is not None and self._eight_bit(point.maker)
        last = self._made_last(point)
        others = [name for name in point.readers if not self._eight_bit(name)]
        twice = [name for name in others if self._rounded_twice(name)] if last else []
        plain = point.floats or len(others) > len(twice)
        sums = [self.joins[name] for name in point.readers if name in self.joins and self._eight_bit(name)]
        if last:
            transposed = plain + len(twice) + any(not self._sum_last(join) for join in sums)
        else:
            transposed = any(name in self.static for name in point.readers)
        if not made:
            self._add(Kernel.REORDER_OUTPUT, point, point.name in self.blocked)
            self._add(Kernel.QUANTIZE, point)
        self._add(Kernel.TRANSPOSE, point, int(transposed))
        self._add(Kernel.QUANTIZE, point, len(twice))
        self._add(Kernel.DEQUANTIZE, point, len(others) + point.floats + len(twice))
        self._add(Kernel.REORDER_INPUT, point, any(map(self._reads_blocked, others)))

    def _add(self, kernel: Kernel, point: Point, count: int = 1) -> None:
        if count:
            self.found[kernel, point.name] += int(count)

    def _float(self, point: Point) -> None:
        blocked = [self._reads_blocked(name) for name in point.readers]
        if point.name in self.blocked:
            self._add(Kernel.REORDER_OUTPUT, point, point.floats or not all(blocked))
        else:
            self._add(Kernel.REORDER_INPUT, point, any(blocked))
