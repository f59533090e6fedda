import numpy as np
import pytest

from grainwise.search import beliefs
from grainwise.search.beliefs import Beliefs
from grainwise.study.sensitivity import Sensitivity

PRIOR = Sensitivity(np.array([[0.0, 0.3], [0.0, 0.5]]), np.array([[0.0, 0.2] + [1.0] * 8, [0.0, 0.1] + [1.0] * 8]))
KEY = (11, 10)  # the first layer takes structure 1 and precision 1, the second structure 1: 0.3 + 0.2 + 0.5


def _sum(table: Sensitivity) -> float:
    return float(table.structures[0, 1] + table.precisions[0, 1] + table.structures[1, 1])


def _samples(keys: list[tuple[int, ...]], divergences: list[float], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    for name, value in {"_ALL": 0.1, "_LAYER": 0.04, "_OWN": 0.08, "_NOISE": 0.05}.items():
        monkeypatch.setattr(beliefs, name, value)  # so small that no score is cut
    rng, believed = np.random.default_rng(0), Beliefs(PRIOR, keys, divergences)
    return np.array([_sum(believed.sample(rng)) for _ in range(4000)])


def test_samples_without_trials_have_the_spread_of_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = _samples([], [], monkeypatch)
    # errors: of all in common, of each layer, of each score
    variance = 0.1**2 * 1.0**2 + 0.04**2 * (0.5**2 + 0.5**2) + 0.08**2 * (0.3**2 + 0.2**2 + 0.5**2)
    assert drawn.mean() == pytest.approx(1.0, abs=0.008)
    assert drawn.var() == pytest.approx(variance, rel=0.08)


def test_samples_after_a_trial_have_mean_and_variance_of_the_gaussian_posterior(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = _samples([KEY], [1.2], monkeypatch)
    before = 0.1**2 + 0.04**2 * 0.5 + 0.08**2 * 0.38
    noise = (0.05 * 1.2) ** 2
    gain = before / (before + noise)
    assert drawn.mean() == pytest.approx(1.0 + gain * 0.2, abs=0.004)
    assert drawn.var() == pytest.approx(before * noise / (before + noise), rel=0.08)
    assert _sum(Beliefs(PRIOR, [KEY], [1.2]).mean()) == pytest.approx(1.0 + gain * 0.2)


def test_spread_draws_samples_nearer_to_the_mean() -> None:
    mean = _sum(Beliefs(PRIOR, [KEY], [1.2]).mean())
    far, near, none = (
        _sum(Beliefs(PRIOR, [KEY], [1.2]).sample(np.random.default_rng(3), spread)) - mean for spread in (0.2, 0.1, 0.0)
    )
    assert abs(far) > 1e-3
    assert near == pytest.approx(far / 2)
    assert none == pytest.approx(0.0, abs=1e-12)


def test_samples_are_scores() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        table = Beliefs(PRIOR, [KEY], [0.01]).sample(rng)
        assert (table.structures[:, 0] == 0).all()
        assert table.structures[0, 1] >= 0.1 * 0.3
