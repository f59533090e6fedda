from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import grainwise as gw
import grainwise.compare
from grainwise.api import Observer
from grainwise.compare import OPTIONS, _Bench, _with_milliseconds, compare
from grainwise.evaluate.calibration import Calibration
from grainwise.evaluate.evaluator import Evaluator
from grainwise.plan.space import SpaceKind
from grainwise.report.comparison import curves, summary
from grainwise.store.studies import Store, StoreError
from grainwise.study.trial import Trial
from tests.networks import tiny, tiny_data


class Cut(Exception):
    """Stands for kill -9."""


@pytest.fixture(scope="module")
def prepared() -> gw.Session:
    return gw.Session.prepare(tiny(), tiny_data(), target="packed", methods=["quantize", "prune"])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(f"sqlite:///{tmp_path / 's.db'}")
    yield opened
    opened.close()


def _compare(session: gw.Session, store: Store, study: str = "c", cut: int | None = None, **changes: object) -> dict:
    left = [cut]

    def watch(trial: Trial, leader: Trial | None) -> None:
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                raise Cut

    settings = {"searchers": ["random", "additive"], "seeds": [0, 1], "evaluations": 20, "constraints": {"size": 0.3}}
    return compare(session, store=store, study=study, observer=Observer(trial=watch), **{**settings, **changes})  # type: ignore[arg-type]


def _timeless(runs: list[dict]) -> list[dict]:
    """Runs without what a clock says."""
    kept = [{k: v for k, v in run.items() if "seconds" not in k} for run in runs]
    for run in kept:
        run["best"] = {k: v for k, v in run["best"].items() if k != "seconds"}
    return json.loads(json.dumps(kept))


def test_a_cut_comparison_goes_on_and_a_finished_one_is_not_run_again(
    prepared: gw.Session, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _compare(prepared, store, "whole")
    for cut in (5, 30):  # in the first run, and in a later one
        with pytest.raises(Cut):
            _compare(prepared, store, "cut", cut)
    tested: list[int] = []
    plain = Evaluator.test

    def counted(self: Evaluator, *arguments: object) -> float:
        tested.append(1)
        return plain(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Evaluator, "test", counted)
    resumed = _compare(prepared, store, "cut")
    assert _timeless(resumed["runs"]) == _timeless(whole["runs"])
    assert resumed["budgets"] == whole["budgets"]
    tested.clear()
    monkeypatch.setattr(Evaluator, "__call__", None)  # nothing may be evaluated any more, no searcher be made
    monkeypatch.setattr(grainwise.compare, "make_searcher", None)
    again = _compare(prepared, store, "cut")
    assert again == resumed
    assert not tested


def test_what_a_run_says_is_what_its_trials_say(prepared: gw.Session, store: Store) -> None:
    body = _compare(prepared, store, searchers=["additive"], seeds=[3])
    (run,) = body["runs"]
    trials = store.trials("c/additive/20 evaluations/seed 3")
    budget = 0.3 * prepared.evaluator.reference.size_bytes
    fitting = [t.measurement.divergence for t in trials if t.measurement and t.measurement.size_bytes <= budget]
    assert run["best"]["divergence"] == min(fitting) == run["divergence_curve"][-1]
    assert run["within_budgets"] == len(fitting)
    assert run["sources"] == {"additive": 1, "local": 19}
    for count in range(1, 21):
        met = [t.measurement for t in trials[:count] if t.measurement and t.measurement.size_bytes <= budget]
        leader = min(met, key=lambda m: m.divergence)
        curves = run["divergence_curve"][count - 1], run["metric_curve"][count - 1]
        assert curves == (leader.divergence, leader.metric)
    choices = prepared.space.structures[:, 1:].sum() + prepared.space.precisions[:, 1:].sum()
    assert run["score_passes"] == body["scores"]["kl"]["passes"] == choices
    parts = run["score_seconds"] + run["searcher_seconds"] + run["evaluation_seconds"]
    assert run["seconds"] == pytest.approx(parts)
    seconds = run["seconds_curve"]
    assert seconds == sorted(seconds) and seconds[-1] == run["seconds"]
    assert seconds[0] > run["score_seconds"] + trials[0].seconds  # the searcher's own time too
    assert run["best"]["seconds"] == seconds[run["best"]["trial"]]


def test_a_comparison_that_goes_on_keeps_the_milliseconds_it_was_begun_with(
    prepared: gw.Session, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Calibration | None] = []
    line = Calibration(0.5, 0.25)

    def with_latency(session: gw.Session, progress: object, known: Calibration | None) -> gw.Session:
        asked.append(known)
        return replace(session, line=known or line)

    monkeypatch.setattr(grainwise.compare, "with_latency", with_latency)
    for _ in range(2):
        session = _with_milliseconds(prepared, store, "c", Observer())
        _Bench(session, store, "c", {"size": 0.3}, 1, Observer()).budgets()
    assert asked == [None, line]


def test_another_comparison_under_the_same_name_is_refused(prepared: gw.Session, store: Store) -> None:
    _compare(prepared, store, searchers=["random"], seeds=[0], evaluations=2)
    with pytest.raises(StoreError, match="begun with another constraints"):
        _compare(prepared, store, searchers=["random"], seeds=[0], evaluations=2, constraints={"size": 0.4})
    _compare(prepared, store, searchers=["greedy"], seeds=[0], evaluations=2)
    single = replace(OPTIONS, space=SpaceKind.SINGLE)
    with pytest.raises(StoreError, match="begun with another space"):
        _compare(prepared, store, searchers=["greedy"], seeds=[0], evaluations=3, options=single)
    with pytest.raises(ValueError, match="no searcher is called"):
        _compare(prepared, store, searchers=["fame"])


def _run(searcher: str, seed: int, divergence: float | None, curve: list[float | None]) -> dict:
    best = {"divergence": divergence, "metric": 0.9, "test_metric": 0.8, "seconds": 2.0, "source": "x", "trial": 1}
    return {
        "searcher": searcher, "seed": seed, "sources": {"x": 2}, "within_budgets": 1, "score_passes": 7,
        "searcher_seconds": 1.0, "seconds": 4.0, "divergence_curve": curve, "metric_curve": curve,
        **({"best": best} if divergence is not None else {}),
    }  # fmt: skip


def test_the_summary_is_means_and_deviations_best_first() -> None:
    runs = [_run("b", 0, 0.2, [None, 0.2]), _run("b", 1, 0.4, [0.5, 0.4]), _run("a", 0, None, [None, None])]
    runs += [_run("c", 0, 0.1, [0.1, 0.1])]
    rows = summary({"runs": runs, "evaluations": 2})
    assert [row["searcher"] for row in rows] == ["c", "b", "a"]
    assert rows[1]["divergence"] == pytest.approx([0.3, 0.1414213562])
    assert rows[2]["divergence"] is None
    assert rows[1]["sources"] == {"x": 4}
    assert rows[1]["within_budgets"] == 0.5
    first, second = curves({"runs": runs}, "divergence")["b"]
    assert first[0] != first[0] and first[1] == 0.2
    assert second == [0.5, 0.4]
