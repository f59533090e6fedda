from __future__ import annotations

import math

import pytest
import torch

from grainwise.evaluate.measures import (
    MetricError,
    accuracy,
    checked,
    kl_divergence,
    relative_squared_error,
    resolve_metric,
)


def test_kl_by_hand() -> None:
    reference = torch.tensor([[math.log(0.5), math.log(0.5)]])
    found = torch.tensor([[math.log(0.9), math.log(0.1)]])
    assert kl_divergence(found, reference) == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert kl_divergence(reference, reference) == 0


def test_relative_squared_error_by_hand() -> None:
    reference = torch.tensor([1.0, 3.0])
    assert relative_squared_error(reference + 1, reference) == pytest.approx(1 / 2)


def test_a_metric_must_be_known_and_finite() -> None:
    outputs, targets = torch.eye(3), torch.tensor([0, 1, 0])
    assert checked(resolve_metric("accuracy"), outputs, targets) == pytest.approx(2 / 3)
    with pytest.raises(MetricError, match="no metric is called"):
        resolve_metric("f1")
    with pytest.raises(MetricError, match="gave nan on 3 samples"):
        checked(lambda o, t: math.nan, outputs, targets)
    with pytest.raises(MetricError, match="outputs hold NaN"):
        checked(accuracy, outputs / 0 * 0, targets)
