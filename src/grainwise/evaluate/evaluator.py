"""Profile in, measurement out: candidates are really built, run on the search split and compared with the reference."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grainwise.evaluate.data import Batch, Splits
from grainwise.evaluate.measures import Divergence, Metric, checked
from grainwise.export.weights import stored_tensors, weights_bytes
from grainwise.graph.forward import Forward
from grainwise.plan.choices import Entry
from grainwise.plan.cost import CostModel
from grainwise.realise.build import build
from grainwise.realise.library import VariantLibrary
from grainwise.realise.norms import batch_statistics, freeze_norms, reestimate_norms
from grainwise.realise.reference import channels_last
from grainwise.study.measurement import Failure, Measurement, Outcome


@torch.inference_mode()
def outputs_of(model: nn.Module, batches: Sequence[Batch], forward: Forward) -> Tensor:
    """Outputs of all batches, along dimension 0."""
    return torch.cat([forward(model, batch.inputs) for batch in batches])


def targets_of(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([batch.targets for batch in batches if batch.targets is not None])


# What a candidate that does not fit its network raises, from torch, from our checks, or from the user's own code.
BUILD_ERRORS = (RuntimeError, ValueError, FloatingPointError, AttributeError, TypeError, IndexError)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How outputs are judged."""

    metric: Metric
    divergence: Divergence
    forward: Forward


class Evaluator:
    """Evaluates entries against one reference.

    While a search ranks, batch norm takes its statistics from the search batch itself: one pass gives statistics and
    outputs. Reported figures come from `finish`, whose batch norm is estimated on the calibration split.
    """

    def __init__(self, library: VariantLibrary, splits: Splits, cost: CostModel, scoring: Scoring) -> None:
        self.library = library
        self.splits = splits
        self.cost = cost
        self.scoring = scoring
        reference = library.reference.model
        self._outputs = outputs_of(reference, splits.search, scoring.forward)
        self._targets = targets_of(splits.search)
        self.reference = Measurement(
            metric=checked(scoring.metric, self._outputs, self._targets),
            divergence=0.0,
            size_bytes=weights_bytes(reference),
            macs=int(cost.total({})[1]),
        )

    def __call__(self, entries: Mapping[str, Entry]) -> Outcome:
        """The measurement of the network that `entries` give, or why there is none."""
        stage = "build"
        try:
            model = build(self.library, entries)
            stage = "evaluate"
            return self._measure(model, entries, one_pass=True)
        except BUILD_ERRORS as error:
            return Failure(stage, str(error).splitlines()[0])

    def _measure(self, model: nn.Module, entries: Mapping[str, Entry], *, one_pass: bool) -> Measurement:
        with batch_statistics(model) if one_pass else nullcontext():
            outputs = outputs_of(model, self.splits.search, self.scoring.forward)
        return Measurement(
            metric=checked(self.scoring.metric, outputs, self._targets),
            divergence=self.scoring.divergence(outputs, self._outputs),
            size_bytes=weights_bytes(model),
            macs=int(self.cost.total(entries)[1]),
        )

    def finish(self, entries: Mapping[str, Entry]) -> tuple[nn.Module, Measurement]:
        """The deployable network: batch norm estimated on the calibration split and frozen; and its measurement."""
        forward = self.scoring.forward
        model = channels_last(copy.deepcopy(build(self.library, entries)))
        reestimate_norms(model, [batch.inputs for batch in self.splits.calibration], forward)
        freeze_norms(model)
        return model, self._measure(model, entries, one_pass=False)

    def test(self, model: nn.Module) -> float:
        """The metric on the test split: for final models only."""
        outputs = outputs_of(model, self.splits.test, self.scoring.forward)
        return checked(self.scoring.metric, outputs, targets_of(self.splits.test))


def other_tensors(model: nn.Module, layers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of what the weights file holds beside the layers' own tensors, by name (norms as scale and shift)."""
    owned = set(layers)
    return {n: tuple(v.shape) for n, v in stored_tensors(model) if n.rpartition(".")[0] not in owned}
