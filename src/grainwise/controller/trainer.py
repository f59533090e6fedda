"""The update step of the Compression Policy Trainer: policy gradient on fresh profiles, imitation of the best ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grainwise.controller.network import Controller, Rollout
from grainwise.controller.policy_gradient import imitation_loss, importance_weights, ppo_loss, reinforce_loss

Algorithm = Literal["reinforce", "ppo"]


@dataclass(frozen=True, slots=True)
class TrainerConfig:
    """How a policy is trained."""

    algorithm: Algorithm = "ppo"
    """`reinforce`: one step a batch. `ppo`: several on the same batch, clipped."""
    learning_rate: float = 3e-3
    """Adam's; 0 leaves the policy as it is."""
    epochs: int = 4
    """Steps a batch for PPO, and for imitation."""
    entropy: float = 0.01
    """Weight of the entropy bonus at the start; it falls linearly to 0."""
    anneal_updates: int = 20
    """Updates until the bonus has gone."""
    imitation: float = 0.5
    """Weight of the imitation loss."""
    max_norm: float = 1.0
    """Gradients are clipped to this norm."""


class PolicyTrainer:
    """Trains a controller; its weights are finite after every update."""

    def __init__(self, controller: Controller, config: TrainerConfig | None = None) -> None:
        self.controller = controller
        self.config = config or TrainerConfig()
        self.optimiser = torch.optim.Adam(controller.parameters(), lr=self.config.learning_rate)
        self.updates = 0

    def update(
        self,
        fresh: Rollout | None,
        advantages: Tensor | None = None,
        *,
        old_log_probs: Tensor | None = None,
        elite: Rollout | None = None,
        elite_weights: Tensor | None = None,
    ) -> None:
        """One batch.

        fresh: profiles to reinforce, with advantages `[N, L]`. old_log_probs: `[N, L]` under the policy that sampled
        them; None for the current one. elite: profiles to imitate, with weights `[N]`.
        """
        if self.config.learning_rate == 0:
            return
        if fresh is not None and old_log_probs is None:
            with torch.no_grad():
                old_log_probs = self.controller.evaluate(fresh)[0]
        for epoch in range(self.config.epochs):
            loss = torch.zeros(())
            if fresh is not None and (self.config.algorithm == "ppo" or epoch == 0):
                assert advantages is not None and old_log_probs is not None
                loss = loss + self._gradient_loss(fresh, advantages, old_log_probs)
            if elite is not None:
                weights = torch.ones(len(elite)) if elite_weights is None else elite_weights
                loss = loss + self.config.imitation * imitation_loss(self.controller.evaluate(elite)[0], weights)
            if loss.requires_grad:
                self._descend(loss)
        self.updates += 1

    def _gradient_loss(self, fresh: Rollout, advantages: Tensor, old_log_probs: Tensor) -> Tensor:
        log_probs, entropies = self.controller.evaluate(fresh)
        bonus = self.config.entropy * max(0.0, 1 - self.updates / max(1, self.config.anneal_updates))
        if self.config.algorithm == "ppo":
            loss = ppo_loss(log_probs, old_log_probs, advantages)
        else:
            weights = importance_weights(log_probs.detach(), old_log_probs)
            loss = reinforce_loss(log_probs, advantages * weights[:, None])
        return loss - bonus * entropies.mean()

    def _descend(self, loss: Tensor) -> None:
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.controller.parameters(), self.config.max_norm)
        if torch.isfinite(norm) and torch.isfinite(loss):  # a step that is not finite would spoil the policy for good
            self.optimiser.step()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Policy, optimiser moments and counters: tensors for safetensors, a body for JSON."""
        tensors = {f"policy.{name}": value.clone() for name, value in self.controller.state_dict().items()}
        for number, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value.clone() for name, value in moments.items()}
        return tensors, {"updates": self.updates}

    def restore(self, tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> None:
        """Go on exactly where `state()` was taken. Raises ValueError when the policy has another shape."""
        policy = {name.removeprefix("policy."): t for name, t in tensors.items() if name.startswith("policy.")}
        try:
            self.controller.load_state_dict(policy)
        except RuntimeError as error:
            raise ValueError(f"the stored policy does not fit this controller: {error}") from error
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, moment = name.split(".")
                moments.setdefault(int(number), {})[moment] = value.clone()
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        self.updates = int(body["updates"])
