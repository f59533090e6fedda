"""Activations in 8 bits, against numbers by hand, numpy models of ONNX's operators, and integer arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from grainwise.methods.activations import (
    CACHED,
    KEPT,
    SHARES,
    DynamicLinear,
    EightBit,
    EightBitSum,
    StaticConv1d,
    StaticConv2d,
    affine,
    dynamic_eight_bit,
)
from grainwise.methods.layers import empty_stage, refresh
from grainwise.methods.storage import CENTRE, PackedWeight
from grainwise.plan.choices import Choice, Granularity, Method
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.shapes import Stage
from grainwise.plan.target import WIDEST, Realisation

SEEDS = st.integers(0, 2**32 - 1)


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [
        (0.0, 255.0, 1.0, 0),
        (-127.5, 127.5, 1.0, 128),  # 127.5, a half to even
        (-25.5, 229.5, 1.0, 26),  # 25.5
        (-255.0, 0.0, 1.0, 255),
        (2.0, 51.0, 0.2, 0),  # zero must have a code
        (-51.0, -2.0, 0.2, 255),
        (0.0, 0.0, 1.0, 0),
    ],
)
def test_affine_by_hand(low: float, high: float, scale: float, zero: int) -> None:
    found, code = affine(torch.tensor(low), torch.tensor(high))
    assert (found.item(), code.item()) == (np.float32(scale), zero)
    assert found.dtype == torch.float32 and code.dtype == torch.int32


@given(SEEDS, st.floats(-50, 50), st.floats(1e-3, 50))
def test_zero_is_represented_exactly_and_the_range_is_reached(seed: int, shift: float, width: float) -> None:
    x = noise(64, seed=seed, scale=width) + shift
    scale, zero = affine(*x.aminmax())
    rounded = torch.fake_quantize_per_tensor_affine(torch.cat([torch.zeros(1), x]), scale, zero, 0, 255)
    assert rounded[0] == 0
    assert (rounded[1:] - x).abs().max() <= 1.001 * scale  # half a step, and at an end half a step more for zero


def _dynamic_quantize_linear(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """ONNX's DynamicQuantizeLinear and back, operator by operator in float32."""
    f = np.float32
    low, high = min(f(0), x.min()), max(f(0), x.max())
    scale = f((high - low) / f(255)) if high > low else f(1)
    zero = np.rint(np.clip(f(f(0) - low / scale), f(0), f(255)))
    codes = np.clip(np.rint((x / scale).astype(f)) + zero, 0, 255)
    back: NDArray[np.float32] = ((codes - zero) * scale).astype(f)
    return back


@given(SEEDS, st.sampled_from([-4.0, -1.0, 0.0, 0.3, 5.0]), st.sampled_from([1e-4, 1.0, 300.0]))
def test_dynamic_rounding_is_that_of_onnx(seed: int, shift: float, width: float) -> None:
    x = noise(4, 33, seed=seed, scale=width) + shift * width
    assert torch.equal(dynamic_eight_bit(x), torch.from_numpy(_dynamic_quantize_linear(x.numpy())))
    assert torch.equal(dynamic_eight_bit(torch.zeros(3)), torch.zeros(3))


def test_a_dynamic_layer_rounds_its_input_over_the_whole_tensor() -> None:
    layer = DynamicLinear(16, 4)
    x = noise(3, 5, 16)
    x[0, 0, 0] = 40.0
    rounded = torch.from_numpy(_dynamic_quantize_linear(x.numpy()))
    assert torch.equal(layer(x), F.linear(rounded, layer.weight, layer.bias))
    assert not torch.allclose(layer(x[1:]), layer(x)[1:], atol=1e-6)


def point(scale: float, zero: int) -> EightBit:
    found = EightBit()
    found.scale.fill_(scale)
    found.zero.fill_(zero)
    return found


