"""Timing by hand, and the line to whole networks."""

from __future__ import annotations

import pytest

from grainwise.evaluate.calibration import Calibration, Work, fit
from grainwise.evaluate.timing import (
    Machine,
    Timing,
    device_name,
    interleaved,
    mean_percentage_error,
    noise,
    rank_correlation,
    ratio,
)


def test_programs_are_called_in_turn() -> None:
    calls: list[str] = []
    found = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls[-12:] == ["a", "a", "b", "b"] * 3  # the first call of a turn warms up
    assert found["a"].runs == found["b"].runs == 3
    with pytest.raises(ValueError, match="rounds"):
        interleaved({}, rounds=1, seconds=1.0)


def test_ratios_pair_the_rounds() -> None:
    a, b = Timing((1.0, 9.0), (1.0, 9.0)), Timing((2.0, 18.0), (2.0, 18.0))
    assert ratio(a, b) == 0.5
    assert not noise(a, a).noisy
    assert noise(a, b).noisy
    slow = Timing((4.0, 36.0), (1.0, 9.0))  # waited for something else than this process
    assert (ratio(slow, a), ratio(slow, a, wall=True)) == (1.0, 4.0)
    assert (noise(slow, a).spread, noise(slow, a, wall=True).spread) == (0.0, 3.0)
    assert a.p50_ms == 5.0
    with pytest.raises(ValueError, match="pair"):
        ratio(a, Timing((1.0,), (1.0,)))


def test_rounds_in_which_the_processor_clock_stood_still_do_not_count() -> None:
    half, whole = Timing((1.0, 1.0, 1.0), (0.0, 1.0, 0.0)), Timing((2.0, 2.0, 2.0), (0.0, 2.0, 2.0))
    assert ratio(half, whole) == 0.5
    still = Timing((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    assert ratio(still, whole) == 0.5  # of the time on the clock


def test_time_can_be_the_limit() -> None:
    found = interleaved({"a": lambda: None}, seconds=0.01)
    assert found["a"].runs >= 1
    assert set(found["a"].to_json()) == {"p50_ms", "p95_ms", "cpu_median_ms", "runs"}
    with pytest.raises(ValueError, match="no timing"):
        Timing((), ())


def test_the_machine_is_named() -> None:
    machine = Machine(device_name(), 1, "onnxruntime", "1.0")
    assert machine.device
    assert machine.to_json() == {"device": machine.device, "threads": 1, "runtime": "onnxruntime", "version": "1.0"}


def test_errors_and_ranks_by_hand() -> None:
    assert mean_percentage_error([1.1, 1.8], [1.0, 2.0]) == pytest.approx(10.0)
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 15.0]) == pytest.approx(0.5)
    assert rank_correlation([1.0, 1.0, 2.0], [1.0, 1.0, 5.0]) == pytest.approx(1.0)  # equal values share a rank
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) == 0.0


def test_the_line_is_found_again() -> None:
    works = [Work(1.0, 1), Work(2.0, 5), Work(3.0, 2), Work(4.0, 9)]
    line = fit(works, [2 * work.ms - 0.1 * work.kernels + 0.5 for work in works])
    assert (line.slope, line.kernel_ms, line.offset_ms) == pytest.approx((2.0, -0.1, 0.5))
    assert line.whole(Work(10.0, 5)) == pytest.approx(20.0)
    assert line.part(Work(10.0, 5)) == pytest.approx(19.5)
    assert line.part(Work(0.1, 9)) == 0.0
    assert fit([Work(1.0, 1), Work(2.0, 1)], [2.0, 1.0]).slope == 1.0
    with pytest.raises(ValueError, match="line"):
        fit(works[:1], [1.0])
    with pytest.raises(ValueError, match="slope"):
        Calibration(-1.0)
