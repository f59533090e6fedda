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

MIXES = 4  # random profiles among those that are measured

_EIGHT = Choice(Method.QUANTIZE, Granularity.CHANNEL, 8)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Milliseconds of a whole network from the sum of its kernels: slope * sum + offset. slope is positive."""

    slope: float = 1.0
    offset_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.slope > 0:
            raise ValueError(f"slope must be above 0, got {self.slope}: more work would take less time")

    def of(self, kernels_ms: float) -> float:
        return self.slope * kernels_ms + self.offset_ms


def fit(kernels_ms: Sequence[float], measured_ms: Sequence[float]) -> Calibration:
    """The line of least squared relative error; of slope 1 where the best has none that is positive.

    Raises ValueError for fewer than two networks.
    """
    if len(kernels_ms) < 2 or len(kernels_ms) != len(measured_ms):
        raise ValueError(f"{len(kernels_ms)} sums and {len(measured_ms)} times do not make a line: give two of each")
    sums, times = np.asarray(kernels_ms, dtype=np.float64), np.asarray(measured_ms, dtype=np.float64)
    matrix = np.stack([sums, np.ones_like(sums)], axis=1) / times[:, None]
    slope, offset = np.linalg.lstsq(matrix, np.ones_like(times), rcond=None)[0]
    if not slope > 0:
        return Calibration(1.0, float(np.mean(times - sums)))
    return Calibration(float(slope), float(offset))


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
