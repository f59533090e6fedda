"""The action distribution of one decision, factorised as a tree: method, then granularity, then level.

Letters: A actions, M methods, G granularities, D levels (of the method with most).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grainwise.plan.choices import LEVELS, PRECISIONS, STRUCTURES, Choice, Granularity, Method

_NEVER = -1e9  # stands for -inf where a gradient passes: exp gives exactly 0 and no NaN arises


@dataclass(frozen=True, slots=True)
class Tree:
    """Where each action stands.

    leaves: `[M * G * D]` int64: number of the action at the place, A (one too many) where there is none.
    places: `[A]` int64: inverse of `leaves`.
    """

    methods: int
    granularities: int
    levels: int
    leaves: Tensor
    places: Tensor

    @staticmethod
    def of(choices: Sequence[Choice]) -> Tree:
        """The tree of a list of choices; `none` is a method with one leaf."""
        methods = list(dict.fromkeys(choice.method for choice in choices))
        grains = list(Granularity)
        depth = max(len(LEVELS.get(method, (0,))) for method in methods)
        leaves = torch.full((len(methods) * len(grains) * depth,), len(choices))
        places = torch.zeros(len(choices), dtype=torch.int64)
        for number, choice in enumerate(choices):
            grain = level = 0
            if choice.method is not Method.NONE:
                assert choice.granularity is not None and choice.level is not None
                grain, level = grains.index(choice.granularity), LEVELS[choice.method].index(choice.level)
            places[number] = (methods.index(choice.method) * len(grains) + grain) * depth + level
            leaves[places[number]] = number
        return Tree(len(methods), len(grains), depth, leaves, places)

    @property
    def logits(self) -> int:
        """Head outputs that the tree takes: M + M G + M G D."""
        return self.methods * (1 + self.granularities * (1 + self.levels))

    def split(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Head outputs `[.., logits]` as method `[.., M]`, granularity `[.., M, G]`, level `[.., M, G, D]` logits."""
        m, g, d = self.methods, self.granularities, self.levels
        method, grain, level = torch.split(outputs, [m, m * g, m * g * d], dim=-1)
        return method, grain.reshape(*grain.shape[:-1], m, g), level.reshape(*level.shape[:-1], m, g, d)


STRUCTURE_TREE = Tree.of(STRUCTURES)
PRECISION_TREE = Tree.of(PRECISIONS)


def tree_log_probs(
    tree: Tree, method_logits: Tensor, granularity_logits: Tensor, level_logits: Tensor, prior: Tensor, mask: Tensor
) -> Tensor:
    """`[.., A]` log-probabilities of the actions: log p(method) + log p(granularity | ..) + log p(level | ..).

    method_logits `[.., M]`, granularity_logits `[.., M, G]`, level_logits `[.., M, G, D]`; prior `[.., A]` log-weights;
    mask `[.., A]` booleans, at least one True. At each level of the tree the prior enters by logsumexp over the
    leaves below, so that zero logits give softmax(prior) over the mask. -inf where masked; gradients are finite.
    """
    weights = torch.where(mask, prior, torch.full_like(prior, _NEVER))
    nowhere = torch.full_like(weights[..., :1], _NEVER)
    leaf = torch.cat([weights, nowhere], dim=-1)[..., tree.leaves]
    leaf = leaf.reshape(*leaf.shape[:-1], tree.methods, tree.granularities, tree.levels)
    by_grain = leaf.logsumexp(-1)
    by_method = by_grain.logsumexp(-1)
    level = (level_logits + leaf).log_softmax(-1)
    grain = (granularity_logits + by_grain).log_softmax(-1)
    method = (method_logits + by_method).log_softmax(-1)
    joint = (level + grain[..., None] + method[..., None, None]).flatten(-3)[..., tree.places]
    return torch.where(mask, joint, torch.full_like(joint, -torch.inf))
