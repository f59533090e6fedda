from __future__ import annotations

from typing import Any

import pytest
import torch

from grainwise.evaluate.data import Data, DataError, Splits, samples_in, take
from tests.networks import pictures, tiny_data


def test_splits_are_read_once_and_fingerprinted() -> None:
    splits = Splits.read(tiny_data())
    assert sum(samples_in(b.inputs) for b in splits.search) == 64
    assert splits.fingerprint == Splits.read(tiny_data()).fingerprint
    assert splits.search[0].inputs.is_contiguous(memory_format=torch.channels_last)


def test_a_sample_in_two_splits_is_refused() -> None:
    with pytest.raises(DataError, match="search split is in the calibration split too"):
        Splits.read(Data(pictures(8, 1), pictures(4, 5) + pictures(8, 1), pictures(4, 3)))


@pytest.mark.parametrize("split", ["calibration", "search", "test"])
def test_an_empty_split_is_refused(split: str) -> None:
    loaders: dict[str, Any] = {"calibration": pictures(8, 1), "search": pictures(8, 2), "test": pictures(8, 3)}
    with pytest.raises(DataError, match=f"the {split} split is empty"):
        Splits.read(Data(**{**loaders, split: []}))


def test_forms_of_batches() -> None:
    tokens = torch.arange(6).view(3, 2)
    batch = {"input_ids": tokens, "labels": [0, 1, 0]}
    splits = Splits.read(Data([tokens + 10], [batch], [{**batch, "input_ids": tokens + 20}]))
    assert set(splits.search[0].inputs) == {"input_ids"}
    assert splits.calibration[0].targets is None
    with pytest.raises(DataError, match="has no targets"):
        Splits.read(Data([tokens], [tokens + 9], [batch]))
    with pytest.raises(DataError, match="is a str"):
        Splits.read(Data(["x"], [batch], [batch]))
    with pytest.raises(DataError, match="holds no tensor"):
        Splits.read(Data([(["x"], [1])], [batch], [batch]))


def test_take_cuts_across_batches() -> None:
    batches = Splits.read(tiny_data()).search
    assert [samples_in(b.inputs) for b in take(batches, 40)] == [32, 8]
    assert take(batches, 40)[1].targets is not None
