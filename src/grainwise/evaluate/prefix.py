"""Prefix activations: candidates run from where they part from those before them, within a limit of memory.

Letters: B batches of the split, all run through one candidate before the next.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from grainwise.evaluate.data import Batch
from grainwise.graph.forward import tensors_in
from grainwise.graph.program import Key, Kind, Program
from grainwise.graph.skeleton import Skeleton
from grainwise.realise.memory import limit
from grainwise.realise.norms import Standard, matched

KEEP_SECONDS = (
    0.3e-9  # a byte: what is kept cannot be reused, and fresh memory is 4096 bytes a page fault of about 1 us
)
_REMEMBERED = 200_000  # keys of values that were computed before, 16 bytes each


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A candidate's actors and keys, see `Program`."""

    actors: list[Any]
    keys: list[Key]


@dataclass(frozen=True, slots=True)
class _Plan:
    """run: steps to run, in order. known: steps whose values are kept already. keep: of those to run, the ones whose
    values are to be kept, with the seconds that it takes to make them again. free: for each step of `run` the values
    that nothing reads afterwards.
    """

    run: list[int]
    known: list[int]
    keep: dict[int, float]
    free: list[list[int]]


@dataclass(slots=True)
class _Kept:
    """A value on each of the B batches. seconds: to make it again. used: number of the run that used it last."""

    seconds: float
    used: int
    values: list[Any] = field(default_factory=list)
    bytes: int = 0
    whole: bool = False


