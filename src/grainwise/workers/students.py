"""Students of blocks trained side by side, each process on its own copy of a block's activations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import loky
import torch
from numpy.typing import NDArray

from grainwise.plan.choices import LEVELS, Choice, Granularity, Method
from grainwise.plan.space import units_left
from grainwise.realise.library import VariantLibrary
from grainwise.workers.processes import serve
from grainwise.workers.shared import Shared, unpack_from

_library: VariantLibrary | None = None  # of a worker process


def train_students(library: VariantLibrary, workers: int) -> int:
    """Train the students of every block and width in so many processes, each with as many threads as this one; how many
    there are. The library then holds them, the same to the last bit as if it had trained them itself.

    Raises RuntimeError where the system cannot share memory.
    """
    blocks = library.reference.graph.blocks
    widths = {block.name: _widths(library, number) for number, block in enumerate(blocks)}
    with closing(Shared(library)) as shared:
        given = (shared.path, torch.get_num_threads(), os.getpid())
        with loky.ProcessPoolExecutor(workers, initializer=_begin, initargs=given) as executor:
            trained = executor.map(_train, range(len(blocks)), widths.values())
            for block, states in zip(blocks, trained, strict=True):
                for units, state in zip(widths[block.name], states, strict=True):
                    library.student(block, units, {name: torch.from_numpy(value) for name, value in state.items()})
    return sum(map(len, widths.values()))


def _widths(library: VariantLibrary, number: int) -> list[int]:
    graph = library.reference.graph
    coupling = graph.coupling(graph.blocks[number].coupling)
    choices = [Choice(Method.DISTILL, Granularity.BLOCK, level) for level in LEVELS[Method.DISTILL]]
    return sorted({units_left(coupling, choice) for choice in choices}, reverse=True)


def _begin(path: str, threads: int, parent: int) -> None:
    global _library  # noqa: PLW0603  (loky hands an initializer's work to the calls in no other way)
    serve(threads, parent)
    _library = unpack_from(path)


def _train(number: int, widths: Sequence[int]) -> list[dict[str, NDArray[Any]]]:
    """Their states, which travel as plain numbers."""
    assert _library is not None
    block = _library.reference.graph.blocks[number]
    states = [_library.student(block, units).state_dict() for units in widths]
    return [{name: value.numpy() for name, value in state.items()} for state in states]
