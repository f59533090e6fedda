"""A ResNet-20-like network as plain records, and a made-up measurement with interactions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from grainwise.plan.choices import LEVELS, PRECISIONS, STRUCTURES, UNCOMPRESSED, Choice, Entry, Method, numbers_of
from grainwise.plan.cost import CostModel
from grainwise.plan.layers import Block, Coupling, Geometry, Kind, Layer, LayerGraph, Slot
from grainwise.plan.prices import COSTS
from grainwise.plan.projection import Projection
from grainwise.plan.space import SearchSpace, SpaceKind
from grainwise.search.searcher import Proposal, Searcher
from grainwise.study.measurement import Measurement
from grainwise.study.reward import HardBudget
from grainwise.study.sensitivity import Sensitivity
from grainwise.study.trial import Trial


def _conv(name: str, inputs: int, outputs: int, kernel: int, stride: int, place: int) -> Layer:
    pad = (kernel // 2,) * 2
    shape = Geometry(Kind.CONV2D, inputs, outputs, (kernel,) * 2, (stride,) * 2, pad, (1, 1))
    return Layer(name, shape, (place * stride) ** 2, place**2)


def _units(width: int) -> tuple[tuple[int, ...], ...]:
    return tuple((i,) for i in range(width))


def _slots(producers: Sequence[str], consumers: Sequence[str], width: int) -> tuple[Slot, ...]:
    units = _units(width)
    made = [Slot(f"{p}.weight", 0, units, True, p) for p in producers]
    norms = [Slot(f"{p}.bn.{t}", 0, units, True) for p in producers for t in ("weight", "bias", "mean", "var")]
    read = [Slot(f"{c}.weight", 1, units, False, c) for c in consumers]
    return (*made, *norms, *read)


def resnet(blocks: int = 3, width: int = 16) -> tuple[LayerGraph, dict[str, tuple[int, ...]]]:
    """A residual network of three stages and the shapes of its batch-norm tensors."""
    layers = [_conv("stem", 3, width, 3, 1, 32)]
    stage_of: list[tuple[list[str], list[str]]] = [(["stem"], [])]
    couplings: list[Coupling] = []
    found: list[Block] = []
    for stage in range(3):
        channels, place = width * 2**stage, 32 // 2**stage
        for block in range(blocks):
            down = stage > 0 and block == 0
            inputs = channels // 2 if down else channels
            a, b, name = (f"s{stage}.b{block}.{x}" for x in ("conv1", "conv2", "short"))
            stage_of[-1][1].append(a)
            layers.append(_conv(a, inputs, channels, 3, 2 if down else 1, place))
            layers.append(_conv(b, channels, channels, 3, 1, place))
            couplings.append(Coupling(a, channels, _slots([a], [b], channels)))
            found.append(Block(f"s{stage}.b{block}", a, (a, b, name) if down else (a, b)))
            if down:
                stage_of[-1][1].append(name)
                layers.append(_conv(name, inputs, channels, 1, 2, place))
                stage_of.append(([], []))
            stage_of[-1][0].append(b)
            if down:
                stage_of[-1][0].append(name)
    stage_of[-1][1].append("fc")
    layers.append(Layer("fc", Geometry(Kind.LINEAR, width * 4, 10, bias=True), 1, 1))
    for stage, (producers, consumers) in enumerate(stage_of):
        channels = width * 2**stage
        couplings.append(Coupling(producers[0], channels, _slots(producers, consumers, channels)))
    by_output = {p: c.name for c in couplings for p in c.producers()}
    by_input = {r: c.name for c in couplings for r in c.consumers()}
    named = tuple(
        Layer(la.name, la.geometry, la.positions_in, la.positions_out, by_output.get(la.name),
              (by_input[la.name],) if la.name in by_input else ())
        for la in layers
    )  # fmt: skip
    others = {s.parameter: (c.width,) for c in couplings for s in c.slots if s.layer is None}
    return LayerGraph(named, tuple(couplings), tuple(found)), others


_HARM = {"prune": 1.0, "quantize": 0.5, "factorize": 1.3, "distill": 1.2}
_GRAIN = {"layer": 1.0, "block": 1.4, "channel": 2.0}


def _severity(choice: Choice) -> float:
    """Damage of a choice on a layer of unit sensitivity: several orders of magnitude from mild to hard."""
    if choice.method is Method.NONE:
        return 0.0
    assert choice.level is not None and choice.granularity is not None
    grain = _GRAIN[choice.granularity]
    if choice.method is Method.QUANTIZE:
        return (
            _HARM["quantize"]
            * {8: 2e-4, 4: 0.04, 2: 1.2}[int(choice.level)]
            * {"layer": 2.5, "block": 0.8}.get(choice.granularity, 1.0)
        )
    hardness = LEVELS[choice.method].index(choice.level) / (len(LEVELS[choice.method]) - 1)
    return float(_HARM[choice.method] * grain * 0.02 * 40**hardness)


@dataclass
class Bed:
    """A search problem whose truth is known.

    true: `[L, S]` and `[L, P]` damages; estimate: the same with log-normal noise, as the search sees it.
    coupling: `[L - 1]` how much the damages of neighbours add to each other beyond their sum.
    """

    projection: Projection
    structures: np.ndarray
    precisions: np.ndarray
    interaction: np.ndarray
    sensitivity: Sensitivity
    features: np.ndarray

    def divergence(self, entries: Mapping[str, Entry]) -> float:
        damage = []
        for index, layer in enumerate(self.projection.space.layers):
            s, p = numbers_of(entries.get(layer.name, UNCOMPRESSED))
            own, bits = self.structures[index, s], self.precisions[index, p]
            damage.append(own + bits + 1.5 * np.sqrt(own * bits))
        d = np.array(damage)
        return float(d.sum() + (self.interaction * np.sqrt(d[1:] * d[:-1])).sum())

    def measure(self, entries: Mapping[str, Entry]) -> Measurement:
        size, macs, _ = self.projection.cost.total(entries)
        divergence = self.divergence(entries)
        return Measurement(float(np.exp(-divergence)), divergence, int(size), int(macs))

    def trial(self, number: int, proposal: Proposal) -> Trial:
        outcome = self.measure(proposal.entries)
        budgets = dict(zip(COSTS, self.projection.budget, strict=True))
        reward = HardBudget({k: v for k, v in budgets.items() if np.isfinite(v)})(outcome, outcome, proposal.entries)
        return Trial(number, proposal.entries, outcome, reward, proposal.source, 0.0)


@cache
def bed(
    seed: int, *, size: float | None = 0.12, macs: float | None = 0.5, kind: str = "chain", blocks: int = 3,
    noise: float = 0.7,
) -> Bed:  # fmt: skip
    """Budgets are shares of the uncompressed network's cost. Cached, so that tests share the cost tables."""
    rng = np.random.default_rng(seed)
    graph, others = resnet(blocks)
    space = SearchSpace.of(graph, SpaceKind(kind))
    cost = CostModel(space, others)
    full = cost.total({})
    budgets = {n: full[i] * v for i, (n, v) in enumerate((("size", size), ("macs", macs))) if v is not None}
    count = len(graph.layers)
    fragile = np.exp(rng.normal(0, 1.2, (count, 1)))
    tables = []
    for choices, legal in ((STRUCTURES, space.structures), (PRECISIONS, space.precisions)):
        base = np.array([_severity(c) for c in choices]) * fragile * np.exp(rng.normal(0, 0.6, (count, len(choices))))
        noisy = base * np.exp(rng.normal(0, noise, base.shape)) * np.exp(rng.normal(0, noise / 2, (count, 1)))
        tables.append((base, np.where(legal, noisy, np.inf)))
    estimate = Sensitivity(tables[0][1], tables[1][1])
    shares = np.array([[la.geometry.weights, la.macs, la.geometry.outputs, la.positions_out] for la in graph.layers])
    features = np.concatenate([np.log(shares), np.linspace(-1, 1, count)[:, None], np.log(fragile)], axis=1)
    interaction = rng.normal(0.3, 0.5, count - 1)
    return Bed(Projection(cost, budgets), tables[0][0], tables[1][0], interaction, estimate, features)


def run(problem: Bed, searcher: Searcher, evaluations: int = 300, batch: int = 16) -> list[Trial]:
    """The driver in small: ask, measure, tell."""
    trials: list[Trial] = []
    while len(trials) < evaluations:
        proposals = searcher.ask(min(batch, evaluations - len(trials)))
        new = [problem.trial(len(trials) + i, proposal) for i, proposal in enumerate(proposals)]
        searcher.tell(new)
        trials += new
    return trials


def best_divergence(problem: Bed, trials: Sequence[Trial]) -> float:
    """Lowest divergence within the budgets; infinite when nothing met them."""
    fitting = [
        t.measurement.divergence
        for t in trials
        if t.measurement and (problem.projection.cost.total(t.entries) <= problem.projection.budget).all()
    ]
    return min(fitting, default=float("inf"))
