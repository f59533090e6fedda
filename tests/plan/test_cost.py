"""Costs against hand-worked numbers, and the fast tables against the shapes that define them."""

from __future__ import annotations

import numpy as np
import pytest

from grainwise.plan.choices import (
    NONE,
    PRECISIONS,
    STRUCTURES,
    Choice,
    Entry,
    Granularity,
    Method,
    entry_of,
    numbers_of,
)
from grainwise.plan.cost import CostModel
from grainwise.plan.layers import Coupling, Geometry, Kind, Layer, LayerGraph, Slot
from grainwise.plan.shapes import routing_tensors, stage_macs, stage_tensors, stages
from grainwise.plan.space import SearchSpace

_UNITS = tuple((i,) for i in range(32))
_CUT = Choice(Method.PRUNE, Granularity.CHANNEL, 0.5)


@pytest.fixture(scope="module")
def cost() -> CostModel:
    """Two linear layers, 64 -> 32 -> 16, with a scale of 32 between them."""
    layers = (
        Layer("a", Geometry(Kind.LINEAR, 64, 32, bias=True), 1, 1, output_coupling="a"),
        Layer("b", Geometry(Kind.LINEAR, 32, 16), 1, 1),
    )
    slots = (
        Slot("a.weight", 0, _UNITS, True, "a"),
        Slot("scale", 0, _UNITS, True),
        Slot("b.weight", 1, _UNITS, False, "b"),
    )
    found = LayerGraph(layers, (Coupling("a", 32, slots),), (), other_macs=7)
    return CostModel(SearchSpace.of(found), {"scale": (32,), "step": ()})


def test_macs_by_hand(cost: CostModel) -> None:
    assert cost.total({})[1] == 64 * 32 + 32 * 16 + 7
    assert cost.total({"a": Entry(_CUT)})[1] == 64 * 16 + 16 * 16 + 7


def test_a_cut_saves_its_weights_biases_scales_and_what_reads_them(cost: CostModel) -> None:
    saved = cost.total({})[0] - cost.total({"a": Entry(_CUT)})[0]
    assert saved == 4 * (16 * 64 + 16 + 16 + 16 * 16)


def test_four_bits_by_hand(cost: CostModel) -> None:
    """512 weights at half a byte with one float16 scale, in place of 4 bytes each: the scale adds a header line."""
    four = Entry(NONE, Choice(Method.QUANTIZE, Granularity.LAYER, 4))
    saved = cost.total({})[0] - cost.total({"b": four})[0]
    line = saved - (512 * 4 - 512 // 2 - 2)
    assert -160 < line < 0


def test_tables_equal_the_shapes_that_define_them(cost: CostModel) -> None:
    for index, layer in enumerate(cost.space.layers):
        table = cost.table(index, {})
        assert (np.isfinite(table[..., 0]) == cost.space.pairs(index)).all()
        for s, p in np.argwhere(cost.space.pairs(index)):
            found = stages(layer.geometry, STRUCTURES[s])
            tensors = [size for stage in found for size in stage_tensors(stage, PRECISIONS[p]).values()]
            tensors += routing_tensors(layer.geometry, STRUCTURES[s]).values()
            header = table[s, p, 0] - sum(tensors)
            assert header / len(tensors) == (table[0, 0, 0] - _plain(layer)) / (1 + layer.geometry.bias)
            assert table[s, p, 1] == sum(stage_macs(stage, 1, 1) for stage in found)


def _plain(layer: Layer) -> int:
    return 4 * (layer.geometry.weights + layer.geometry.bias * layer.geometry.outputs)


def test_entry_numbers_mirror_each_other() -> None:
    assert all(numbers_of(entry_of(s, p)) == (s, p) for s in range(len(STRUCTURES)) for p in range(len(PRECISIONS)))
