"""Activations in 8 bits: with a range that was found beforehand, or with that of the values at hand.

All of it can be trained through: rounding passes gradients on as they are, clipping those of values within the range
(straight-through, Bengio et al. 2013), so that recovery trains on the very numerics that are deployed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLES = 32  # of a batch that an uncalibrated range is taken from
KEPT = 1 << 18  # values that a calibrated range is chosen on
CACHED = 1 << 16  # values at a time that stay in a processor's cache as float64
SHARES = (1.0, 0.97, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)  # of the observed range that are tried


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Kept(torch.autograd.Function):
    """A value on the grid of 256 codes; gradients of values beyond it end. One function, since single operations would
    keep a copy each of every value for the way back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        # Divided, as the kernel does: fake_quantize multiplies by 1 / scale, and one value in 10^5 rounds differently.
        codes = (x / scale).round_().add_(zero)
        ctx.save_for_backward(codes)
        return codes.clamp(0, 255).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (codes,) = ctx.saved_tensors  # whole numbers, so that the bounds are never met
        return torch.ops.aten.hardtanh_backward(gradient, codes, -0.5, 255.5), None, None


class _Sums(torch.autograd.Function):
    """A convolution by sums of integers (`_Static`). Gradients are those of the plain convolution, which roundings pass
    on: scales cancel out in them, and one function keeps no copies of values in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        unit = layer.x_scale * rows
        levels = (weight / rows.reshape(-1, *(1,) * (x.dim() - 1))).round_()
        start = None if bias is None else (bias / unit).round_()
        sums: Tensor = layer._conv_forward((x / layer.x_scale).round_(), levels, start)
        return sums.mul_((unit / layer.y_scale).reshape(-1, *(1,) * (x.dim() - 2))).round_().mul_(layer.y_scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), layer = ctx.saved_tensors, ctx.layer
        shape = (layer.stride, layer.padding, layer.dilation, False, (0,) * len(layer.stride), layer.groups)
        found = torch.ops.aten.convolution_backward(
            gradient, x, weight, [len(weight)], *shape, ctx.needs_input_grad[:3]
        )
        return *found, None, None


class _Added(torch.autograd.Function):
    """a + b as `EightBitSum` says; gradients are those of a + b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        ratios = scales[:2] / scales[2]
        # Products of two float32 are exact in float64, so that each step rounds once, like the kernel's fma.
        offset = zeros[2] - (ratios[0].double() * zeros[0] + ratios[1] * zeros[1]).float()
        summed = torch.empty_like(a)
        parts = max(1, a.numel() // CACHED)
        for first, second, whole in zip(a.chunk(parts), b.chunk(parts), summed.chunk(parts), strict=True):
            inner = (second / scales[1]).round_().add_(zeros[1]).double().mul_(ratios[1]).add_(offset).float()
            total = (first / scales[0]).round_().add_(zeros[0]).double().mul_(ratios[0]).add_(inner)
            whole.copy_(total).round_().sub_(zeros[2]).mul_(scales[2])
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return gradient, gradient, None, None


def rounded(x: Tensor) -> Tensor:
    """`x` rounded to integers, a tie to the even one; its gradient is passed on as it is. Where none is asked for, `x`
    itself is rounded: pass a value that nobody else reads.
    """
    if not x.requires_grad:
        return x.round_()
    through: Tensor = _Rounded.apply(x)  # type: ignore[no-untyped-call]
    return through


def affine(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale float32 and zero point int32 such that codes 0 to 255 reach from low to high and zero has a code."""
    low, high = low.clamp(max=0.0).float(), high.clamp(min=0.0).float()
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low / scale).clamp(0, 255).round()
    return scale, zero.to(torch.int32)


def dynamic_eight_bit(x: Tensor) -> Tensor:
    """`x` on the 8-bit grid of its own range over the whole tensor, as ONNX's DynamicQuantizeLinear sets it."""
    scale, zero = affine(*x.detach().aminmax())
    return (rounded(x / scale) + zero).clamp(0, 255).sub(zero).mul(scale)


class EightBit(nn.Module):
    """A value kept in 8 bits: `(clip(round(x / scale) + zero, 0, 255) - zero) * scale`.

    scale: float32 scalar, 0 until it is calibrated: then the first samples of each batch set the range, as batch norm
    takes its statistics from the batch while a search ranks. zero: int32 scalar, 0 to 255.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(()))
        self.register_buffer("zero", torch.zeros((), dtype=torch.int32))
        self._seen: list[Tensor] | None = None

    @property
    def calibrated(self) -> bool:
        return bool(self.scale > 0)

    def forward(self, x: Tensor) -> Tensor:
        if self._seen is not None:
            self._seen.append(_thinned(x))
            return x
        if not self.calibrated:
            return torch.fake_quantize_per_tensor_affine(x, *affine(*x[:SAMPLES].aminmax()), 0, 255)
        kept: Tensor = _Kept.apply(x, self.scale, self.zero)  # type: ignore[no-untyped-call]
        return kept

    def observe(self) -> None:
        """From now on values pass as they are, and a sample of them is kept for `settle`."""
        self._seen = []

    def settle(self) -> None:
        """Choose the range of least squared rounding error on what was observed; the range is then calibrated.

        Raises ValueError when nothing was observed.
        """
        if not self._seen:
            raise ValueError("no value was seen at a point that is to be kept in 8 bits: is the layer ever run?")
        values = torch.cat(self._seen)
        low, high = values.aminmax()
        values = values[:: max(1, len(values) // KEPT)]
        self._seen = None
        found = [affine(low * share, high * share) for share in SHARES]
        errors = [
            F.mse_loss(torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, 255), values)
            for scale, zero in found
        ]
        scale, zero = found[int(torch.stack(errors).argmin())]
        self.scale.copy_(scale)
        self.zero.copy_(zero)


def _thinned(x: Tensor) -> Tensor:
    """The values of a batch, or about `KEPT` of them and the extremes."""
    flat = x.detach().flatten()
    if len(flat) <= KEPT:
        return flat.clone()
    return torch.cat([flat[:: len(flat) // KEPT], torch.stack(flat.aminmax())])


class DynamicLinear(nn.Linear):
    """A Linear whose input is rounded to 8 bits by the range of each call (`dynamic_eight_bit`)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(dynamic_eight_bit(input), self.weight, self.bias)


class _Static:
    """What both kinds of `StaticConv` share: sums of integers rounded to codes, as the kernel does it.

    x_scale, y_scale: float32 scalars, scales of the points that the input comes from and that the output goes to; 0
    until they are calibrated, when the layer is an ordinary convolution of rounded values. From then on rounding ties
    fall as in the kernel: in float arithmetic a few in a million would not, and a deep network multiplies them.
    """

    x_scale: Tensor
    y_scale: Tensor

    def integer_forward(self, x: Tensor) -> Tensor:
        """Exact while the sums stay below 2^24."""
        rows = self.packed.row_scale()  # type: ignore[attr-defined]
        sums: Tensor = _Sums.apply(x, self.weight, self.bias, rows, self)  # type: ignore[attr-defined,no-untyped-call]
        return sums


class StaticConv1d(_Static, nn.Conv1d):
    """A Conv1d that runs in 8 bits."""

    def forward(self, input: Tensor) -> Tensor:
        return self.integer_forward(input) if bool(self.x_scale > 0) else super().forward(input)


class StaticConv2d(_Static, nn.Conv2d):
    """A Conv2d that runs in 8 bits."""

    def forward(self, input: Tensor) -> Tensor:
        return self.integer_forward(input) if bool(self.x_scale > 0) else super().forward(input)


class EightBitSum(nn.Module):
    """a + b of two values on 8-bit grids, rounded to the grid of the result as ONNX Runtime's QLinearAdd rounds it.

    scales: float32 `[3]`, zeros: int32 `[3]`, of a, b and the result.
    """

    scales: Tensor
    zeros: Tensor

    def __init__(self, first: EightBit, second: EightBit, result: EightBit) -> None:
        super().__init__()
        points = (first, second, result)
        self.register_buffer("scales", torch.stack([point.scale for point in points]))
        self.register_buffer("zeros", torch.stack([point.zero for point in points]))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        summed: Tensor = _Added.apply(a, b, self.scales, self.zeros)  # type: ignore[no-untyped-call]
        return summed
