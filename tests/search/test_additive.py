from dataclasses import replace

import numpy as np
import pytest

from grainwise.plan.choices import Entry
from grainwise.search.additive import ThompsonSearcher, additive, greedy
from grainwise.search.draft import Draft
from grainwise.search.local import reduced
from grainwise.search.prior import Prior, finite_scores, score_of
from grainwise.search.searcher import Searcher
from tests.search.searcher_contract import SearcherContract
from tests.search.synthetic import Bed, bed, best_divergence, run


class TestAdditive(SearcherContract):
    def make(self, problem: Bed, seed: int) -> Searcher:
        return additive(problem.projection, problem.sensitivity, seed=seed)


class TestGreedy(SearcherContract):
    def make(self, problem: Bed, seed: int) -> Searcher:
        return greedy(problem.projection, problem.sensitivity, seed=seed)


class TestThompson(SearcherContract):
    @pytest.fixture
    def problem(self) -> Bed:
        return bed(3, macs=None, blocks=1)  # one budget: the programme is solved often here

    def make(self, problem: Bed, seed: int) -> Searcher:
        return ThompsonSearcher(problem.projection, problem.sensitivity, seed=seed)


@pytest.fixture(scope="module")
def problem() -> Bed:
    return bed(0, blocks=1)


def test_the_programme_is_first_and_no_other_solution_has_a_lower_score(problem: Bed) -> None:
    scores, cost = finite_scores(problem.projection, problem.sensitivity), problem.projection.cost
    first, *others = additive(problem.projection, problem.sensitivity).ask(3)
    assert [first.source, *(other.source for other in others)] == ["additive", "local", "local"]
    rivals = (reduced(problem.projection, scores), Prior(problem.projection, problem.sensitivity).solution())
    for rival in rivals:
        assert score_of(Draft(cost, first.entries), scores) <= 1.001 * score_of(Draft(cost, rival), scores)
    assert greedy(problem.projection, problem.sensitivity).ask(1)[0].entries == rivals[0]


def _apart(first: dict[str, Entry], second: dict[str, Entry]) -> int:
    return sum(first[name] != second[name] for name in first)


def test_local_search_moves_to_the_best_profile(problem: Bed) -> None:
    searcher = additive(problem.projection, problem.sensitivity)
    proposals = searcher.ask(8)
    trials = [problem.trial(i, proposal) for i, proposal in enumerate(proposals)]
    far = max(trials[1:], key=lambda t: _apart(dict(t.entries), dict(proposals[0].entries)))
    assert far.measurement is not None
    winner = replace(far, outcome=replace(far.measurement, divergence=1e-6))
    searcher.tell([winner if trial is far else trial for trial in trials])
    resumed = additive(problem.projection, problem.sensitivity, seed=9)
    resumed.restore(*searcher.state())
    around = searcher.ask(12)
    assert around == resumed.ask(12)
    nearer = sum(
        _apart(dict(p.entries), dict(far.entries)) < _apart(dict(p.entries), dict(proposals[0].entries)) for p in around
    )
    assert nearer > 9


@pytest.mark.parametrize("make", [additive, greedy, ThompsonSearcher])
def test_more_evaluations_improve_on_the_first_solution(problem: Bed, make) -> None:
    trials = run(problem, make(problem.projection, problem.sensitivity), 32)
    assert best_divergence(problem, trials) < 0.97 * best_divergence(problem, trials[:1])


def test_thompson_samples_approach_the_solution_of_an_additive_truth() -> None:
    """Where the model is true its re-fit must lead towards the solution of the true scores, which it never sees."""
    problem = bed(3, blocks=1)
    space = problem.projection.space
    true = replace(
        problem.sensitivity,
        structures=np.where(space.structures, problem.structures, np.inf),
        precisions=np.where(space.precisions, problem.precisions, np.inf),
    )
    scores = finite_scores(problem.projection, true)

    def truth(entries) -> float:
        return score_of(Draft(problem.projection.cost, entries), scores)

    searcher = ThompsonSearcher(problem.projection, problem.sensitivity)
    batches = []
    for _ in range(4):
        proposals = searcher.ask(8)
        trials = [problem.trial(i, p) for i, p in enumerate(proposals)]
        searcher.tell([replace(t, outcome=replace(t.measurement, divergence=truth(t.entries))) for t in trials])
        batches.append([truth(p.entries) for p in proposals])
    best = truth(additive(problem.projection, true).ask(1)[0].entries)
    first, last = np.mean(batches[0][1:]), np.mean(batches[-1])
    assert last < best + 0.7 * (first - best)
