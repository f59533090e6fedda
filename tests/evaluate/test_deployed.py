"""Races of files whose work is known, and the batches that they run on."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from grainwise.evaluate.data import Batch, DataError
from grainwise.evaluate.deployed import first_samples, race, race_figures


def products(count: int) -> bytes:
    """A file that multiplies its input by a matrix `count` times."""
    weight = numpy_helper.from_array(np.eye(256, dtype=np.float32), "w")
    names = ["x", *(f"y{n}" for n in range(count))]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in itertools.pairwise(names)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", 256]) for n in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(file)
    return bytes(file.SerializeToString())


@pytest.mark.parametrize("threads", [1, 2])
def test_more_work_takes_longer(threads: int) -> None:
    sample = {"x": np.zeros((64, 256), np.float32)}
    found = race({"one": products(1), "eight": products(8)}, sample, 0.5, threads=threads)
    assert found.ratios["one"] == 1.0
    assert found.ratios["eight"] > 3
    clock = "process_ms" if threads == 1 else "wall_ms"
    pairs = zip(getattr(found.timings["eight"], clock), getattr(found.timings["one"], clock), strict=True)
    assert found.ratios["eight"] == pytest.approx(statistics.median(a / b for a, b in pairs))
    assert found.clock == ("processor time" if threads == 1 else "time on the clock")
    figures = race_figures(found, "eight")
    assert (figures["latency_batch"], figures["latency_threads"]) == (64, threads)


def test_a_batch_is_taken_across_those_of_the_split() -> None:
    rows = torch.arange(24.0).reshape(12, 2)
    split = [Batch({"a": part, "b": -part}, None) for part in rows.split(5)]
    taken = first_samples(split, ["a", "b"], 7)
    np.testing.assert_array_equal(taken["a"], rows[:7].numpy())
    np.testing.assert_array_equal(taken["b"], -rows[:7].numpy())
    with pytest.raises(DataError, match="a batch of 13 samples was asked for, and the split has 12"):
        first_samples(split, ["a", "b"], 13)
    texts = [Batch(torch.zeros(2, length), None) for length in (8, 9)]
    with pytest.raises(DataError, match="first 3 samples of the split do not go into one batch"):
        first_samples(texts, ["a"], 3)
