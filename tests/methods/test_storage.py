from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grainwise.methods.storage import (
    PackedWeight,
    decode_support,
    encode_support,
    pack_bits,
    spread_scales,
    tile_columns,
    unpack_bits,
)
from grainwise.plan.choices import NONE, Choice, Granularity, Method
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.shapes import Stage, scale_count


def _linear(rows: int, columns: int) -> Geometry:
    return Geometry(Kind.LINEAR, columns, rows)


def test_layout_by_hand() -> None:
    assert pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert pack_bits(torch.tensor([3, 0, 1, 2, 1], dtype=torch.uint8), 2).tolist() == [0b10010011, 1]
    assert pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.uint8), 1).tolist() == [0x81, 1]
    assert pack_bits(torch.tensor([7, 255], dtype=torch.uint8), 8).tolist() == [7, 255]


@given(st.data(), st.sampled_from([8, 4, 2, 1]))
def test_codes_round_trip(data: st.DataObject, bits: int) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70))
    packed = pack_bits(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.numel() == -(-len(codes) * bits // 8)
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


@given(st.integers(1, 9), st.integers(1, 21), st.integers(0, 2**16))
def test_bitmask_round_trip(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    stage = Stage(_linear(rows, columns), kept=int(mask.sum()))
    stored = encode_support(mask, stage)
    assert stored.dtype == torch.uint8 and stored.numel() == -(-rows * columns // 8)
    assert torch.equal(decode_support(stored, stage), mask)


@given(st.integers(1, 4), st.sampled_from([4, 8, 16]), st.integers(2, 20), st.integers(0, 2**16))
def test_tiles_round_trip(blocks: int, tile: int, columns: int, seed: int) -> None:
    kept = columns // 2
    order = torch.rand(blocks, columns, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    mask = torch.zeros(blocks, columns, dtype=torch.bool).scatter_(1, order[:, :kept], True).repeat_interleave(tile, 0)
    stage = Stage(_linear(blocks * tile, columns), kept=kept * blocks * tile, tile_rows=tile)
    stored = encode_support(mask, stage)
    assert stored.dtype == torch.int16 and stored.numel() == kept * blocks
    assert torch.equal(stored, tile_columns(mask, tile))
    assert torch.equal(decode_support(stored, stage), mask)


def test_scales_reach_the_weights_that_share_them() -> None:
    g = _linear(3, 70)
    for granularity in Granularity:
        scale = torch.arange(1, 1 + scale_count(g, granularity)).half()
        spread = spread_scales(scale, g, granularity)
        expected = {"layer": (1, 1, 1, 1), "channel": (1, 1, 1, 3), "block": (1, 2, 3, 9)}[granularity]
        assert (spread[0, 0], spread[0, 32], spread[0, 69], spread[2, 69]) == expected


@pytest.mark.parametrize("bits, levels", [(8, [-127, 0, 127]), (4, [-7, 0, 7]), (2, [-1.5, -0.5, 0.5, 1.5])])
def test_levels_of_the_codes(bits: int, levels: list[float]) -> None:
    codes = {8: [1, 128, 255], 4: [1, 8, 15], 2: [0, 1, 2, 3]}[bits]
    packed = PackedWeight(Stage(_linear(1, len(codes))), Choice(Method.QUANTIZE, Granularity.LAYER, bits))
    packed.store(torch.tensor([codes], dtype=torch.uint8), torch.tensor([0.5]).half(), None)
    assert packed.unpack().tolist() == [[0.5 * level for level in levels]]


def test_kept_values_are_stored_row_by_row() -> None:
    mask = torch.tensor([[True, False, True], [False, True, False]])
    packed = PackedWeight(Stage(_linear(2, 3), kept=3), NONE)
    packed.store(torch.arange(6.0).reshape(2, 3), None, mask)
    assert packed.weight.tolist() == [0, 2, 4]
    assert packed.unpack().tolist() == [[0, 0, 2], [0, 4, 0]]
    with pytest.raises(ValueError, match="2 kept weights given, the plan keeps 3"):
        packed.store(torch.zeros(2, 3), None, torch.tensor([[True, False, True], [False, False, False]]))


def test_damaged_supports_are_refused() -> None:
    packed = PackedWeight(Stage(_linear(2, 3), kept=3), NONE)
    with pytest.raises(ValueError, match="marks 0 weights, 3 are stored"):
        packed.unpack()
    tiles = PackedWeight(Stage(_linear(4, 3), kept=8, tile_rows=4), NONE)
    assert tiles.support is not None
    for columns, message in (([0, 3], "reach from 0 to 3"), ([-1, 2], "reach from -1 to 2"), ([1, 1], "marks 4")):
        tiles.support.copy_(torch.tensor(columns))
        with pytest.raises(ValueError, match=message):
            tiles.unpack()
