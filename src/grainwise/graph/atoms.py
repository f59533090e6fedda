"""Atoms: one for each index of each parameter dimension, joined into classes that can only be removed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

AtomArray = NDArray[np.int64]
Dims = tuple[AtomArray | None, ...]
"""For each dimension the atom at each index, or None where no unit can be removed (batch, pixels, tokens)."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """What is known of a tensor: its shape, its atoms, and whether only parameters went into it."""

    shape: tuple[int, ...]
    dims: Dims
    weight: bool = False


@dataclass(frozen=True, slots=True)
class Origin:
    """The place an atom stands for: index `index` of dimension `dim` of the tensor numbered `tensor`."""

    tensor: int
    dim: int
    index: int


class Atoms:
    """Union-find over atoms, with the reasons why some must stay and a mark on those that a product sums over."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._origins: list[Origin | None] = []
        self._reasons: dict[int, str] = {}
        self._read: set[int] = set()

    def tag(self, tensor: int, shape: tuple[int, ...]) -> Dims:
        """New atoms for a parameter; dimensions of size 1 get none, for their unit can never be removed."""
        return tuple(
            self._new([Origin(tensor, dim, index) for index in range(size)]) if size > 1 else None
            for dim, size in enumerate(shape)
        )

    def constants(self, size: int, reason: str) -> AtomArray:
        """New atoms that belong to no parameter and must stay."""
        atoms = self._new([None] * size)
        self.freeze(atoms, reason)
        return atoms

    def _new(self, origins: Sequence[Origin | None]) -> AtomArray:
        start = len(self._parent)
        self._parent.extend(range(start, start + len(origins)))
        self._origins.extend(origins)
        return np.arange(start, start + len(origins), dtype=np.int64)

    def root(self, atom: int) -> int:
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def unify(self, first: AtomArray, second: AtomArray) -> None:
        """Join the atoms of two arrays of one length, pair by pair."""
        if first.shape != second.shape:
            raise ValueError(f"atoms of shapes {first.shape} and {second.shape} cannot be paired")
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            root_a, root_b = self.root(a), self.root(b)
            if root_a != root_b:
                self._parent[max(root_a, root_b)] = min(root_a, root_b)

    def meet(self, first: AtomArray | None, second: AtomArray | None, reason: str) -> AtomArray | None:
        """Join two dimensions that must keep one width; atoms that meet a fixed dimension are frozen with `reason`."""
        if first is None or second is None:
            self.freeze(first, reason)
            self.freeze(second, reason)
            return first if second is None else second
        self.unify(first, second)
        return first

    def freeze(self, atoms: AtomArray | None, reason: str) -> None:
        """Mark atoms as not removable; the first reason stays."""
        if atoms is not None:
            for atom in atoms.tolist():
                self._reasons.setdefault(atom, reason)

    def mark_read(self, atoms: AtomArray | None) -> None:
        """Mark parameter atoms as the side of a product that is summed over: the consumers of the units."""
        if atoms is not None:
            self._read.update(atoms.tolist())

    def is_read(self, atom: int) -> bool:
        return atom in self._read

    def origin(self, atom: int) -> Origin | None:
        return self._origins[atom]

    def classes(self) -> list[list[int]]:
        """The atoms that belong together, in order of their first atom."""
        found: dict[int, list[int]] = {}
        for atom in range(len(self._parent)):
            found.setdefault(self.root(atom), []).append(atom)
        return list(found.values())

    def reason(self, atoms: list[int]) -> str | None:
        """Why a class must stay, or None."""
        return next((self._reasons[a] for a in atoms if a in self._reasons), None)
