"""The same file in OpenVINO: how far it is from ONNX Runtime, and what is refused.

Bounds: 1e-4 of the outputs' standard deviation where all is float32. With 8-bit values two right runs part by single
steps of their grids, so there the mean difference is below 2 % of the deviation.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from grainwise.artefacts import verify_artefact
from grainwise.cli import app
from grainwise.export import artefact, runtime
from grainwise.export.artefact import ArtefactError, load
from grainwise.export.functions import DOMAIN, INNER, embedding
from grainwise.export.functions import Weight as Stored
from grainwise.export.manifest import MANIFEST, MODEL
from grainwise.export.openvino import open_openvino
from grainwise.export.parity import Difference
from grainwise.export.runtime import FileError, open_session, plain, run
from grainwise.plan.profile import CompressionProfile
from tests.export.candidates import PLANS, images, tiny_candidate, tiny_source
from tests.export.test_deployed_artefact import save
from tests.networks import tiny, tiny_data

openvino = pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save(tmp_path_factory.mktemp("openvino") / "out", tiny_source(), tiny_candidate("int4"))
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["figures"]["size_bytes"] = (root / MODEL).stat().st_size
    (root / MANIFEST).write_text(json.dumps(manifest))
    return root


@pytest.mark.parametrize("plan", PLANS)
def test_both_runtimes_compute_the_same(plan: str) -> None:
    file = tiny_candidate(plan)[1].SerializeToString()
    batch = torch.cat(images(256, 3))
    ours, other = (run(session, {"input": batch}) for session in (open_session(file), open_openvino(file)))
    found = Difference.between(ours, other)
    assert found.share < (1e-4 if plan == "float" else 0.02)
    assert found.agreement >= (1.0 if plan == "float" else 0.98)


def test_convolutions_of_all_bits_run_in_eight() -> None:
    for plan in ("int8", "int4", "int2"):
        kernels = open_openvino(tiny_candidate(plan)[1].SerializeToString()).kernels
        assert kernels["Convolution u8"] == 4 and "Convolution f32" not in kernels
    assert open_openvino(tiny_candidate("float")[1].SerializeToString()).kernels["Convolution f32"] == 4


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rows_that_are_unpacked_on_each_call_are_exact(bits: int) -> None:
    """Against the codes themselves, taken apart with NumPy."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 2**bits, (40, 16))
    per = 8 // bits
    planes = codes.reshape(40, per, 16 // per)  # planar: byte j holds dimensions j, j + n, ..
    packed = sum(planes[:, i] << (bits * i) for i in range(per)).astype(np.uint8)
    centre = {8: 0.0, 4: 8.0, 2: 1.5}[bits]
    if bits == 8:
        packed, codes = packed.view(np.int8), packed.view(np.int8).astype(int)
    scale = random.random(40).astype(np.float16)
    function = embedding(Stored(bits, "row"), gathered=True)
    call = helper.make_node(function.name, ["x", "weight", "scale"], ["y"], domain=DOMAIN)
    graph = helper.make_graph(
        [call],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["B", 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 5, 16])],
        [numpy_helper.from_array(packed, "weight"), numpy_helper.from_array(scale, "scale")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    file = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function, *INNER.values()])
    ids = random.integers(0, 40, (3, 5))
    expected = ((codes - centre) * scale.astype(np.float32)[:, None])[ids].astype(np.float32)
    for session in (open_session(file.SerializeToString()), open_openvino(file.SerializeToString())):
        np.testing.assert_array_equal(run(session, {"x": ids}), expected)


def test_plain_files_have_no_operators_of_our_own() -> None:
    for plan in PLANS:
        model = plain(tiny_candidate(plan)[1].SerializeToString())
        assert not model.functions and {node.domain for node in model.graph.node} == {""}


