"""The gate before a file is shipped: it computes what the torch module computes, on the kernels that were planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn

from grainwise.export.kernels import found_kernels, misplaced, planned_kernels
from grainwise.export.runtime import open_session, optimised, run
from grainwise.export.steps import Step, steps
from grainwise.graph.forward import tensors_in
from grainwise.graph.skeleton import Skeleton
from grainwise.methods.activations import DynamicLinear

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

OTHER_BATCHES = (1, 7)
SAMPLES = 8  # that are compared layer by layer: all values of the network are in memory at once


class ParityError(ValueError):
    """A file does not compute what its network computes, or not on the planned kernels; the message names the layer."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a file may be from its network. Differences are mean absolute ones, as a share of the standard deviation
    of what is compared.
    """

    step: float = 0.001
    """Of one layer's result, when the module's layer reads what the file computed before it."""
    difference: float = 0.005
    """Of the outputs of file and torch module."""
    agreement: float | None = 0.995
    """Smallest share of outputs whose largest component (along the last dimension) is the same in file and torch
    module; one may always differ. None where the largest component means nothing, as in embeddings."""
    unfused: float = 0.05
    """Of the outputs of the file run with fused kernels and node by node, where sums of 8-bit layers are rounded in
    float32."""
    noise: float = 0.5
    """Share of what the compression itself changes that is allowed to all outputs when that is more: where float layers
    and 8-bit ones mix, two right runs part (`export.steps`), and at most by as much as rounding changes."""

    def __post_init__(self) -> None:
        for name in ("step", "difference", "unfused", "noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"the bound {name} is a share of 0 or more, got {getattr(self, name)}")
        if self.agreement is not None and not 0 <= self.agreement <= 1:
            raise ValueError(f"the bound agreement is a share in [0, 1], got {self.agreement}")


@dataclass(frozen=True, slots=True)
class Difference:
    """Two runs of one network. mean, largest: absolute. spread: standard deviation of the first run's outputs.
    agreement: share of `answers` whose largest component along the last dimension is the same.
    """

    mean: float
    largest: float
    spread: float
    agreement: float
    answers: int

    @staticmethod
    def between(first: NDArray[Any], second: NDArray[Any]) -> Difference:
        distance = np.abs(first.astype(np.float64) - second)
        same = first.argmax(-1) == second.argmax(-1)
        return Difference(
            float(distance.mean()),
            float(distance.max()),
            float(first.std(dtype=np.float64)),
            float(same.mean()),
            int(np.size(same)),
        )

    @property
    def share(self) -> float:
        """Mean difference as a share of the spread; infinite for constant outputs that differ."""
        return self.mean / self.spread if self.spread else (0.0 if self.mean == 0 else float("inf"))

    def agrees(self, least: float) -> bool:
        """True when at least this share of answers is the same, or all but one."""
        differ = round((1 - self.agreement) * self.answers)
        return differ <= max(1, int((1 - least) * self.answers + 1e-9))


@dataclass(frozen=True, slots=True)
class Parity:
    """What the gate saw. torch: the torch module against the file with fused kernels. unfused: the file node by node
    against the same. compression: the uncompressed network against the torch module. worst: the layer that differs most
    by itself. kernels: counts of 8-bit kernels, equal to those planned.
    """

    torch: Difference
    unfused: Difference
    compression: Difference
    worst: Step
    kernels: Mapping[str, int]

    def figures(self) -> dict[str, float | int | str | None]:
        """For the artefact's manifest."""
        return {
            "max_abs_difference": self.torch.largest,
            "mean_abs_difference": self.torch.mean,
            "relative_difference": self.torch.share,
            "top1_agreement": self.torch.agreement,
            "unfused_relative_difference": self.unfused.share,
            "step_relative_difference": self.worst.share,
            "parity_answers": self.torch.answers,
            "kernels": ", ".join(f"{count} {name}" for name, count in self.kernels.items()),
        }


