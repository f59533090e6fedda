import ctypes
from itertools import product

import numpy as np
import pytest

from grainwise.search.milp import Rows, _quiet, minimise


@pytest.mark.parametrize("seed", range(8))
def test_the_solution_is_that_of_enumeration(seed: int) -> None:
    """Four groups of three columns, one of each, under two knapsacks."""
    rng = np.random.default_rng(seed)
    objective, costs = rng.exponential(size=(4, 3)), rng.random((2, 4, 3))
    limits = costs.mean(axis=2).sum(axis=1)
    rows = Rows(12)
    for group in range(4):
        rows.add(np.arange(3) + 3 * group, 1.0, 1.0, 1.0)
    for cost, limit in zip(costs, limits, strict=True):
        rows.add(np.arange(12), cost.ravel(), -np.inf, limit)

    picks = [np.array(pick) for pick in product(range(3), repeat=4)]
    groups = np.arange(4)
    fitting = [p for p in picks if (costs[:, groups, p].sum(axis=1) <= limits).all()]
    values = sorted(objective[groups, p].sum() for p in fitting)
    taken = minimise(objective.ravel(), rows, limit=values[len(values) // 2])
    assert taken is not None
    assert objective.ravel()[taken].sum() == pytest.approx(values[0], rel=2e-3)
    assert (costs.reshape(2, -1)[:, taken].sum(axis=1) <= limits + 1e-6).all()


def test_what_cannot_be_met_gives_none() -> None:
    rows = Rows(2)
    rows.add(np.arange(2), 1.0, 3.0, 3.0)
    assert minimise(np.ones(2), rows, limit=5.0) is None


def test_what_the_solver_prints_is_not_seen(capfd: pytest.CaptureFixture[str]) -> None:
    c = ctypes.CDLL(None)
    with _quiet():
        c.puts(b"inside")
    c.puts(b"after")
    c.fflush(None)
    assert capfd.readouterr().out == "after\n"
