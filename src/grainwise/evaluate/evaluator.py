"""Profile in, measurement out: candidates are really built, run on the search split and compared with the reference."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from onnx import ModelProto
from torch import Tensor, nn

from grainwise.evaluate.data import Batch, Splits
from grainwise.evaluate.measures import Divergence, Metric, checked
from grainwise.export.graph import MarkedGraph, file_bytes
from grainwise.export.weights import stored_tensors, weights_bytes
from grainwise.graph.forward import Forward
from grainwise.plan.choices import UNCOMPRESSED, Entry
from grainwise.plan.cost import CostModel
from grainwise.plan.profile import entries_to_json
from grainwise.realise.build import build, standards_of
from grainwise.realise.deploy import deploy
from grainwise.realise.library import VariantLibrary
from grainwise.realise.norms import NormWatch, Standard, freeze_norms, matched_norms, reestimate_norms
from grainwise.realise.reference import channels_last
from grainwise.study.measurement import Failure, Measurement, Outcome


@torch.inference_mode()
def outputs_of(model: nn.Module, batches: Sequence[Batch], forward: Forward) -> Tensor:
    """Outputs of all batches, along dimension 0."""
    return torch.cat([forward(model, batch.inputs) for batch in batches])


@torch.inference_mode()
def watched_outputs(
    model: nn.Module, batches: Sequence[Batch], forward: Forward
) -> tuple[Tensor, tuple[Standard, ...]]:
    """Outputs of the uncompressed network, and what its batch norms give out on each batch."""
    outputs, standards = [], []
    with NormWatch(model) as watch:
        for batch in batches:
            outputs.append(forward(model, batch.inputs))
            standards.append(watch.standard())
    return torch.cat(outputs), tuple(standards)


@torch.inference_mode()
def matched_outputs(
    model: nn.Module, batches: Sequence[Batch], forward: Forward, standards: Sequence[Standard]
) -> Tensor:
    """Outputs of a candidate whose batch norms take their statistics from the batch itself (`matched_norms`)."""
    outputs = []
    for batch, standard in zip(batches, standards, strict=True):
        with matched_norms(model, standard):
            outputs.append(forward(model, batch.inputs))
    return torch.cat(outputs)


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


@dataclass(frozen=True)
class Candidate:
    """A network as it will be deployed. file: its ONNX file, None for the packed target."""

    model: nn.Module
    file: ModelProto | None
    measurement: Measurement


class Evaluator:
    """Evaluates entries against one reference.

    While a search ranks, batch norm takes its statistics, and 8-bit values take their ranges, from the search batch
    itself, relative to the uncompressed network's (`matched_norms`): one pass gives statistics and outputs; bytes and
    milliseconds are predicted. Reported figures come from `finish`: norms and ranges from the calibration split, bytes
    of the file. marked: the ONNX graph of a target that deploys one, None for the packed target.
    """

    def __init__(
        self,
        library: VariantLibrary,
        splits: Splits,
        cost: CostModel,
        scoring: Scoring,
        marked: MarkedGraph | None = None,
    ) -> None:
        self.library = library
        self.splits = splits
        self.cost = cost
        self.scoring = scoring
        self.marked = marked
        reference = library.reference.model
        self._outputs, self._standards = watched_outputs(reference, splits.search, scoring.forward)
        self._targets = targets_of(splits.search)
        _, macs, latency = cost.total({})
        self.reference_file = None if marked is None else marked.write_reference()
        self.reference = Measurement(
            metric=checked(scoring.metric, self._outputs, self._targets),
            divergence=0.0,
            size_bytes=weights_bytes(reference) if self.reference_file is None else file_bytes(self.reference_file),
            macs=int(macs),
            latency_ms=float(latency),
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

    def _measure(
        self, model: nn.Module, entries: Mapping[str, Entry], *, one_pass: bool, size_bytes: int | None = None
    ) -> Measurement:
        size, macs, latency = self.cost.total(entries)
        if self.marked is None:
            size = weights_bytes(model)
        if one_pass:
            standards = standards_of(self.library, entries, self._standards)
            outputs = matched_outputs(model, self.splits.search, self.forward, standards)
        else:
            outputs = outputs_of(model, self.splits.search, self.forward)
        return Measurement(
            metric=checked(self.scoring.metric, outputs, self._targets),
            divergence=self.scoring.divergence(outputs, self._outputs),
            size_bytes=int(size) if size_bytes is None else size_bytes,
            macs=int(macs),
            latency_ms=float(latency),
        )

    @property
    def forward(self) -> Forward:
        """How a batch goes through a candidate."""
        reference = self.library.reference
        return self.scoring.forward if reference.skeleton is None else reference.base_forward

    def finish(self, entries: Mapping[str, Entry]) -> Candidate:
        """The deployable network and its file; norms and ranges from the calibration split."""
        model, file = self._deploy(entries)
        size = None if file is None else file_bytes(file)
        return Candidate(model, file, self._measure(model, entries, one_pass=False, size_bytes=size))

    def _deploy(self, entries: Mapping[str, Entry]) -> tuple[nn.Module, ModelProto | None]:
        changed = any(entry != UNCOMPRESSED for entry in entries.values())
        calibration = [batch.inputs for batch in self.splits.calibration] if changed else []
        model = channels_last(copy.deepcopy(build(self.library, entries)))
        standards = standards_of(self.library, entries, self.library.reference.standards) if changed else []
        skeleton = self.library.reference.skeleton
        if skeleton is None or self.marked is None:
            reestimate_norms(model, calibration, self.forward, standards)
            freeze_norms(model)
            return model, None
        deploy(model, skeleton, calibration, self.forward, standards)
        return model, self.marked.write(model, self._metadata(entries))

    def _metadata(self, entries: Mapping[str, Entry]) -> dict[str, str]:
        """What the file says of itself: target, and the digest of the profile's layers."""
        layers = json.dumps(entries_to_json(entries), sort_keys=True)
        profile = hashlib.sha256(layers.encode()).hexdigest()
        return {"grainwise.target": self.library.reference.target.name, "grainwise.profile": profile}

    def test(self, model: nn.Module, forward: Forward) -> float:
        """The metric on the test split: for final models only."""
        outputs = outputs_of(model, self.splits.test, forward)
        return checked(self.scoring.metric, outputs, targets_of(self.splits.test))


def other_tensors(model: nn.Module, layers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of what the weights file holds beside the layers' own tensors, by name (norms as scale and shift)."""
    owned = set(layers)
    return {n: tuple(v.shape) for n, v in stored_tensors(model) if n.rpartition(".")[0] not in owned}
