import numpy as np
import pytest

from grainwise.plan.choices import entry_of
from grainwise.search.draft import Draft
from grainwise.search.local import exchange, reduce, reduced, rises
from grainwise.search.prior import cheapest, finite_scores, score_of
from grainwise.search.walks import key_of
from tests.search.synthetic import Bed, bed


@pytest.fixture(scope="module")
def problem() -> Bed:
    return bed(5, blocks=1)


@pytest.mark.parametrize("size", [0.12, 0.97])
def test_the_first_step_is_the_best_saving_for_its_score(size: float) -> None:
    """Against every single change of the uncompressed network, priced as a whole profile; with a budget that one
    change meets, what goes below it must not count.
    """
    problem = bed(5, size=size, macs=None, blocks=1)
    projection, scores = problem.projection, finite_scores(problem.projection, problem.sensitivity)
    cost, budget = projection.cost, projection.budget
    finite = np.isfinite(budget)

    def excess(entries: dict) -> float:
        return float((np.maximum(0, cost.total(entries) - budget)[finite] / budget[finite]).sum())

    values = {}
    for index, layer in enumerate(projection.space.layers):
        for s, p in np.argwhere(projection.cost.pairs(index))[1:]:
            saved = excess({}) - excess({layer.name: entry_of(int(s), int(p))})
            values[index, int(s), int(p)] = saved / max(1e-9, scores[index, s, p])
    expected = max(values, key=lambda key: values[key])
    steps: list[tuple[int, int, int]] = []

    class Watched(Draft):
        def replace(self, index: int, structure: int, precision: int) -> None:
            steps.append((index, structure, precision))
            super().replace(index, structure, precision)

    draft = Watched(cost, {})
    assert reduce(draft, scores, projection)
    assert steps[0] == expected
    assert (draft.total <= budget).all()


def test_the_greedy_solution_is_legal_within_the_budgets_and_better_than_the_cheapest(problem: Bed) -> None:
    scores = finite_scores(problem.projection, problem.sensitivity)
    found = reduced(problem.projection, scores)
    problem.projection.space.check(found)
    cost = problem.projection.cost
    assert (cost.total(found) <= problem.projection.budget).all()
    assert score_of(Draft(cost, found), scores) < 0.5 * score_of(Draft(cost, cheapest(problem.projection)), scores)


def test_kept_layers_are_not_touched_and_the_impossible_is_told(problem: Bed) -> None:
    scores = finite_scores(problem.projection, problem.sensitivity)
    everything = set(range(len(problem.projection.space.layers)))
    draft = Draft(problem.projection.cost, {})
    assert not reduce(draft, scores, problem.projection, keep=everything)
    assert reduce(draft, scores, problem.projection, keep={0, 3})
    assert draft.numbers[0] == draft.numbers[3] == (0, 0)


def test_the_rise_of_a_change_is_the_difference_of_scores(problem: Bed) -> None:
    scores = finite_scores(problem.projection, problem.sensitivity)
    draft = Draft(problem.projection.cost, reduced(problem.projection, scores))
    rng = np.random.default_rng(0)
    for _ in range(20):
        index = int(rng.integers(len(draft.layers)))
        legal = np.argwhere(np.isfinite(draft.changes()[index, ..., 0]))
        s, p = (int(n) for n in legal[rng.integers(len(legal))])
        expected = score_of(draft, scores) + rises(draft, scores)[index, s, p]
        draft.replace(index, s, p)
        assert score_of(draft, scores) == pytest.approx(expected)


def test_neighbours_are_new_legal_and_within_the_budgets(problem: Bed) -> None:
    scores = finite_scores(problem.projection, problem.sensitivity)
    centre = reduced(problem.projection, scores)
    rng = np.random.default_rng(0)
    found = [exchange(problem.projection, centre, scores, rng) for _ in range(30)]
    made = [entries for entries in found if entries is not None]
    assert len({key_of(problem.projection, entries) for entries in made}) > 10
    for entries in made:
        problem.projection.space.check(entries)
        assert (problem.projection.cost.total(entries) <= problem.projection.budget).all()
        assert entries != centre