def check_parity(
    file: ModelProto, model: nn.Module, skeleton: Skeleton, inputs: Sequence[Any], bounds: Bounds = Bounds()
) -> Parity:
    """Run the file of a deployed candidate of `skeleton` on batches of inputs, beside the module itself.

    Raises ParityError for kernels that were not planned or are missing, for a layer or outputs out of bounds, and for a
    file that does not take other batch sizes. Raises ValueError without inputs.
    """
    if not inputs:
        raise ValueError("parity is checked on at least one batch of inputs, none was given")
    content = file.SerializeToString()
    batches = [tensors_in(batch) for batch in inputs]
    few = [tensor[:SAMPLES] for tensor in batches[0]]
    kernels = _checked_kernels(content, model, skeleton, few)
    worst = _checked_steps(steps(file, model, skeleton, few), bounds)
    fused, unfused = open_session(content), open_session(content, fused=False)
    feeds = [dict(zip(skeleton.inputs, tensors, strict=True)) for tensors in batches]
    found = np.concatenate([run(fused, feed) for feed in feeds])
    expected, uncompressed = (_outputs(module, batches) for module in (model, skeleton.module))
    parity = Parity(
        torch=Difference.between(expected, found),
        unfused=Difference.between(np.concatenate([run(unfused, feed) for feed in feeds]), found),
        compression=Difference.between(uncompressed, expected),
        worst=worst,
        kernels=kernels,
    )
    _check_outputs(parity, bounds)
    exact = not any(isinstance(module, DynamicLinear) for module in model.modules())
    allowed = max(bounds.difference, bounds.noise * parity.compression.share)
    _check_batches(fused, feeds[0], found[: len(batches[0][0])], allowed if exact else None)
    return parity


@torch.no_grad()
def _outputs(model: nn.Module, batches: Sequence[Sequence[Tensor]]) -> NDArray[Any]:
    outputs: NDArray[Any] = torch.cat([model(*tensors) for tensors in batches]).numpy()
    return outputs


def _checked_kernels(content: bytes, model: nn.Module, skeleton: Skeleton, tensors: Sequence[Tensor]) -> dict[str, int]:
    """Counts of the kernels that round, equal to those that the module plans."""
    graph = optimised(content).graph
    found, planned = found_kernels(graph), planned_kernels(model, tensors)
    for kernel in (*planned, *found):
        if found[kernel] != planned[kernel]:
            raise ParityError(
                f"ONNX Runtime runs {found[kernel]} {kernel} where the plan has {planned[kernel]}: "
                + misplaced(graph, model, skeleton, kernel)
            )
    return dict(planned)


def _checked_steps(found: Sequence[Step], bounds: Bounds) -> Step:
    """The step that differs most."""
    for step in found:
        if not step.share <= bounds.step:
            raise ParityError(
                f"the file computes {step.place} otherwise than the network does: on the same inputs the results "
                f"differ by {step.share:.3%} of their standard deviation, {bounds.step:.3%} is allowed"
            )
    return max(found, key=lambda step: step.share)


def _check_outputs(parity: Parity, bounds: Bounds) -> None:
    rounding = bounds.noise * parity.compression.share
    most = f"; of all layers {parity.worst.place} differs most by itself, by {parity.worst.share:.3%}"
    for other, found, bound in (
        ("the torch module", parity.torch, max(bounds.difference, rounding)),
        ("the file run node by node", parity.unfused, max(bounds.unfused, rounding)),
    ):
        if not found.share <= bound:
            raise ParityError(
                f"the file's outputs differ from those of {other} by {found.share:.2%} of their standard deviation, "
                f"{bound:.2%} is allowed{most}"
            )
    if bounds.agreement is None:
        return
    least = min(bounds.agreement, 1 - bounds.noise * (1 - parity.compression.agreement))
    if not parity.torch.agrees(least):
        raise ParityError(
            f"{parity.torch.agreement:.2%} of {parity.torch.answers} answers of the file are those of the torch "
            f"module, {least:.2%} is the least allowed{most}"
        )


def _check_batches(
    session: InferenceSession, feed: Mapping[str, Tensor], expected: NDArray[Any], bound: float | None
) -> None:
    """Batches of other sizes give the same outputs. bound: None where a layer's rounding depends on the whole batch,
    so that shapes alone can be compared.
    """
    for size in OTHER_BATCHES:
        rows = np.arange(size) % len(expected)
        try:
            found = run(session, {name: tensor[rows] for name, tensor in feed.items()})
        except Exception as error:  # ONNX Runtime has no common error class
            raise ParityError(f"the file does not run on a batch of {size}: {error}") from error
        same = expected[rows]
        if found.shape != same.shape:
            raise ParityError(f"the file makes {[*found.shape]} of a batch of {size} instead of {[*same.shape]}")
        share = Difference.between(same, found).mean / (float(expected.std()) or 1.0)
        if bound is not None and not share <= bound:
            raise ParityError(
                f"in a batch of {size} the outputs differ by {share:.2%} of their standard deviation from those of the "
                f"same samples in a batch of {len(expected)}, {bound:.2%} is allowed"
            )