def test_an_artefact_is_called_alike_in_both(saved: Path) -> None:
    ours, other = load(saved), load(saved, runtime="openvino")
    (batch,) = images(32, 4)
    first = other(batch)
    np.testing.assert_array_equal(other(input=batch.numpy()), first)
    np.testing.assert_allclose(first, ours(batch), atol=0.2 * first.std())
    kept = first.copy()
    other(-batch)
    np.testing.assert_array_equal(first, kept)  # results are the caller's own
    assert other(batch[:1]).shape == (1, 4)
    with pytest.raises(TypeError, match="the network takes input"):
        other(batch, batch)


def test_what_openvino_cannot_run_is_named() -> None:
    def one(kind: str, domain: str) -> bytes:
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", 4]) for n in ("x", "y")]
        graph = helper.make_graph(
            [helper.make_node(kind, ["x"], ["y"], name="head", domain=domain)], "g", values[:1], values[1:]
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model: ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return model.SerializeToString()

    open_session(one("Inverse", "com.microsoft"))  # ONNX Runtime has it
    with pytest.raises(FileError, match=r"OpenVINO has no operator com.microsoft.Inverse, which head needs"):
        open_openvino(one("Inverse", "com.microsoft"))


def test_a_runtime_that_there_is_not_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="no runtime is called 'tensorrt'; give one of onnxruntime, openvino"):
        load(saved, runtime="tensorrt")
    with pytest.raises(ValueError, match="no runtime is called 'tensorrt'"):
        verify_artefact(saved, tiny(), tiny_data(), runtime="tensorrt")
    with pytest.raises(ValueError, match="a network was given, which PyTorch runs; leave it out"):
        load(saved, tiny(), runtime="openvino")  # type: ignore[call-overload]


def test_a_missing_package_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = importlib.import_module

    def without(name: str) -> Any:
        if name == "openvino":
            raise ModuleNotFoundError("No module named 'openvino'", name="openvino")
        return imported(name)

    monkeypatch.setattr(runtime.importlib, "import_module", without)
    load(saved)
    with pytest.raises(ImportError, match=r"openvino is not installed.*pip install 'grainwise\[openvino\]'"):
        load(saved, runtime="openvino")


def test_verify_reports_both(saved: Path) -> None:
    figures = verify_artefact(saved, tiny(), tiny_data(), runtime="openvino")
    assert "openvino_accuracy" not in verify_artefact(saved, tiny(), tiny_data())
    batches = list(tiny_data().test)
    targets = np.concatenate([targets for _, targets in batches])
    ours, other = (
        np.concatenate([network(inputs) for inputs, _ in batches])
        for network in (load(saved), load(saved, runtime="openvino"))
    )
    assert figures["openvino_accuracy"] == pytest.approx((other.argmax(1) == targets).mean())
    assert figures["openvino_max_abs_difference"] == pytest.approx(np.abs(ours - other).max(), rel=1e-5)
    assert figures["openvino_mean_abs_difference"] == pytest.approx(np.abs(ours - other).mean(), rel=1e-5)
    assert figures["openvino_top1_agreement"] == (ours.argmax(1) == other.argmax(1)).mean()
    assert figures["openvino_version"] == openvino.__version__.split("-")[0]
    assert str(figures["openvino_kernels"]).startswith("4 Convolution u8")
    ratio = figures["openvino_latency_ratio"]
    assert isinstance(ratio, float) and 0.05 < ratio < 50
    network = ["--model", "tests.networks:tiny", "--data", "tests.networks:tiny_data"]
    shown = CliRunner().invoke(app, ["verify", str(saved), *network, "--runtime", "openvino"]).stdout
    assert f"The same file in OpenVINO {figures['openvino_version']}: metric" in " ".join(shown.split())


def test_weights_for_pytorch_are_refused(tmp_path: Path) -> None:
    source, network = tiny_source(), tiny()
    root = artefact.save(
        tmp_path / "out",
        network,
        reference=network,
        graph=source.graph,
        profile=CompressionProfile({}),
        figures={"size_bytes": 0},
        card="",
    )
    with pytest.raises(ArtefactError, match=f"has no {MODEL} that openvino could run"):
        verify_artefact(root, tiny(), tiny_data(), runtime="openvino")
