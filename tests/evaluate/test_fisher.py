from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import grainwise as gw
from grainwise.evaluate import fisher
from grainwise.evaluate.fisher import fisher_sensitivity
from grainwise.evaluate.measures import relative_squared_error
from grainwise.plan.choices import PRECISIONS, STRUCTURES, Entry
from grainwise.plan.space import narrows
from grainwise.realise.reference import recording
from grainwise.study.sensitivity import Sensitivity
from tests.networks import tiny, tiny_data


@pytest.fixture(scope="module")
def prepared() -> gw.Session:
    return gw.Session.prepare(tiny(), tiny_data(), target="packed")


@pytest.fixture(scope="module")
def bits_only() -> gw.Session:
    return gw.Session.prepare(tiny(), tiny_data(), target="packed", methods=["quantize"])


def _scores(session: gw.Session, **changes: object) -> Sensitivity:
    scoring = replace(session.evaluator.scoring, **changes)  # type: ignore[arg-type]
    return fisher_sensitivity(session.evaluator.library, session.space, session.splits.calibration, scoring)


def _last_layer_change(session: gw.Session, precision: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs of the network, their change when its last layer takes a precision)."""
    reference, library = session.reference, session.evaluator.library
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad(), recording(reference.model.get_submodule("fc"), pairs):
        for batch in session.splits.calibration:
            reference.forward(reference.model, batch.inputs)
    inputs, outputs = (torch.cat(column) for column in zip(*pairs, strict=True))
    layer = library.layer(reference.graph.layer("fc"), Entry(precision=PRECISIONS[precision]), {})
    return outputs.double(), (layer(inputs) - outputs).double()


@pytest.mark.parametrize("name", ["quantize/layer/2", "quantize/channel/4"])
def test_of_the_last_layer_it_is_half_the_variance_of_the_logits_change(
    bits_only: gw.Session, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For softmax outputs F = diag(p) - p pᵀ at the logits, so that 1/2 dᵀ F d = 1/2 Var_p(d)."""
    monkeypatch.setattr(fisher, "DRAWS", 150)
    precision = [str(p) for p in PRECISIONS].index(name)
    logits, change = _last_layer_change(bits_only, precision)
    p = logits.softmax(-1)
    expected = 0.5 * ((p * change.square()).sum(-1) - (p * change).sum(-1).square()).mean()
    index = [layer.name for layer in bits_only.space.layers].index("fc")
    found = _scores(bits_only).precisions[index, precision]
    assert found == pytest.approx(float(expected), rel=0.1)


def test_of_outputs_that_are_no_logits_it_is_their_relative_squared_error(
    bits_only: gw.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "DRAWS", 150)
    precision = [str(p) for p in PRECISIONS].index("quantize/layer/2")
    outputs, change = _last_layer_change(bits_only, precision)
    variances = [part.var() for part in outputs.split(32)]  # of each batch, as it is scored
    expected = sum(part.square().mean() / v for part, v in zip(change.split(32), variances, strict=True)) / len(
        variances
    )
    index = [layer.name for layer in bits_only.space.layers].index("fc")
    found = _scores(bits_only, divergence=relative_squared_error).precisions[index, precision]
    assert found == pytest.approx(float(expected), rel=0.1)


def test_it_ranks_choices_as_measuring_each_one_does(prepared: gw.Session) -> None:
    estimated, measured = _scores(prepared), prepared.sensitivity(lambda done, total: None)
    cutting = np.array([narrows(choice) for choice in STRUCTURES])
    for found, expected in (
        (estimated.structures[:, ~cutting], measured.structures[:, ~cutting]),
        (estimated.structures[:, cutting], measured.structures[:, cutting]),
        (estimated.precisions, measured.precisions),
    ):
        assert (np.isfinite(found) == np.isfinite(expected)).all()
        both = np.isfinite(found) & (expected > 1e-7)
        assert spearmanr(found[both], expected[both]).statistic > 0.8
        assert 0.25 < np.median(found[both] / expected[both]) < 4
    assert (estimated.structures[:, 0] == 0).all() and (estimated.precisions[:, 0] == 0).all()


def test_the_reference_is_left_as_it_was(prepared: gw.Session) -> None:
    model = prepared.reference.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = _scores(prepared), _scores(prepared)
    assert (first.structures == second.structures).all()
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
