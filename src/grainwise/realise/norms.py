"""Batch-norm statistics of a compressed network: estimated anew, then frozen into one scale and shift a channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Forward = Callable[[nn.Module, Any], Tensor]


class FrozenNorm(nn.Module):
    """y = x * weight + bias for each channel (dimension 1): what batch norm computes once its statistics are fixed.

    weight, bias: `[C]`.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))

    @staticmethod
    def of(norm: _BatchNorm) -> FrozenNorm:
        """The frozen twin of a batch norm with running statistics."""
        assert norm.running_mean is not None and norm.running_var is not None
        frozen = FrozenNorm(norm.num_features)
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.detach()
        shift = -norm.running_mean * scale
        if norm.bias is not None:
            shift = shift + norm.bias.detach()
        frozen.weight.copy_(scale)
        frozen.bias.copy_(shift)
        return frozen

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.dim() - 2))
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))


def norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Batch norms of `model` that keep running statistics, by path."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            yield name, module


def freeze_norms(model: nn.Module) -> None:
    """Replace every batch norm by its frozen twin, in place."""
    for name, norm in list(norms(model)):
        model.set_submodule(name, FrozenNorm.of(norm))


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms use the statistics of the batch they see and leave their running statistics alone: the
    statistics of a compressed network and its outputs come from one pass.
    """
    found = [norm for _, norm in norms(model)]
    for norm in found:
        norm.train()
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in found:
            norm.eval()
            norm.track_running_stats = True


def reestimate_norms(model: nn.Module, batches: Iterable[Any], forward: Forward) -> None:
    """Set the running statistics of every batch norm to their plain average over `batches`, in place.

    Compression shifts the distributions that batch norm was fitted to; this restores mean and variance without labels
    (Li et al. 2020, EagleEye, section 3.2).
    """
    found = [norm for _, norm in norms(model)]
    if not found:
        return
    momenta = [norm.momentum for norm in found]
    for norm in found:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    try:
        with torch.inference_mode():
            for batch in batches:
                forward(model, batch)
    finally:
        for norm, momentum in zip(found, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
