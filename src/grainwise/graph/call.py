"""One call of an ATen operator as its rule sees it: arguments by name, tensors as atoms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grainwise.graph.atoms import AtomArray, Atoms, Dims, Tagged

FIXED = "combined with a tensor of fixed width"


@dataclass(frozen=True, slots=True)
class Call:
    """atoms: the table that the rule updates. name: the operator's, without overload. args: by schema name, defaults
    filled in, tensors replaced by `Tagged`. shapes: of each output tensor. A rule returns the `Dims` of each output.
    """

    atoms: Atoms
    name: str
    args: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]

    def tensor(self, name: str) -> Tagged:
        value = self.args[name]
        if not isinstance(value, Tagged):
            raise TypeError(f"{self.name}: argument {name} is {type(value).__name__}, not a tensor")
        return value

    def optional(self, name: str) -> Tagged | None:
        value = self.args.get(name)
        return value if isinstance(value, Tagged) else None

    def tensors(self) -> list[Tagged]:
        """Every tensor argument, also those in lists."""
        found: list[Tagged] = []
        for value in self.args.values():
            items = value if isinstance(value, list | tuple) else (value,)
            found.extend(item for item in items if isinstance(item, Tagged))
        return found

    def dim(self, name: str, x: Tagged) -> int:
        """A dimension argument as a non-negative number."""
        return int(self.args[name]) % max(1, len(x.shape))

    def dims_of(self, name: str, x: Tagged) -> list[int]:
        """A list of dimensions as non-negative numbers; missing, None or empty means all."""
        value = self.args.get(name)
        listed: Sequence[int] = [value] if isinstance(value, int) else (value or range(len(x.shape)))
        return [int(d) % max(1, len(x.shape)) for d in listed]

    def freeze_all(self, reason: str) -> None:
        for tensor in self.tensors():
            for array in tensor.dims:
                self.atoms.freeze(array, reason)

    def free_outputs(self) -> list[Dims]:
        return [(None,) * len(shape) for shape in self.shapes]

    def join(self, arrays: Sequence[AtomArray | None], size: int) -> AtomArray | None:
        """Join dimensions of one size that meet index by index."""
        if size <= 1 or all(array is None for array in arrays):
            for array in arrays:
                self.atoms.freeze(array, FIXED)
            return None
        joined = arrays[0]
        for array in arrays[1:]:
            joined = self.atoms.meet(joined, array, FIXED)
        return joined
