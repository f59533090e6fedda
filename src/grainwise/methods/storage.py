"""How a weight matrix is kept: codes of 8, 4 or 2 bits, float16 scales, bitmasks or tile columns; and read back.

Letters: R x C the weight matrix, N kept weights, S scales.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn

from grainwise.plan.choices import Choice, Granularity, Method
from grainwise.plan.layers import Geometry
from grainwise.plan.shapes import Stage, group_size, scale_count

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0  # of float16
CENTRE: dict[int, float] = {8: 128.0, 4: 8.0, 2: 1.5}
"""Code of the value zero; at 2 bits it lies between two codes: the levels are ±0.5 and ±1.5 scales (mid-rise)."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[N]` below 2^bits to uint8 `[ceil(N bits / 8)]`, the first code in the lowest bits."""
    per_byte = 8 // bits
    padded = torch.zeros(ceil(codes.numel() / per_byte) * per_byte, dtype=torch.int32)
    padded[: codes.numel()] = codes
    shifts = torch.arange(per_byte, dtype=torch.int32) * bits
    shifted: Tensor = torch.bitwise_left_shift(padded.reshape(-1, per_byte), shifts)
    summed: Tensor = shifted.sum(1)
    return summed.to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 `[count]`."""
    shifts = torch.arange(8 // bits, dtype=torch.uint8) * bits
    shifted: Tensor = torch.bitwise_right_shift(packed[:, None], shifts)
    codes: Tensor = torch.bitwise_and(shifted, 2**bits - 1)
    return codes.reshape(-1)[:count]


def storable(scale: Tensor) -> Tensor:
    """Scales as float16 keeps them, in float32: positive and finite whatever comes in."""
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()


def spread_scales(scale: Tensor, geometry: Geometry, granularity: Granularity) -> Tensor:
    """Scales `[S]` to float32 `[R, C]`: the one that each weight of the matrix shares."""
    rows, columns = geometry.rows, geometry.columns
    wide = scale.float()
    match granularity:
        case Granularity.LAYER:
            return wide.expand(rows, columns)
        case Granularity.CHANNEL:
            return wide[:, None].expand(rows, columns)
        case Granularity.BLOCK:
            return wide.reshape(rows, -1).repeat_interleave(group_size(columns), dim=1)[:, :columns]


def tile_columns(support: Tensor, tile_rows: int) -> Tensor:
    """Bool `[R, C]` made of tiles to int16 `[R / tile_rows * kept per block row]`, ascending in each block row."""
    return support[::tile_rows].nonzero()[:, 1].to(torch.int16)


def encode_support(support: Tensor, stage: Stage) -> Tensor:
    """Bool `[R, C]` as it is stored: int16 tile columns, or a bitmask uint8 of one bit a weight."""
    if stage.tile_rows:
        return tile_columns(support, stage.tile_rows)
    return pack_bits(support.reshape(-1).to(torch.uint8), 1)


def decode_support(stored: Tensor, stage: Stage) -> Tensor:
    """The inverse of `encode_support`: bool `[R, C]`. Raises ValueError for columns that the matrix does not have."""
    rows, columns = stage.geometry.rows, stage.geometry.columns
    if not stage.tile_rows:
        return unpack_bits(stored, 1, rows * columns).bool().reshape(rows, columns)
    if bool(((stored < 0) | (stored >= columns)).any()):
        raise ValueError(f"tile columns reach from {int(stored.min())} to {int(stored.max())} in a matrix of {columns}")
    tiles = torch.zeros(rows // stage.tile_rows, columns, dtype=torch.bool)
    tiles.scatter_(1, stored.long().reshape(tiles.shape[0], -1), True)
    return tiles.repeat_interleave(stage.tile_rows, dim=0)


class PackedWeight(nn.Module):
    """The stored tensors of one stage, exactly those of `plan.shapes.stage_tensors` (the bias stays with the layer).

    weight: uint8 codes, or float32 `[N]` kept values, in row-major order of the matrix.
    scale: float16 `[S]`, only when quantised. support: int16 or uint8, only when some weights are left out.
    """

    weight: Tensor
    scale: Tensor | None
    support: Tensor | None

    def __init__(self, stage: Stage, precision: Choice) -> None:
        super().__init__()
        self.stage = stage
        self.precision = precision
        g = stage.geometry
        kept = self.kept
        if self.bits:
            assert precision.granularity is not None
            self.register_buffer("weight", torch.zeros(ceil(kept * self.bits / 8), dtype=torch.uint8))
            scales = scale_count(g, precision.granularity)
            self.register_buffer("scale", torch.zeros(scales, dtype=torch.float16))
        else:
            self.register_buffer("weight", torch.zeros(kept))
            self.register_buffer("scale", None)
        self.register_buffer("support", None)
        if stage.tile_rows:
            self.register_buffer("support", torch.zeros(kept // stage.tile_rows, dtype=torch.int16))
        elif stage.kept is not None:
            self.register_buffer("support", torch.zeros(ceil(g.weights / 8), dtype=torch.uint8))

    @property
    def bits(self) -> int:
        """Bits of a code; 0 when values are kept as float32."""
        quantised = self.precision.method is Method.QUANTIZE and self.precision.level is not None
        return int(self.precision.level or 0) if quantised else 0

    @property
    def kept(self) -> int:
        """N: weights that are stored."""
        return self.stage.geometry.weights if self.stage.kept is None else self.stage.kept

    @torch.no_grad()
    def store(self, values: Tensor, scale: Tensor | None, support: Tensor | None) -> None:
        """Takes over `values` `[R, C]` (codes uint8 with scales `[S]`, or float32) and bool `support` `[R, C]`."""
        kept = values.reshape(-1) if support is None else values[support]
        if kept.numel() != self.kept:
            raise ValueError(f"{kept.numel()} kept weights given, the plan keeps {self.kept}")
        self.weight.copy_(pack_bits(kept, self.bits) if self.bits else kept)
        if self.scale is not None and scale is not None:
            self.scale.copy_(scale)
        if self.support is not None and support is not None:
            self.support.copy_(encode_support(support, self.stage))

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The kept codes `[N]`, uint8. Raises ValueError when values are kept as float32."""
        if not self.bits:
            raise ValueError("float32 values have no codes")
        return unpack_bits(self.weight, self.bits, self.kept)

    def row_scale(self) -> Tensor:
        """`[R]` or `[1]`, float32: what one unit of an integer sum of products is worth for inputs of scale 1. Levels
        of 2 bits are multiples of a half, so the kernel takes them doubled.
        """
        assert self.scale is not None
        return self.scale.float() * (0.5 if self.bits == 2 else 1.0)

    @torch.no_grad()
    def scaled_rows(self, factors: Tensor) -> PackedWeight:
        """The weight with each row of the matrix times its factor `[R]`, in the same codes (mirrored for a negative
        factor); scales are rounded to float16, one a row where one served the tensor.
        """
        g, precision = self.stage.geometry, self.precision
        signs = torch.where(factors < 0, -1.0, 1.0)
        support = None if self.support is None else decode_support(self.support, self.stage)
        if not self.bits:
            twin = PackedWeight(self.stage, precision)
            twin.store(self.unpack() * factors[:, None], None, support)
            return twin
        if precision.granularity is Granularity.LAYER:
            precision = Choice(Method.QUANTIZE, Granularity.CHANNEL, precision.level)
        assert self.scale is not None
        per_row = self.scale.float().reshape(-1, 1) if len(self.scale) == 1 else self.scale.float().reshape(g.rows, -1)
        scale = storable(per_row * factors.abs()[:, None]).reshape(-1)
        levels = self._dense_levels() * signs[:, None]
        twin = PackedWeight(self.stage, precision)
        twin.store((levels + CENTRE[self.bits]).to(torch.uint8), scale, support)
        return twin

    def _dense_levels(self) -> Tensor:
        """`[R, C]` codes counted from the code of zero; zero where nothing is kept."""
        g = self.stage.geometry
        values = self.codes().float() - CENTRE[self.bits]
        return values.reshape(g.rows, g.columns) if self.support is None else self._scattered(values)

    @torch.no_grad()
    def unpack(self) -> Tensor:
        """The dense weight, float32 `[R, C]`. Raises ValueError when the support does not fit what is stored."""
        g = self.stage.geometry
        if self.bits:
            dense = self._dense_levels()
        else:
            dense = self.weight.reshape(g.rows, g.columns) if self.support is None else self._scattered(self.weight)
        if self.scale is not None:
            assert self.precision.granularity is not None
            dense = dense * spread_scales(self.scale, g, self.precision.granularity)
        return dense

    def _scattered(self, values: Tensor) -> Tensor:
        assert self.support is not None
        dense = torch.zeros(self.stage.geometry.rows, self.stage.geometry.columns)
        mask = decode_support(self.support, self.stage)
        if (marked := int(mask.sum())) != values.numel():
            raise ValueError(
                f"the support marks {marked} weights, {values.numel()} are stored: the tensors are damaged"
            )
        dense[mask] = values
        return dense
