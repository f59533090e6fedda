"""What every searcher must do: subclass `SearcherContract` and supply `make`."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from grainwise.search.searcher import Proposal, Searcher
from grainwise.study.measurement import Failure
from grainwise.study.trial import Trial
from tests.search.synthetic import Bed, bed


def _keys(proposals: Sequence[Proposal]) -> list[tuple[str, ...]]:
    return [tuple(f"{name}:{entry}" for name, entry in sorted(p.entries.items())) for p in proposals]


class SearcherContract:
    """`make(problem, seed)` gives a new searcher; `projected` says whether its profiles meet the budgets."""

    projected = True

    @pytest.fixture
    def problem(self) -> Bed:
        return bed(3, blocks=1)

    def make(self, problem: Bed, seed: int) -> Searcher:
        raise NotImplementedError

    def round(self, problem: Bed, searcher: Searcher, count: int = 6) -> list[Proposal]:
        proposals = searcher.ask(count)
        searcher.tell([problem.trial(i, p) for i, p in enumerate(proposals)])
        return proposals

    def test_proposals_are_whole_legal_and_within_the_budgets(self, problem: Bed) -> None:
        searcher = self.make(problem, 0)
        for _ in range(3):
            proposals = self.round(problem, searcher)
            assert len(proposals) == 6
            for proposal in proposals:
                assert list(proposal.entries) == [layer.name for layer in problem.projection.space.layers]
                problem.projection.space.check(proposal.entries)
                if self.projected:
                    assert (problem.projection.cost.total(proposal.entries) <= problem.projection.budget).all()

    def test_nothing_is_proposed_twice(self, problem: Bed) -> None:
        searcher = self.make(problem, 0)
        keys = [key for _ in range(3) for key in _keys(self.round(problem, searcher))]
        assert len(set(keys)) == len(keys)

    def test_the_seed_decides_everything(self, problem: Bed) -> None:
        first, second, other = (self.make(problem, seed) for seed in (1, 1, 2))
        runs = [[_keys(self.round(problem, s)) for _ in range(3)] for s in (first, second, other)]
        assert runs[0] == runs[1] != runs[2]

    def test_a_restored_searcher_goes_on_as_if_uncut(self, problem: Bed) -> None:
        uncut = self.make(problem, 4)
        for _ in range(2):
            self.round(problem, uncut)
        tensors, body = uncut.state()
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        cut = self.make(problem, 99)
        cut.restore(tensors, json.loads(json.dumps(body)))
        assert json.dumps(cut.state()[1], sort_keys=True) == json.dumps(body, sort_keys=True)
        for _ in range(3):
            assert _keys(self.round(problem, uncut)) == _keys(self.round(problem, cut))

    @pytest.mark.parametrize("reward", [None, 0.25])
    @pytest.mark.parametrize("count", [1, 5])
    def test_failures_and_equal_rewards_do_no_harm(self, problem: Bed, reward: float | None, count: int) -> None:
        searcher = self.make(problem, 0)
        for _ in range(3):
            proposals = searcher.ask(count)
            outcomes = [Failure("build", "test") if reward is None else problem.measure(p.entries) for p in proposals]
            pairs = enumerate(zip(proposals, outcomes, strict=True))
            searcher.tell([Trial(i, p.entries, outcome, reward, p.source, 0.0) for i, (p, outcome) in pairs])
        tensors, _ = searcher.state()
        finite = [t for name, t in tensors.items() if name.startswith("policy.")]
        assert all(t.isfinite().all() for t in finite)
        assert len(searcher.ask(count)) == count
