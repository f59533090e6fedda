"""Atoms through views: merging and un-merging is free, splitting freezes."""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from grainwise.graph.atoms import Atoms, Tagged
from grainwise.graph.call import Call
from grainwise.graph.reshaping import reshape


def view(atoms: Atoms, x: Tagged, shape: tuple[int, ...]) -> Tagged:
    (dims,) = reshape(Call(atoms, "view", {"self": x}, (shape,)))
    return Tagged(shape, dims)


def feature_map(*shape: int) -> tuple[Atoms, Tagged]:
    """A map whose second dimension holds removable channels."""
    atoms = Atoms()
    channels = atoms.tag(0, (shape[1],))[0]
    return atoms, Tagged(shape, (None, channels, *[None] * (len(shape) - 2)))


def test_flattening_repeats_each_channel() -> None:
    atoms, x = feature_map(2, 3, 2, 2)
    assert view(atoms, x, (2, 12)).dims[1].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_splitting_channels_freezes_them() -> None:
    atoms, x = feature_map(2, 12, 5)
    heads = view(atoms, x, (2, 3, 4, 5))
    assert heads.dims == (None,) * 4
    assert "heads" in (atoms.reason([0]) or "")


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(2, 5), st.integers(1, 4), st.integers(1, 4)),
    first=st.integers(0, 3),
    last=st.integers(0, 3),
)
def test_what_is_merged_can_be_unmerged(shape: tuple[int, ...], first: int, last: int) -> None:
    atoms, x = feature_map(*shape)
    first, last = min(first, last), max(first, last)
    merged = view(atoms, x, (*shape[:first], prod(shape[first : last + 1]), *shape[last + 1 :]))
    back = view(atoms, merged, shape)
    assert np.array_equal(back.dims[1], x.dims[1])
    assert all(dim is None for k, dim in enumerate(back.dims) if k != 1)
    assert atoms.reason(list(range(shape[1]))) is None
