"""The controller: an LSTM that reads the layers in order and gives each a distribution over entries.

Letters: N profiles, L layers, F static features, D dynamic features, S structures, P precisions, H hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from grainwise.controller.tree import PRECISION_TREE, STRUCTURE_TREE, tree_log_probs
from grainwise.plan.choices import PRECISIONS, STRUCTURES

_S, _P = len(STRUCTURES), len(PRECISIONS)
Memory = tuple[Tensor, Tensor]  # `[1, N, H]` hidden and cell state


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the controller sees at a run of layers (all of them, or one step).

    static: `[N, L, F]` features of the layers. dynamic: `[N, L, D]` what is left of the budgets and the like.
    summary: `[N, L, S + P]` scaled log scores of the choices. previous: `[N, L]` int64 flat number s * P + p of the
    entry before, S * P at the first layer. prior: `[N, L, S, P]` log-weights. mask: `[N, L, S, P]` allowed entries.
    """

    static: Tensor
    dynamic: Tensor
    summary: Tensor
    previous: Tensor
    prior: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Rollout:
    """Profiles with all that the controller saw while they were chosen. actions: `[N, L]` int64, flat s * P + p."""

    inputs: Inputs
    actions: Tensor

    def __len__(self) -> int:
        return self.actions.shape[0]

    def split(self) -> list[Rollout]:
        """A rollout of each profile."""
        parts = zip(*(torch.split(getattr(self.inputs, f.name), 1) for f in fields(Inputs)), strict=True)
        return [
            Rollout(Inputs(*part), actions) for part, actions in zip(parts, torch.split(self.actions, 1), strict=True)
        ]

    @staticmethod
    def join(rollouts: list[Rollout]) -> Rollout:
        """One rollout of all profiles, in order."""
        parts = {f.name: torch.cat([getattr(r.inputs, f.name) for r in rollouts]) for f in fields(Inputs)}
        return Rollout(Inputs(**parts), torch.cat([r.actions for r in rollouts]))


class Controller(nn.Module):
    """The Compression Granularity Controller.

    features, dynamics: F and D. The heads start at zero, so that the first policy is the prior itself.
    """

    def __init__(self, features: int, dynamics: int, hidden: int = 64, *, generator: torch.Generator) -> None:
        super().__init__()
        self.structure_memory = nn.Embedding(_S + 1, 16)
        self.precision_memory = nn.Embedding(_P + 1, 8)
        self.encoder = nn.Linear(features + dynamics + _S + _P + 16 + 8, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.structure_head = nn.Linear(hidden, STRUCTURE_TREE.logits)
        self.chosen = nn.Embedding(_S, hidden)
        self.precision_head = nn.Linear(hidden, PRECISION_TREE.logits)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                scale = 0.0 if "head" in name or "bias" in name else weight.shape[-1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)

    def forward(self, inputs: Inputs, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """`[N, L, S, P]` log-probabilities of the entries (-inf where masked), and the memory after the last layer."""
        hidden, memory = self._read(inputs, memory)
        given = torch.tanh(hidden[..., None, :] + self.chosen.weight)  # each structure, as if it were the chosen one
        joint = self._structures(hidden, inputs)[..., None] + self._precisions(given, inputs.prior, inputs.mask)
        return torch.where(inputs.mask, joint, torch.full_like(joint, -torch.inf)), memory

    @torch.no_grad()
    def step(self, inputs: Inputs, memory: Memory | None) -> tuple[Tensor, Memory]:
        """`[N, S, P]` log-probabilities at one layer (inputs with L = 1), for sampling."""
        log_probs, memory = self(inputs, memory)
        return log_probs[:, 0], memory

    def evaluate(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """`[N, L]` log-probabilities of the rollout's actions, and `[N, L]` entropies in nats: of the structure, and of
        the precision given the structure that was taken, whose mean over the policy's actions is the joint entropy.
        """
        inputs, (structure, precision) = rollout.inputs, (rollout.actions // _P, rollout.actions % _P)
        hidden, _ = self._read(inputs, None)
        taken = structure[..., None, None].expand(*structure.shape, 1, _P)
        given = torch.tanh(hidden + self.chosen(structure))
        structures = self._structures(hidden, inputs)
        precisions = self._precisions(
            given, inputs.prior.gather(-2, taken).squeeze(-2), inputs.mask.gather(-2, taken).squeeze(-2)
        )
        log_probs = _of(structures, structure) + _of(precisions, precision)
        return log_probs, _entropy(structures) + _entropy(precisions)

    def _read(self, inputs: Inputs, memory: Memory | None) -> tuple[Tensor, Memory]:
        """`[N, L, H]` what the LSTM makes of the layers until each, and its memory after the last."""
        structure = inputs.previous.div(_P, rounding_mode="floor")
        precision = torch.where(structure == _S, _P, inputs.previous % _P)
        seen = [inputs.static, inputs.dynamic, inputs.summary]
        seen += [self.structure_memory(structure), self.precision_memory(precision)]
        found: tuple[Tensor, Memory] = self.lstm(torch.tanh(self.encoder(torch.cat(seen, dim=-1))), memory)
        return found

    def _structures(self, hidden: Tensor, inputs: Inputs) -> Tensor:
        """`[N, L, S]` log-probabilities."""
        prior = torch.where(inputs.mask, inputs.prior, torch.full_like(inputs.prior, -1e9)).logsumexp(-1)
        logits = STRUCTURE_TREE.split(self.structure_head(hidden))
        return tree_log_probs(STRUCTURE_TREE, *logits, prior, inputs.mask.any(-1))

    def _precisions(self, given: Tensor, prior: Tensor, mask: Tensor) -> Tensor:
        """`[.., P]` log-probabilities once the structure is taken. given: `[.., H]`; prior, mask: `[.., P]`."""
        reachable = mask | ~mask.any(-1, keepdim=True)
        return tree_log_probs(PRECISION_TREE, *PRECISION_TREE.split(self.precision_head(given)), prior, reachable)


def _of(log_probs: Tensor, actions: Tensor) -> Tensor:
    """`[N, L]` log-probabilities of the actions taken."""
    return log_probs.gather(-1, actions[..., None]).squeeze(-1)


def _entropy(log_probs: Tensor) -> Tensor:
    finite = torch.where(torch.isfinite(log_probs), log_probs, torch.zeros_like(log_probs))
    return -(log_probs.exp() * finite).sum(-1)
