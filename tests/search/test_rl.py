import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from grainwise.controller.network import Inputs
from grainwise.plan.choices import Entry
from grainwise.search import rl
from grainwise.search.baselines import EvolutionSearcher, RandomSearcher
from grainwise.search.draft import Draft
from grainwise.search.local import exchange
from grainwise.search.prior import Prior, finite_scores, score_of
from grainwise.search.programme import Programme
from grainwise.search.rl import ControllerConfig, ControllerSearcher, _Lockstep
from grainwise.search.searcher import Searcher
from grainwise.search.walks import entries_of, key_of, sample
from tests.search.searcher_contract import SearcherContract
from tests.search.synthetic import Bed, bed, best_divergence, run

torch.set_num_threads(1)


def searcher(problem: Bed, seed: int = 0, **options: object) -> ControllerSearcher:
    features = torch.tensor(problem.features, dtype=torch.float32)
    config = ControllerConfig(**options)  # type: ignore[arg-type]
    return ControllerSearcher(problem.projection, features, problem.sensitivity, seed=seed, config=config)


class TestController(SearcherContract):
    def make(self, problem: Bed, seed: int) -> Searcher:
        return searcher(problem, seed, horizon=20)


class TestReinforceWithoutPrior(SearcherContract):
    def make(self, problem: Bed, seed: int) -> Searcher:
        return searcher(problem, seed, horizon=20, algorithm="reinforce", use_prior=False)


class TestUnprojected(SearcherContract):
    projected = False

    def make(self, problem: Bed, seed: int) -> Searcher:
        return searcher(problem, seed, projected=False, use_prior=False)


@pytest.fixture(scope="module")
def problem() -> Bed:
    return bed(2, blocks=1)


def test_the_additive_solution_comes_first(problem: Bed) -> None:
    proposals = searcher(problem).ask(4)
    assert proposals[0].source == "prior"
    scores = finite_scores(problem.projection, problem.sensitivity)
    first = score_of(Draft(problem.projection.cost, proposals[0].entries), scores)
    for rival in (
        Programme(problem.projection).solve(scores),
        Prior(problem.projection, problem.sensitivity).solution(),
    ):
        assert first <= 1.001 * score_of(Draft(problem.projection.cost, rival), scores)
    assert {p.source for p in proposals[1:]} == {"controller"}


@pytest.mark.parametrize(("share", "most"), [(0.0, 0), (0.5, 8)])
def test_a_share_of_each_batch_solves_sampled_scores(problem: Bed, share: float, most: int) -> None:
    made = searcher(problem, sampled=share)
    run(problem, made, 16)
    proposals = made.ask(16)
    solved = [proposal for proposal in proposals if proposal.source in ("programme", "thompson")]
    assert len(proposals) == 16
    assert most // 2 <= len(solved) <= most
    assert len({tuple(p.entries.items()) for p in proposals}) == 16
    for proposal in solved:
        problem.projection.space.check(proposal.entries)
        assert (problem.projection.cost.total(proposal.entries) <= problem.projection.budget).all()


