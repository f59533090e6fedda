"""From sums of kernel times to the time of a whole network: a line through a few networks that were really run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from grainwise.evaluate.timing import Timing, interleaved
from grainwise.export.runtime import open_session, run
from grainwise.plan.choices import NONE, Choice, Entry, Granularity, Method, entry_of
from grainwise.plan.cost import CostModel
from grainwise.plan.projection import BLOCK_STUDENTS, Projection, Walk
from grainwise.plan.space import SearchSpace

MIXES = 6  # random profiles among those that are measured

_EIGHT = Choice(Method.QUANTIZE, Granularity.CHANNEL, 8)


@dataclass(frozen=True, slots=True)
class Work:
    """Kernels that run one after the other. ms: their time by themselves. kernels: how many they are."""

    ms: float = 0.0
    kernels: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.ms + other.ms, self.kernels + other.kernels)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Milliseconds of a whole network from its work: slope * ms + kernel_ms * kernels + offset_ms.

    slope is positive. kernel_ms: what a kernel takes more (or, mostly, less) in a network than by itself, where the
    profiler disturbs it and the caches are as another kernel left them.
    """

    slope: float = 1.0
    offset_ms: float = 0.0
    kernel_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.slope > 0:
            raise ValueError(f"slope must be above 0, got {self.slope}: more work would take less time")

    def part(self, work: Work) -> float:
        """Milliseconds of a part of a network, never below 0."""
        return max(0.0, self.slope * work.ms + self.kernel_ms * work.kernels)

    def whole(self, work: Work) -> float:
        return self.part(work) + self.offset_ms


def fit(works: Sequence[Work], measured_ms: Sequence[float]) -> Calibration:
    """The calibration of least squared relative error; without what is the same for each kernel, and then of slope 1,
    where the best has no positive slope.

    Raises ValueError for fewer than two networks.
    """
    if len(works) < 2 or len(works) != len(measured_ms):
        raise ValueError(f"{len(works)} sums and {len(measured_ms)} times do not make a line: give two of each")
    times = np.asarray(measured_ms, dtype=np.float64)
    columns = np.array([(work.ms, 1.0, work.kernels) for work in works]) / times[:, None]
    for terms in (3, 2):
        slope, *others = np.linalg.lstsq(columns[:, :terms], np.ones_like(times), rcond=None)[0]
        if slope > 0:
            return Calibration(float(slope), *map(float, others))
    return Calibration(1.0, float(np.mean(times - [work.ms for work in works])))


def random_profile(space: SearchSpace, generator: np.random.Generator) -> dict[str, Entry]:
    """A legal profile, some layers with a structure, some with a precision; how many is random too. Students of whole
    blocks are left out: they run as pruned channels do, and have to be trained.
    """
    structured, quantised = generator.random(2)
    walk = Walk(Projection(CostModel(space, {}), {}))
    while not walk.done:
        legal = walk.legal()
        legal[list(BLOCK_STUDENTS)] = False
        rows = np.flatnonzero(legal.any(axis=1))
        structure = int(generator.choice(rows)) if generator.random() < structured else 0
        columns = np.flatnonzero(legal[structure])
        plain = generator.random() >= quantised and legal[structure, 0]
        walk.take(entry_of(structure, 0 if plain else int(generator.choice(columns))))
    return dict(walk.entries)


def plain_profiles(space: SearchSpace) -> dict[str, dict[str, Entry]]:
    """Uncompressed; all layers in 8 bits that can be; the first half of them; the second half."""
    layers = [layer.name for layer in space.layers if (layer.name, _EIGHT) not in space.reasons]
    eight = {name: Entry(NONE, _EIGHT) for name in layers}
    half = len(layers) // 2
    return {
        "float": {},
        "int8": eight,
        "first half int8": {name: eight[name] for name in layers[:half]},
        "second half int8": {name: eight[name] for name in layers[half:]},
    }


def calibration_profiles(space: SearchSpace, generator: np.random.Generator) -> dict[str, dict[str, Entry]]:
    """What to run for a calibration, by names for people: the plain profiles and some random ones."""
    mixes = {f"mix {number}": random_profile(space, generator) for number in range(1, MIXES + 1)}
    return {**plain_profiles(space), **mixes}


def time_files(
    files: Mapping[str, str | Path | bytes],
    inputs: Mapping[str, Any],
    *,
    threads: int = 1,
    rounds: int | None = None,
    seconds: float | None = None,
) -> dict[str, Timing]:
    """Deployed files timed in turn on one batch (arrays or tensors by input name)."""
    sessions = {name: open_session(file, threads=threads) for name, file in files.items()}
    programs = {name: partial(run, session, inputs) for name, session in sessions.items()}
    return interleaved(programs, rounds=rounds, seconds=seconds)
