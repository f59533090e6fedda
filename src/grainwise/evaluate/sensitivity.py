"""Sensitivity scores: the divergence that each choice alone causes, measured on a few samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grainwise.evaluate.data import Batch, take
from grainwise.evaluate.evaluator import BUILD_ERRORS, Scoring, matched_outputs, watched_outputs
from grainwise.evaluate.timing import Progress
from grainwise.plan.choices import NONE, PRECISIONS, STRUCTURES, Choice, Entry
from grainwise.plan.space import SearchSpace
from grainwise.realise.build import build, standards_of
from grainwise.realise.library import VariantLibrary
from grainwise.study.sensitivity import Sensitivity

MOST, LEAST = 128, 8  # samples that a choice is scored on
MACS = 6e12  # multiply-accumulates of the whole table: minutes on one core


def affordable(space: SearchSpace) -> int:
    """Samples on which all choices can be scored with `MACS` operations: what the machine is does not matter."""
    graph = space.graph
    macs = graph.other_macs + sum(layer.macs for layer in graph.layers)
    choices = int(space.structures.sum() + space.precisions.sum())
    return max(LEAST, min(MOST, int(MACS / max(1, macs * choices))))


def measure_sensitivity(
    library: VariantLibrary,
    space: SearchSpace,
    batches: Sequence[Batch],
    scoring: Scoring,
    *,
    samples: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Sensitivity:
    """Run the network with one choice at one layer, for every legal choice; no labels are read. A choice that cannot
    be built or gives no finite outputs scores infinity, so that a search leaves it alone.

    batches: not those that the methods are fitted on: a layer that runs once a sample can fit as many samples as it has
    inputs to the bit, and its scores would be far too good.

    Costs one forward pass of `samples` samples (by default as many as are `affordable`) for each legal choice. The
    variants that it solves stay in the library.
    """
    batches = take(batches, samples or affordable(space))
    base, forward = library.reference.base, library.reference.base_forward
    reference, standards = watched_outputs(base, batches, forward)

    def score(layer: str, choice: Choice, precision: bool) -> float:
        try:
            entries = {layer: Entry(precision=choice) if precision else Entry(structure=choice)}
            outputs = matched_outputs(
                build(library, entries), batches, forward, standards_of(library, entries, standards)
            )
        except BUILD_ERRORS:
            return np.inf
        divergence = scoring.divergence(outputs, reference)
        return divergence if np.isfinite(divergence) else np.inf

    tables = [np.full((len(space.layers), len(c)), np.inf) for c in (STRUCTURES, PRECISIONS)]
    total, done = int(space.structures.sum() + space.precisions.sum()), 0
    for table, legal, choices, precision in zip(
        tables, (space.structures, space.precisions), (STRUCTURES, PRECISIONS), (False, True), strict=True
    ):
        for index, action in np.argwhere(legal):
            choice = choices[action]
            table[index, action] = 0.0 if choice == NONE else score(space.layers[index].name, choice, precision)
            done += 1
            progress(done, total)
    return Sensitivity(*tables)
