"""What every pool must do: subclass `PoolContract` and supply `make`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from grainwise.search.baselines import RandomSearcher
from grainwise.session import Session
from grainwise.study.measurement import Measurement
from grainwise.workers.pool import Evaluate, Judged, Pool
from tests.workers.evaluations import PROFILES, all_of, by_text, never, nobody, often_fails, unknown


class PoolContract:
    """`make(evaluate)` gives a new pool."""

    def make(self, evaluate: Evaluate) -> Pool:
        raise NotImplementedError

    @pytest.fixture
    def pool(self) -> Iterator[Callable[[Evaluate], Pool]]:
        made: list[Pool] = []
        yield lambda evaluate: made.append(self.make(evaluate)) or made[-1]  # type: ignore[func-returns-value]
        for pool in made:
            pool.close()

    def test_each_profile_is_judged_once(self, pool: Callable[[Evaluate], Pool]) -> None:
        given: list[int] = []
        found = all_of(pool(often_fails), PROFILES, given.extend)
        assert {j.number: j.outcome for j in found} == {n: often_fails(p) for n, p in PROFILES.items()}
        assert len(found) == len(PROFILES) and sorted(given) == list(PROFILES)
        assert all(j.seconds >= 0 and j.started > 1e9 and j.worker for j in found)

    def test_what_has_begun_is_finished_when_it_is_stopped(self, pool: Callable[[Evaluate], Pool]) -> None:
        taken: list[Judged] = []
        made = pool(by_text)
        for ended in made.run(PROFILES, unknown, nobody, lambda: len(taken) >= 2):
            taken.extend(ended)
        assert 2 <= len(taken) < len(PROFILES)
        assert not all_of(made, {})

    def test_a_pool_is_used_again_after_a_run_that_was_left(self, pool: Callable[[Evaluate], Pool]) -> None:
        made = pool(by_text)
        with closing(made.run(PROFILES, unknown, nobody, never)) as running:
            next(running)
        assert len(all_of(made, PROFILES)) == len(PROFILES)

    @pytest.mark.parametrize("kind", ["session", "onnx_session"])
    def test_figures_are_those_of_the_evaluator_to_the_last_bit(
        self, pool: Callable[[Evaluate], Pool], kind: str, request: pytest.FixtureRequest
    ) -> None:
        prepared: Session = request.getfixturevalue(kind)
        searcher = RandomSearcher(prepared.projection(prepared.budgets({"size": 0.4})), seed=5)
        profiles = {number: p.entries for number, p in enumerate(searcher.ask(6))}
        alone = dict(enumerate(map(prepared.evaluator, profiles.values())))
        assert {j.number: j.outcome for j in all_of(pool(prepared.evaluator), profiles)} == alone

    def test_a_known_measurement_is_not_made_again(self, pool: Callable[[Evaluate], Pool], session: Session) -> None:
        searcher = RandomSearcher(session.projection(session.budgets({"size": 0.4})), seed=5)
        profiles = {number: p.entries for number, p in enumerate(searcher.ask(2))}
        kept = Measurement(0.125, 7.0, 11, 12)
        key = session.evaluator.key(profiles[1])
        known: Callable[[str], Measurement | None] = lambda asked: kept if asked == key else None
        run = pool(session.evaluator).run(profiles, known, nobody, never)
        found = {j.number: j.outcome for ended in run for j in ended}
        assert found[1] == kept and found[0] == session.evaluator(profiles[0])
