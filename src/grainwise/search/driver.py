"""The driver: ask, evaluate, reward, store, tell; the one place where the parts of a search meet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from grainwise.plan.choices import NONE, UNCOMPRESSED, Entry
from grainwise.plan.layers import LayerGraph
from grainwise.search.searcher import Proposal, Searcher
from grainwise.store.studies import Checkpoint, Store
from grainwise.study.measurement import Failure, Measurement, Outcome
from grainwise.study.reward import Reward
from grainwise.study.trial import Trial

BATCH = 16

Evaluate = Callable[[Mapping[str, Entry]], Outcome]
Observer = Callable[[Trial], None]
"""Called after each trial is stored."""

Known = Callable[[str], Measurement | None]
"""(key) -> the measurement that was stored under it, if there is one."""


@runtime_checkable
class EvaluatesMany(Protocol):
    """An `Evaluate` that shares work between the profiles of a batch."""

    def __call__(self, entries: Mapping[str, Entry]) -> Outcome: ...

    def many(self, profiles: Sequence[Mapping[str, Entry]], known: Known) -> Iterable[tuple[int, Outcome]]:
        """(number in `profiles`, outcome), each before the next profile runs, in an order of its own choice."""
        ...

    def key(self, entries: Mapping[str, Entry]) -> str:
        """Under which the measurement is stored for other studies; empty for one that is not to be."""
        ...


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to search: until `evaluations` trials are done or `seconds` have passed, whichever is first."""

    evaluations: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not any(limit is not None and limit > 0 for limit in (self.evaluations, self.seconds)):
            raise ValueError("a search needs a budget: a number of evaluations or a time above 0")

    @staticmethod
    def parse(text: str | int) -> Budget:
        """`300` evaluations, or a time: `90s`, `20m`, `2h`. Raises ValueError for anything else."""
        units = {"s": 1.0, "m": 60.0, "h": 3600.0}
        word = str(text)
        try:
            if word and word[-1] in units:
                return Budget(seconds=float(word[:-1]) * units[word[-1]])
            return Budget(evaluations=int(word))
        except ValueError as error:
            raise ValueError(
                f"a budget is a number of evaluations or a time such as 90s, 20m, 2h, got {word!r}"
            ) from error


@dataclass(frozen=True, slots=True)
class Judge:
    """From entries to a trial's outcome and reward."""

    evaluate: Evaluate
    reward: Reward
    reference: Measurement
    graph: LayerGraph
    per_layer: bool = False

    def __call__(self, number: int, proposal: Proposal) -> Trial:
        start = time.monotonic()
        return self._trial(number, proposal, self.evaluate(proposal.entries), start)

    def many(self, asked: Mapping[int, Proposal], known: Known) -> Iterator[Trial]:
        """A trial of each proposal, by number, as soon as it is judged; the next begins when it was taken."""
        if not isinstance(self.evaluate, EvaluatesMany):
            yield from (self(number, proposal) for number, proposal in asked.items())
            return
        numbers = list(asked)
        outcomes = iter(self.evaluate.many([asked[number].entries for number in numbers], known))
        while True:
            start = time.monotonic()
            if (found := next(outcomes, None)) is None:
                return
            yield self._trial(numbers[found[0]], asked[numbers[found[0]]], found[1], start)

    def key(self, entries: Mapping[str, Entry]) -> str:
        return self.evaluate.key(entries) if isinstance(self.evaluate, EvaluatesMany) else ""

    def _trial(self, number: int, proposal: Proposal, outcome: Outcome, start: float) -> Trial:
        reward = None if isinstance(outcome, Failure) else self.reward(outcome, self.reference, proposal.entries)
        prefix = self._prefix_rewards(proposal.entries, reward) if self.per_layer and reward is not None else ()
        seconds = time.monotonic() - start
        return Trial(number, dict(proposal.entries), outcome, reward, proposal.source, seconds, prefix)

    def _prefix_rewards(self, entries: Mapping[str, Entry], final: float) -> tuple[float, ...]:
        """For each layer the reward of the profile that stops after it; a failed prefix repeats the one before."""
        rewards: list[float] = []
        prefix: dict[str, Entry] = {}
        last = self.reward(self.reference, self.reference, {})
        for layer in self.graph.layers:
            entry = entries.get(layer.name, UNCOMPRESSED)
            if entry != UNCOMPRESSED:
                prefix[layer.name] = entry
                outcome = self.evaluate(prefix)
                last = last if isinstance(outcome, Failure) else self.reward(outcome, self.reference, prefix)
            rewards.append(last)
        return (*rewards[:-1], final)


def search(
    *,
    searcher: Searcher,
    judge: Judge,
    store: Store,
    study: str,
    budget: Budget,
    observer: Observer,
    batch: int = BATCH,
) -> tuple[Trial, ...]:
    """Run until the budget is spent; returns all trials of the study.

    Each trial is stored before the next begins, and the searcher's state after each batch, so a search that was cut
    anywhere goes on with the same profiles as an uncut one: the batch that was under way is asked for again and what
    is in the store of it is not evaluated again. Trials are numbered as asked; within a batch they may be judged in
    another order, which changes nothing, since an outcome depends on its profile alone.
    """
    stored = {trial.number: trial for trial in store.trials(study)}
    told = _restore(searcher, store, study)
    start = time.monotonic()

    def spent() -> bool:
        late = budget.seconds is not None and time.monotonic() - start >= budget.seconds
        return late or (budget.evaluations is not None and told >= budget.evaluations)

    while not spent():
        count = batch if budget.evaluations is None else min(batch, budget.evaluations - told)
        asked = dict(enumerate(searcher.ask(count), told))
        for number in asked.keys() & stored.keys():
            if _plain(stored[number].entries) != _plain(asked[number].entries):
                raise RuntimeError(f"trial {number} of study {study!r} was another profile; the code has changed since")
        new = {number: proposal for number, proposal in asked.items() if number not in stored}
        for trial in judge.many(new, store.measurement):
            stored[trial.number] = trial
            store.add(study, trial, key=judge.key(trial.entries))
            observer(trial)
        searcher.tell([stored[number] for number in asked])
        told += len(asked)
        tensors, body = searcher.state()
        store.save_checkpoint(study, Checkpoint(told, body, save_tensors(tensors)))
    return tuple(stored[number] for number in sorted(stored))


def _plain(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    return {name: entry for name, entry in entries.items() if entry.structure != NONE or entry.precision != NONE}


def _restore(searcher: Searcher, store: Store, study: str) -> int:
    checkpoint = store.checkpoint(study)
    if checkpoint is None:
        return 0
    searcher.restore(load_tensors(checkpoint.tensors), checkpoint.body)
    return checkpoint.trials
