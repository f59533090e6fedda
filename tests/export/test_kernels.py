from __future__ import annotations

import pytest
from onnx import GraphProto, helper

from grainwise.export.kernels import found_kernels, misplaced, planned_kernels
from grainwise.export.runtime import optimised
from tests.export.candidates import images, tiny_candidate, tiny_source


def _graph(plan: str) -> GraphProto:
    return optimised(tiny_candidate(plan)[1].SerializeToString()).graph


@pytest.mark.parametrize("plan", ["int8", "factorized", "bitmask"])
def test_a_right_file_runs_what_is_planned(plan: str) -> None:
    assert found_kernels(_graph(plan)) == planned_kernels(tiny_candidate(plan)[0], images(2, 3))


@pytest.mark.parametrize(
    "file, module, kernel, said",
    [
        ("mixed", "int8", "QLinearConv", "layer block.0 does not run so, layer down does not run so"),
        ("int8", "mixed", "QLinearConv", "layer block.0 should not run so, layer down should not run so"),
        ("mixed", "int8", "DynamicQuantizeMatMul", "layer fc does not run so"),
        ("int8", "mixed", "DynamicQuantizeMatMul", "layer fc should not run so"),
        ("float", "int8", "QLinearAdd", "sum add does not run so"),
        ("int8", "float", "QLinearAdd", "sum add should not run so"),
        (
            "float",
            "factorized",
            "QLinearConv",
            ", ".join(["layer block.0 does not run so"] * 3 + ["layer down does not run so"] * 3),
        ),
        (
            "factorized",
            "float",
            "QLinearConv",
            "what makes block.0.1 should not run so, what makes block.0.3 should not run so, "
            "what makes down.1 should not run so, what makes down.3 should not run so, "
            "layer block.0 should not run so, layer down should not run so",
        ),
        ("int8", "int8", "QLinearConv", "a layer runs several times"),
    ],
)
def test_layers_that_are_not_as_planned_are_named(file: str, module: str, kernel: str, said: str) -> None:
    assert misplaced(_graph(file), tiny_candidate(module)[0], tiny_source().skeleton, kernel) == said


def test_kernels_that_no_plan_has_count_too() -> None:
    node = helper.make_node("MatMulNBits", ["x", "fc.weight_q4"], ["y"])
    graph = helper.make_graph([node, helper.make_node("Add", ["y", "y"], ["z"])], "g", [], [])
    assert found_kernels(graph) == {"MatMulNBits": 1}
    model = tiny_candidate("int8")[0]
    assert misplaced(graph, model, tiny_source().skeleton, "MatMulNBits") == "layer fc should not run so"
