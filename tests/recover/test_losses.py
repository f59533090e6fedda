from __future__ import annotations

import math

import torch

from grainwise.evaluate.measures import kl_divergence
from grainwise.recover.losses import feature_loss, relative_error, softened_divergence


def test_softened_divergence_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2) at temperature 2, hence logits of 2 ln."""
    teacher, student = 2 * torch.tensor([[0.75, 0.25]]).log(), torch.zeros(1, 2)
    wanted = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert math.isclose(float(softened_divergence(student, teacher, 2.0)), wanted, rel_tol=1e-5)


def test_softened_divergence_is_what_a_search_ranks_by_at_temperature_one() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(8, 5, generator=generator) for _ in range(2))
    found = float(softened_divergence(student, teacher, 1.0))
    assert math.isclose(found, kl_divergence(student, teacher), rel_tol=1e-5)


def test_relative_error_by_hand() -> None:
    teacher = torch.tensor([0.0, 2.0])  # variance 2
    assert float(relative_error(torch.tensor([1.0, 2.0]), teacher)) == 0.25
    assert float(relative_error(teacher, teacher)) == 0.0


def test_features_of_other_shapes_are_left_out() -> None:
    teacher = torch.tensor([0.0, 2.0])
    pairs = [torch.tensor([1.0, 2.0]), torch.zeros(3)], [teacher, torch.zeros(4)]
    assert float(feature_loss(*pairs)) == 0.25
    assert float(feature_loss(pairs[0][1:], pairs[1][1:])) == 0.0
