"""A session that knows milliseconds: kernels from the table, the line to whole networks from a few that are timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from grainwise.evaluate.calibration import Calibration, calibration_profiles, time_files
from grainwise.evaluate.deployed import first_sample
from grainwise.evaluate.evaluator import Evaluator
from grainwise.evaluate.grids import grids
from grainwise.evaluate.kernels import KernelTimes
from grainwise.evaluate.latency import LatencyTable
from grainwise.evaluate.places import input_shapes
from grainwise.evaluate.timing import Progress
from grainwise.export.prices import OnnxPrices, other_tensors
from grainwise.plan.choices import Entry
from grainwise.plan.cost import CostModel
from grainwise.session import Session

SECONDS = 4.0  # of timing the networks that the line is fitted to


def with_latency(
    session: Session, progress: Progress = lambda done, total: None, line: Calibration | None = None
) -> Session:
    """The same session, its costs and measurements with milliseconds of this machine at batch 1.

    Kernels are measured once for a machine and kept in the user's cache directory; progress: (done, total) of them.
    line: from their sum to a network's time, as an earlier session found it (`Session.line`); None to time some now.
    Raises ValueError for a target without a runtime.
    """
    evaluator, graph = session.evaluator, session.space.graph
    reference = session.reference
    if evaluator.marked is None:
        raise ValueError(f"the target {reference.target.name} has no runtime to time: latency cannot be a constraint")
    shapes = input_shapes(reference.model, session.example, reference.forward, graph)
    table = LatencyTable(
        evaluator.marked,
        shapes,
        grids(session.space),
        KernelTimes(reference.target, remember=evaluator.sharing.latency),
    )
    table.prepare(session.space, progress)
    if line is None:
        profiles = calibration_profiles(session.space, np.random.default_rng(0))
        measured = whole_ms(session, profiles)
        table = table.calibrated(session.cost, [(profiles[name], ms) for name, ms in measured.items()])
    else:
        table = LatencyTable(table.marked, table.shapes, table.grids, table.times, parts=line)
    prices = OnnxPrices(
        evaluator.marked,
        session.space,
        reference.target,
        layer_time=table.layer_ms,
        boundary_time=table.boundary_ms,
        offset_ms=table.offset_ms,
    )
    cost = CostModel(session.space, other_tensors(evaluator.marked, reference.base), prices)
    timed = Evaluator(evaluator.library, session.splits, cost, evaluator.scoring, evaluator.marked, evaluator.sharing)
    return replace(session, cost=cost, evaluator=timed, line=table.parts)


def whole_ms(
    session: Session, profiles: Mapping[str, Mapping[str, Entry]], seconds: float = SECONDS
) -> dict[str, float]:
    """Median processor milliseconds of each profile's file, timed in turn at batch 1 on one thread."""
    evaluator = session.evaluator
    assert evaluator.marked is not None
    files = {}
    for name, entries in profiles.items():
        file = evaluator.finish(entries).file
        assert file is not None
        files[name] = file.SerializeToString()
    sample = first_sample(session.example, evaluator.marked.skeleton.inputs)
    return {name: timing.cpu_median_ms for name, timing in time_files(files, sample, seconds=seconds).items()}
