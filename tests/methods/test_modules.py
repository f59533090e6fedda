from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from grainwise.methods.layers import Ghost, GroupedLinear, geometry_of
from grainwise.methods.modules import construct, describe, effective_matrix
from grainwise.methods.structure import realise, restructure
from grainwise.plan.choices import NONE, PRECISIONS, Choice, Granularity, Method
from grainwise.plan.layers import Kind
from tests.methods.samples import GEOMETRIES, structures_of, synthetic

CELLS = [(name, choice) for name, g in GEOMETRIES.items() for choice in structures_of(g)]


@pytest.mark.parametrize("name, choice", CELLS, ids=str)
def test_round_trips_bit_for_bit(name: str, choice: Choice) -> None:
    problem, inputs = synthetic(name)
    structure = restructure(problem, choice, inputs)
    for precision in (NONE, PRECISIONS[-1], PRECISIONS[5]):
        module = realise(structure, precision)
        before = module(inputs[:4])
        spec = json.loads(json.dumps(describe(module)))
        again = construct(spec)
        assert describe(again) == describe(module)
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in module.state_dict().items()
        }
        again.load_state_dict(module.state_dict())
        assert torch.equal(again(inputs[:4]), before)
        assert torch.equal(copy.deepcopy(again)(inputs[:4]), before)


def test_a_packed_layer_stays_an_ordinary_one() -> None:
    problem, _ = synthetic("conv2d stride 2")
    module = realise(restructure(problem, NONE), Choice(Method.QUANTIZE, Granularity.CHANNEL, 4))
    assert isinstance(module, nn.Conv2d) and geometry_of(module) == problem.geometry
    assert set(module.state_dict()) == {"packed.weight", "packed.scale"}
    assert module.weight.shape == problem.geometry.weight_shape and not list(module.parameters())
    module.to(memory_format=torch.channels_last)
    module.load_state_dict(module.state_dict())
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    plain = realise(restructure(problem, NONE))
    assert isinstance(plain, nn.Conv2d) and set(plain.state_dict()) == {"weight"} and len(list(plain.parameters())) == 1
    assert torch.equal(plain.weight, problem.weight)


def test_names_inside_chains_and_ghosts() -> None:
    problem, inputs = synthetic("conv1d")
    precision = Choice(Method.QUANTIZE, Granularity.LAYER, 8)
    pair = realise(restructure(problem, Choice(Method.FACTORIZE, Granularity.LAYER, 0.25)), precision)
    assert isinstance(pair, nn.Sequential)
    assert set(pair.state_dict()) == {
        "0.packed.weight",
        "0.packed.scale",
        "1.packed.weight",
        "1.packed.scale",
        "1.bias",
    }
    ghost = realise(restructure(problem, Choice(Method.DISTILL, Granularity.CHANNEL, 0.25), inputs))
    assert isinstance(ghost, Ghost)
    assert {"source", "order", "primary.weight", "primary.bias", "cheap.weight", "cheap.bias"} == set(
        ghost.state_dict()
    )
    assert ghost.source.dtype == ghost.order.dtype == torch.int16


def test_grouped_linear_is_a_block_diagonal_linear() -> None:
    layer = GroupedLinear(6, 4, groups=2)
    generator = torch.Generator().manual_seed(0)
    layer.weight.copy_(torch.randn(4, 3, generator=generator))
    assert layer.bias is not None
    layer.bias.copy_(torch.randn(4, generator=generator))
    x = torch.randn(5, 7, 6, generator=generator)
    dense = torch.block_diag(layer.weight[:2], layer.weight[2:])
    assert torch.allclose(layer(x), nn.functional.linear(x, dense, layer.bias), atol=1e-6)


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_effective_matrix_of_the_layer_itself(name: str) -> None:
    problem, _ = synthetic(name)
    module = realise(restructure(problem, NONE))
    assert torch.allclose(effective_matrix(module, problem.geometry), problem.matrix, atol=1e-6)


def test_effective_matrix_refuses_ghosts() -> None:
    problem, inputs = synthetic("linear")
    ghost = realise(restructure(problem, Choice(Method.DISTILL, Granularity.CHANNEL, 0.5), inputs))
    with pytest.raises(ValueError, match="ghost"):
        effective_matrix(ghost, problem.geometry)


LINEAR: dict[str, Any] = {"type": "layer", "kind": "linear", "inputs": 4, "outputs": 4}


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"type": "os.system"},
        [],
        {**LINEAR, "type": "conv"},
        {**LINEAR, "command": "rm"},
        {**LINEAR, "inputs": 0},
        {**LINEAR, "inputs": 2**40},
        {**LINEAR, "inputs": 2**30, "outputs": 2**30},
        {**LINEAR, "groups": 3},
        {**LINEAR, "kernel": [3]},
        {**LINEAR, "kind": "conv2d"},
        {**LINEAR, "kept": 17},
        {**LINEAR, "kept": 6, "tile_rows": 4},
        {**LINEAR, "kept": 8, "tile_rows": 5},
        {**LINEAR, "bits": 3, "sharing": "layer"},
        {**LINEAR, "bits": 4},
        {**LINEAR, "bits": 4, "sharing": "rows"},
        {**LINEAR, "kind": "embedding", "bias": True},
        {"type": "sequence", "stages": []},
        {"type": "sequence", "stages": [{"type": "sequence", "stages": [LINEAR]}]},
        {"type": "ghost", "primary": LINEAR, "cheap": {**LINEAR, "outputs": 8}},
    ],
    ids=str,
)
def test_bad_specs_are_refused_in_one_sentence(spec: Any) -> None:
    with pytest.raises(ValueError) as caught:
        construct(spec)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_only_known_modules_are_described() -> None:
    with pytest.raises(ValueError, match="ReLU is not a layer"):
        describe(nn.ReLU())
    with pytest.raises(ValueError, match="padding"):
        describe(nn.Conv2d(2, 2, 3, padding="same"))
    assert describe(nn.Linear(3, 2))["kind"] == Kind.LINEAR