def test_a_point_by_hand() -> None:
    x = torch.tensor([0.0, 0.24, 0.25, 0.26, 0.75, -0.5, -0.6, 200.0])
    assert point(0.5, 1)(x).tolist() == [0.0, 0.0, 0.0, 0.5, 1.0, -0.5, -0.5, 127.0]


@given(SEEDS)
def test_ties_fall_as_in_onnx_which_divides(seed: int) -> None:
    """x / scale, not x times a rounded 1 / scale, which puts many a tie on the other side."""
    rng = np.random.default_rng(seed)
    scale, zero = np.float32(rng.uniform(1e-3, 1)), int(rng.integers(0, 256))
    x = ((np.arange(-300, 300) + 0.5) * scale).astype(np.float32)
    codes = np.clip(np.rint(x / scale) + np.float32(zero), 0, 255)
    found = point(float(scale), zero)(torch.from_numpy(x))
    assert torch.equal(found, torch.from_numpy((codes - np.float32(zero)) * scale))


def test_an_uncalibrated_point_takes_the_range_of_the_first_samples() -> None:
    found, x = EightBit(), noise(40, 8)
    x[33:] *= 10  # behind the samples that are looked at
    scale, zero = affine(*x[:32].aminmax())
    assert not found.calibrated
    assert torch.equal(found(x), torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255))
    assert not found.calibrated


def test_the_range_of_least_squared_error_is_chosen() -> None:
    """Among the shares of the range that was seen, each computed here anew; an outlier is clipped."""
    found, x = EightBit(), noise(64, 1024)
    x[0, 0] = 9.0
    found.observe()
    assert torch.equal(found(x[:32]), x[:32]) and torch.equal(found(x[32:]), x[32:])  # values pass as they are
    found.settle()
    errors = {}
    for share in SHARES:
        scale, zero = affine(x.min() * share, x.max() * share)
        codes = ((x / scale).round() + zero).clamp(0, 255)
        errors[scale.item()] = float(((codes - zero) * scale - x).square().mean())
    assert found.calibrated and found.scale.item() == min(errors, key=errors.__getitem__)
    assert found.scale < (x.max() - x.min()) / 255
    assert not torch.equal(found(x), x)


def test_a_range_without_outliers_is_kept_whole() -> None:
    found = EightBit()
    found.observe()
    found(torch.linspace(-1, 4, 1000))
    found.settle()
    assert found.scale.item() == pytest.approx(5 / 255) and found.zero.item() == 51


def test_many_values_are_thinned_and_extremes_kept() -> None:
    found, x = EightBit(), torch.zeros(KEPT * 2 + 7)
    x[1::4], x[3], x[5] = 0.5, -1.0, 2.0
    found.observe()
    for _ in range(3):
        found(x)
    assert found._seen is not None and all(KEPT < len(seen) < KEPT + 20 for seen in found._seen)
    x.zero_()  # what was seen is a copy
    found.settle()
    assert found.scale.item() in {affine(torch.tensor(-share), torch.tensor(2.0 * share))[0].item() for share in SHARES}


def test_a_point_that_saw_nothing_cannot_settle() -> None:
    found = EightBit()
    found.observe()
    with pytest.raises(ValueError, match="no value was seen"):
        found.settle()


GEOMETRIES = {
    "conv2d": Geometry(Kind.CONV2D, 6, 8, (3, 3), (2, 1), (1, 1), (1, 1), bias=True),
    "grouped": Geometry(Kind.CONV2D, 6, 8, (3, 3), (1, 1), (0, 1), (1, 1), groups=2),
    "depthwise": Geometry(Kind.CONV2D, 8, 8, (3, 3), (1, 1), (1, 1), (1, 1), groups=8, bias=True),
    "conv1d": Geometry(Kind.CONV1D, 6, 8, (5,), (1,), (4,), (2,), bias=True),
}


