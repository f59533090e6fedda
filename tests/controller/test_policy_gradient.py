import math

import pytest
import torch

from grainwise.controller.policy_gradient import (
    discounted_sums,
    imitation_loss,
    importance_weights,
    normalised,
    per_layer_credit,
    ppo_loss,
    reinforce_loss,
    terminal_credit,
    with_failures,
)


def test_reinforce_by_hand() -> None:
    loss = reinforce_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[3.0, -1.0]]))
    assert loss.item() == pytest.approx((3.0 - 2.0) / 2)


def test_ppo_clips_only_what_would_gain() -> None:
    """Ratios 1.5 and 0.5: with advantage 1 they count 1.2 and 0.5, with -1 they count -1.5 and -0.8."""
    log_probs = torch.tensor([[1.5, 0.5]]).log()
    old = torch.zeros(1, 2)
    assert ppo_loss(log_probs, old, torch.ones(1, 2)).item() == pytest.approx(-(1.2 + 0.5) / 2)
    assert ppo_loss(log_probs, old, -torch.ones(1, 2)).item() == pytest.approx((1.5 + 0.8) / 2)


def test_normalised_by_hand_and_guarded() -> None:
    assert torch.allclose(normalised(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]))
    assert (normalised(torch.tensor([7.0])) == 0).all()
    assert (normalised(torch.full((5,), 0.3)) == 0).all()


def test_a_failure_is_worse_than_the_worst() -> None:
    rewards = with_failures(torch.tensor([1.0, math.nan, 3.0]))
    assert torch.allclose(rewards, torch.tensor([1.0, 0.0, 3.0]))
    assert (with_failures(torch.full((2,), math.nan)) == 0).all()


def test_terminal_credit_is_the_same_for_all_decisions() -> None:
    assert torch.allclose(terminal_credit(torch.tensor([1.0, 3.0]), 3), torch.tensor([[-1.0] * 3, [1.0] * 3]))


def test_per_layer_credit_by_hand() -> None:
    """Prefix rewards (0.9, 0.8) and (0.5, 0.4) from 1: to go -0.2, -0.1 and -0.6, -0.1; the second layer ties."""
    credit = per_layer_credit(torch.tensor([[0.9, 0.8], [0.5, 0.4]]), 1.0)
    assert torch.allclose(credit, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))


def test_discounted_sums_by_hand() -> None:
    assert torch.allclose(discounted_sums(torch.tensor([[1.0, 2.0, 4.0]]), 0.5), torch.tensor([[3.0, 4.0, 4.0]]))


def test_importance_weights_are_truncated() -> None:
    weights = importance_weights(torch.tensor([[0.0, 2.0], [-0.5, -0.5]]), torch.zeros(2, 2))
    assert torch.allclose(weights, torch.tensor([2.0, math.exp(-1)]))


def test_imitation_by_hand() -> None:
    loss = imitation_loss(torch.tensor([[-1.0, -3.0], [-5.0, -5.0]]), torch.tensor([1.0, 3.0]))
    assert loss.item() == pytest.approx((2 + 15) / 4)
