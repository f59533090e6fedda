"""From a built candidate to what its file computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from grainwise.graph.skeleton import skeleton_forward
from grainwise.methods.activations import EightBit, EightBitSum, StaticConv2d
from grainwise.methods.layers import scale_outputs
from grainwise.methods.structure import blank
from grainwise.plan.choices import NONE, Choice, Entry, Granularity, Method
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.target import TARGETS
from grainwise.realise.build import build
from grainwise.realise.deploy import deploy
from grainwise.realise.norms import FrozenNorm
from grainwise.session import Session
from tests.networks import tiny, tiny_data

INT8 = Entry(precision=Choice(Method.QUANTIZE, Granularity.CHANNEL, 8))
GHOST = Entry(structure=Choice(Method.DISTILL, Granularity.CHANNEL, 0.5))


@pytest.fixture(scope="module")
def deployed() -> Session:
    return Session.prepare(tiny(), tiny_data())


def _deployed(session: Session, entries: dict[str, Entry], calibrated: bool = True) -> nn.Module:
    skeleton = session.reference.skeleton
    assert skeleton is not None
    model = copy.deepcopy(build(session.evaluator.library, entries))
    batches = [batch.inputs for batch in session.splits.calibration] if calibrated else []
    deploy(model, skeleton, batches, skeleton_forward)
    return model


def test_folding_the_norms_changes_nothing(deployed: Session) -> None:
    x = deployed.splits.search[0].inputs
    with torch.no_grad():
        expected = skeleton_forward(deployed.reference.base, x)
        found = skeleton_forward(_deployed(deployed, {}, calibrated=False), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_everything_in_8_bits_is_calibrated_and_on_its_grid(deployed: Session) -> None:
    convolutions = [layer.name for layer in deployed.space.layers if layer.geometry.kernel]
    model = _deployed(deployed, dict.fromkeys(convolutions, INT8))
    points = [module for module in model.modules() if isinstance(module, EightBit)]
    static = [module for module in model.modules() if isinstance(module, StaticConv2d)]
    assert points and all(point.calibrated for point in points)
    assert len(static) == len(convolutions)
    assert any(isinstance(module, EightBitSum) for module in model.modules())
    for layer in static:
        unit = layer.x_scale * layer.packed.row_scale()  # type: ignore[operator, union-attr]
        assert layer.bias is not None
        sums = layer.bias / unit
        torch.testing.assert_close(sums, sums.round(), rtol=0, atol=1e-2)


def test_the_library_s_modules_are_left_alone(deployed: Session) -> None:
    name = deployed.space.layers[0].name
    before = copy.deepcopy(build(deployed.evaluator.library, {name: INT8}).state_dict())
    _deployed(deployed, {name: INT8})
    after = build(deployed.evaluator.library, {name: INT8}).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_ghost_keeps_its_norm_as_scale_and_shift(deployed: Session) -> None:
    index = next(
        i for i, la in enumerate(deployed.space.layers) if deployed.space.structures[i].any() and la.geometry.kernel
    )
    name = next(
        la.name
        for la in deployed.space.layers[index:]
        if (la.name, GHOST.structure) not in deployed.space.reasons and la.geometry.kernel
    )
    skeleton = deployed.reference.skeleton
    assert skeleton is not None
    norm = skeleton.units[name].norm
    assert norm is not None
    assert isinstance(_deployed(deployed, {name: GHOST}).get_submodule(norm), FrozenNorm)


@pytest.mark.parametrize("granularity", [Granularity.LAYER, Granularity.CHANNEL, Granularity.BLOCK])
def test_scaled_outputs_are_scaled_and_mirrored(granularity: Granularity) -> None:
    geometry = Geometry(Kind.LINEAR, 40, 4, bias=True)
    layer = blank(geometry, NONE, Choice(Method.QUANTIZE, granularity, 4), TARGETS["packed"])
    packed = layer.packed
    packed.store(torch.randint(1, 16, (4, 40)).to(torch.uint8), packed.scale.clone(), None)  # type: ignore[operator, union-attr]
    layer.weight.copy_(packed.unpack())  # type: ignore[operator, union-attr]
    x, scale, shift = torch.randn(3, 40), torch.tensor([1.5, -2.0, 0.25, 1e-12]), torch.randn(4)
    expected = layer(x) * scale + shift
    scale_outputs(layer, scale, shift)
    torch.testing.assert_close(layer(x), expected, rtol=2e-3, atol=2e-3)
