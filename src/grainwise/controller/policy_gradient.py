"""Policy-gradient formulas, one function each. Letters: N profiles, L decisions of a profile."""

from __future__ import annotations

import torch
from torch import Tensor


def reinforce_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """Mean of -log p * advantage over `[N, L]` decisions (Williams 1992, eq. 11, as a loss); the baseline is in the
    advantages already.
    """
    return -(log_probs * advantages).mean()


def ppo_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """Clipped surrogate over `[N, L]` decisions, as a loss (Schulman et al. 2017, eq. 7)."""
    ratio = (log_probs - old_log_probs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def with_failures(rewards: Tensor, penalty: float = 1.0) -> Tensor:
    """`[N]` rewards with NaN (a failed evaluation) replaced by the lowest reward minus `penalty` standard deviations
    of the others; zeros when all failed.
    """
    good = torch.isfinite(rewards)
    if not good.any():
        return torch.zeros_like(rewards)
    worst = rewards[good].min() - penalty * rewards[good].std(correction=0)
    return torch.where(good, rewards, worst)


def normalised(advantages: Tensor) -> Tensor:
    """Zero mean, unit standard deviation over the whole tensor; zeros for one value or when all are equal."""
    centred = advantages - advantages.mean()
    spread = centred.std(correction=0)
    if not torch.isfinite(spread) or spread <= 1e-6 * (1 + advantages.abs().max()):
        return torch.zeros_like(advantages)
    return centred / spread


def terminal_credit(rewards: Tensor, decisions: int) -> Tensor:
    """`[N, L]`: every decision of a profile is credited with the profile's normalised reward (`[N]`, NaN = failed)."""
    return normalised(with_failures(rewards))[:, None].expand(-1, decisions)


def per_layer_credit(prefix_rewards: Tensor, start: Tensor | float, discount: float = 1.0) -> Tensor:
    """`[N, L]` reward-to-go of telescoping differences, normalised at each layer over the batch.

    prefix_rewards: `[N, L]`, R of the profile cut after each layer; start: R of the empty profile. The decision at l
    earns r_l = R(prefix l) - R(prefix l - 1) and is credited with the discounted sum of r_l, r_l+1, .. (Sutton & Barto
    2018, eq. 3.8). The sum of r_l is R(profile) - start, so the optimum is that of the terminal reward (Ng et al.
    1999).
    """
    before = torch.cat([torch.as_tensor(start).expand(len(prefix_rewards), 1), prefix_rewards[:, :-1]], dim=1)
    to_go = discounted_sums(prefix_rewards - before, discount)
    columns = [normalised(with_failures(column)) for column in to_go.T]
    return torch.stack(columns, dim=1)


def discounted_sums(rewards: Tensor, discount: float) -> Tensor:
    """`[N, L]` with G_l = r_l + discount * G_l+1."""
    sums = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for index in reversed(range(rewards.shape[1])):
        running = rewards[:, index] + discount * running
        sums[:, index] = running
    return sums


def importance_weights(log_probs: Tensor, old_log_probs: Tensor, limit: float = 2.0) -> Tensor:
    """`[N]` truncated ratios min(limit, p(profile) / q(profile)) from `[N, L]` log-probabilities (Ionides 2008)."""
    return (log_probs - old_log_probs).sum(-1).clamp(max=torch.log(torch.tensor(limit)).item()).exp()


def imitation_loss(log_probs: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of -log p over `[N, L]` decisions: self-imitation of profiles that did better than expected (Oh et
    al. 2018, eq. 2, without the critic). weights: `[N]`, >= 0.
    """
    return -(weights * log_probs.mean(-1)).sum() / weights.sum().clamp(min=1e-6)
