"""The vocabulary of compression: methods, granularities, levels, choices, and the entry a profile holds for a layer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import product


class Method(StrEnum):
    """What is done to a layer's weight."""

    NONE = "none"
    PRUNE = "prune"
    QUANTIZE = "quantize"
    FACTORIZE = "factorize"
    DISTILL = "distill"


class Granularity(StrEnum):
    """The unit within which one decision or one parameter holds."""

    LAYER = "layer"
    BLOCK = "block"
    CHANNEL = "channel"


LEVELS: dict[Method, tuple[float, ...]] = {
    Method.PRUNE: (0.1, 0.3, 0.5, 0.7),  # share removed
    Method.QUANTIZE: (8, 4, 2),  # bits a weight
    Method.FACTORIZE: (0.5, 0.25, 0.125),  # share of the full rank kept
    Method.DISTILL: (0.5, 0.25),  # width of the student
}
"""Levels of each method, from mild to hard."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One method at one granularity and level; `NONE` has neither.

    Raises ValueError for a combination that is not in the vocabulary.
    """

    method: Method = Method.NONE
    granularity: Granularity | None = None
    level: float | None = None

    def __post_init__(self) -> None:
        if self.method is Method.NONE:
            if self.granularity is not None or self.level is not None:
                raise ValueError(f"method none takes no granularity or level, got {self.granularity}, {self.level}")
        elif self.granularity is None or self.level not in LEVELS[self.method]:
            raise ValueError(
                f"{self.method} needs a granularity and a level of {LEVELS[self.method]}, "
                f"got {self.granularity} and {self.level}"
            )

    def __str__(self) -> str:
        if self.method is Method.NONE:
            return "none"
        return f"{self.method}/{self.granularity}/{self.level:g}"


NONE = Choice()


def _choices(*methods: Method) -> tuple[Choice, ...]:
    return (NONE, *(Choice(m, g, level) for m in methods for g, level in product(Granularity, LEVELS[m])))


STRUCTURES: tuple[Choice, ...] = _choices(Method.PRUNE, Method.FACTORIZE, Method.DISTILL)
"""Every structural choice; a choice's index is its action number everywhere."""

PRECISIONS: tuple[Choice, ...] = _choices(Method.QUANTIZE)
"""Every precision choice; a choice's index is its action number everywhere."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a profile says of a layer: first the structure, then the precision of what the structure left.

    Raises ValueError when a choice stands in the other's place.
    """

    structure: Choice = NONE
    precision: Choice = NONE

    def __post_init__(self) -> None:
        if self.structure.method is Method.QUANTIZE:
            raise ValueError(f"{self.structure} is a precision, not a structure")
        if self.precision.method not in (Method.NONE, Method.QUANTIZE):
            raise ValueError(f"{self.precision} is a structure, not a precision")

    def __str__(self) -> str:
        parts = [str(c) for c in (self.structure, self.precision) if c is not NONE and c != NONE]
        return " + ".join(parts) or "none"


UNCOMPRESSED = Entry()

_STRUCTURE_NUMBERS = {choice: number for number, choice in enumerate(STRUCTURES)}
_PRECISION_NUMBERS = {choice: number for number, choice in enumerate(PRECISIONS)}


def numbers_of(entry: Entry) -> tuple[int, int]:
    """Action numbers of an entry's structure and precision."""
    return _STRUCTURE_NUMBERS[entry.structure], _PRECISION_NUMBERS[entry.precision]


def entry_of(structure: int, precision: int) -> Entry:
    """Inverse of `numbers_of`."""
    return Entry(STRUCTURES[structure], PRECISIONS[precision])
