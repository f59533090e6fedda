"""Sensitivity scores: the divergence that each choice alone causes, measured on a few samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from grainwise.evaluate.data import take
from grainwise.evaluate.evaluator import Evaluator
from grainwise.evaluate.timing import Progress
from grainwise.plan.choices import PRECISIONS, STRUCTURES, UNCOMPRESSED, Entry
from grainwise.plan.space import SearchSpace
from grainwise.study.measurement import Measurement
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
    evaluator: Evaluator,
    space: SearchSpace,
    *,
    samples: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Sensitivity:
    """Run the network with one choice at one layer, for every legal choice; no labels are read. A choice that cannot
    be built or gives no finite outputs scores infinity, so that a search leaves it alone.

    Scored on the search split: the methods are fitted on the calibration split, and a layer that runs once a sample can
    fit as many samples as it has inputs to the bit, so that its scores would be far too good.

    Costs at most one forward pass of `samples` samples (by default as many as are `affordable`) for each legal choice;
    choices of one layer share what runs before it. The variants that it solves stay in the library.
    """
    some = replace(evaluator.splits, search=take(evaluator.splits.search, samples or affordable(space)))
    scoring = replace(evaluator.scoring, metric=lambda outputs, targets: 0.0)
    few = Evaluator(evaluator.library, some, evaluator.cost, scoring, evaluator.marked, evaluator.sharing)
    tables = [np.full((len(space.layers), len(c)), np.inf) for c in (STRUCTURES, PRECISIONS)]
    total, done = int(space.structures.sum() + space.precisions.sum()), 0
    for index, layer in enumerate(space.layers):
        structures, precisions = np.flatnonzero(space.structures[index]), np.flatnonzero(space.precisions[index])
        places = [(0, s, Entry(structure=STRUCTURES[s])) for s in structures]
        places += [(1, p, Entry(precision=PRECISIONS[p])) for p in precisions]
        for number, outcome in few.many([{layer.name: entry} for *_, entry in places]):
            table, action, entry = places[number]
            if isinstance(outcome, Measurement) and np.isfinite(outcome.divergence):
                tables[table][index, action] = 0.0 if entry == UNCOMPRESSED else outcome.divergence
            done += 1
            progress(done, total)
    return Sensitivity(*tables)
