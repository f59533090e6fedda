from dataclasses import replace

import pytest

from grainwise.search.local import reduced
from grainwise.search.optuna import OptunaSearcher
from grainwise.search.prior import finite_scores
from grainwise.search.searcher import Searcher
from tests.search.searcher_contract import SearcherContract
from tests.search.synthetic import Bed, bed, run


class TestTpe(SearcherContract):
    projected = False

    def make(self, problem: Bed, seed: int) -> Searcher:
        return OptunaSearcher(problem.projection, "tpe", seed=seed)


class TestNsgaii(SearcherContract):
    projected = False

    def make(self, problem: Bed, seed: int) -> Searcher:
        return OptunaSearcher(problem.projection, "nsgaii", seed=seed)


@pytest.fixture(scope="module")
def problem() -> Bed:
    return bed(2, blocks=1)


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii"])
def test_the_start_is_first_and_failures_are_told(problem: Bed, sampler) -> None:
    start = reduced(problem.projection, finite_scores(problem.projection, problem.sensitivity))
    searcher = OptunaSearcher(problem.projection, sampler, start=start)
    first, *rest = searcher.ask(4)
    assert first.entries == start and first.source == "start"
    assert {p.source for p in rest} == {f"optuna:{sampler}"}
    searcher.tell([problem.trial(i, p) for i, p in enumerate([first, *rest])])
    told = searcher.state()[1]["told"]
    assert told[0]["value"] == pytest.approx(problem.divergence(start))
    size = problem.projection.cost.total(start)[0] / problem.projection.budget[0] - 1
    assert told[0]["attributes"]["constraints:size"] == pytest.approx(size, abs=1e-4)


def test_a_repeated_profile_is_told_what_it_gave_before_and_not_proposed(problem: Bed) -> None:
    searcher = OptunaSearcher(problem.projection, "nsgaii")
    (first,) = searcher.ask(1)
    searcher.tell([problem.trial(0, first)])
    (raw,) = searcher.state()[1]["told"]
    searcher._study.enqueue_trial(
        dict(zip(raw["params"], raw["key"], strict=True))
    )  # what the sampler says next is known already
    (second,) = searcher.ask(1)
    assert second.entries != first.entries
    searcher.tell([problem.trial(1, second)])
    values = [told["value"] for told in searcher.state()[1]["told"]]
    assert len(values) == 3
    assert values[0] == values[1] == pytest.approx(problem.divergence(first.entries))


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii"])
def test_a_long_study_heeds_what_it_is_told_and_goes_on_as_if_uncut(problem: Bed, sampler) -> None:
    """Past the first generation and the random start-up, where the samplers read what was told."""
    uncut, contrary = (OptunaSearcher(problem.projection, sampler, seed=1) for _ in range(2))
    first = run(problem, uncut, 64)
    for proposals in (contrary.ask(16) for _ in range(4)):
        trials = [problem.trial(i, p) for i, p in enumerate(proposals)]
        contrary.tell(
            [replace(t, outcome=replace(t.measurement, divergence=1 / t.measurement.divergence)) for t in trials]
        )
    cut = OptunaSearcher(problem.projection, sampler, seed=5)
    cut.restore(*uncut.state())
    following = [p.entries for p in uncut.ask(5)]
    assert [p.entries for p in cut.ask(5)] == following != [p.entries for p in contrary.ask(5)]
    assert len(first) == 64


def test_failed_profiles_are_no_parents(problem: Bed) -> None:
    from grainwise.study.measurement import Failure

    searcher = OptunaSearcher(problem.projection, "nsgaii")
    proposals = searcher.ask(3)
    trials = [problem.trial(i, p) for i, p in enumerate(proposals)]
    searcher.tell([replace(trials[0], outcome=Failure("build", "no"), reward=None), *trials[1:]])
    values = [told["value"] for told in searcher.state()[1]["told"]]
    assert values[0] is None and None not in values[1:]
