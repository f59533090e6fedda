from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from grainwise.export import runtime
from grainwise.export.manifest import Manifest
from grainwise.export.runtime import Deployed, FileError, kernels, open_session, optimised, run
from grainwise.plan.profile import CompressionProfile
from tests.export.candidates import images, tiny_candidate

NONE = Manifest(files={}, modules={}, norms={}, resized={}, figures={})


@pytest.fixture(scope="module")
def mixed() -> bytes:
    return tiny_candidate("mixed")[1].SerializeToString()


def scaled(names: tuple[str, ...]) -> Deployed:
    """A file that computes the difference of its inputs, in the order of `names`."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", 2]) for n in (*names, "y")]
    graph = helper.make_graph([helper.make_node("Sub", list(names), ["y"])], "g", values[:-1], values[-1:])
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Deployed(open_session(file.SerializeToString()), CompressionProfile({}), NONE)


def test_the_options_are_those_of_the_measurements(mixed: bytes) -> None:
    options = open_session(mixed, threads=2).get_session_options()
    assert (options.intra_op_num_threads, options.log_severity_level) == (2, 3)
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert open_session(mixed).get_session_options().intra_op_num_threads == 1
    assert open_session(mixed).get_providers() == ["CPUExecutionProvider"]


def test_float_layers_between_quantised_ones_stay_float(mixed: bytes) -> None:
    assert kernels(mixed)["QLinearConv"] == 2
    others = [node.op_type for node in optimised(mixed, disabled=()).graph.node]
    assert others.count("QLinearConv") == 3  # the reason for the option: without it the session does more than asked


def test_unfused_runs_the_nodes_as_they_are_written(mixed: bytes) -> None:
    (batch,) = images(16, 4)
    fused, plain = (run(open_session(mixed, fused=flag), {"input": batch}) for flag in (True, False))
    np.testing.assert_allclose(fused, plain, atol=0.05 * fused.std())


def test_a_path_and_bytes_are_the_same_file(mixed: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(mixed)
    assert kernels(tmp_path / "m.onnx") == kernels(str(tmp_path / "m.onnx")) == kernels(mixed)
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_the_optimised_graph_is_removed_again(mixed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.tempfile, "tempdir", str(tmp_path))
    kernels(mixed)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("where", ["initializer", "constant", "function"])
def test_tensors_outside_of_the_file_are_refused(where: str, tmp_path: Path) -> None:
    stored = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    onnx.external_data_helper.set_external_data(stored, "elsewhere.bin", 0, 16)
    stored.ClearField("raw_data")
    file = ModelProto(ir_version=10)
    if where == "initializer":
        file.graph.initializer.append(stored)
    elif where == "constant":
        file.graph.node.append(helper.make_node("Constant", [], ["w"], value=stored))
    else:
        node = helper.make_node("Constant", [], ["w"], value=stored)
        file.functions.append(helper.make_function("d", "f", [], ["w"], [node], [helper.make_opsetid("", 21)]))
    path = tmp_path / "m.onnx"
    path.write_bytes(file.SerializeToString())
    with pytest.raises(FileError, match=r"m.onnx keeps tensor 'w' in another file"):
        open_session(path)


def test_what_is_no_file_is_refused() -> None:
    with pytest.raises(FileError, match="the file is no ONNX file"):
        open_session(b"\xff\xff\xff")


def test_inputs_are_given_in_order_or_by_name() -> None:
    deployed = scaled(("a", "b"))
    a, b = np.ones((3, 2), np.float32), torch.full((3, 2), 3.0, requires_grad=True)
    expected = np.full((3, 2), -2.0, np.float32)
    for found in (deployed(a, b), deployed(b=b, a=a), deployed(a, b=b)):
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, expected)
    strided = torch.arange(8.0).reshape(2, 4).T
    np.testing.assert_array_equal(deployed(strided, torch.zeros(4, 2)), strided.numpy())


@pytest.mark.parametrize("inputs, named", [(1, ()), (3, ()), (2, ("a",)), (1, ("c",)), (2, ("c",)), (0, ("a",))])
def test_each_input_is_given_once(inputs: int, named: tuple[str, ...]) -> None:
    value = np.ones((1, 2), np.float32)
    with pytest.raises(TypeError, match=f"the network takes a, b; given were {inputs} inputs by position"):
        scaled(("a", "b"))(*[value] * inputs, **dict.fromkeys(named, value))


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(missing: str, mixed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = importlib.import_module

    def without(name: str) -> Any:
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name)

    monkeypatch.setattr(runtime.importlib, "import_module", without)
    with pytest.raises(ImportError, match=rf"{missing} is not installed.*pip install onnx onnxruntime"):
        open_session(mixed)