@pytest.mark.parametrize(("share", "most"), [(0.0, 0), (0.5, 8)])
def test_a_share_of_the_others_are_neighbours_of_the_best_by_the_corrected_scores(
    problem: Bed, share: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = searcher(problem, sampled=0.0, exchanged=share, elite=1)
    run(problem, made, 32)
    (parent,) = made._elite()

    def spied(projection: Any, entries: Any, scores: Any, rng: Any) -> dict[str, Entry] | None:
        assert key_of(projection, entries) == parent.key and scores is made._prior.scores
        return exchange(projection, entries, scores, rng)

    monkeypatch.setattr(rl, "exchange", spied)
    proposals = made.ask(16)
    found = [key_of(problem.projection, p.entries) for p in proposals if p.source == "neighbour"]
    assert len(proposals) == 16 and len({tuple(p.entries.items()) for p in proposals}) == 16
    assert most // 2 <= len(found) <= most
    for key in found:
        entries = entries_of(problem.projection, key)
        problem.projection.space.check(entries)
        assert (problem.projection.cost.total(entries) <= problem.projection.budget).all()


def test_the_next_batch_holds_the_solution_of_what_the_measurements_taught(problem: Bed) -> None:
    """The first profile turns out to be 30 times as bad as its scores say: another one solves the corrected scores."""
    made, cost = searcher(problem), problem.projection.cost
    (first,) = made.ask(1)
    trial = problem.trial(0, first)
    assert trial.measurement is not None
    made.tell([replace(trial, outcome=replace(trial.measurement, divergence=30 * trial.measurement.divergence))])
    solved = next(proposal for proposal in made.ask(16) if proposal.source == "programme")
    new, old = (score_of(Draft(cost, one.entries), made._prior.scores) for one in (solved, first))
    assert new < old


def test_the_programme_is_solved_again_when_four_times_as_many_trials_were_told(
    problem: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, solved = searcher(problem), []
    solve = made._programme.solve

    def spied(*given: Any) -> dict[str, Entry]:
        solved.append(made._told)
        return solve(*given)

    monkeypatch.setattr(made._programme, "solve", spied)
    run(problem, made, 72, batch=4)
    assert solved == [4, 16, 64]


def test_the_controller_learns_from_what_it_saw_when_it_chose(problem: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = searcher(problem), []
    run(problem, made, 16)
    inputs = made.inputs

    def spied(*given: Any) -> Inputs:
        seen.append(inputs(*given))
        return seen[-1]

    monkeypatch.setattr(made, "inputs", spied)
    drawn = sample(problem.projection, 3, _Lockstep(made), np.random.default_rng(0))
    monkeypatch.undo()
    rollout = made._retrace(drawn)
    for name in Inputs.__dataclass_fields__:
        assert torch.equal(getattr(rollout.inputs, name), torch.cat([getattr(one, name) for one in seen], dim=1)), name
    assert [entries_of(problem.projection, key) for key in rollout.actions.tolist()] == drawn


def test_an_untrained_policy_is_the_prior(problem: Bed) -> None:
    made = searcher(problem)
    rollout = made._retrace([made._prior.solution()])
    log_probs, _ = made.trainer.controller(rollout.inputs)
    weights = torch.where(rollout.inputs.mask, rollout.inputs.prior, torch.tensor(-torch.inf))
    assert torch.allclose(log_probs.exp().flatten(2), weights.flatten(2).softmax(-1), atol=1e-5)


def test_it_beats_random_evolution_and_the_additive_solution(problem: Bed) -> None:
    found = best_divergence(problem, run(problem, searcher(problem, horizon=96), 96))
    assert found < problem.divergence(Prior(problem.projection, problem.sensitivity).solution())
    for other in (RandomSearcher(problem.projection), EvolutionSearcher(problem.projection)):
        assert found < best_divergence(problem, run(problem, other, 96))


def test_foreign_trials_are_not_proposed_again_and_are_learnt_from(problem: Bed) -> None:
    trials = run(problem, EvolutionSearcher(problem.projection), 16)
    made = searcher(problem)
    made.replay(trials)
    proposals = made.ask(8)
    assert not any(p.entries == t.entries for p in proposals for t in trials)
    assert {"programme", "thompson"} & {proposal.source for proposal in proposals}  # of scores that they corrected
    made.tell([problem.trial(i, p) for i, p in enumerate(proposals)])
    assert made.trainer.updates == 1


def test_per_layer_credit_takes_prefix_rewards(problem: Bed) -> None:
    from dataclasses import replace

    made = searcher(problem, credit="per_layer")
    proposals = made.ask(4)
    layers = len(problem.projection.space.layers)
    trials = [
        replace(problem.trial(i, p), prefix_rewards=tuple(np.linspace(1, 0.2 + 0.1 * i, layers)))
        for i, p in enumerate(proposals)
    ]
    made.tell(trials)
    assert all(weight.isfinite().all() for weight in made.trainer.controller.parameters())


def test_a_trained_policy_proposes_without_moving_the_search(problem: Bed) -> None:
    made = searcher(problem)
    run(problem, made, 16, 8)
    before = json.dumps(made.state()[1])
    proposals = made.propose(3)
    assert json.dumps(made.state()[1]) == before
    for proposal in proposals:
        problem.projection.space.check(proposal.entries)
        assert (problem.projection.cost.total(proposal.entries) <= problem.projection.budget).all()
