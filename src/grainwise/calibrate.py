"""A session that knows milliseconds: kernels from the table, the line to whole networks from a few that are timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from grainwise.evaluate.deployed import first_sample
from grainwise.evaluate.evaluator import Evaluator
from grainwise.evaluate.kernels import KernelTimes
from grainwise.evaluate.latency import LatencyTable, grids, input_shapes
from grainwise.evaluate.timing import interleaved
from grainwise.export.prices import OnnxPrices, other_tensors
from grainwise.export.runtime import open_session
from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.plan.cost import CostModel
from grainwise.plan.space import SearchSpace
from grainwise.session import Session

SECONDS = 4.0  # of timing the networks that the line is fitted to
_INT8 = Choice(Method.QUANTIZE, Granularity.CHANNEL, 8)


def with_latency(session: Session) -> Session:
    """The same session, its costs and measurements with milliseconds of this machine at batch 1.

    Kernels are measured once for a machine and kept in the user's cache directory. Raises ValueError for a target
    without a runtime.
    """
    evaluator, graph = session.evaluator, session.space.graph
    reference = session.reference
    if evaluator.marked is None:
        raise ValueError(f"the target {reference.target.name} has no runtime to time: latency cannot be a constraint")
    shapes = input_shapes(reference.model, session.example, reference.forward, graph)
    table = LatencyTable(evaluator.marked, shapes, grids(session.space), KernelTimes(reference.target))
    table.prepare(session.space)
    networks = calibration_networks(session.space)
    measured = whole_ms(session, networks)
    table = table.calibrate(session.cost, [(networks[name], ms) for name, ms in measured.items()])
    prices = OnnxPrices(
        evaluator.marked,
        session.space,
        reference.target,
        layer_time=table.layer_ms,
        boundary_time=table.boundary_ms,
        offset_ms=table.offset_ms,
    )
    cost = CostModel(session.space, other_tensors(evaluator.marked, reference.base), prices)
    timed = Evaluator(evaluator.library, session.splits, cost, evaluator.scoring, evaluator.marked)
    return replace(session, cost=cost, evaluator=timed)


def calibration_networks(space: SearchSpace) -> dict[str, dict[str, Entry]]:
    """Plain, all in 8 bits, each half, every second layer, pairs: the kinds of boundaries that a plan can have."""
    able = [layer.name for layer in space.layers if (layer.name, _INT8) not in space.reasons]
    middle = len(able) // 2
    chosen = {
        "float": [],
        "int8": able,
        "first half": able[:middle],
        "second half": able[middle:],
        "every second": able[::2],
        "pairs": [name for number, name in enumerate(able) if number // 2 % 2],
    }
    return {name: {layer: Entry(precision=_INT8) for layer in layers} for name, layers in chosen.items()}


def whole_ms(
    session: Session, networks: Mapping[str, Mapping[str, Entry]], seconds: float = SECONDS
) -> dict[str, float]:
    """Median processor milliseconds of each network's file, timed in turn at batch 1 on one thread."""
    evaluator = session.evaluator
    assert evaluator.marked is not None
    sample = first_sample(session.example, evaluator.marked.skeleton.inputs)
    programs = {}
    for name, entries in networks.items():
        file = evaluator.finish(entries).file
        assert file is not None
        opened = open_session(file.SerializeToString())
        programs[name] = lambda opened=opened: opened.run(None, sample)
    return {name: timing.cpu_median_ms for name, timing in interleaved(programs, seconds=seconds).items()}
