"""The training data of a recovery: read anew each epoch, in an order that a resumed run meets again."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from grainwise.evaluate.data import Splits
from grainwise.recover.errors import RecoveryError


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators of torch, numpy and Python start at `seed`: loaders shuffle and augment by them.
    Afterwards they are where they were.
    """
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


@dataclass(frozen=True)
class TrainingBatches:
    """loader: as a split of `Data`, with or without targets, that can be read again for each epoch. Each epoch begins
    with the global generators at a state that follows from seed and epoch alone, so that it can be repeated.
    per_epoch: batches that the loader gives.
    """

    loader: Iterable[Any]
    splits: Splits
    seed: int
    per_epoch: int

    @staticmethod
    def of(loader: Iterable[Any], splits: Splits, seed: int) -> TrainingBatches:
        """A loader that does not know its length is read once to count. Raises RecoveryError for an empty one."""
        if isinstance(loader, Sized):
            count = len(loader)
        else:
            with seeded(_epoch_seed(seed, 0)):
                count = sum(1 for _ in loader)
        if count < 1:
            raise RecoveryError("the training data are empty; give at least one batch")
        return TrainingBatches(loader, splits, seed, count)

    def epoch(self, number: int, done: int = 0, last: str | None = None) -> Generator[tuple[Any, str]]:
        """Inputs of each batch of an epoch with their SHA-256, but for the first `done` ones.

        last: SHA-256 of the batch before the first one that is given. Raises RecoveryError when it is another one now,
        or when there are fewer batches than in other epochs; DataError for a sample that is in another split.
        """
        count = 0
        with seeded(_epoch_seed(self.seed, number)):
            for count, raw in enumerate(islice(self.loader, self.per_epoch), 1):
                if count < done:
                    continue
                batch, digest = self.splits.training(raw)
                if count == done:
                    if digest != last:
                        raise RecoveryError(
                            "the training data give other batches than before the cut, so that the run cannot go on as "
                            "it would have: give a loader whose order depends on nothing but the global generators"
                        )
                    continue
                yield batch.inputs, digest
        if count < self.per_epoch:
            raise RecoveryError(
                f"the training data ran dry: {count} batches in epoch {number + 1}, {self.per_epoch} were expected; "
                "give a loader that can be read anew for each epoch, for instance a list or a DataLoader"
            )


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % 2**32
