"""Gathers H = E[x xᵀ] of a layer's unfolded inputs while pictures or tokens run through the network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from grainwise.plan.layers import Geometry, Kind

POSITIONS = 4096  # per update, at most: 8 batches give 32 thousand rows, enough for K = 4608
FEWEST, A_COLUMN = 256, 16  # of them at least, and for each input: a depthwise layer has few inputs and many groups
ROWS = 3  # that each row of inputs counts as when H is shrunk


def sampling_stride(total: int, period: int, limit: int) -> int:
    """Smallest step that takes at most `limit` of `total` positions and shares no factor with `period`.

    Without the second condition a stride of 16 in rows of 32 pixels would only ever see two columns, one of them the
    border with its padding zeros.
    """
    step = max(1, math.ceil(total / limit))
    while math.gcd(step, period) > 1:
        step += 1
    return step


class HessianAccumulator:
    """Running E[x xᵀ] of one layer.

    Of each batch at most `positions` places (pixels, tokens) are read: every s-th in sample-major order, s from
    `sampling_stride`, starting one later with each batch; so the result depends on the batches alone.
    """

    def __init__(self, geometry: Geometry, *, positions: int | None = None) -> None:
        self.geometry = geometry
        self.positions = positions or min(POSITIONS, max(FEWEST, A_COLUMN * geometry.fan_in))
        self.updates = 0
        self.count = 0
        g = geometry
        shape = (g.inputs,) if g.kind is Kind.EMBEDDING else (g.groups, g.fan_in, g.fan_in)
        self.total = torch.zeros(shape)
        self.sums = torch.zeros(shape[:-1])  # of the inputs

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Adds a batch: `[B, I, *spatial]` for a convolution, `[..., I]` for Linear, integer tokens for Embedding.

        Raises ValueError for another shape.
        """
        if self.geometry.kind is Kind.EMBEDDING:
            self.total += torch.bincount(x.reshape(-1), minlength=self.geometry.inputs)
            self.count += x.numel()
            return
        patches = self._sample(self._windows(x.float()))
        by_group = patches.transpose(0, 1)  # [G, N, K]
        self.total += torch.bmm(by_group.transpose(1, 2), by_group)
        self.sums += by_group.sum(1)
        self.count += patches.shape[0]
        self.updates += 1

    def hessian(self) -> Tensor:
        """`[G, K, K]`, or `[V]` token frequencies. Raises ValueError when nothing was seen."""
        if self.count == 0:
            raise ValueError(f"no inputs were seen by the {self.geometry.kind} layer; is it ever called?")
        return self.total / self.count

    def shrunk(self) -> Tensor:
        """`hessian()` as it is to be expected on other samples: covariances of the inputs times N / (N + K), N = rows *
        `ROWS`; their means and variances stay.

        Between few rows there are correlations by chance, and a method that compensates one weight's error in others
        relies on them: a layer of more inputs than rows is then perfect on these rows and poor on others. Shrinkage
        towards the diagonal as in Ledoit & Wolf (2004), its intensity by measurement (docs/methods.md).
        """
        h = self.hessian()
        if h.dim() == 1:
            return h
        mean = self.sums / self.count
        covariance = torch.baddbmm(h, mean[:, :, None], mean[:, None], alpha=-1)
        covariance.diagonal(dim1=1, dim2=2).zero_()
        return h - covariance * (self.geometry.fan_in / (ROWS * self.count + self.geometry.fan_in))

    def _windows(self, x: Tensor) -> Tensor:
        """A view `[B, *positions, I, *kernel]` (Linear: `[B, T, I]`) of the padded inputs; nothing is copied yet."""
        g = self.geometry
        dims = len(g.kernel)
        if (x.dim() != dims + 2 or x.shape[1] != g.inputs) if dims else x.shape[-1] != g.inputs:
            raise ValueError(f"inputs of shape {tuple(x.shape)} do not fit a {g.kind} layer of {g.inputs} inputs")
        if not dims:
            return x.reshape(-1, math.prod(x.shape[1:-1]) if x.dim() > 2 else 1, g.inputs)
        x = F.pad(x, [p for p in reversed(g.padding) for _ in (0, 1)])
        for d in range(dims):
            x = x.unfold(2 + d, g.dilation[d] * (g.kernel[d] - 1) + 1, g.stride[d])
        x = x[(slice(None),) * (2 + dims) + tuple(slice(None, None, step) for step in g.dilation)]
        return x.movedim(1, 1 + dims)

    def _sample(self, windows: Tensor) -> Tensor:
        """`[N, G, K]`: the positions that this batch contributes."""
        dims = max(1, len(self.geometry.kernel))
        places = windows.shape[: 1 + dims]
        step = sampling_stride(math.prod(places), math.prod(places[1:]), self.positions)
        flat = torch.arange(self.updates % step, math.prod(places), step)
        chosen = windows[torch.unravel_index(flat, places)]
        return chosen.reshape(len(flat), self.geometry.groups, self.geometry.fan_in)
