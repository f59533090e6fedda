"""Metrics and divergences: how good outputs are, and how far they are from the reference's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Metric = Callable[[Tensor, Tensor], float]
"""(outputs of the whole split, targets) -> figure, higher is better."""

Divergence = Callable[[Tensor, Tensor], float]
"""(outputs, reference outputs) -> distance >= 0, 0 when equal."""


class MetricError(ValueError):
    """The metric cannot be used; the message says what it gave."""


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of samples whose largest logit is the target's, 0 to 1; outputs `[N, C]`, targets `[N]`."""
    return float((outputs.argmax(-1) == targets).float().mean())


def kl_divergence(outputs: Tensor, reference: Tensor) -> float:
    """Mean KL(reference || candidate) over samples in nats, of softmax over the last dimension."""
    expected, found = (F.log_softmax(t.double(), dim=-1) for t in (reference, outputs))
    return max(0.0, float((expected.exp() * (expected - found)).sum(-1).mean()))


def relative_squared_error(outputs: Tensor, reference: Tensor) -> float:
    """Mean squared difference over the variance of the reference's outputs: for outputs that are no logits."""
    error = (outputs - reference).double().square().mean()
    return float(error / reference.double().var().clamp_min(1e-12))


METRICS: dict[str, Metric] = {"accuracy": accuracy}
DIVERGENCES: dict[str, Divergence] = {"kl": kl_divergence, "mse": relative_squared_error}


def resolve_metric(metric: str | Metric) -> Metric:
    """A metric by name or as it is. Raises MetricError for an unknown name."""
    if not isinstance(metric, str):
        return metric
    if metric not in METRICS:
        raise MetricError(f"no metric is called {metric!r}; give one of {', '.join(METRICS)} or a function")
    return METRICS[metric]


def checked(metric: Metric, outputs: Tensor, targets: Tensor) -> float:
    """The metric's figure. Raises MetricError when the outputs or the figure are not finite."""
    if not torch.isfinite(outputs).all():
        raise MetricError("the network's outputs hold NaN or infinity")
    value = float(metric(outputs, targets))
    if not math.isfinite(value):
        raise MetricError(f"the metric gave {value} on {len(outputs)} samples; it must return a finite number")
    return value
