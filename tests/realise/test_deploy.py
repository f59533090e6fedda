"""Deploying: norms disappear into layers, every 8-bit value has its range, biases lie on the grid of the sums."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from grainwise.graph.forward import default_forward
from grainwise.graph.skeleton import Sum, build_skeleton, skeleton_forward
from grainwise.graph.trace import trace
from grainwise.methods.activations import EightBit, EightBitSum, StaticConv2d
from grainwise.methods.hessian import HessianAccumulator
from grainwise.methods.layers import Ghost, filled_stage, scale_outputs
from grainwise.methods.storage import CENTRE, PackedWeight, storable
from grainwise.plan.choices import NONE, Choice, Entry, Granularity, Method
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.shapes import Stage
from grainwise.plan.target import TARGETS, Realisation
from grainwise.realise.build import build
from grainwise.realise.deploy import LARGEST_BIAS, deploy, stages_of, static_layers
from grainwise.realise.library import VariantLibrary
from grainwise.realise.norms import FrozenNorm, freeze_norms, matched_norms, reestimate_norms
from grainwise.realise.reference import Reference
from tests.networks import TinyResidual, pictures, tiny

CALIBRATION = [inputs for inputs, _ in pictures(64, 1)]
X = pictures(16, 5)[0][0]
LOW_RANK = Choice(Method.FACTORIZE, Granularity.LAYER, 0.5)
GHOST = Choice(Method.DISTILL, Granularity.CHANNEL, 0.5)
HALF = Choice(Method.PRUNE, Granularity.CHANNEL, 0.5)
CONVOLUTIONS = ("stem", "block.0", "block.3", "down")


def bits(level: int, granularity: Granularity = Granularity.CHANNEL) -> Choice:
    return Choice(Method.QUANTIZE, granularity, level)


def library_of(model: TinyResidual) -> VariantLibrary:
    graph = trace(model, X[:2])
    skeleton = build_skeleton(model, X[:2], default_forward, graph)
    target = TARGETS["ort-cpu-vnni"]
    return VariantLibrary(Reference.gather(model, graph, CALIBRATION, default_forward, target, skeleton))


def test_methods_are_given_what_is_to_be_expected_on_other_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HessianAccumulator, "shrunk", lambda found: 2 * found.hessian())
    twice = library_of(tiny()).reference.hessians
    monkeypatch.setattr(HessianAccumulator, "shrunk", HessianAccumulator.hessian)
    for name, hessian in library_of(tiny()).reference.hessians.items():
        assert torch.equal(twice[name], 2 * hessian)


@pytest.fixture(scope="module")
def library() -> VariantLibrary:
    """Of the tiny network, some of its channels mirrored by their norm; shared, so tests must not change it."""
    model = tiny()
    with torch.no_grad():
        model.block[1].weight[::3] *= -0.7
    return library_of(model)


def deployed(library: VariantLibrary, entries: Mapping[str, Entry]) -> nn.Module:
    model = copy.deepcopy(build(library, entries))
    assert library.reference.skeleton is not None
    deploy(model, library.reference.skeleton, CALIBRATION, skeleton_forward)
    return model


def undeployed(library: VariantLibrary, entries: Mapping[str, Entry]) -> nn.Module:
    """The same candidate with its norms beside its layers."""
    model = copy.deepcopy(build(library, entries))
    reestimate_norms(model, CALIBRATION, skeleton_forward)
    freeze_norms(model)
    return model


def norms_of(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, FrozenNorm | nn.BatchNorm2d)]


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"block.0": Entry(HALF), "down": Entry(LOW_RANK)},
        {"stem": Entry(LOW_RANK), "block.3": Entry(Choice(Method.PRUNE, Granularity.LAYER, 0.5))},
    ],
    ids=["none", "narrow", "factors"],
)
def test_norms_are_folded_exactly_in_float(library: VariantLibrary, entries: Mapping[str, Entry]) -> None:
    model, plain = deployed(library, entries), undeployed(library, entries)
    assert norms_of(model) == [] and norms_of(plain) == ["norm", "block.1", "block.4"]
    with torch.no_grad():
        wanted = plain(X)
        torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        assert not torch.allclose(model(X), library.reference.model(X), rtol=1e-3)  # norms were estimated anew


@pytest.mark.parametrize("level", [8, 4, 2])
@pytest.mark.parametrize("granularity", list(Granularity))
def test_folding_keeps_codes_and_scales_scales(library: VariantLibrary, level: int, granularity: Granularity) -> None:
    entries = {"block.0": Entry(precision=bits(level, granularity))}
    before, after = undeployed(library, entries), deployed(library, entries)
    layer, norm = after.get_submodule("block.0"), before.get_submodule("block.1")
    old, new = before.get_submodule("block.0").packed, layer.packed
    assert torch.equal(new.codes(), _mirrored(old, norm.weight))
    per_row = old.scale.float().reshape(1 if granularity is Granularity.LAYER else 32, -1)
    expected = storable(per_row * norm.weight.abs()[:, None])
    assert torch.equal(new.scale.float(), expected.reshape(-1))
    assert (norm.weight > 0).any() and (norm.weight < 0).any()
    assert torch.equal(layer.weight, new.unpack().reshape(32, 16, 3, 3))


def _mirrored(packed: PackedWeight, gamma: Tensor) -> Tensor:
    levels = (packed.codes().float() - CENTRE[packed.bits]).reshape(len(gamma), -1)
    return (levels * gamma.sign()[:, None] + CENTRE[packed.bits]).reshape(-1).to(torch.uint8)


@pytest.mark.parametrize("level", [8, 4, 2])
def test_a_negative_factor_mirrors_codes(level: int) -> None:
    """By hand: codes turn around that of zero, scales stay positive, and the bias is scaled and shifted."""
    g = Geometry(Kind.LINEAR, 4, 2, bias=True)
    codes = torch.tensor({8: [1, 128, 130, 255], 4: [1, 8, 10, 15], 2: [0, 1, 2, 3]}[level], dtype=torch.uint8)
    scale, bias = torch.tensor([0.5]).half(), torch.tensor([1.0, -1.0])
    layer = filled_stage(Stage(g), bits(level, Granularity.LAYER), codes.expand(2, 4), scale=scale, bias=bias)
    plain, x = layer.packed.unpack().clone(), torch.eye(4)
    scale_outputs(layer, torch.tensor([2.0, -4.0]), torch.tensor([0.25, 0.5]))
    mirrored = {8: [255, 128, 126, 1], 4: [15, 8, 6, 1], 2: [3, 2, 1, 0]}[level]
    assert layer.packed.codes().reshape(2, 4).tolist() == [codes.tolist(), mirrored]
    assert layer.packed.scale.tolist() == [1.0, 2.0]
    assert torch.equal(layer.packed.unpack(), plain * torch.tensor([[2.0], [-4.0]]))
    assert layer.bias.tolist() == [2.25, 4.5]
    assert torch.equal(layer(x), x @ layer.packed.unpack().T + layer.bias)


def test_all_values_in_8_bits_are_calibrated(library: VariantLibrary) -> None:
    model = deployed(library, {name: Entry(LOW_RANK, bits(8)) for name in CONVOLUTIONS})
    points = {name: m for name, m in model.named_modules() if isinstance(m, EightBit)}
    between = {f"{name}.1" for name in CONVOLUTIONS}
    skeleton = library.reference.skeleton
    assert set(points) == between | {f"points.{name}" for name in skeleton.points}
    assert all(point.calibrated and point._seen is None for point in points.values())
    (join,) = skeleton.joins
    assert isinstance(model.get_submodule(f"joins.{join.name}"), EightBitSum)
    assert static_layers(model, skeleton) == CONVOLUTIONS
    for name in CONVOLUTIONS:
        first, _, second = stages_of(model.get_submodule(name))
        unit = skeleton.units[name]
        assert first.x_scale == points[f"points.{unit.source}"].scale
        assert first.y_scale == second.x_scale == points[f"{name}.1"].scale
        assert second.y_scale == points[f"points.{unit.result}"].scale


def test_points_of_float_layers_stay_open(library: VariantLibrary) -> None:
    """A layer alone in 8 bits: the values that it reads and makes, and the sum next to it in float."""
    skeleton = library.reference.skeleton
    for layer in ("block.0", "block.3"):
        model = deployed(library, {layer: Entry(precision=bits(4))})
        unit = skeleton.units[layer]
        found = {name for name in skeleton.points if isinstance(model.get_submodule(f"points.{name}"), EightBit)}
        assert found == {unit.source, unit.result}
        assert isinstance(model.get_submodule(f"joins.{skeleton.joins[0].name}"), Sum)


@pytest.mark.parametrize("granularity", [Granularity.LAYER, Granularity.CHANNEL])
@pytest.mark.parametrize("level", [8, 4, 2])
def test_biases_lie_on_the_grid_of_the_sums(library: VariantLibrary, level: int, granularity: Granularity) -> None:
    entries = {name: Entry(precision=bits(level, granularity)) for name in CONVOLUTIONS}
    model, plain = deployed(library, entries), undeployed(library, entries)
    for name in CONVOLUTIONS:
        layer = model.get_submodule(name)
        assert isinstance(layer, StaticConv2d)
        unit = layer.x_scale * layer.packed.row_scale()
        sums = layer.bias / unit
        assert torch.equal(sums.round() * unit, layer.bias)
        assert (sums - sums.round()).abs().max() <= 1e-6 * sums.abs().max()
    rounded, unrounded = model.down.bias, plain.down.bias  # no norm follows
    assert (rounded - unrounded).abs().max() <= 0.5 * (model.down.x_scale * model.down.packed.row_scale()).max()
    assert not torch.equal(rounded, unrounded)


@pytest.mark.parametrize("granularity", [Granularity.LAYER, Granularity.CHANNEL])
@pytest.mark.parametrize("level", [8, 4, 2])
@pytest.mark.parametrize("gamma", [1e-9, 0.0, -1e-9])
def test_a_vanishing_gamma_keeps_sums_within_int32(gamma: float, level: int, granularity: Granularity) -> None:
    """The channel is its bias, which would be beyond int32 in units of its all but vanished weights."""
    model = tiny()
    with torch.no_grad():
        model.norm.weight[3], model.norm.bias[3] = gamma, 50.0
    library = library_of(model)
    found = deployed(library, {"stem": Entry(precision=bits(level, granularity))})
    stem = found.stem
    sums = stem.bias / (stem.x_scale * stem.packed.row_scale())
    assert LARGEST_BIAS / 2 < sums[3].abs() == sums.abs().max() < 2**31 - 2**29
    assert torch.equal(stem.weight, stem.packed.unpack().reshape(stem.weight.shape))
    source = found.get_submodule(f"points.{library.reference.skeleton.units['stem'].source}")
    with torch.no_grad():
        assert (stem(source(X))[:, 3] - 50.0).abs().max() <= stem.y_scale


def test_ghosts_keep_their_norm(library: VariantLibrary) -> None:
    entries = {"stem": Entry(GHOST, bits(8)), "block.0": Entry(precision=bits(8))}
    model, plain = deployed(library, entries), undeployed(library, {"stem": entries["stem"]})
    assert isinstance(model.stem, Ghost) and isinstance(model.norm, FrozenNorm)
    assert norms_of(model) == ["norm"] and isinstance(model.get_submodule("block.1"), nn.Identity)
    assert torch.equal(model.norm.weight, plain.norm.weight) and torch.equal(model.norm.bias, plain.norm.bias)
    assert static_layers(model, library.reference.skeleton) == ("block.0",)
    assert model.stem.primary.realisation is model.stem.cheap.realisation is Realisation.FOLDED


def test_the_librarys_modules_stay_as_they_are(library: VariantLibrary) -> None:
    entries = {
        "stem": Entry(GHOST, bits(4)),
        "block.0": Entry(LOW_RANK, bits(4)),
        "block.3": Entry(precision=bits(8)),
        "down": Entry(NONE, bits(2)),
        "fc": Entry(precision=bits(4)),
    }
    built = build(library, entries)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    base = {name: value.clone() for name, value in library.reference.skeleton.module.state_dict().items()}
    model = deployed(library, entries)
    again = build(library, entries)
    assert all(again.get_submodule(name) is built.get_submodule(name) for name in entries)
    for state, kept in ((again.state_dict(), before), (library.reference.skeleton.module.state_dict(), base)):
        assert state.keys() == kept.keys() and all(torch.equal(state[name], value) for name, value in kept.items())
    shared = {value.data_ptr() for value in again.state_dict().values() if value.numel()}
    assert not shared & {value.data_ptr() for value in model.state_dict().values() if value.numel()}


def test_what_ranks_is_near_what_is_deployed(library: VariantLibrary) -> None:
    """With norms and ranges of the batch itself the candidate computes nearly what it does once they are fixed."""
    entries = {name: Entry(precision=bits(8)) for name in (*CONVOLUTIONS, "fc")}
    raw, fixed, x = build(library, entries), deployed(library, entries), torch.cat(CALIBRATION)
    with torch.no_grad():
        with matched_norms(raw, {}):
            found = raw(x)
        wanted = fixed(x)
    assert (found - wanted).square().mean() <= 1e-3 * wanted.var()
