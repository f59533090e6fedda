from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from grainwise.evaluate.data import DataError
from grainwise.recover.batches import TrainingBatches
from grainwise.recover.errors import RecoveryError
from tests.networks import pictures, tiny_data, tiny_training
from tests.recover.candidates import splits


class Shuffled:
    """Reads by all three global generators, and does not know its length."""

    def __iter__(self) -> Iterator[Tensor]:
        images = torch.cat([inputs for inputs, _ in tiny_training()])
        for part in torch.randperm(len(images)).split(32):
            yield images[part] * (1 + random.random() + np.random.rand())


def batches_of(loader: Any, seed: int = 0) -> TrainingBatches:
    return TrainingBatches.of(loader, splits(), seed)


def test_an_epoch_can_be_repeated_and_joined_anywhere() -> None:
    batches = batches_of(Shuffled())
    assert batches.per_epoch == 4
    whole = list(batches.epoch(1))
    for done in range(1, 5):
        rest = list(batches.epoch(1, done, whole[done - 1][1]))
        assert [digest for _, digest in rest] == [digest for _, digest in whole[done:]]
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(rest, whole[done:], strict=True))
    for other in (batches.epoch(0), batches_of(Shuffled(), seed=1).epoch(1)):
        assert {digest for _, digest in other}.isdisjoint(digest for _, digest in whole)


def test_a_shuffled_loader_of_torch_can_be_repeated() -> None:
    images = torch.cat([inputs for inputs, _ in tiny_training()])
    batches = batches_of(DataLoader(TensorDataset(images, torch.zeros(len(images))), 32, shuffle=True))
    first, again, other = (list(batches.epoch(number)) for number in (0, 0, 1))
    assert [d for _, d in first] == [d for _, d in again] != [d for _, d in other]


def test_the_generators_are_where_they_were() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    wanted = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    list(batches_of(Shuffled()).epoch(0))
    assert (torch.rand(1), np.random.rand(), random.random()) == wanted


def test_a_loader_that_was_changed_is_refused() -> None:
    batches = batches_of(Shuffled())
    with pytest.raises(RecoveryError, match="other batches than before the cut"):
        next(batches.epoch(0, 2, "another digest"))


def test_a_loader_that_runs_dry_is_refused() -> None:
    batches = batches_of(iter(tiny_training()))  # read once to be counted
    with pytest.raises(RecoveryError, match="ran dry: 0 batches in epoch 1, 4 were expected"):
        next(batches.epoch(0))
    with pytest.raises(RecoveryError, match="training data are empty"):
        batches_of([])


@pytest.mark.parametrize("name", ["calibration", "search", "test"])
def test_a_sample_of_another_split_is_refused(name: str) -> None:
    stolen = list(getattr(tiny_data(), name))[1][0][5:6]
    mixed = torch.cat([pictures(8, 11)[0][0], stolen])
    with pytest.raises(DataError, match=f"training split is in the {name} split too"):
        list(batches_of([mixed]).epoch(0))


def test_batches_of_unknown_form_are_refused() -> None:
    with pytest.raises(DataError, match="a batch of the training split is a str"):
        list(batches_of(["a"]).epoch(0))
