from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from grainwise.interrupt import Stopped
from grainwise.plan.choices import Entry
from grainwise.plan.projection import Projection
from grainwise.search.baselines import RandomSearcher
from grainwise.search.driver import Budget, Judge, search
from grainwise.search.rl import ControllerSearcher
from grainwise.search.searcher import Searcher
from grainwise.session import Session
from grainwise.store.studies import Store, StoreError
from grainwise.study.measurement import Failure, Measurement, Outcome
from grainwise.study.reward import HardBudget
from grainwise.study.trial import State, Task, Trial
from grainwise.workers.pool import Evaluate, Judged, Known

BUDGETS = {"size": 8000.0}


class Cut(Exception):
    """Stands for kill -9."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(f"sqlite:///{tmp_path / 's.db'}")
    yield opened
    opened.close()


def _evaluate(session: Session, entries: Mapping[str, Entry]) -> Outcome:
    """A cheap stand-in for the evaluator: what counts here is the order of things."""
    size, macs, _ = session.cost.total(entries)
    hardness = sum(len(str(entry)) for entry in entries.values())
    return Measurement(0.5, hardness / 100, int(size), int(macs))


def _judge(session: Session) -> Judge:
    return Judge(
        lambda entries: _evaluate(session, entries),
        HardBudget(BUDGETS),
        session.evaluator.reference,
        session.space.graph,
    )


def _searcher(session: Session, kind: str) -> Searcher:
    projection = Projection(session.cost, BUDGETS)
    if kind == "random":
        return RandomSearcher(projection, seed=3)
    return ControllerSearcher(projection, session.features(), None, seed=3)


def _run(
    session: Session, store: Store, study: str, kind: str, cut: int | None = None, evaluate: Evaluate | None = None
) -> tuple[Trial, ...]:
    seen: list[int] = []

    def observe(trial: Trial) -> None:
        seen.append(trial.number)
        if cut is not None and trial.number == cut:
            raise Cut

    return search(
        searcher=_searcher(session, kind),
        judge=_judge(session) if evaluate is None else replace(_judge(session), evaluate=evaluate),
        store=store,
        study=study,
        budget=Budget(evaluations=22),
        observer=observe,
        batch=8,
    )


@pytest.mark.parametrize("kind", ["random", "rl"])
@pytest.mark.parametrize("cuts", [(0,), (7,), (8, 13), (3, 20)])
def test_a_cut_search_goes_on_as_if_it_had_not_been_cut(
    session: Session, store: Store, kind: str, cuts: tuple[int, ...]
) -> None:
    store.create("whole", {})
    store.create("cut", {})
    whole = _run(session, store, "whole", kind)
    for cut in cuts:
        with pytest.raises(Cut):
            _run(session, store, "cut", kind, cut)
        assert len(store.trials("cut")) == cut + 1
    resumed = _run(session, store, "cut", kind)
    assert [(t.number, t.entries, t.outcome, t.reward, t.source) for t in resumed] == [
        (t.number, t.entries, t.outcome, t.reward, t.source) for t in whole
    ]
    assert len(whole) == 22


class Backwards:
    """Judges a batch from its end, and counts what it judges."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.judged = 0

    def __call__(self, entries: Mapping[str, Entry]) -> Outcome:
        self.judged += 1
        return _evaluate(self.session, entries)

    def many(self, profiles: Sequence[Mapping[str, Entry]], known: Known) -> Iterator[tuple[int, Outcome]]:
        for number in reversed(range(len(profiles))):
            yield number, known(self.key(profiles[number])) or self(profiles[number])

    def key(self, entries: Mapping[str, Entry]) -> str:
        return str(sorted((name, str(entry)) for name, entry in entries.items()))


@pytest.mark.parametrize("cuts", [(7,), (5, 12), (15, 8)])
def test_a_batch_may_be_judged_in_any_order(session: Session, store: Store, cuts: tuple[int, ...]) -> None:
    store.create("whole", {})
    store.create("cut", {})
    whole = _run(session, store, "whole", "rl")
    backwards = Backwards(session)
    for cut in cuts:
        with pytest.raises(Cut):
            _run(session, store, "cut", "rl", cut, backwards)
        assert cut in [t.number for t in store.trials("cut")]
    resumed = _run(session, store, "cut", "rl", evaluate=backwards)
    assert [(t.number, t.entries, t.outcome, t.reward) for t in resumed] == [
        (t.number, t.entries, t.outcome, t.reward) for t in whole
    ]
    assert backwards.judged == 22  # what was stored before a cut is not judged again


def test_each_trial_is_stored_before_the_next_begins(session: Session, store: Store) -> None:
    store.create("s", {})
    stored: list[int] = []

    class Watching(Backwards):
        def __call__(self, entries: Mapping[str, Entry]) -> Outcome:
            stored.append(len(store.trials("s")))
            return super().__call__(entries)

    _run(session, store, "s", "random", evaluate=Watching(session))
    assert stored == list(range(22))


