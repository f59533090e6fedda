"""Activations in 8 bits against integer arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from grainwise.methods.activations import EightBit, EightBitSum, StaticConv2d, affine, dynamic_eight_bit
from grainwise.methods.structure import blank
from grainwise.plan.choices import NONE, Choice, Granularity, Method
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.target import TARGETS


def test_zero_always_has_a_code() -> None:
    scale, zero = affine(torch.tensor(-1.0), torch.tensor(3.0))
    assert float(scale) == pytest.approx(4 / 255)
    assert int(zero) == 64
    scale, zero = affine(torch.tensor(2.0), torch.tensor(3.0))
    assert (float(scale), int(zero)) == (pytest.approx(3 / 255), 0)
    assert float(affine(torch.tensor(0.0), torch.tensor(0.0))[0]) == 1.0


def test_dynamic_rounding_is_that_of_the_onnx_operator() -> None:
    x = torch.randn(64)
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = np.float32((high - low) / 255)
    zero = np.rint(np.clip(-np.float32(low) / scale, 0, 255))
    codes = np.clip(np.rint(x.numpy() / scale) + zero, 0, 255)
    np.testing.assert_allclose(dynamic_eight_bit(x).numpy(), (codes - zero) * scale, rtol=0, atol=1e-6)


def test_a_point_takes_the_batch_s_range_until_it_is_calibrated() -> None:
    point = EightBit()
    x = torch.linspace(-1, 1, 256).reshape(2, 128)
    assert not point.calibrated
    assert float((point(x) - x).abs().max()) <= 1 / 255 + 1e-6
    with pytest.raises(ValueError, match="no value was seen"):
        point.settle()
    point.observe()
    assert torch.equal(point(x), x)
    point.settle()
    assert point.calibrated
    assert len(point(torch.randn(4096) * 5).unique()) <= 256


def test_an_outlier_is_clipped_when_that_costs_less() -> None:
    point = EightBit()
    values = torch.cat([torch.rand(100_000), torch.tensor([2.0])])
    point.observe()
    point(values)
    point.settle()
    assert float(point.scale) < 1.9 / 255


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_static_convolution_sums_integers(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    geometry = Geometry(Kind.CONV2D, 5, 6, (3, 3), (1, 1), (1, 1), (1, 1), bias=True)
    layer = blank(geometry, NONE, Choice(Method.QUANTIZE, Granularity.CHANNEL, bits), TARGETS["ort-cpu-vnni"])
    assert isinstance(layer, StaticConv2d)
    low = {8: 1, 4: 1, 2: 0}[bits]
    codes = torch.randint(low, 2**bits, (6, 45), generator=generator).to(torch.uint8)
    rows = (torch.rand(6, generator=generator) * 0.01 + 0.001).half()
    packed = layer.packed
    packed.store(codes, rows, None)  # type: ignore[operator, union-attr]
    layer.weight.copy_(packed.unpack().reshape(layer.weight.shape))  # type: ignore[operator, union-attr]
    layer.x_scale.fill_(0.03)
    layer.y_scale.fill_(0.05)
    unit = layer.x_scale * packed.row_scale()  # type: ignore[operator, union-attr]
    sums_bias = torch.randint(-500, 500, (6,), generator=generator)
    layer.bias = torch.nn.Parameter(sums_bias * unit, requires_grad=False)
    x = torch.randint(-100, 156, (2, 5, 7, 7), generator=generator)
    doubled = {8: 2 * (codes.long() - 128), 4: 2 * (codes.long() - 8), 2: 2 * codes.long() - 3}[bits]
    levels = (doubled if bits == 2 else doubled // 2).reshape(6, 5, 3, 3)
    sums = F.conv2d(x.double(), levels.double(), sums_bias.double(), padding=1)
    expected = (sums.float() * (unit / layer.y_scale).reshape(-1, 1, 1)).round()
    found = layer(x.float() * layer.x_scale) / layer.y_scale
    torch.testing.assert_close(found.round(), expected, rtol=0, atol=0)


def test_a_sum_rounds_to_the_result_s_grid() -> None:
    points = [EightBit() for _ in range(3)]
    for point, scale, zero in zip(points, (0.02, 0.03, 0.05), (3, 128, 0), strict=True):
        point.scale.fill_(scale)
        point.zero.fill_(zero)
    a = torch.arange(0, 40).float() * points[0].scale
    b = torch.arange(-20, 20).float() * points[1].scale
    found = EightBitSum(*points)(a, b) / points[2].scale
    exact = (a.double() + b.double()) / points[2].scale.double()
    assert float((found - exact).abs().max()) <= 0.5 + 1e-3
    torch.testing.assert_close(found, found.round(), rtol=0, atol=1e-4)
