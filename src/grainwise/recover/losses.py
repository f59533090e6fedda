"""How far a student is from its teacher, as losses: on the outputs, and on values inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

OutputLoss = Callable[[Tensor, Tensor], Tensor]
"""(student's outputs, teacher's outputs) -> scalar."""

_TINY = 1e-12


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher || student) of softmax(logits / T) over the last dimension, mean over samples, in nats (Hinton et
    al. 2015, section 2; T² keeps the gradient's size).
    """
    expected, found = (F.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    return temperature**2 * (expected.exp() * (expected - found)).sum(-1).mean()


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over the teacher's variance."""
    squares: Tensor = torch.linalg.vector_norm(student - teacher).square()  # one pass each way, unlike mse_loss
    return squares / (teacher.numel() * teacher.var().clamp_min(_TINY))


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean `relative_error` over the values that are of one shape in both (FitNets, Romero et al. 2015, equation 3,
    without a regressor); 0 where there is none.
    """
    pairs = [(s, t) for s, t in zip(student, teacher, strict=True) if s.shape == t.shape]
    if not pairs:
        return torch.zeros(())
    return torch.stack([relative_error(s, t) for s, t in pairs]).mean()
