"""What the controller is told of each layer: feature-map statistics and shape, as numbers around 1."""

from __future__ import annotations

from math import log, log1p

import torch
from torch import Tensor

from grainwise.graph.statistics import BINS
from grainwise.plan.layers import Kind, Layer, LayerGraph

FEATURE_NAMES: tuple[str, ...] = (
    "mean",
    "variance",
    "entropy",
    *(kind.value for kind in Kind),
    "inputs",
    "outputs",
    "taps",
    "depthwise",
    "parameter_share",
    "mac_share",
    "depth",
    "positions",
)
"""Names of the F columns of `controller_features`."""

_LOG_WIDTH = log1p(1024)
_LOG_TAPS = log1p(9)
_LOG_POSITIONS = log1p(1024)


def signed_log(value: float) -> float:
    """sign(x) log(1 + |x|): keeps the sign, tames the size."""
    return log1p(abs(value)) * (1 if value >= 0 else -1)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _row(layer: Layer, statistics: list[float], depth: float, weights: int, macs: int) -> list[float]:
    mean, variance, entropy = statistics
    g = layer.geometry
    return [
        signed_log(mean),
        signed_log(variance),
        entropy / log(BINS),
        *(float(g.kind is kind) for kind in Kind),
        log1p(g.inputs) / _LOG_WIDTH,
        log1p(g.outputs) / _LOG_WIDTH,
        log1p(g.taps) / _LOG_TAPS,
        float(g.depthwise),
        _share(g.weights, weights),
        _share(layer.macs, macs),
        depth,
        log1p(layer.positions_out) / _LOG_POSITIONS,
    ]


def controller_features(graph: LayerGraph, statistics: Tensor) -> Tensor:
    """[L, F] float32, columns named by FEATURE_NAMES: finite, most between -1 and 1.

    statistics: [L, 3] from `feature_statistics`. A tied weight counts once in the whole of the parameters.
    Raises ValueError when the shapes disagree or a statistic is not finite.
    """
    count = len(graph.layers)
    if tuple(statistics.shape) != (count, 3):
        raise ValueError(f"statistics must have shape [{count}, 3], got {[*statistics.shape]}")
    if not statistics.isfinite().all():
        raise ValueError("statistics hold infinite or undefined values")
    weights = sum(layer.geometry.weights for layer in graph.layers if layer.tied_to is None)
    macs = sum(layer.macs for layer in graph.layers)
    rows = [
        _row(layer, statistics[position].tolist(), position / count, weights, macs)
        for position, layer in enumerate(graph.layers)
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(count, len(FEATURE_NAMES))