@given(
    SEEDS,
    st.sampled_from(list(GEOMETRIES)),
    st.sampled_from([8, 4, 2]),
    st.sampled_from([Granularity.LAYER, Granularity.CHANNEL]),
)
def test_static_convolution_is_integer_arithmetic(seed: int, name: str, bits: int, granularity: Granularity) -> None:
    """Against sums in int64 and the rounding of ONNX Runtime's QLinearConv in float32, bit for bit."""
    g, rng = GEOMETRIES[name], np.random.default_rng(seed)
    layer = empty_stage(Stage(g), Choice(Method.QUANTIZE, granularity, bits), Realisation.STATIC)
    assert isinstance(layer, StaticConv1d | StaticConv2d) and isinstance(layer.packed, PackedWeight)
    most = WIDEST[bits]
    codes = rng.integers(int(CENTRE[bits] - most), int(CENTRE[bits] + most) + 1, (g.rows, g.columns))
    scales = rng.uniform(1e-3, 1e-2, g.rows if granularity is Granularity.CHANNEL else 1).astype(np.float16)
    layer.packed.store(torch.from_numpy(codes.astype(np.uint8)), torch.from_numpy(scales), None)
    refresh(layer)
    x_scale, y_scale, zero = np.float32(rng.uniform(0.01, 0.1)), np.float32(rng.uniform(0.01, 0.1)), rng.integers(256)
    layer.x_scale.fill_(float(x_scale))
    layer.y_scale.fill_(float(y_scale))
    doubled = 2 if bits == 2 else 1
    unit = x_scale * (scales.astype(np.float32) / np.float32(doubled))
    bias = rng.integers(-20000, 20000, g.outputs)
    if layer.bias is not None:
        layer.bias.data.copy_(torch.from_numpy(bias.astype(np.float32) * unit))
    inputs = rng.integers(0, 256, (2, g.inputs, *(9,) * len(g.kernel))) - int(zero)

    levels = torch.from_numpy(((codes - CENTRE[bits]) * doubled).astype(np.int64)).reshape(g.weight_shape)
    convolve = F.conv2d if len(g.kernel) == 2 else F.conv1d
    whole = torch.from_numpy(bias) if g.bias else None
    sums = convolve(torch.from_numpy(inputs), levels, whole, g.stride, g.padding, g.dilation, g.groups)
    multiplier = (unit / y_scale).reshape(-1, *(1,) * len(g.kernel))
    expected = np.rint(sums.numpy().astype(np.float32) * multiplier)

    found = layer(torch.from_numpy(inputs.astype(np.float32) * x_scale))
    assert torch.equal(found, torch.from_numpy(expected * y_scale))


@torch.enable_grad()
@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_a_static_convolution_is_trained_as_the_plain_one(name: str) -> None:
    """Its values are whole numbers of steps, its gradients those of the convolution that they round."""
    g, rng = GEOMETRIES[name], np.random.default_rng(0)
    layer = empty_stage(Stage(g), Choice(Method.QUANTIZE, Granularity.CHANNEL, 4), Realisation.STATIC)
    codes = torch.from_numpy(rng.integers(1, 16, (g.rows, g.columns)).astype(np.uint8))
    layer.packed.store(codes, torch.from_numpy(rng.uniform(0.01, 0.1, g.rows)).half(), None)
    refresh(layer)
    layer.x_scale.fill_(0.1)
    layer.y_scale.fill_(0.5)
    weight = layer.weight.clone().requires_grad_()
    layer.weight = weight
    x = (0.1 * torch.from_numpy(rng.integers(0, 256, (2, g.inputs, *(9,) * len(g.kernel))))).float().requires_grad_()
    read = [value for value in (x, weight, layer.bias) if value is not None]
    found = layer(x)
    with torch.no_grad():
        assert torch.equal(found, layer(x)) and torch.equal((found / 0.5).round() * 0.5, found)
    plain = layer._conv_forward(x, weight, layer.bias)
    assert (found - plain).abs().max() <= 0.25 * 1.001
    pull = noise(*found.shape)
    for got, wanted in zip(*(torch.autograd.grad((y * pull).sum(), read) for y in (found, plain)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_an_uncalibrated_static_layer_is_an_ordinary_one() -> None:
    layer = StaticConv2d(3, 4, 3)
    layer.register_buffer("x_scale", torch.zeros(()))
    x = noise(2, 3, 6, 6)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias))


