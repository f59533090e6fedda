"""The driver: ask, evaluate, reward, store, tell; the one place where the parts of a search meet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from grainwise.interrupt import Stopped
from grainwise.plan.choices import NONE, UNCOMPRESSED, Entry
from grainwise.plan.layers import LayerGraph
from grainwise.search.searcher import Searcher
from grainwise.store.studies import Checkpoint, Store, StoreError
from grainwise.study.measurement import Failure, Measurement
from grainwise.study.reward import Reward
from grainwise.study.trial import Task, Trial
from grainwise.workers.pool import Evaluate, EvaluatesMany, Inline, Judged, Pool, Stop

BATCH = 16

Observer = Callable[[Trial], None]
"""Called after each trial is stored."""


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

    def __call__(self, task: Task, judged: Judged) -> Trial:
        start, outcome, reward = time.monotonic(), judged.outcome, None
        if not isinstance(outcome, Failure):
            reward = self.reward(outcome, self.reference, task.entries)
            if not math.isfinite(reward):
                outcome, reward = Failure("reward", f"the reward is {reward}"), None
        prefix = self._prefix_rewards(task.entries, reward) if self.per_layer and reward is not None else ()
        return Trial(
            number=task.number,
            entries=dict(task.entries),
            outcome=outcome,
            reward=reward,
            source=task.source,
            seconds=judged.seconds + time.monotonic() - start,
            prefix_rewards=prefix,
            policy=task.policy,
            worker=judged.worker,
            started=judged.started,
        )

    def key(self, entries: Mapping[str, Entry]) -> str:
        return self.evaluate.key(entries) if isinstance(self.evaluate, EvaluatesMany) else ""

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
                found = last if isinstance(outcome, Failure) else self.reward(outcome, self.reference, prefix)
                last = found if math.isfinite(found) else last
            rewards.append(last)
        return (*rewards[:-1], final)


def search(
    *,
    searcher: Searcher,
    judge: Judge,
    store: Store,
    study: str,
    budget: Budget,
    observer: Observer = lambda trial: None,
    batch: int = BATCH,
    pool: Pool | None = None,
    stop: Stop = lambda: False,
) -> tuple[Trial, ...]:
    """Run until the budget is spent; returns all trials of the study.

    Each trial is stored before its worker begins the next, and the searcher's state after each batch, so a search that
    was cut anywhere goes on with the same profiles as an uncut one: the batch that was under way is asked for again and
    what is in the store of it is not evaluated again. Trials are numbered as asked; within a batch they may be judged
    in another order, which changes nothing, since an outcome depends on its profile alone.

    pool: where profiles are evaluated; this process when there is none. Raises Stopped when `stop` says so, after the
    trials that had begun.
    """
    stored = {trial.number: trial for trial in store.trials(study)}
    told = _restore(searcher, store, study)
    pool = pool or Inline(judge.evaluate)
    start = time.monotonic()

    def spent() -> bool:
        late = budget.seconds is not None and time.monotonic() - start >= budget.seconds
        return late or (budget.evaluations is not None and told >= budget.evaluations)

    def begun(hands: Mapping[int, str]) -> None:
        store.start(study, hands, time.time())

    while not spent():
        if stop():
            raise Stopped(f"study {study!r} was stopped after {len(stored)} trials")
        count = batch if budget.evaluations is None else min(batch, budget.evaluations - told)
        proposals = enumerate(searcher.ask(count), told)
        tasks = {number: Task(number, p.entries, p.source, told) for number, p in proposals}
        new = {number: task.entries for number, task in tasks.items() if not _known(study, task, stored)}
        store.queue(study, [tasks[number] for number in new])
        for ended in pool.run(new, store.measurement, begun, stop):
            trials = {judged.number: judge(tasks[judged.number], judged) for judged in ended}
            keys = {number: judge.key(trial.entries) for number, trial in trials.items()}
            store.add(study, *trials.values(), keys=keys)
            stored |= trials
            for trial in trials.values():
                observer(trial)
        if tasks.keys() <= stored.keys():  # else it was stopped
            # A stored profile names compressed layers only, a searcher knows all.
            searcher.tell([replace(stored[number], entries=task.entries) for number, task in tasks.items()])
            told += len(tasks)
            tensors, body = searcher.state()
            store.save_checkpoint(study, Checkpoint(told, body, save_tensors(tensors)))
    return tuple(stored[number] for number in sorted(stored))


def _known(study: str, task: Task, stored: Mapping[int, Trial]) -> bool:
    """Whether a trial is in the store. Raises RuntimeError when it is there with another profile."""
    if task.number not in stored:
        return False
    if _plain(stored[task.number].entries) != _plain(task.entries):
        raise RuntimeError(f"trial {task.number} of study {study!r} was another profile; the code has changed since")
    return True


def _plain(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    return {name: entry for name, entry in entries.items() if entry.structure != NONE or entry.precision != NONE}


def _restore(searcher: Searcher, store: Store, study: str) -> int:
    checkpoint = store.checkpoint(study)
    if checkpoint is None:
        return 0
    try:
        searcher.restore(load_tensors(checkpoint.tensors), checkpoint.body)
    except (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise StoreError(f"the checkpoint of study {study!r} is none of its searcher's: {error}") from error
    return checkpoint.trials