def test_a_profile_measured_in_another_study_is_not_measured_again(session: Session, store: Store) -> None:
    store.create("first", {})
    store.create("second", {})
    first, second = Backwards(session), Backwards(session)
    before = _run(session, store, "first", "random", evaluate=first)
    after = _run(session, store, "second", "random", evaluate=second)
    assert (first.judged, second.judged) == (22, 0)
    assert [t.outcome for t in after] == [t.outcome for t in before]


def test_a_failure_is_a_trial_and_the_search_goes_on(session: Session, store: Store) -> None:
    store.create("s", {})
    judge = replace(_judge(session), evaluate=lambda entries: Failure("build", "no"))
    trials = search(
        searcher=_searcher(session, "rl"),
        judge=judge,
        store=store,
        study="s",
        budget=Budget(evaluations=10),
        observer=lambda trial: None,
        batch=4,
    )
    assert [t.reward for t in trials] == [None] * 10
    assert store.trials("s") == trials


def test_prefix_rewards_end_at_the_reward(session: Session) -> None:
    judge = replace(_judge(session), per_layer=True)
    (proposal,) = _searcher(session, "random").ask(1)
    judged = Judged(0, _evaluate(session, proposal.entries), "host:1", 0.0, 0.0)
    trial = judge(Task(0, proposal.entries, proposal.source, 0), judged)
    assert len(trial.prefix_rewards) == len(session.space.layers)
    assert trial.prefix_rewards[-1] == trial.reward


def test_budgets_are_parsed() -> None:
    assert Budget.parse("300") == Budget(evaluations=300)
    assert Budget.parse("20m") == Budget(seconds=1200)
    for wrong in ("", "many", "-3", "0", "m", "5d"):
        with pytest.raises(ValueError, match="budget"):
            Budget.parse(wrong)


def test_a_time_budget_ends_the_search(session: Session, store: Store) -> None:
    store.create("s", {})
    trials = search(
        searcher=_searcher(session, "random"),
        judge=_judge(session),
        store=store,
        study="s",
        budget=Budget(seconds=0.2),
        observer=lambda trial: None,
        batch=2,
    )
    assert trials


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_a_failed_trial(session: Session, store: Store, reward: float) -> None:
    store.create("s", {})
    judge = replace(_judge(session), reward=lambda c, r, e: reward if c.size_bytes % 2 else 0.5)
    trials = search(
        searcher=_searcher(session, "rl"),
        judge=judge,
        store=store,
        study="s",
        budget=Budget(evaluations=24),
        observer=lambda trial: None,
        batch=8,
    )
    failed = [t for t in trials if t.reward is None]
    assert 0 < len(failed) < 24
    assert all(t.outcome == Failure("reward", f"the reward is {reward}") for t in failed)
    assert store.trials("s") == trials


@pytest.mark.parametrize("after", [3, 7, 15, 16])
def test_a_search_that_is_asked_to_stop_ends_after_the_running_trial(
    session: Session, store: Store, after: int
) -> None:
    store.create("whole", {})
    store.create("s", {})
    whole = _run(session, store, "whole", "random")
    seen: list[Trial] = []
    with pytest.raises(Stopped, match=f"stopped after {after} trials"):
        search(
            searcher=_searcher(session, "random"),
            judge=_judge(session),
            store=store,
            study="s",
            budget=Budget(evaluations=22),
            observer=seen.append,
            batch=8,
            stop=lambda: len(seen) == after,
        )
    assert len(store.trials("s")) == after
    resumed = _run(session, store, "s", "random")
    assert [t.entries for t in resumed] == [t.entries for t in whole]


def test_trials_say_who_made_them_when_and_by_which_policy(session: Session, store: Store) -> None:
    store.create("s", {})
    before = time.time()
    states: list[dict[State, int]] = []

    class Watching(Backwards):
        def __call__(self, entries: Mapping[str, Entry]) -> Outcome:
            states.append(dict(store.study("s").counts))
            return super().__call__(entries)

    trials = _run(session, store, "s", "random", evaluate=Watching(session))
    assert states[0] == {State.RUNNING: 8}
    assert states[9] == {State.DONE: 9, State.RUNNING: 7}
    assert [t.policy for t in trials] == [0] * 8 + [8] * 8 + [16] * 6
    assert {t.worker for t in trials} == {f"{socket.gethostname()}:{os.getpid()}"}
    assert all(before <= (t.started or 0) <= time.time() for t in trials)


def test_a_second_process_on_the_same_study_is_refused(session: Session, store: Store) -> None:
    store.create("s", {})

    class Overtaken(Backwards):
        def __call__(self, entries: Mapping[str, Entry]) -> Outcome:
            if self.judged == 3:  # trials 7, 6 and 5 are stored; another process resumes the study
                store.queue("s", [Task(4, entries, "random", 0)])
            return super().__call__(entries)

    with pytest.raises(StoreError, match="another process searches this study"):
        _run(session, store, "s", "random", evaluate=Overtaken(session))
    assert [t.number for t in store.trials("s")] == [5, 6, 7]