def _qlinear_add(a: NDArray[np.int64], b: NDArray[np.int64], points: list[EightBit]) -> NDArray[np.float64]:
    """ONNX Runtime's QLinearAdd: each fma rounds once, as a product of two float32 in float64 does.

    Found by trying forms on all 65536 pairs of codes at 60 random sets of scales: this one has no mismatch.
    """
    f = np.float32
    (sa, za), (sb, zb), (sc, zc) = ((f(p.scale.item()), p.zero.item()) for p in points)
    ra, rb = f(sa / sc), f(sb / sc)
    centre = f(float(ra) * za + float(f(rb * f(zb))))
    inner = (b * float(rb) + float(f(f(zc) - centre))).astype(f)
    total = (a * float(ra) + inner.astype(np.float64)).astype(f)
    return np.clip(np.rint(total), 0, 255)


@given(SEEDS)
def test_sums_round_as_the_kernel_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [point(float(np.float32(rng.uniform(0.005, 0.1))), int(rng.integers(256))) for _ in range(3)]
    a, b = (codes.reshape(-1) for codes in np.meshgrid(np.arange(256), np.arange(256)))
    first, second = (
        (torch.from_numpy(c.astype(np.float32)) - p.zero) * p.scale for c, p in zip((a, b), points[:2], strict=True)
    )
    found = points[2](EightBitSum(*points)(first, second))
    codes = (found / points[2].scale).round() + points[2].zero
    np.testing.assert_array_equal(codes.numpy(), _qlinear_add(a, b, points))
    plain = points[2](first + second)
    assert (plain - found).abs().max() <= points[2].scale * 1.001
    assert ((plain - found).abs() > 0.5 * points[2].scale).float().mean() < 1e-3


@torch.enable_grad()
def test_gradients_pass_through_rounding() -> None:
    """Within the range as they are, beyond it not at all; values are those that are computed without gradients."""
    point = EightBit()
    point.scale.fill_(0.5)
    point.zero.fill_(100)  # -50 to 77.5
    values = torch.tensor([-50.4, -3.3, 0.2, 77.6, 90.0])
    x = values.clone().requires_grad_()
    found = point(x)
    assert torch.equal(found, point(values)) and found.tolist() == [-50.0, -3.5, 0.0, 77.5, 77.5]
    (found * torch.arange(1.0, 6.0)).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]
    dynamic = values.clone().requires_grad_()
    rounded = dynamic_eight_bit(dynamic)
    assert torch.equal(rounded, dynamic_eight_bit(values))
    rounded.sum().backward()
    assert dynamic.grad.tolist() == [1.0] * 5


@torch.enable_grad()
def test_sums_of_rounded_values_pass_gradients_on() -> None:
    points = [EightBit() for _ in range(3)]
    for point, scale in zip(points, (0.1, 0.2, 0.25), strict=True):
        point.scale.fill_(scale)
        point.zero.fill_(128)
    a, b = (torch.linspace(-3, 3, 7).roll(n).requires_grad_() for n in (0, 3))
    total = EightBitSum(*points)
    assert torch.equal(total(a, b), total(a.detach(), b.detach()))
    total(a, b).sum().backward()
    torch.testing.assert_close(a.grad, torch.ones(7))
    torch.testing.assert_close(b.grad, torch.ones(7))


def test_a_large_sum_is_made_of_small_ones() -> None:
    total = EightBitSum(point(0.1, 128), point(0.2, 3), point(0.25, 128))
    a, b = noise(2, 3, 7, CACHED // 8, seed=1), noise(2, 3, 7, CACHED // 8, seed=2)
    rows = [total(first[None], second[None]) for first, second in zip(a, b, strict=True)]
    assert torch.equal(total(a, b), torch.cat(rows))
