"""What is trained computes what is stored, to the last bit where it can be, whatever the form it is stored in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from grainwise.graph.forward import default_forward
from grainwise.methods.layers import filled_stage, realisation_of
from grainwise.methods.storage import CENTRE, decode_support
from grainwise.plan.choices import NONE, Choice, Granularity, Method
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.shapes import Stage, scale_count
from grainwise.plan.target import TARGETS, Realisation, Target
from grainwise.realise.norms import FrozenNorm
from grainwise.recover.shadows import Learnt, PackedShadow, shadows_of
from grainwise.recover.step import Student

SQUARE = ((3, 3), (1, 1), (1, 1), (1, 1))
GEOMETRIES = {
    "conv2d": Geometry(Kind.CONV2D, 8, 16, *SQUARE, bias=True),
    "depthwise": Geometry(Kind.CONV2D, 16, 16, *SQUARE, groups=16, bias=True),
    "conv1d": Geometry(Kind.CONV1D, 8, 16, (5,), (1,), (2,), (1,), bias=True),
    "linear": Geometry(Kind.LINEAR, 40, 16, bias=True),
    "grouped linear": Geometry(Kind.LINEAR, 80, 16, groups=2),
    "embedding": Geometry(Kind.EMBEDDING, 12, 40),
}


def quantised(bits: int, granularity: Granularity) -> Choice:
    return Choice(Method.QUANTIZE, granularity, bits)


def support_of(stage: Stage, generator: torch.Generator) -> Tensor | None:
    g = stage.geometry
    if stage.kept is None:
        return None
    if stage.tile_rows:
        columns = torch.arange(g.columns) < stage.kept // g.rows
        return columns.expand(g.rows, g.columns).clone()
    order = torch.randperm(g.weights, generator=generator)
    return (order < stage.kept).reshape(g.rows, g.columns)


def layer_of(stage: Stage, precision: Choice, target: Target) -> nn.Module:
    """A stage with random contents, its scales rather fine, as it would be deployed."""
    generator = torch.Generator().manual_seed(3)
    g, how = stage.geometry, target.realisation(stage, precision)
    bias, support = torch.randn(g.outputs, generator=generator), support_of(stage, generator)
    if precision == NONE:
        values = torch.randn(g.rows, g.columns, generator=generator)
        return filled_stage(stage, precision, values, support=support, bias=bias, realisation=how)
    bits = int(precision.level or 0)
    reach = int(target.largest_code(how, bits) + (0.5 if bits == 2 else 0))
    low, high = (0, 4) if bits == 2 else (int(CENTRE[bits]) - reach, int(CENTRE[bits]) + reach + 1)
    codes = torch.randint(low, high, (g.rows, g.columns), generator=generator).to(torch.uint8)
    assert precision.granularity is not None
    scale = (0.5 + torch.rand(scale_count(g, precision.granularity), generator=generator)) / 2 ** (bits - 1)
    layer = filled_stage(stage, precision, codes, scale=scale.half(), support=support, bias=bias, realisation=how)
    if how is Realisation.STATIC:
        layer.x_scale.fill_(1 / 64)
        layer.y_scale.fill_(1 / 32)
    return layer


def inputs_of(g: Geometry) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    if g.kind is Kind.EMBEDDING:
        return torch.randint(0, g.inputs, (5, 7), generator=generator)
    sizes = {Kind.CONV2D: (6, 6), Kind.CONV1D: (9,)}.get(g.kind, ())
    return (32 * torch.randn(4, g.inputs, *sizes, generator=generator)).round() / 64


def trained(layer: nn.Module, target: Target, size: float = 0.2) -> Student:
    """The layer's student, moved as training moves it."""
    wrapped = nn.Sequential(layer)
    student = Student(wrapped, default_forward, shadows_of(wrapped, {"0"}, target.largest_code))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for change in student.parameters():
            change.add_(size * torch.randn(change.shape, generator=generator))
    return student


def assert_stored_as_trained(student: Student, x: Tensor) -> None:
    before = student.network(x)
    wanted = student(x)
    assert wanted.requires_grad and not torch.allclose(before, wanted, rtol=1e-2)
    student.store()
    found = student.network(x)
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", [TARGETS["packed"], TARGETS["ort-cpu-avx2"]], ids=lambda t: t.name)
@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_training_computes_what_is_stored(name: str, bits: int, granularity: Granularity, target: Target) -> None:
    g = GEOMETRIES[name]
    layer = layer_of(Stage(g), quantised(bits, granularity), target)
    student = trained(layer, target)
    assert_stored_as_trained(student, inputs_of(g))
    reach = target.largest_code(realisation_of(layer), bits)
    assert (layer.packed.codes() - CENTRE[bits]).abs().max() <= reach


def test_the_cases_are_of_every_realisation() -> None:
    found = {
        TARGETS["ort-cpu-avx2"].realisation(Stage(g), quantised(bits, granularity))
        for g in GEOMETRIES.values()
        for bits in (8, 4, 2)
        for granularity in Granularity
    }
    assert found == {Realisation.STATIC, Realisation.DYNAMIC, Realisation.FOLDED, Realisation.GATHERED}


