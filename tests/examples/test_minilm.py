"""MiniLM: it ranks words as measured, its splits share no word, its metric is Spearman's, and it exports."""

from __future__ import annotations

import pytest
import torch

from examples import minilm
from grainwise.evaluate.data import Splits
from tests.examples.conftest import or_skip


@pytest.fixture(scope="module")
def network() -> minilm.MiniLM:
    return or_skip(minilm.model)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return Splits.read(or_skip(minilm.data))


def test_equal_values_share_a_rank() -> None:
    assert minilm.ranks(torch.tensor([3.0, 1.0, 3.0, 7.0])).tolist() == [2.5, 1, 2.5, 4]


def test_the_metric_is_the_correlation_of_ranks() -> None:
    """Similarities 1, 0, .6 have ranks 3, 1, 2 and the scores ranks 2, 1, 3: 1 - 6 * (1 + 0 + 1) / (3 * 8) = .5."""
    outputs = torch.tensor([[1, 0], [1, 0], [1, 0], [0, 1], [1, 0], [0.6, 0.8]])
    targets = torch.tensor([5.0, 5.0, 2.0, 2.0, 9.0, 9.0])
    assert minilm.metric(outputs, targets) == pytest.approx(0.5)


def test_wordsim_is_ranked_as_measured(network: minilm.MiniLM, splits: Splits) -> None:
    with torch.inference_mode():
        outputs = torch.cat([network(**batch.inputs) for batch in splits.test])
    torch.testing.assert_close(outputs.norm(dim=1), torch.ones(706))
    targets = torch.cat([batch.targets for batch in splits.test])
    assert minilm.metric(outputs, targets) == pytest.approx(0.729, abs=0.001)


def test_splits_are_of_fixed_shapes(splits: Splits) -> None:
    parts = (splits.calibration, splits.search, splits.test)
    assert [sum(len(b.inputs["input_ids"]) for b in part) for part in parts] == [64, 2 * 763, 2 * 353]
    assert [{b.inputs["input_ids"].shape[1] for b in part} for part in parts] == [{128}, {8}, {8}]


def test_padding_changes_nothing(network: minilm.MiniLM) -> None:
    with torch.inference_mode():
        short, long = (network(**minilm.encode(["tiger"], length)) for length in (3, 8))
    torch.testing.assert_close(short, long)


def test_it_exports_with_any_batch(network: minilm.MiniLM) -> None:
    example, other = minilm.tokens(batch=2, length=16), minilm.tokens(batch=3, length=16)
    other["attention_mask"][1, 9:] = 0
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        network, (), kwargs=example, dynamic_shapes={name: {0: batch} for name in example}, strict=False
    )
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(**other), network(**other))
