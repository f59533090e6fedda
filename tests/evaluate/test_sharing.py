"""Measurements, stand-ins and switches: shared equals unshared, and nothing old is taken for new."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from grainwise import Data
from grainwise.evaluate import evaluator as module
from grainwise.evaluate.evaluator import Evaluator
from grainwise.evaluate.sharing import Sharing
from grainwise.graph.skeleton import skeleton_forward
from grainwise.methods.distill import StudentOptions
from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.realise.library import VariantLibrary
from grainwise.realise.memory import Recent, free_bytes, limit
from grainwise.session import Session
from grainwise.store.studies import Store
from grainwise.study.measurement import Failure, Measurement
from grainwise.study.trial import Trial
from tests.evaluate.candidates import SUBJECTS, prepared, profiles
from tests.evaluate.test_prefix import again, judged, subject
from tests.graph.graph_networks import build
from tests.networks import pictures, tiny, tiny_data

INT4 = Entry(precision=Choice(Method.QUANTIZE, Granularity.CHANNEL, 4))


@pytest.mark.parametrize("switch", ["reference", "variants", "measurements"])
@pytest.mark.parametrize("name", ["residual", "attention"])
def test_a_switch_changes_no_figure(name: str, switch: str) -> None:
    session = subject(name)
    asked = profiles(session, 6, seed=4)
    assert judged(again(session, **{switch: False}), asked) == judged(again(session), asked)


def test_without_the_library_every_layer_is_solved_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from grainwise.realise import library

    session, count = subject("residual"), 0
    original = library.restructure

    def counted(*given: object) -> object:
        nonlocal count
        count += 1
        return original(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(library, "restructure", counted)
    e = session.evaluator
    for variants, solved in ((True, 2), (False, 6)):
        count = 0
        fresh = VariantLibrary(session.reference)
        evaluator = Evaluator(fresh, e.splits, e.cost, e.scoring, e.marked, Sharing(variants=variants))
        for _ in range(3):
            judged(evaluator, [{"down": INT4, "fc": INT4}])
        assert count == solved


# -- measurements


def test_a_measurement_is_known_again_and_not_made_again(tmp_path: Path) -> None:
    session, store = subject("residual"), Store(f"sqlite:///{tmp_path / 's.db'}")
    asked = profiles(session, 6, seed=6)
    first = again(session)
    store.create("first", {})
    expected = judged(first, asked)
    for number, (entries, outcome) in enumerate(zip(asked, expected, strict=True)):
        store.add("first", Trial(number, entries, outcome, None, "test", 0.0), keys={number: first.key(entries)})
    second = again(session)
    found = dict(second.many(asked, store.measurement))
    assert [found[number] for number in range(6)] == expected
    assert second.prefixes is not None
    assert second.prefixes.steps_run == 0
    off = again(session, measurements=False)
    assert off.key(asked[0]) == ""
    assert store.measurement("") is None
    store.close()


def test_milliseconds_are_those_of_the_present_session() -> None:
    session = subject("residual")
    evaluator = again(session)
    known = Measurement(0.5, 0.1, 1000, 2000, latency_ms=7.0)
    ((_, outcome),) = evaluator.many([{"down": INT4}], lambda key: known)
    assert outcome == replace(known, latency_ms=float(session.cost.total({"down": INT4})[2]))


def test_keys_differ_with_all_that_decides_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"down": INT4}

    def changed_model() -> nn.Module:
        model = tiny()
        with torch.no_grad():
            model.fc.bias[0] += 1e-3
        return model

    def changed_data(**splits: object) -> Data:
        return replace(tiny_data(), **splits)  # type: ignore[arg-type]

    labels = [(x, (y + 1) % 4) for x, y in tiny_data().search]
    sessions = [
        Session.prepare(tiny(), tiny_data(), target="packed"),
        Session.prepare(changed_model(), tiny_data(), target="packed"),
        Session.prepare(tiny(), changed_data(calibration=pictures(64, 9)), target="packed"),
        Session.prepare(tiny(), changed_data(search=pictures(64, 9)), target="packed"),
        Session.prepare(tiny(), changed_data(search=labels), target="packed"),
        Session.prepare(tiny(), changed_data(search=pictures(64, 2, batch=16)), target="packed"),
        Session.prepare(tiny(), tiny_data(), divergence="mse", target="packed"),
        Session.prepare(tiny(), tiny_data(), target="ort-cpu-avx2"),
        Session.prepare(tiny(), tiny_data(), target="ort-cpu-vnni"),
        Session.prepare(tiny(), tiny_data(), target="packed", students=StudentOptions(steps=9)),
    ]
    keys = [session.evaluator.key(entries) for session in sessions]
    assert len(set(keys)) == len(keys)
    same = Session.prepare(tiny(), tiny_data(), target="packed").evaluator
    assert same.key(entries) == keys[0]
    assert same.key({**entries, "fc": Entry()}) == keys[0]
    assert same.key({"fc": INT4}) != keys[0]
    monkeypatch.setattr(module, "code_version", lambda *_: "another")
    assert Session.prepare(tiny(), tiny_data(), target="packed").evaluator.key(entries) not in keys


def test_what_a_users_function_gives_is_not_stored() -> None:
    def metric(outputs: Tensor, targets: Tensor) -> float:
        return 0.0

    def forward(model: nn.Module, inputs: Tensor) -> Tensor:
        found: Tensor = model(inputs)
        return found

    for options in ({"metric": metric, "divergence": "kl"}, {"forward": forward}):
        evaluator = Session.prepare(tiny(), tiny_data(), target="packed", **options).evaluator  # type: ignore[arg-type]
        assert evaluator.key({"down": INT4}) == ""


# -- stand-ins


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_stand_in_computes_what_the_module_does(name: str) -> None:
    session = subject(name)
    form, reference = session.evaluator.form, session.reference
    assert reference.skeleton is None
    assert form is not None
    for batch in session.splits.search:
        with torch.inference_mode():
            expected = reference.forward(reference.model, batch.inputs)
            torch.testing.assert_close(skeleton_forward(form.module, batch.inputs), expected, rtol=1e-5, atol=1e-5)


class Branching(nn.Module):
    """Decides by its data what it computes, which no exported graph shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).mean((2, 3))
        found: Tensor = self.second(y if float(y.sum()) > 0 else -y)
        return found


