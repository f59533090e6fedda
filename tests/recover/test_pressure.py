from __future__ import annotations

import pytest

from grainwise.recover.pressure import AdaptiveOptions, shares


def test_pressure_rises_from_none_to_the_constraints() -> None:
    assert shares({"size": 0.2}, 0, 4) == {"size": 1.0}
    assert shares({"size": 0.2}, 4, 4) == {"size": 0.2}
    assert shares({"size": 0.2}, 2, 4) == {"size": pytest.approx(0.3)}  # 0.2 + 0.8 / 8
    falling = [shares({"size": 0.2}, k, 4)["size"] for k in range(5)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("epochs", "settle", "expected"),
    [
        (12, 1 / 3, (1, 2, 3, 4, 5, 6, 7, 8)),
        (4, 0.0, (1, 2, 3, 4)),
        (60, 1 / 3, (5, 10, 15, 20, 25, 30, 35, 40)),
        (1, 0.5, (1,)),
        (3, 0.9, (1,)),
    ],
)
def test_few_epochs_end_with_a_decision_and_the_last_ones_never(
    epochs: int, settle: float, expected: tuple[int, ...]
) -> None:
    assert AdaptiveOptions(settle=settle).ends(epochs) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decisions": 0}, "decisions must be at least 1, got 0"),
        ({"settle": 1.0}, "settle must be 0 or more and below 1, got 1.0"),
        ({"margin": -0.1}, "margin must be 0 or more"),
        ({"evaluations": 1}, "evaluations must be at least 2, got 1"),
        ({"samples": 0}, "samples must be at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveOptions(**options)  # type: ignore[arg-type]
