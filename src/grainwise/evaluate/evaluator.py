"""Profile in, measurement out: candidates are really built, run on the search split and compared with the reference."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn

from grainwise.evaluate.data import Batch, Splits
from grainwise.evaluate.measures import DIVERGENCES, METRICS, Divergence, Metric, checked
from grainwise.evaluate.prefix import PrefixRuns
from grainwise.evaluate.sharing import EVERYTHING, Sharing
from grainwise.evaluate.standin import shapes_of, stand_in
from grainwise.evaluate.timing import device_name
from grainwise.export.graph import MarkedGraph, file_bytes
from grainwise.export.weights import stored_tensors, weights_bytes
from grainwise.graph.forward import Forward, default_forward, tensors_in
from grainwise.graph.program import NotShared
from grainwise.graph.skeleton import Skeleton, skeleton_forward
from grainwise.plan.choices import UNCOMPRESSED, Entry
from grainwise.plan.cost import CostModel
from grainwise.plan.profile import entries_to_json
from grainwise.plan.version import code_version
from grainwise.realise.build import assemble, build, standards_of
from grainwise.realise.deploy import deploy
from grainwise.realise.library import VariantLibrary
from grainwise.realise.norms import NormWatch, Standard, freeze_norms, matched_norms, reestimate_norms
from grainwise.realise.reference import channels_last, fingerprint, tensors_digest
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
BUILD_ERRORS = (RuntimeError, ValueError, FloatingPointError, AttributeError, TypeError, IndexError, MemoryError)


_SOURCES = ("plan", "graph", "methods", "realise", "export", "evaluate")

Known = Callable[[str], Measurement | None]
"""(key of a profile) -> its measurement, if there is one."""

Judged = tuple[int, Outcome]


@dataclass(frozen=True, slots=True)
class Scoring:
    """How outputs are judged."""

    metric: Metric
    divergence: Divergence
    forward: Forward


@dataclass(frozen=True, slots=True)
class _Built:
    """A candidate to be ranked. size_bytes: of the packed weights of the user's own module; None where the size of a
    file is predicted.
    """

    model: nn.Module
    size_bytes: int | None


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
        sharing: Sharing = EVERYTHING,
    ) -> None:
        self.library = library
        self.splits = splits
        self.cost = cost
        self.scoring = scoring
        self.marked = marked
        self.sharing = sharing
        reference = self.reference_model
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

    def __getstate__(self) -> dict[str, Any]:
        """For other processes: kept activations stay here, each process begins to keep its own."""
        return {name: value for name, value in self.__dict__.items() if name != "prefixes"}

    def __call__(self, entries: Mapping[str, Entry]) -> Outcome:
        """The measurement of the network that `entries` give, or why there is none."""
        ((_, outcome),) = self.many([entries])
        return outcome

    def many(self, profiles: Sequence[Mapping[str, Entry]], known: Known = lambda key: None) -> Iterator[Judged]:
        """(number in `profiles`, outcome) of each as soon as it is there, in the order in which most is shared.

        known: measurements of profiles by their `key`. Layers of all profiles are solved before the first one runs.
        """
        waiting: dict[int, _Built] = {}
        for number, entries in enumerate(profiles):
            found = known(key) if (key := self.key(entries)) else None
            if found is not None:  # milliseconds are this session's
                yield number, replace(found, latency_ms=float(self.cost.total(entries)[2]))
                continue
            try:
                waiting[number] = self._built(entries)
            except BUILD_ERRORS as error:
                yield number, Failure("build", _in_words(error))
        numbers = list(waiting)
        if self.prefixes is not None:
            numbers = [numbers[place] for place in self.prefixes.schedule([b.model for b in waiting.values()])]
        for number in numbers:
            try:
                outcome: Outcome = self._ranked(waiting.pop(number), profiles[number])
            except BUILD_ERRORS as error:
                outcome = Failure("evaluate", _in_words(error))
            yield number, outcome

    def key(self, entries: Mapping[str, Entry]) -> str:
        """What decides the measurement of `entries` but for its milliseconds, as a digest; empty when that is not known
        to the last bit: a metric or `forward` of the user may depend on anything.
        """
        if not self._context:
            return ""
        changed = {name: entry for name, entry in entries.items() if entry != UNCOMPRESSED}
        layers = json.dumps(entries_to_json(changed), sort_keys=True)
        return hashlib.sha256(f"{self._context}{layers}".encode()).hexdigest()

    @cached_property
    def _context(self) -> str:
        scoring, reference = self.scoring, self.library.reference
        own = scoring.metric in METRICS.values() and scoring.divergence in DIVERGENCES.values()
        if not (self.sharing.measurements and own and scoring.forward is default_forward):
            return ""
        facts = [
            code_version(*_SOURCES),
            torch.__version__,
            torch.get_num_threads(),
            device_name(),
            repr(reference.target),
            repr(self.library.students),
        ]
        digest = hashlib.sha256(json.dumps(facts).encode())
        digest.update(f"{scoring.metric.__name__} {scoring.divergence.__name__}".encode())
        digest.update(fingerprint(reference.model).encode())
        for batch in (*self.splits.calibration, *self.splits.search):
            digest.update(tensors_digest([*tensors_in(batch.inputs), *tensors_in(batch.targets)]).encode())
        return digest.hexdigest()

    @cached_property
    def form(self) -> Skeleton | None:
        """The skeleton that ranked candidates run as, None where the network cannot be shown as one."""
        reference = self.library.reference
        if reference.skeleton is not None:
            return reference.skeleton
        search = self.splits.search
        return self.library.once(("form", shapes_of(search)), lambda: stand_in(reference, search))

    @cached_property
    def prefixes(self) -> PrefixRuns | None:
        """Runs that share activations; None when that is switched off or cannot be."""
        if self.form is None or not self.sharing.prefixes:
            return None
        try:
            return PrefixRuns(self.form, self.splits.search, self.sharing.prefix_bytes)
        except NotShared:
            return None

    def _built(self, entries: Mapping[str, Entry]) -> _Built:
        library = self.library if self.sharing.variants else VariantLibrary(self.library.reference)
        if self.form is None:
            model = build(library, entries)
            return _Built(model, weights_bytes(model))
        model = assemble(library, entries, self.form)
        if self.marked is not None:
            return _Built(model, None)
        return _Built(model, weights_bytes(assemble(library, entries, self.reference_model)))

    def _ranked(self, built: _Built, entries: Mapping[str, Entry]) -> Measurement:
        """The measurement in one pass."""

        def standards() -> Sequence[Standard]:
            return standards_of(self.library, entries, self._standards)

        if self.prefixes is not None:
            outputs = self.prefixes.outputs(built.model, standards)
        else:
            forward = self.scoring.forward if self.form is None else skeleton_forward
            outputs = matched_outputs(built.model, self.splits.search, forward, standards())
        return self._judged(outputs, entries, built.size_bytes)

    def _judged(self, outputs: Tensor, entries: Mapping[str, Entry], size_bytes: int | None) -> Measurement:
        size, macs, latency = self.cost.total(entries)
        return Measurement(
            metric=checked(self.scoring.metric, outputs, self._targets),
            divergence=self.scoring.divergence(outputs, self._reference_outputs()),
            size_bytes=int(size) if size_bytes is None else size_bytes,
            macs=int(macs),
            latency_ms=float(latency),
        )

    def _reference_outputs(self) -> Tensor:
        if self.sharing.reference:
            return self._outputs
        return outputs_of(self.reference_model, self.splits.search, self.scoring.forward)

    @property
    def reference_model(self) -> nn.Module:
        return self.library.reference.model

    @property
    def forward(self) -> Forward:
        """How a batch goes through a candidate."""
        reference = self.library.reference
        return self.scoring.forward if reference.skeleton is None else reference.base_forward

    def finish(self, entries: Mapping[str, Entry]) -> Candidate:
        """The deployable network and its file; norms and ranges from the calibration split."""
        return self.deployed(self._deploy(entries), entries)

    def deployed(self, model: nn.Module, entries: Mapping[str, Entry]) -> Candidate:
        """A network that `entries` gave and that was deployed, with its file and figures."""
        file = None if self.marked is None else self.marked.write(model, self._metadata(entries))
        size = weights_bytes(model) if file is None else file_bytes(file)
        outputs = outputs_of(model, self.splits.search, self.forward)
        return Candidate(model, file, self._judged(outputs, entries, size))

    def _deploy(self, entries: Mapping[str, Entry]) -> nn.Module:
        changed = any(entry != UNCOMPRESSED for entry in entries.values())
        calibration = [batch.inputs for batch in self.splits.calibration] if changed else []
        model = channels_last(copy.deepcopy(build(self.library, entries)))
        standards = standards_of(self.library, entries, self.library.reference.standards) if changed else []
        skeleton = self.library.reference.skeleton
        if skeleton is None or self.marked is None:
            reestimate_norms(model, calibration, self.forward, standards)
            freeze_norms(model)
        else:
            deploy(model, skeleton, calibration, self.forward, standards)
        return model

    def _metadata(self, entries: Mapping[str, Entry]) -> dict[str, str]:
        """What the file says of itself: target, and the digest of the profile's layers."""
        layers = json.dumps(entries_to_json(entries), sort_keys=True)
        profile = hashlib.sha256(layers.encode()).hexdigest()
        return {"grainwise.target": self.library.reference.target.name, "grainwise.profile": profile}

    def test(self, model: nn.Module, forward: Forward) -> float:
        """The metric on the test split: for final models only."""
        outputs = outputs_of(model, self.splits.test, forward)
        return checked(self.scoring.metric, outputs, targets_of(self.splits.test))


def _in_words(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def other_tensors(model: nn.Module, layers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of what the weights file holds beside the layers' own tensors, by name (norms as scale and shift)."""
    owned = set(layers)
    return {n: tuple(v.shape) for n, v in stored_tensors(model) if n.rpartition(".")[0] not in owned}