@pytest.mark.parametrize("network", ["branching", "tied", "two sizes"])
def test_what_cannot_stand_in_runs_as_it_is(network: str) -> None:
    model: nn.Module = Branching() if network == "branching" else tiny()
    data = tiny_data()
    if network == "two sizes":
        small = [(x[:, :, ::2, ::2], y) for x, y in pictures(32, 5)]
        data = replace(data, search=[*data.search, *small])
    if network == "tied":
        model = build("tied")[0]
        tokens = torch.arange(3 * 4 * 6).reshape(3, 4, 6) % 20
        rolled = [[(t.roll(shift, 1), torch.zeros(4, 6, dtype=torch.long))] for shift, t in enumerate(tokens)]
        data = Data(*rolled)
    session = Session.prepare(model, data, target="packed", divergence="mse")
    evaluator = session.evaluator
    assert evaluator.form is None
    assert evaluator.prefixes is None
    asked = profiles(session, 4)
    assert judged(evaluator, asked) == [evaluator(entries) for entries in asked]
    assert any(isinstance(outcome, Measurement) for outcome in judged(evaluator, asked))


def test_a_candidate_that_cannot_be_built_is_a_failure_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    session = subject("residual")
    evaluator = again(session)
    original = module.assemble

    def broken(library: VariantLibrary, entries: dict[str, Entry], base: object) -> nn.Module:
        if "fc" in entries:
            raise RuntimeError("no such shape")
        return original(library, entries, base)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "assemble", broken)
    found = dict(evaluator.many([{"down": INT4}, {"fc": INT4}, {"stem": INT4}]))
    assert found[1] == Failure("build", "no such shape")
    assert isinstance(found[0], Measurement)
    assert isinstance(found[2], Measurement)


def test_the_limit_is_a_part_of_what_is_free() -> None:
    assert 0 < limit(None) <= free_bytes() // 7 and limit(5) == 5


def test_what_is_kept_heeds_what_is_free_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 bytes each; an eighth of what is free holds two of them at first, and none when others have taken it."""
    kept, free = Recent(lambda value: [value]), 20_000
    monkeypatch.setattr("grainwise.realise.memory.free_bytes", lambda: free)
    for key in range(3):
        kept.once(key, lambda: torch.zeros(250))
    assert kept.kept_bytes == 2_000
    free = 0
    kept.once(3, lambda: torch.zeros(250))
    assert kept.kept_bytes == 1_000  # what is asked for at the moment


def test_measuring_leaves_the_reference_as_it_was() -> None:
    session = prepared("residual")
    assert session.evaluator.form is not None
    modules = session.reference.model, session.evaluator.form.module
    before = [copy.deepcopy(m.state_dict()) for m in modules]
    judged(session.evaluator, profiles(session, 16, seed=8))
    for m, state in zip(modules, before, strict=True):
        assert all(torch.equal(v, state[n]) for n, v in m.state_dict().items())
        assert not any(child.training for child in m.modules())
        assert not any("forward" in child.__dict__ for child in m.modules())
