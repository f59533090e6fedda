import numpy as np
import pytest

from grainwise.plan.choices import entry_of
from grainwise.plan.projection import Walk
from grainwise.search.beliefs import Beliefs
from grainwise.search.draft import Draft
from grainwise.search.prior import Prior, cheapest, fill, score_of
from grainwise.search.walks import key_of, sample, uniform
from grainwise.study.sensitivity import Sensitivity
from tests.search.synthetic import Bed, bed


@pytest.fixture(scope="module")
def problem() -> Bed:
    return bed(3, blocks=1)


@pytest.mark.parametrize(("size", "macs"), [(0.12, None), (None, 0.4), (0.12, 0.5)])
@pytest.mark.parametrize("kind", ["single", "chain"])
def test_the_solution_is_legal_meets_the_budgets_and_is_far_better_than_the_cheapest(size, macs, kind) -> None:
    problem = bed(1, size=size, macs=macs, kind=kind, blocks=1)
    prior = Prior(problem.projection, problem.sensitivity)
    solution = prior.solution()
    problem.projection.space.check(solution)
    assert (problem.projection.cost.total(solution) <= problem.projection.budget).all()
    solved, cheap = (Draft(problem.projection.cost, e) for e in (solution, cheapest(problem.projection)))
    assert score_of(solved, prior.scores) < 0.5 * score_of(cheap, prior.scores)


def test_the_solution_beats_every_sampled_profile_in_its_own_score(problem: Bed) -> None:
    prior = Prior(problem.projection, problem.sensitivity)
    drawn = sample(problem.projection, 32, uniform, np.random.default_rng(0))
    best = score_of(Draft(problem.projection.cost, prior.solution()), prior.scores)
    assert all(best < score_of(Draft(problem.projection.cost, entries), prior.scores) for entries in drawn)


def test_colder_walks_come_closer_to_the_solution(problem: Bed) -> None:
    prior = Prior(problem.projection, problem.sensitivity)

    def mean_score(temperature: float) -> float:
        prior.set_temperature(temperature)
        rng = np.random.default_rng(0)
        drawn = sample(problem.projection, 16, lambda w, m: np.stack([prior.log_weights(x) for x in w]), rng)
        return float(np.mean([score_of(Draft(problem.projection.cost, e), prior.scores) for e in drawn]))

    assert mean_score(0.1) < mean_score(2.0)


def test_a_walk_that_spent_more_than_planned_prices_cost_higher(problem: Bed) -> None:
    prior = Prior(problem.projection, problem.sensitivity)
    lavish, frugal = Walk(problem.projection), Walk(problem.projection)
    for _ in range(4):
        _, costs = lavish.costs()
        allowed = lavish.allowed()
        lavish.take(entry_of(*_extreme(np.where(allowed, costs[..., 0], -np.inf), np.argmax)))
        _, costs = frugal.costs()
        frugal.take(entry_of(*_extreme(np.where(frugal.allowed(), costs[..., 0], np.inf), np.argmin)))
    assert prior.factor(lavish) > prior.factor(frugal)


def _extreme(values: np.ndarray, pick) -> tuple[int, int]:
    s, p = np.unravel_index(pick(values), values.shape)
    return int(s), int(p)


def test_without_scores_all_weights_are_equal(problem: Bed) -> None:
    prior = Prior(problem.projection, None)
    assert (prior.log_weights(Walk(problem.projection)) == 0).all()
    problem.projection.space.check(prior.solution())


def test_temperature_must_be_positive(problem: Bed) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Prior(problem.projection, problem.sensitivity, temperature=0.0)


def test_a_draft_prices_every_revision_exactly() -> None:
    problem = bed(2, blocks=1)
    cost, space = problem.projection.cost, problem.projection.space
    rng = np.random.default_rng(0)
    for entries in sample(problem.projection, 6, uniform, rng, projected=False):
        draft = Draft(cost, entries)
        for _ in range(12):
            index = int(rng.integers(len(space.layers)))
            changes = draft.changes()[index]
            options = np.argwhere(np.isfinite(changes[..., 0]))
            s, p = (int(i) for i in options[rng.integers(len(options))])
            expected = draft.total + changes[s, p]
            draft.replace(index, s, p)
            space.check(draft.entries())
            assert (draft.total == expected).all()
            assert (draft.total == cost.total(draft.entries())).all()


def test_filling_lowers_the_score_within_the_budgets_and_keeps_what_it_must(problem: Bed) -> None:
    prior = Prior(problem.projection, problem.sensitivity)
    for entries in sample(problem.projection, 6, uniform, np.random.default_rng(1)):
        draft = Draft(problem.projection.cost, entries)
        before = score_of(draft, prior.scores)
        kept = draft.numbers[5]
        fill(draft, prior.scores, problem.projection.budget, keep={5})
        assert score_of(draft, prior.scores) < before
        assert draft.numbers[5][1] == kept[1]
        assert (draft.total <= problem.projection.budget).all()
        problem.projection.space.check(draft.entries())


def test_beliefs_find_the_true_scores_of_an_additive_truth(problem: Bed) -> None:
    space, wrong = problem.projection.space, problem.sensitivity
    drawn = sample(problem.projection, 200, uniform, np.random.default_rng(0))
    keys = [key_of(problem.projection, entries) for entries in drawn]
    true = Sensitivity(
        np.where(space.structures, problem.structures, np.inf), np.where(space.precisions, problem.precisions, np.inf)
    )

    def sums(table: Sensitivity) -> np.ndarray:
        pairs = [table.pairs(i) for i in range(len(space.layers))]
        return np.array([sum(pairs[i][divmod(a, 10)] for i, a in enumerate(key)) for key in keys])

    learnt = Beliefs(wrong, keys[:150], sums(true)[:150]).mean()
    error = np.abs(sums(learnt) / sums(true) - 1)[150:].mean()
    assert error < 0.5 * np.abs(sums(wrong) / sums(true) - 1)[150:].mean()


def test_beliefs_without_measurements_are_the_prior(problem: Bed) -> None:
    believed = Beliefs(problem.sensitivity, [], []).mean()
    np.testing.assert_array_equal(believed.structures, problem.sensitivity.structures)
    np.testing.assert_array_equal(believed.precisions, problem.sensitivity.precisions)
