"""Timing by hand, and the line to whole networks."""

from __future__ import annotations

import pytest

from grainwise.evaluate.calibration import Calibration, fit
from grainwise.evaluate.timing import (
    Timing,
    interleaved,
    mean_percentage_error,
    noise,
    rank_correlation,
    ratio,
)


def test_programs_are_called_in_turn() -> None:
    calls: list[str] = []
    found = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls[-6:] == ["a", "b"] * 3
    assert found["a"].runs == found["b"].runs == 3
    with pytest.raises(ValueError, match="rounds"):
        interleaved({}, rounds=1, seconds=1.0)


def test_ratios_pair_the_rounds() -> None:
    a, b = Timing((1.0, 9.0), (1.0, 9.0)), Timing((2.0, 18.0), (2.0, 18.0))
    assert ratio(a, b) == 0.5
    assert not noise(a, a).noisy
    assert noise(a, b).noisy
    assert a.p50_ms == 5.0
    assert a.cpu_ms == 1.0
    with pytest.raises(ValueError, match="pair"):
        ratio(a, Timing((1.0,), (1.0,)))


def test_errors_and_ranks_by_hand() -> None:
    assert mean_percentage_error([1.1, 1.8], [1.0, 2.0]) == pytest.approx(10.0)
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 15.0]) == pytest.approx(0.5)


def test_the_line_is_found_again() -> None:
    line = fit([1.0, 2.0, 3.0], [2.5, 4.5, 6.5])
    assert (line.slope, line.offset_ms) == (pytest.approx(2.0), pytest.approx(0.5))
    assert fit([1.0, 2.0], [2.0, 1.0]).slope == 1.0
    assert line.of(10.0) == pytest.approx(20.5)
    with pytest.raises(ValueError, match="slope"):
        Calibration(-1.0)
