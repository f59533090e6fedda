"""Union-find over atoms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grainwise.graph.atoms import Atoms

SIZE = 12


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1))))
def test_classes_are_the_connected_components(pairs: list[tuple[int, int]]) -> None:
    atoms = Atoms()
    atoms.tag(0, (SIZE,))
    reach = np.eye(SIZE, dtype=bool)
    for a, b in pairs:
        atoms.unify(np.array([a]), np.array([b]))
        reach[a, b] = reach[b, a] = True
    for k in range(SIZE):  # Warshall's closure
        reach |= np.outer(reach[:, k], reach[k])
    expected = {tuple(np.flatnonzero(row).tolist()) for row in reach}
    assert {tuple(members) for members in atoms.classes()} == expected


def test_the_first_reason_stays_and_holds_for_the_class() -> None:
    atoms = Atoms()
    first, second = atoms.tag(0, (2, 2))
    assert first is not None and second is not None
    atoms.freeze(second, "early")
    atoms.freeze(second, "late")
    atoms.unify(first, second)
    assert [atoms.reason(members) for members in atoms.classes()] == ["early", "early"]


def test_meeting_a_fixed_dimension_freezes() -> None:
    atoms = Atoms()
    (units,) = atoms.tag(0, (3,))
    assert atoms.meet(None, units, "fixed") is units
    assert atoms.reason([2]) == "fixed"
    assert atoms.tag(1, (1,)) == (None,)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        Atoms().unify(np.arange(2), np.arange(3))
