"""How a recovery trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

DEFAULT_EPOCHS = 3


@dataclass(frozen=True, slots=True)
class RecoverOptions:
    """Raises ValueError for a value out of its range."""

    learning_rate: float = 4e-3
    """Peak of Adam's, as a share of the size of what is trained (`shadows.Learnt`), so that it needs no search for each
    network; it rises over `warm_up` steps and falls as half a cosine to zero."""
    warm_up: int = 50
    """Steps; at most a tenth of all."""
    temperature: float = 2.0
    """Of the softened outputs, where they are logits."""
    feature_weight: float = 1.0
    """Of the values inside the network, beside the outputs' loss; 0 switches them off."""
    patience: int = 5
    """Epochs without a lower divergence on the search split, after which training stops early; those of the first half
    of the steps do not count."""
    seed: int = 0
    """Of the order and augmentation of the training data."""
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warm_up", "feature_weight", "checkpoint_seconds", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1 epoch, got {self.patience}")


STANDARD = RecoverOptions()


@dataclass(frozen=True, slots=True)
class TrainingBudget:
    """Whole epochs, or minutes of training (of one run or all its resumed parts together).

    Raises ValueError unless exactly one is given, above 0.
    """

    epochs: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.epochs, self.minutes) if value is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise ValueError(f"give epochs or minutes, above 0: got epochs={self.epochs}, minutes={self.minutes}")


def training_budget(epochs: int | None, minutes: float | None) -> TrainingBudget:
    """What was asked for, 3 epochs where nothing was. Raises ValueError as the budget does."""
    return TrainingBudget(DEFAULT_EPOCHS if epochs is None and minutes is None else epochs, minutes)


def learning_rate(step: int, total: int | None, options: RecoverOptions) -> float:
    """Of step 0, 1, ... of `total`: a linear rise, then half a cosine (Loshchilov & Hutter 2017, equation 5). While the
    total is not known there is only the rise.
    """
    rise = options.warm_up if total is None else min(options.warm_up, total // 10)
    if step < rise:
        return options.learning_rate * (step + 1) / rise
    if total is None:
        return options.learning_rate
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))
