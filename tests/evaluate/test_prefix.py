"""Prefix activations: runs that share give the same bits as runs that do not, within their memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grainwise.evaluate.evaluator import Evaluator, matched_outputs
from grainwise.evaluate.prefix import PrefixRuns, held_bytes
from grainwise.evaluate.sharing import Sharing
from grainwise.graph.skeleton import skeleton_forward
from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.realise.build import assemble, standards_of
from grainwise.session import Session
from grainwise.study.measurement import Measurement, Outcome
from tests.evaluate.candidates import SUBJECTS, prepared, profiles

INT2, INT4, INT8 = (Entry(precision=Choice(Method.QUANTIZE, Granularity.CHANNEL, bits)) for bits in (2, 4, 8))
subject = cache(prepared)


def again(session: Session, **switches: Any) -> Evaluator:
    """An evaluator of the same session that remembers nothing yet."""
    e = session.evaluator
    return Evaluator(e.library, e.splits, e.cost, e.scoring, e.marked, Sharing(**switches))


def judged(evaluator: Evaluator, asked: Sequence[dict[str, Entry]], batch: int = 8) -> list[Outcome]:
    found: dict[int, Outcome] = {}
    for start in range(0, len(asked), batch):
        found |= {start + number: outcome for number, outcome in evaluator.many(asked[start : start + batch])}
    return [found[number] for number in range(len(asked))]


@pytest.mark.parametrize("target", ["packed", "ort-cpu"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_shared_runs_measure_the_same_to_the_bit(
    name: str, target: str, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grainwise.evaluate.prefix.KEEP_SECONDS", 0.0)  # keep even what is made again at once
    session = subject(name, target)
    count = 1000 if full else 24
    asked = profiles(session, count, seed=len(name))
    on, off = again(session), again(session, prefixes=False)
    assert on.prefixes is not None
    assert judged(on, asked) == judged(off, asked)
    assert on.prefixes.steps_known >= 12
    assert sum(isinstance(o, Measurement) for o in judged(off, asked)) >= count * 5 // 6


@pytest.mark.parametrize("name", ["residual", "densenet"])
def test_shared_outputs_are_those_of_the_network_itself(name: str) -> None:
    """Of the reference form: each candidate by itself, run whole through its generated code."""
    session = subject(name)
    evaluator, splits = again(session), session.splits
    asked = profiles(session, 6, seed=3)
    assert evaluator.form is not None and evaluator.prefixes is not None
    models = [assemble(evaluator.library, entries, evaluator.form) for entries in asked]
    for index in evaluator.prefixes.schedule(models):
        standards = standards_of(evaluator.library, asked[index], evaluator._standards)
        expected = matched_outputs(models[index], splits.search, skeleton_forward, standards)
        assert torch.equal(evaluator.prefixes.outputs(models[index], lambda s=standards: s), expected)


def runs_of(session: Session, limit: int | None = None) -> PrefixRuns:
    form = session.evaluator.form
    assert form is not None
    return PrefixRuns(form, session.splits.search, limit)


def run(runs: PrefixRuns, session: Session, asked: Sequence[dict[str, Entry]]) -> list[Tensor]:
    evaluator = session.evaluator
    assert evaluator.form is not None
    models = [assemble(evaluator.library, entries, evaluator.form) for entries in asked]
    found = {}
    for index in runs.schedule(models):
        found[index] = runs.outputs(
            models[index], lambda i=index: standards_of(evaluator.library, asked[i], evaluator._standards)
        )
    return [found[index] for index in range(len(asked))]


def test_a_candidate_runs_from_where_it_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grainwise.evaluate.prefix.KEEP_SECONDS", 0.0)
    session = subject("residual")
    calls: list[str] = []
    runs = runs_of(session)
    names = [layer.name for layer in session.space.layers]
    form = session.evaluator.form
    assert form is not None
    handles = [form.module.get_submodule(n).register_forward_hook(lambda m, i, o, n=n: calls.append(n)) for n in names]
    try:
        run(runs, session, [{"stem": INT2}])  # it times the steps, and shares nothing with what follows
        calls.clear()
        run(runs, session, [{"down": INT2}, {"down": INT4}, {"down": INT8}])
    finally:
        for handle in handles:
            handle.remove()
    # What precedes `down` runs once on each of the two batches, the classifier in all three.
    assert [calls.count(n) for n in names] == [2, 2, 2, 0, 6]


@pytest.mark.parametrize("limit", [0, 40_000, 400_000])
def test_memory_stays_within_its_limit(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grainwise.evaluate.prefix.KEEP_SECONDS", 0.0)
    session = subject("residual")
    runs, free = runs_of(session, limit), runs_of(session, 2**40)
    peak = 0
    keep = runs._keep

    def watched(*given: Any) -> None:
        nonlocal peak
        keep(*given)
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for k in runs._kept.values() for t in k.values
        }
        assert sum(storages.values()) <= runs.kept_bytes <= limit
        assert runs.kept_bytes == sum(k.bytes for k in runs._kept.values())
        peak = max(peak, runs.kept_bytes)

    monkeypatch.setattr(runs, "_keep", watched)
    for start in range(0, 24, 8):
        asked = profiles(session, 24, seed=5)[start : start + 8]
        for found, expected in zip(run(runs, session, asked), run(free, session, asked), strict=True):
            assert torch.equal(found, expected)
    assert peak >= 0.4 * limit
    assert free.kept_bytes > 400_000
    assert runs.steps_known <= free.steps_known


def test_nothing_is_kept_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    session = subject("residual")
    alone = runs_of(session)
    run(alone, session, profiles(session, 2)[::2])
    assert alone.kept_bytes == 0  # nobody asked for anything twice
    monkeypatch.setattr("grainwise.evaluate.prefix.KEEP_SECONDS", 1.0)
    dear = runs_of(session)
    run(dear, session, [{"down": INT2}, {"down": INT4}])
    assert dear.kept_bytes == 0


def test_what_is_asked_for_again_is_kept_across_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grainwise.evaluate.prefix.KEEP_SECONDS", 0.0)
    session = subject("residual")
    runs = runs_of(session)
    counts = []
    for entry in (INT2, INT4, INT8):
        before = runs.steps_run
        run(runs, session, [{"fc": entry}])
        counts.append(runs.steps_run - before)
    assert counts[0] == counts[1] > 5 * counts[2]


def test_a_changed_module_is_never_taken_for_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it stands where the old one was in memory: identity is a number that is given once."""
    monkeypatch.setattr("grainwise.evaluate.prefix.KEEP_SECONDS", 0.0)
    session = subject("residual")
    evaluator = session.evaluator
    assert evaluator.form is not None
    runs = runs_of(session)
    found = []
    for scale in (1.0, 1.0, 2.0, 3.0):
        model = assemble(evaluator.library, {}, evaluator.form)
        layer = nn.Linear(32, 4)
        with torch.no_grad():
            layer.weight.copy_(session.reference.model.fc.weight * scale)
            layer.bias.copy_(session.reference.model.fc.bias * scale)
        model.set_submodule("fc", layer)
        runs.schedule([model])
        found.append(runs.outputs(model, lambda: evaluator._standards))
        del model, layer
    torch.testing.assert_close(found[2], 2 * found[0])
    torch.testing.assert_close(found[3], 3 * found[0])
    assert torch.equal(found[0], found[1])


def test_bytes_of_a_view_are_those_of_what_it_views() -> None:
    whole = torch.zeros(10, 10)
    assert held_bytes(whole[:1]) == held_bytes((whole[0], whole.T)) == 400
    assert held_bytes(3) == 0


def test_a_failed_run_leaves_no_half_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grainwise.evaluate.prefix.KEEP_SECONDS", 0.0)
    session = subject("residual")
    evaluator = again(session)
    asked = [{"down": INT2}, {"down": INT4}]
    expected = judged(again(session), asked)
    runs = evaluator.prefixes
    assert runs is not None
    original, calls = runs._run, 0

    def breaks(*given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:  # the second batch of the first candidate
            raise RuntimeError("no more")
        return original(*given)

    monkeypatch.setattr(runs, "_run", breaks)
    outcomes = judged(evaluator, asked)
    assert sum(not isinstance(o, Measurement) for o in outcomes) == 1
    assert judged(evaluator, asked) == expected
