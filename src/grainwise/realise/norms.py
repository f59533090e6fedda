"""Batch-norm statistics of a compressed network: estimated anew, then frozen into one scale and shift a channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from grainwise.graph.forward import Forward


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


Standard = Mapping[str, Tensor]
"""By batch norm: mean and variance `[2, C]` of the uncompressed network's normalised values on one batch; 0 and 1 where
the batch is what the norm was fitted to."""


class NormWatch:
    """Inside, remembers the mean and the biased variance `[2, C]` of what each batch norm of `model` is given."""

    def __init__(self, model: nn.Module) -> None:
        self._norms = dict(norms(model))
        self.seen: dict[str, list[Tensor]] = {name: [] for name in self._norms}

    def __enter__(self) -> NormWatch:
        def watch(name: str) -> Any:
            return lambda module, inputs: self.seen[name].append(_moments(inputs[0]))

        self._handles = [norm.register_forward_pre_hook(watch(name)) for name, norm in self._norms.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def standard(self) -> Standard:
        """What was seen since the last call, as normalised by the norms' own statistics. Norms that ran more than once
        are left out: one set of moments does not describe them.
        """
        found = {}
        for name, moments in self.seen.items():
            if len(moments) == 1:
                (mean, variance), norm = moments[0], self._norms[name]
                assert norm.running_mean is not None and norm.running_var is not None
                fitted = norm.running_var + norm.eps
                found[name] = torch.stack([(mean - norm.running_mean) * fitted.rsqrt(), (variance + norm.eps) / fitted])
            moments.clear()
        return found


def _moments(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    return torch.stack([mean, variance])


def _affine(norm: _BatchNorm, standard: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias with which `norm`, normalising by its batch, gives values of the standard's mean and variance."""
    if standard is None:
        return norm.weight, norm.bias
    mean, variance = standard
    weight = variance.sqrt() if norm.weight is None else norm.weight * variance.sqrt()
    shift = mean if norm.weight is None else norm.weight * mean
    return weight, shift if norm.bias is None else norm.bias + shift


def _by_batch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def matched(norm: _BatchNorm, standard: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What `norm` computes inside `matched_norms`; standard: its own `[2, C]`."""
    weight, bias = _affine(norm, standard)
    return partial(_by_batch, weight=weight, bias=bias, eps=norm.eps)


@contextmanager
def matched_norms(model: nn.Module, standard: Standard) -> Iterator[None]:
    """Inside, batch norms normalise by the batch they see, to the mean and variance that the uncompressed network has
    there: the statistics of a compressed network and its outputs come from one pass.

    A norm that is not in `standard` normalises to its own weight and bias. Running statistics are left alone.
    """
    found = list(norms(model))
    for name, norm in found:
        norm.__dict__["forward"] = matched(norm, standard.get(name))
    try:
        yield
    finally:
        for _, norm in found:
            del norm.__dict__["forward"]


def reestimate_norms(
    model: nn.Module, batches: Sequence[Any], forward: Forward, standards: Sequence[Standard] | None = None
) -> None:
    """Set each batch norm, in place, so that its outputs over `batches` have the uncompressed network's mean and
    variance. standards: what that has on each batch; None: what the norms' own weights and biases ask for.

    Compression shifts the distributions that batch norm was fitted to; this restores mean and variance without labels
    (Li et al. 2020, EagleEye, section 3.2), relative to the uncompressed network, because the batches may be unlike
    what it was trained on. An unchanged network stays as it is.
    """
    if not dict(norms(model)):
        return
    given = standards or [{}] * len(batches)
    with torch.inference_mode(), NormWatch(model) as watch:
        for batch, standard in zip(batches, given, strict=True):
            with matched_norms(model, standard):
                forward(model, batch)
    for name, norm in norms(model):
        if not watch.seen[name]:
            continue
        assert norm.running_mean is not None and norm.running_var is not None
        common = torch.stack([standard[name] for standard in given]).mean(0) if name in given[0] else None
        weight, bias = _affine(norm, common)
        mean, variance = torch.stack(watch.seen[name]).mean(0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        for attribute, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                setattr(norm, attribute, nn.Parameter(value.detach().clone(), requires_grad=False))
