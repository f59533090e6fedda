"""Statistics of each layer's output feature map: mean, variance and histogram entropy."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grainwise.graph.forward import Forward, default_forward
from grainwise.graph.trace import eval_mode
from grainwise.graph.walk import plain_attention
from grainwise.plan.layers import LayerGraph

BINS = 64


@dataclass(slots=True)
class _Accumulator:
    """Sums over all values of one layer, in float64; counts: [BINS] over the range of the first output seen."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = 0.0
    high: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def add(self, output: Tensor) -> None:
        values = output.detach().float().flatten().cpu()
        if not self.count:
            self.low, self.high = values.min().item(), values.max().item()
        # Sums are taken of differences from `low`, so that a large mean does not swallow a small variance.
        shifted = values.double() - self.low
        self.count += values.numel()
        self.total += shifted.sum().item()
        self.squares += shifted.square().sum().item()
        if self.high > self.low:
            self.counts += torch.histc(values.clamp(self.low, self.high), BINS, self.low, self.high).double()

    def summary(self) -> tuple[float, float, float]:
        """Mean, variance (of the population), entropy in nats; zeros when nothing was seen."""
        if not self.count:
            return 0.0, 0.0, 0.0
        mean = self.total / self.count
        shares = self.counts / self.counts.sum().clamp(min=1)
        entropy = torch.special.entr(shares).sum().item()
        return self.low + mean, max(0.0, self.squares / self.count - mean * mean), entropy


def _watch(name: str, module: nn.Module, accumulator: _Accumulator) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if not isinstance(tensor, Tensor) or not tensor.numel():
            return
        if not tensor.isfinite().all():
            raise ValueError(f"the output of {name} holds infinite or undefined values")
        accumulator.add(tensor)

    return module.register_forward_hook(hook)


def feature_statistics(
    model: nn.Module, graph: LayerGraph, batches: Iterable[Any], forward: Forward = default_forward
) -> Tensor:
    """[L, 3] float64: mean, variance, and entropy in nats of the histogram of each layer's outputs.

    One pass over `batches` (inputs as `forward` takes them). The 64 bins span the range of the layer's first output;
    later values outside of it count in the outer bins. Layers that never run have zeros. Raises ValueError on outputs
    that are not finite.
    """
    accumulators = [_Accumulator() for _ in graph.layers]
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(plain_attention())
        stack.enter_context(torch.no_grad())
        for layer, accumulator in zip(graph.layers, accumulators, strict=True):
            handle = _watch(layer.name, model.get_submodule(layer.name), accumulator)
            stack.callback(handle.remove)
        for inputs in batches:
            forward(model, inputs)
    return torch.tensor([a.summary() for a in accumulators], dtype=torch.float64).reshape(len(accumulators), 3)
