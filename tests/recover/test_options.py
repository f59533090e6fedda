from __future__ import annotations

import math

import pytest

from grainwise.recover.options import RecoverOptions, TrainingBudget, learning_rate, training_budget


def test_the_rate_rises_and_falls() -> None:
    """By hand, peak 1, 10 steps of warm-up and 110 in all."""
    options = RecoverOptions(learning_rate=1.0, warm_up=10)
    assert [learning_rate(step, 110, options) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert math.isclose(learning_rate(60, 110, options), 0.5)
    assert learning_rate(110, 110, options) == 0.0
    assert [learning_rate(step, None, options) for step in (4, 10, 500)] == [0.5, 1.0, 1.0]
    assert learning_rate(0, 5, options) == 1.0  # a tenth of five steps is none


def test_a_budget_is_epochs_or_minutes() -> None:
    assert training_budget(None, None) == TrainingBudget(epochs=3)
    assert training_budget(None, 0.5) == TrainingBudget(minutes=0.5)
    for epochs, minutes in ((1, 1.0), (0, None), (None, 0.0), (None, math.nan), (None, math.inf)):
        with pytest.raises(ValueError, match="give epochs or minutes, above 0"):
            training_budget(epochs, minutes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"temperature": -1.0},
        {"feature_weight": -1.0},
        {"warm_up": -1},
        {"patience": 0},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        RecoverOptions(**wrong)  # type: ignore[arg-type]
