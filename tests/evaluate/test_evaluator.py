from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grainwise.evaluate.data import Data, take
from grainwise.evaluate.evaluator import Evaluator
from grainwise.evaluate.measures import MetricError
from grainwise.evaluate.sensitivity import measure_sensitivity
from grainwise.export.weights import weights_bytes
from grainwise.plan.choices import PRECISIONS, STRUCTURES, UNCOMPRESSED, Choice, Entry, Granularity, Method
from grainwise.realise.library import VariantLibrary
from grainwise.session import Session
from grainwise.study.measurement import Failure, Measurement
from tests.networks import pictures, tiny, tiny_data

INT2 = Entry(precision=Choice(Method.QUANTIZE, Granularity.LAYER, 2))
INT8 = Entry(precision=Choice(Method.QUANTIZE, Granularity.CHANNEL, 8))


def _measured(session: Session, entries: dict[str, Entry]) -> Measurement:
    outcome = session.evaluator(entries)
    assert isinstance(outcome, Measurement)
    return outcome


def test_harder_compression_diverges_more_and_is_smaller(session: Session) -> None:
    mild, hard = (_measured(session, {layer.name: e for layer in session.space.layers}) for e in (INT8, INT2))
    assert 0 <= mild.divergence < 0.5 * hard.divergence
    assert hard.size_bytes < mild.size_bytes < session.evaluator.reference.size_bytes
    assert hard.macs == mild.macs == session.evaluator.reference.macs


def test_evaluation_is_repeatable_to_the_bit(session: Session) -> None:
    entries = {"down": INT2}
    assert session.evaluator(entries) == session.evaluator(entries)
    fresh = Session.prepare(tiny(), tiny_data(), target="packed")
    assert fresh.evaluator(entries) == session.evaluator(entries)


def test_finish_gives_what_it_measured(session: Session) -> None:
    candidate = session.evaluator.finish({"down": INT2})
    model, measurement = candidate.model, candidate.measurement
    assert weights_bytes(model) == measurement.size_bytes
    with torch.inference_mode():
        outputs = torch.cat([model(batch.inputs) for batch in session.splits.search])
    targets = torch.cat([b.targets for b in session.splits.search if b.targets is not None])
    assert float((outputs.argmax(1) == targets).float().mean()) == pytest.approx(measurement.metric)


def test_macs_of_the_reference_by_hand(session: Session) -> None:
    convolutions = 9 * (3 * 16 * 64 + 16 * 32 * 64 + 32 * 16 * 64 + 16 * 32 * 16)
    assert session.evaluator.reference.macs == convolutions + 32 * 4


def test_a_metric_that_fails_on_the_reference_is_an_error() -> None:
    def nan(outputs: Tensor, targets: Tensor) -> float:
        return math.nan

    with pytest.raises(MetricError, match="gave nan"):
        Session.prepare(tiny(), tiny_data(), metric=nan, target="packed")


def test_a_metric_that_fails_on_a_candidate_is_a_failure() -> None:
    calls = []

    def second_is_nan(outputs: Tensor, targets: Tensor) -> float:
        calls.append(1)
        return 1.0 if len(calls) == 1 else math.nan

    broken = Session.prepare(tiny(), tiny_data(), metric=second_is_nan, target="packed")
    outcome = broken.evaluator({"down": INT2})
    assert isinstance(outcome, Failure)
    assert outcome.stage == "evaluate"
    assert "gave nan" in outcome.reason


def test_sensitivity_measures_each_choice_alone(session: Session) -> None:
    steps: list[tuple[int, int]] = []
    found = measure_sensitivity(
        session.evaluator,
        session.space,
        samples=32,
        progress=lambda done, total: steps.append((done, total)),
    )
    legal = session.space.structures, session.space.precisions
    assert steps[-1] == (int(sum(m.sum() for m in legal)),) * 2
    for table, mask in zip((found.structures, found.precisions), legal, strict=True):
        assert (np.isfinite(table) == mask).all()
        assert (table[:, 0] == 0).all()
    bits = [PRECISIONS.index(Choice(Method.QUANTIZE, Granularity.CHANNEL, b)) for b in (8, 4, 2)]
    mean = found.precisions[:, bits].mean(axis=0)
    assert mean[0] < mean[1] < mean[2]
    shares = [STRUCTURES.index(Choice(Method.PRUNE, Granularity.LAYER, s)) for s in (0.1, 0.3, 0.5, 0.7)]
    assert (np.diff(found.structures[:, shares].mean(axis=0)) > 0).all()


def test_sensitivity_is_scored_on_the_search_split(session: Session) -> None:
    """The methods are fitted on the calibration split, so their scores there would flatter them."""
    evaluator = session.evaluator
    found = measure_sensitivity(evaluator, session.space, samples=32)
    alone = replace(session.splits, search=take(session.splits.search, 32))
    wanted = Evaluator(evaluator.library, alone, evaluator.cost, evaluator.scoring, evaluator.marked)
    outcome = wanted({"down": INT2})
    assert isinstance(outcome, Measurement)
    index = [layer.name for layer in session.space.layers].index("down")
    assert found.precisions[index, PRECISIONS.index(INT2.precision)] == pytest.approx(outcome.divergence, rel=1e-6)


def test_a_search_aims_below_its_latency_budget_alone(session: Session) -> None:
    full = session.evaluator.reference
    projection = session.projection({"size": full.size_bytes, "macs": full.macs})
    assert projection.budget[:2].tolist() == [full.size_bytes, full.macs] and np.isinf(projection.budget[2])
    assert session.projection({"latency": 2.0}).budget[2] == pytest.approx(1.94)  # packed: 0 ms, so it can be met


def test_regression_outputs_use_the_squared_error() -> None:
    def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
        return [(x.flatten(1), x.flatten(1)[:, :2]) for x, _ in pictures(32, seed)]

    def closeness(outputs: Tensor, targets: Tensor) -> float:
        return -float((outputs - targets).square().mean())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 2))
    prepared = Session.prepare(model, Data(batches(1), batches(2), batches(3)), metric=closeness, target="packed")
    assert _measured(prepared, {"0": INT2}).divergence > 0
    assert len(take(prepared.splits.calibration, 5)[0].inputs) == 5


def test_a_choice_that_cannot_be_built_scores_infinity(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    from grainwise.evaluate import evaluator

    assemble = evaluator.assemble

    def broken(library: VariantLibrary, entries: Mapping[str, Entry], form: Any) -> nn.Module:
        if entries and next(iter(entries.values())) != UNCOMPRESSED:
            raise RuntimeError("shape mismatch")
        return assemble(library, entries, form)

    monkeypatch.setattr(evaluator, "assemble", broken)
    found = measure_sensitivity(session.evaluator, session.space, samples=8)
    assert np.isinf(found.structures[:, 1:]).all()
    assert (found.structures[:, 0] == 0).all()


def test_a_large_network_is_scored_on_fewer_samples(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    from grainwise.evaluate import sensitivity

    assert sensitivity.affordable(session.space) == sensitivity.MOST
    choices = int(session.space.structures.sum() + session.space.precisions.sum())
    macs = session.evaluator.reference.macs
    monkeypatch.setattr(sensitivity, "MACS", 20.5 * choices * macs)
    assert sensitivity.affordable(session.space) == 20
    monkeypatch.setattr(sensitivity, "MACS", choices * macs)
    assert sensitivity.affordable(session.space) == sensitivity.LEAST
