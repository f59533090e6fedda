"""How soon a run was as good as another one ended, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from bench.search import _as_good

RUN: dict[str, Any] = {"divergence_curve": [None, 0.5, 0.3, 0.3, 0.1], "seconds_curve": [11.0, 12.0, 15.0, 16.0, 20.0]}


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        (0.6, {"evaluations": 2, "seconds": 12.0}),
        (0.3, {"evaluations": 3, "seconds": 15.0}),
        (0.29, {"evaluations": 5, "seconds": 20.0}),
        (0.05, None),
        (None, None),
    ],
)
def test_the_first_profile_as_good_counts(goal: float | None, expected: dict[str, float] | None) -> None:
    assert _as_good(RUN, goal) == expected
