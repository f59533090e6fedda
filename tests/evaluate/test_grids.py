"""Interpolation between measured widths, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grainwise.evaluate.grids import Grid, grids, reachable, shares, thinned
from grainwise.plan.space import SearchSpace
from grainwise.session import Session


def test_corners_by_hand() -> None:
    grid = Grid((16, 32), (8, 24, 64))
    assert grid.corners(32, 24) == {(32, 24): 1.0}
    assert grid.corners(24, 34) == {(16, 24): 0.375, (16, 64): 0.125, (32, 24): 0.375, (32, 64): 0.125}
    assert grid.corners(8, 80) == {(16, 64): 1.0}  # beyond the ends
    assert list(grid.pairs())[:2] == [(16, 8), (16, 24)]


def test_widths_count_in_whole_blocks() -> None:
    assert shares((8, 16, 32, 64), 24, 16) == {32: 1.0}  # 24 channels are computed as 32
    assert shares((16, 64), 40, 16) == {16: pytest.approx(1 / 3), 64: pytest.approx(2 / 3)}
    assert shares((16, 64), 10, 16) == {16: 1.0}


def test_tied_sides_move_together() -> None:
    grid = Grid((8, 16), (16, 32), tied=True)
    assert list(grid.pairs()) == [(8, 16), (16, 32)]
    assert grid.corners(12, 24) == {(8, 16): 0.5, (16, 32): 0.5}
    with pytest.raises(ValueError, match="no grid"):
        Grid((8,), (8, 16), tied=True)


@given(
    st.sets(st.integers(1, 64).map(lambda n: 8 * n), min_size=1, max_size=6),
    st.integers(1, 600),
    st.sampled_from([1, 8, 16]),
)
def test_shares_are_a_mean_of_measured_widths(axis: set[int], at: int, block: int) -> None:
    found = shares(sorted(axis), at, block)
    assert found.keys() <= axis and len(found) <= 2
    assert sum(found.values()) == pytest.approx(1.0)
    assert all(0 <= share <= 1 for share in found.values())


def test_ends_are_kept() -> None:
    assert thinned([64, 16, 32, 48, 56], 3) == (16, 32, 64)
    assert thinned([8, 8, 16], 3) == (8, 16)


def test_grids_hold_what_a_search_can_ask_for(session: Session) -> None:
    space: SearchSpace = session.space
    left = reachable(space)
    assert {(16, 32), (16, 8), (8, 16), (8, 24)} <= left["block.0"]
    exact = grids(space)  # so small a network is measured at all its widths
    assert all(left[name] <= set(exact[name].pairs()) for name in left)
    assert all(len(grid.inputs) <= 2 and len(grid.outputs) <= 2 for grid in grids(space, 2).values())
