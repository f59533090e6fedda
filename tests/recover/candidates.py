"""Deployed candidates of the tiny network, ready to be recovered, without a file."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grainwise.evaluate.data import Splits
from grainwise.evaluate.measures import kl_divergence
from grainwise.graph.forward import default_forward
from grainwise.graph.skeleton import build_skeleton, skeleton_forward
from grainwise.graph.trace import trace
from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.plan.target import resolve_target
from grainwise.realise.build import build
from grainwise.realise.deploy import deploy
from grainwise.realise.library import VariantLibrary
from grainwise.realise.reference import Reference, channels_last
from grainwise.recover.batches import TrainingBatches
from grainwise.recover.losses import softened_divergence
from grainwise.recover.options import STANDARD, RecoverOptions, TrainingBudget
from grainwise.recover.recovery import Recovered, Score, Trainee, Watch, recover
from grainwise.recover.shadows import shadows_of
from grainwise.recover.step import Distillation, Student, feature_places
from grainwise.study.measurement import Measurement
from tests.export.candidates import quantised
from tests.networks import tiny, tiny_data, tiny_training

MIXED = {
    "stem": Entry(precision=quantised(4)),
    "block.0": Entry(Choice(Method.PRUNE, Granularity.LAYER, 0.7), quantised(4)),
    "block.3": Entry(precision=quantised(2, Granularity.BLOCK)),
    "down": Entry(Choice(Method.FACTORIZE, Granularity.CHANNEL, 0.25)),
    "fc": Entry(precision=quantised(4)),
}
"""Of the tiny network: something of everything that is trained."""


@cache
def library(vanishing: bool = False) -> VariantLibrary:
    """vanishing: a channel of the stem is all but nothing beside its bias."""
    network, x = tiny(), next(iter(tiny_data().calibration))[0][:2]
    if vanishing:
        with torch.no_grad():
            network.norm.weight[3], network.norm.bias[3] = 1e-9, 5.0
    graph = trace(network, x, default_forward)
    skeleton = build_skeleton(network, x, default_forward, graph)
    calibration = [inputs for inputs, _ in tiny_data().calibration]
    target = resolve_target("ort-cpu")
    return VariantLibrary(Reference.gather(network, graph, calibration, default_forward, target, skeleton))


@cache
def splits() -> Splits:
    return Splits.read(tiny_data())


def teacher() -> nn.Module:
    return library().reference.base


def outputs_of(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([skeleton_forward(network, batch.inputs) for batch in splits().search])


def score(network: nn.Module) -> Measurement:
    return Measurement(0.5, kl_divergence(outputs_of(network), outputs_of(teacher())), 1, 1)


@dataclass(frozen=True)
class Case:
    """A deployed candidate of the tiny network and its student."""

    trainee: Trainee
    loss: Distillation

    @staticmethod
    def of(entries: Mapping[str, Entry], *, vanishing: bool = False) -> Case:
        reference = library(vanishing).reference
        skeleton = reference.skeleton
        assert skeleton is not None
        network = channels_last(copy.deepcopy(build(library(vanishing), entries)))
        deploy(network, skeleton, reference.calibration, skeleton_forward)
        shadows = shadows_of(network, set(skeleton.units), reference.target.largest_code)
        student = Student(network, skeleton_forward, shadows)
        loss = partial(softened_divergence, temperature=2.0)
        places = feature_places(reference.graph, skeleton, network)
        distillation = Distillation(student, reference.base, skeleton_forward, loss, places)
        return Case(Trainee(student, skeleton_forward, skeleton, reference.calibration), distillation)

    @property
    def network(self) -> nn.Module:
        return self.trainee.student.network

    def recover(
        self,
        train: Iterable[Any] | None = None,
        *,
        epochs: int | None = 3,
        minutes: float | None = None,
        options: RecoverOptions = STANDARD,
        folder: Path | None = None,
        resume: bool = False,
        watch: Watch = lambda done, total, note: None,
        measure: Score = score,
    ) -> Recovered:
        batches = TrainingBatches.of(tiny_training() if train is None else train, splits(), options.seed)
        budget = TrainingBudget(epochs, minutes)
        return recover(
            self.trainee,
            self.loss,
            batches,
            measure,
            budget=budget,
            options=options,
            folder=folder,
            resume=resume,
            watch=watch,
        )