class PrefixRuns:
    """Runs candidates of one skeleton, made by `assemble`, over fixed batches, batch norms as in `matched_norms`.

    A value is known by what decides it: the operations before it and the very modules they used. Kept are values that
    a later candidate of the announced batch will need, and inputs of layers that had to be computed a second time;
    each only when making it again would take longer than keeping it. limit_bytes: of memory for kept values, by default
    a share of what is free.

    Raises NotShared for a graph whose values cannot be kept.
    """

    def __init__(self, skeleton: Skeleton, batches: Sequence[Batch], limit_bytes: int | None = None) -> None:
        self.program = Program(skeleton.graph)
        self.limit_bytes = limit_bytes
        self.kept_bytes = self.steps_run = self.steps_known = 0
        self._batches = batches
        self._skeleton = skeleton
        steps = self.program.steps
        self._cuts = {i for s in steps if s.kind is Kind.MODULE and s.target in skeleton.units for i in s.inputs}
        self._kept: dict[Key, _Kept] = {}
        self._pending: Counter[Key] = Counter()
        self._seen: dict[Key, None] = {}
        self._prepared: WeakKeyDictionary[nn.Module, _Prepared] = WeakKeyDictionary()
        self._norms: WeakKeyDictionary[nn.Module, list[Callable[[Tensor], Tensor]]] = WeakKeyDictionary()
        self._runs = 0
        self._seconds: list[float] = []
        self._bytes: list[int] = []

    # -- which values to keep

    def schedule(self, models: Sequence[nn.Module]) -> list[int]:
        """The order in which to run these candidates, such that those with a common beginning follow each other; what
        one of them will need of another is kept from now on.
        """
        prepared = [self._prepare(model) for model in models]
        order = sorted(range(len(models)), key=lambda index: prepared[index].keys)
        self._pending.clear()
        made: set[Key] = set()
        for keys in (prepared[index].keys for index in order):
            run, known = self._needed(keys, made)
            self._pending.update(keys[step] for step in known)
            made.update(keys[step] for step in run)
        return order

    def _prepare(self, model: nn.Module) -> _Prepared:
        if model not in self._prepared:
            actors = self.program.actors(model)
            self._prepared[model] = _Prepared(actors, self.program.keys(actors))
        return self._prepared[model]

    def _needed(self, keys: Sequence[Key], made: set[Key]) -> tuple[list[int], list[int]]:
        """Steps that must run for the output, in order, and those whose value is in `made` or kept already."""
        needed = bytearray(len(keys))
        needed[self.program.output] = 1
        run, known = [], []
        for step in range(self.program.output, -1, -1):
            if not needed[step]:
                continue
            if keys[step] in made or ((kept := self._kept.get(keys[step])) is not None and kept.whole):
                known.append(step)
                continue
            run.append(step)
            for source in self.program.steps[step].inputs:
                needed[source] = 1
        return run[::-1], known

    def _plan(self, keys: Sequence[Key]) -> _Plan:
        run, known = self._needed(keys, set())
        seconds = [0.0] * len(keys)  # to make a value again from what is kept
        keep: dict[int, float] = {}
        for step in run:
            seconds[step] = self._seconds[step] + sum(seconds[source] for source in self.program.steps[step].inputs)
            key = keys[step]
            uses = self._pending.get(key, 0) or (step in self._cuts and key in self._seen)
            if uses * seconds[step] > self._bytes[step] * KEEP_SECONDS:
                keep[step], seconds[step] = seconds[step], 0.0
        last = {source: at for at, step in enumerate(run) for source in self.program.steps[step].inputs}
        free: list[list[int]] = [[] for _ in run]
        for source, at in last.items():
            free[at].append(source)
        return _Plan(run, known, keep, free)

    # -- running

    @torch.inference_mode()
    def outputs(self, model: nn.Module, standards: Callable[[], Sequence[Standard]]) -> Tensor:
        """Outputs of a candidate over all batches. standards: gives what its norms match on each batch."""
        if not self._seconds:
            self._time_steps()
        prepared = self._prepare(model)
        plan = self._plan(prepared.keys)
        callables = self._callables(prepared.actors, standards)
        self._runs += 1
        self.steps_run += len(plan.run)
        self.steps_known += len(plan.known)
        pinned = {prepared.keys[step] for step in plan.known}
        fresh = {prepared.keys[step]: _Kept(seconds, self._runs) for step, seconds in plan.keep.items()}
        self._kept |= fresh
        outputs: list[Tensor] = []
        try:
            for number in range(len(self._batches)):
                outputs.append(self._run(plan, prepared.keys, callables, number, pinned))
        finally:
            for key, kept in fresh.items():
                kept.whole = len(kept.values) == len(self._batches)
                if not kept.whole:
                    self._drop(key)
        self._settle(plan, prepared.keys)
        return torch.cat(outputs)

    def _run(
        self, plan: _Plan, keys: Sequence[Key], actors: Sequence[Sequence[Any]], number: int, pinned: set[Key]
    ) -> Tensor:
        steps, inputs = self.program.steps, tensors_in(self._batches[number].inputs)
        values: list[Any] = [None] * len(steps)
        for step in plan.known:
            values[step] = self._kept[keys[step]].values[number]
        output: Tensor | None = values[self.program.output]
        for step, free in zip(plan.run, plan.free, strict=True):
            operation = steps[step]
            actor = actors[step]
            made = inputs[operation.target] if operation.kind is Kind.INPUT else operation.run(values, actor[number])
            values[step] = made
            if step in plan.keep:
                self._keep(keys[step], made, pinned)
            if step == self.program.output:
                output = made
            for source in free:
                values[source] = None
        assert output is not None
        return output

    def _callables(self, actors: Sequence[Any], standards: Callable[[], Sequence[Standard]]) -> list[Sequence[Any]]:
        """What each step uses on each batch: norms as they match the uncompressed network there."""
        missing = [
            (step.target, actor)
            for step, actor in zip(self.program.steps, actors, strict=True)
            if isinstance(actor, _BatchNorm) and actor.track_running_stats and actor not in self._norms
        ]
        given = standards() if missing else []
        for name, norm in missing:
            self._norms[norm] = [matched(norm, standard.get(name)) for standard in given]
        count = len(self._batches)
        return [
            self._norms[actor] if isinstance(actor, _BatchNorm) and actor in self._norms else (actor,) * count
            for actor in actors
        ]

    # -- memory

    def _keep(self, key: Key, value: Any, pinned: set[Key]) -> None:
        """Keep a value of the present batch; beyond the limit what is worth least goes, possibly this value itself."""
        kept = self._kept.get(key)
        if kept is None:  # it was dropped on an earlier batch
            return
        size, most = held_bytes(value), limit(self.limit_bytes)
        while self.kept_bytes + size > most:
            least = min(
                (k for k, v in self._kept.items() if k == key or (v.bytes and k not in pinned)), key=self._worth
            )
            self._drop(least)
            if least == key:
                return
        kept.values.append(value)
        kept.bytes += size
        self.kept_bytes += size

    def _worth(self, key: Key) -> tuple[float, int]:
        """Seconds saved a byte by what the announced batch still needs, then how recently a value was used."""
        kept = self._kept[key]
        return self._pending.get(key, 0) * kept.seconds / max(1, kept.bytes), kept.used

    def _drop(self, key: Key) -> None:
        if (kept := self._kept.pop(key, None)) is not None:
            self.kept_bytes -= kept.bytes

    def _settle(self, plan: _Plan, keys: Sequence[Key]) -> None:
        """Write down what was used and what was computed."""
        for step in plan.known:
            self._kept[keys[step]].used = self._runs
            self._pending[keys[step]] -= 1
        self._seen |= dict.fromkeys(keys[step] for step in plan.run if step in self._cuts)
        while len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]

    def _time_steps(self) -> None:
        """Seconds and bytes of each step's value over all batches, from the uncompressed network on the first one."""
        actors, count = self.program.actors(self._skeleton.module), len(self._batches)
        inputs, values = tensors_in(self._batches[0].inputs), list[Any]()
        for step, actor in zip(self.program.steps, actors, strict=True):
            start = time.perf_counter()
            values.append(inputs[step.target] if step.kind is Kind.INPUT else step.run(values, actor))
            self._seconds.append(count * (time.perf_counter() - start))
            self._bytes.append(count * held_bytes(values[-1]))


def held_bytes(value: Any) -> int:
    """Bytes of memory that a value keeps from being used again; those of a view are its whole storage's."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(value)}
    return sum(storages.values())
