"""Networks of the shapes that share runs in different ways, prepared for a target, with random legal profiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grainwise import Data
from grainwise.plan.choices import Entry
from grainwise.plan.projection import Projection
from grainwise.search.walks import sample, uniform
from grainwise.session import Session
from tests.graph.graph_networks import build
from tests.networks import tiny, tiny_data


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _data(make: Callable[[int], Any], outputs: int) -> Data:
    """Three splits of two batches; sizes differ, so that batches cannot be mistaken for each other."""

    def batches(seed: int) -> list[tuple[Any, Tensor]]:
        return [(make(10 * seed + n), torch.arange(size) % outputs) for n, size in enumerate((6, 4))]

    return Data(calibration=batches(1), search=batches(2), test=batches(3))


def _pictures(seed: int) -> Tensor:
    return _noise((6 - 2 * (seed % 10), 3, 8, 8), seed)


def _sequences(seed: int) -> tuple[Tensor]:
    return (_noise((6 - 2 * (seed % 10), 5, 16), seed),)


SUBJECTS: dict[str, Callable[[], tuple[Any, Data]]] = {
    "residual": lambda: (tiny(), tiny_data()),
    "densenet": lambda: (build("densenet")[0], _data(_pictures, 5)),
    "grouped": lambda: (build("grouped")[0], _data(_pictures, 3)),
    "halves": lambda: (build("halves")[0], _data(_pictures, 4)),
    "attention": lambda: (build("attention")[0], _data(_sequences, 3)),
}


def prepared(name: str, target: str = "packed", **options: Any) -> Session:
    model, data = SUBJECTS[name]()
    metric = "accuracy" if name != "attention" else _mean
    return Session.prepare(model, data, target=target, metric=metric, divergence="mse", **options)


def _mean(outputs: Tensor, targets: Tensor) -> float:
    return float(outputs.double().mean())


def profiles(session: Session, count: int, seed: int = 0) -> list[dict[str, Entry]]:
    """Random legal profiles, half of them with the beginning of another one."""
    projection, rng = Projection(session.cost, {}), np.random.default_rng(seed)
    found = sample(projection, count, uniform, rng, projected=False)
    names = [layer.name for layer in session.space.layers]
    for number in range(1, count, 2):
        cut = int(rng.integers(len(names)))
        joined = {n: found[number - 1 if i < cut else number][n] for i, n in enumerate(names)}
        try:
            session.space.check(joined)
        except ValueError:
            continue
        found[number] = joined
    return found