PRUNED = {
    "bitmask": Stage(GEOMETRIES["conv2d"], kept=500),
    "tiles": Stage(GEOMETRIES["conv2d"], kept=40 * 16, tile_rows=16),
    "tall": Stage(Geometry(Kind.LINEAR, 24, 128, bias=True), kept=10 * 128, tile_rows=128),
}


@pytest.mark.parametrize("precision", [NONE, *(quantised(b, Granularity.CHANNEL) for b in (8, 4, 2))], ids=str)
@pytest.mark.parametrize("stage", PRUNED.values(), ids=list(PRUNED))
def test_what_is_pruned_stays_pruned(stage: Stage, precision: Choice) -> None:
    target = TARGETS["ort-cpu-vnni"]
    layer = layer_of(stage, precision, target)
    packed = layer.packed
    kept = decode_support(packed.support, stage)
    student = trained(layer, target)
    assert_stored_as_trained(student, inputs_of(stage.geometry))
    assert torch.equal(decode_support(packed.support, stage), kept)
    assert int((packed.unpack() != 0).sum()) <= stage.kept == int(kept.sum())
    (shadow,) = student.shadows
    assert isinstance(shadow, PackedShadow)
    student(inputs_of(stage.geometry)).square().sum().backward()
    assert (shadow.values.change.grad[~kept] == 0).all() and (shadow.values.change.grad[kept] != 0).any()


def test_nothing_moves_before_the_first_step() -> None:
    """The student of an artefact is the artefact, to the bit, and storing it changes nothing."""
    target = TARGETS["ort-cpu-vnni"]
    for g in GEOMETRIES.values():
        for bits in (8, 4, 2):
            layer = layer_of(Stage(g), quantised(bits, Granularity.CHANNEL), target)
            student, x = trained(layer, target, size=0.0), inputs_of(g)
            before = {name: value.clone() for name, value in layer.state_dict().items()}
            assert torch.equal(student(x), student.network(x))
            student.store()
            assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("how", ["float", "frozen norm"])
def test_float_layers_and_norms_are_trained_too(how: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3) if how == "float" else FrozenNorm(3)
    layer.requires_grad_(False)
    assert_stored_as_trained(trained(layer, TARGETS["packed"]), torch.randn(2, 3, 6, 6))


def test_gradients_pass_within_the_range_and_stop_beyond() -> None:
    """By hand: levels -7 to 7 of scale 1, one weight within and one far beyond, y = w x."""
    g = Geometry(Kind.LINEAR, 2, 1)
    codes = torch.tensor([[8 + 3, 8 + 7]], dtype=torch.uint8)
    layer = filled_stage(Stage(g), quantised(4, Granularity.CHANNEL), codes, scale=torch.ones(1).half())
    shadow = PackedShadow("0", layer, lambda how, bits: 7.0)
    unit = (3**2 + 7**2) ** 0.5 / 2**0.5
    with torch.no_grad():
        shadow.values.change[0, 0] = 0.4 / unit  # 3.4, which is still code 3
        shadow.values.change[0, 1] = 2.0 / unit  # 9, which is beyond 7
    weight = shadow.tensors()["0.weight"]
    assert weight.tolist() == [[3.0, 7.0]]
    (weight * torch.tensor([2.0, 5.0])).sum().backward()
    torch.testing.assert_close(shadow.values.change.grad, torch.tensor([[2.0 * unit, 0.0]]))
    # LSQ, equation 3: round(w/s) - w/s within, the largest level beyond; times s, since factors of it are learnt, and
    # a root of two, since two weights share it.
    wanted = torch.tensor([(2 * (3 - 3.4) + 5 * 7.0) / 2**0.5])
    torch.testing.assert_close(shadow.scale.change.grad, wanted, rtol=0, atol=1e-4)


def test_units_are_the_size_of_rows() -> None:
    layer = nn.Linear(2, 3, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, -3.0], [0.3, 0.3], [0.0, 0.0]]))
        layer.bias.zero_()
    (shadow,) = shadows_of(nn.Sequential(layer), {"0"}, lambda how, bits: 7.0)
    least = 0.1 * ((2 * 9 + 2 * 0.09) / 6) ** 0.5
    torch.testing.assert_close(shadow.weight.unit[:, 0], torch.tensor([3.0, 0.3, least]))
    assert shadow.bias.unit.tolist() == [1.0, 1.0, 1.0]


def test_a_learnt_value_starts_where_it_was() -> None:
    value = Learnt(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0]))
    assert value().tolist() == [1.0, 2.0]
    with torch.no_grad():
        value.change.add_(0.5)
    assert value().tolist() == [1.5, 7.0]


def test_only_the_named_layers_are_trained() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    found = [shadow.path for shadow in shadows_of(network, {"0", "1"}, lambda how, bits: 7.0)]
    assert found == ["0", "1.0"]
