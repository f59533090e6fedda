"""The training step: one batch through student and teacher, one move of the student's shadows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grainwise.graph.forward import Forward
from grainwise.graph.skeleton import POINTS, Skeleton
from grainwise.plan.layers import LayerGraph
from grainwise.realise.norms import FrozenNorm
from grainwise.recover.losses import OutputLoss, feature_loss
from grainwise.recover.shadows import Shadow


class NotFinite(RuntimeError):
    """A loss or gradient is NaN or infinite; nothing was changed."""


class _Bound(nn.Module):
    """A network together with how a batch goes through it."""

    def __init__(self, network: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.network = network
        self._forward = forward

    def forward(self, inputs: Any) -> Tensor:
        return self._forward(self.network, inputs)


class Student(nn.Module):
    """A deployed network that runs on its shadows: what it computes is what it will compute once they are stored."""

    def __init__(self, network: nn.Module, forward: Forward, shadows: Sequence[Shadow]) -> None:
        super().__init__()
        self.shadows = nn.ModuleList(shadows)
        self._bound = [_Bound(network.requires_grad_(False), forward)]  # in a list: it is trained by its shadows alone

    @property
    def network(self) -> nn.Module:
        return self._bound[0].network

    def forward(self, inputs: Any) -> Tensor:
        read = {f"network.{name}": value for shadow in self._each() for name, value in shadow.tensors().items()}
        outputs: Tensor = torch.func.functional_call(self._bound[0], read, (inputs,))
        return outputs

    def store(self) -> None:
        """Write the shadows into the network."""
        for shadow in self._each():
            shadow.store()

    def _each(self) -> Iterator[Shadow]:
        for shadow in self.shadows:
            assert isinstance(shadow, Shadow)
            yield shadow


def feature_places(graph: LayerGraph, skeleton: Skeleton | None, student: nn.Module) -> tuple[str, ...]:
    """Paths of modules whose results student and teacher have in common: sums (residual streams), or where there are
    none the results of layers with the norms and clips that follow them.
    """
    if skeleton is None:
        norms = [name for name, module in student.named_modules() if isinstance(module, FrozenNorm)]
        return tuple(norms or (layer.name for layer in graph.layers if not layer.blocked))
    sums = tuple(f"{POINTS}.{join.result}" for join in skeleton.joins)
    units = skeleton.units.values()
    return sums or tuple(f"{POINTS}.{unit.result}" if unit.result else unit.norm or unit.layer for unit in units)


@contextmanager
def _watched(network: nn.Module, places: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, what the modules at these paths give is kept, the last call's of each."""
    seen: dict[str, Tensor] = {}

    def keep(place: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen[place] = output

    handles = [network.get_submodule(place).register_forward_hook(partial(keep, place)) for place in places]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Distillation:
    """The loss of a student on a batch of inputs: outputs, plus `feature_weight` times values at `places`. teacher: in
    eval mode; forward: how a batch goes through it. Labels are not read.
    """

    student: Student
    teacher: nn.Module
    forward: Forward
    output_loss: OutputLoss
    places: tuple[str, ...] = ()
    feature_weight: float = 1.0

    def __call__(self, inputs: Any) -> Tensor:
        places = self.places if self.feature_weight else ()
        with torch.no_grad(), _watched(self.teacher, places) as wanted:
            expected = self.forward(self.teacher, inputs)
        with _watched(self.student.network, places) as found:
            outputs = self.student(inputs)
        common = [place for place in places if place in wanted and place in found]
        features = feature_loss([found[place] for place in common], [wanted[place] for place in common])
        return self.output_loss(outputs, expected) + self.feature_weight * features


def train_step(
    loss: Callable[[Any], Tensor], inputs: Any, optimiser: torch.optim.Optimizer, learning_rate: float
) -> float:
    """One step of the optimiser on `loss(inputs)`, which is returned. Raises NotFinite before anything is changed."""
    optimiser.zero_grad()
    value = loss(inputs)
    value.backward()  # type: ignore[no-untyped-call]
    found = float(value.detach())
    gradients = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    if not math.isfinite(found) or not all(bool(torch.isfinite(g).all()) for g in gradients):
        raise NotFinite(f"the loss is {found}" if not math.isfinite(found) else "a gradient is not finite")
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    optimiser.step()
    return found
