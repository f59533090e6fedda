"""Where a search for milliseconds aims, and which of its trials is deployed: by candidates that are built and timed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from grainwise.evaluate.deployed import first_sample, race
from grainwise.evaluate.evaluator import Candidate
from grainwise.plan.choices import Entry
from grainwise.plan.prices import LATENCY
from grainwise.plan.projection import Unreachable
from grainwise.search.prior import finite_scores
from grainwise.search.programme import Programme
from grainwise.session import AIM, Session
from grainwise.study.measurement import Failure, Measurement
from grainwise.study.sensitivity import Sensitivity
from grainwise.study.trial import Trial, best, meets

LEADERS = 5  # candidates that are built for deployment, and meet the budgets then too, before one is chosen
MOST_BUILT = 15  # candidates that are built at most
_PROBES = 2  # networks that are built and timed before a search for milliseconds, at most


class Infeasible(RuntimeError):
    """The search ended without a profile that meets the budgets."""


def aimed(session: Session, budgets: Mapping[str, float], sensitivity: Sensitivity | None) -> float:
    """The share of a latency budget that predictions are to keep to: where a search will look, the networks are alike,
    and so are the errors of their predictions. Found by building and timing the additive solution, twice at most.
    """
    aim = AIM
    for _ in range(_PROBES if "latency" in budgets and sensitivity is not None else 0):
        assert sensitivity is not None
        try:
            projection = session.projection(budgets, aim)
        except Unreachable:
            return AIM
        entries = Programme(projection).solve(finite_scores(projection, sensitivity))
        taken = _measured(session, session.evaluator.finish(entries)).latency_ms
        if AIM * AIM * budgets["latency"] <= taken <= AIM * budgets["latency"]:
            break
        aim = AIM * float(session.cost.total(entries)[LATENCY]) / taken
    return aim


def choose(session: Session, trials: Iterable[Trial], budgets: Mapping[str, float]) -> dict[str, Entry]:
    """The entries to deploy: of the leading trials the one whose deployed form diverges least. Raises Infeasible."""
    pool, fitting, built = list(trials), list[tuple[float, Trial]](), 0
    sought = dict(budgets)
    # One disturbed timing must not rule out all others: where nothing is left below it, the budget itself counts.
    while len(fitting) < LEADERS and built < MOST_BUILT and (leader := best(pool, sought) or best(pool, budgets)):
        pool = [trial for trial in pool if trial.entries != leader.entries]
        found, built = session.evaluator.finish(leader.entries), built + 1
        measured = _measured(session, found)
        if meets(measured, budgets):
            fitting.append((found.measurement.divergence, leader))
        elif "latency" in budgets and leader.measurement is not None:  # others will be slower than predicted, too
            slower = measured.latency_ms / leader.measurement.latency_ms
            sought["latency"] = min(sought["latency"], budgets["latency"] / slower)
    if fitting:
        return dict(min(fitting, key=lambda pair: (pair[0], pair[1].number))[1].entries)
    if built:
        raise Infeasible(
            f"{built} trials were predicted to meet the budgets {dict(budgets)}, but none of them does when it is "
            "built and measured; allow more evaluations or a looser constraint"
        )
    raise Infeasible(
        f"none of {len(pool)} trials met the budgets {dict(budgets)}; allow more evaluations or a looser constraint"
        + next((f" (first failure, at {f.stage}: {f.reason})" for t in pool if isinstance(f := t.outcome, Failure)), "")
    )


def _measured(session: Session, candidate: Candidate) -> Measurement:
    """Of the built candidate: bytes of its file and, where latency counts, milliseconds of its runs."""
    if session.line is None or candidate.file is None:
        return candidate.measurement
    reference, marked = session.evaluator.reference_file, session.evaluator.marked
    assert reference is not None and marked is not None
    files = {"reference": reference.SerializeToString(), "candidate": candidate.file.SerializeToString()}
    ratio = race(files, first_sample(session.example, marked.skeleton.inputs)).ratios["candidate"]
    return replace(candidate.measurement, latency_ms=ratio * session.evaluator.reference.latency_ms)
