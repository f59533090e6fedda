"""A deployed file as OpenVINO runs it: a second executor, whose results are compared, not assumed (decision 0010)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grainwise.export.runtime import FileError, plain, required

if TYPE_CHECKING:
    from onnx import ModelProto

PACKAGE = "'grainwise[openvino]'"

_WEIGHTED = ("Convolution", "FullyConnected", "MatMul")


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a file."""

    name: str


@dataclass(frozen=True, slots=True)
class OpenVinoSession:
    """A compiled network, used as ONNX Runtime's session is, one call at a time.

    request: OpenVINO's InferRequest. kernels: how often each kernel that multiplies stands in it, by its precision.
    """

    request: Any
    inputs: tuple[Input, ...]
    kernels: Mapping[str, int]

    def get_inputs(self) -> Sequence[Input]:
        return self.inputs

    def run(self, output_names: None, input_feed: dict[str, Any], /) -> Sequence[Any]:
        """All outputs, in the file's order, as arrays of their own."""
        return tuple(self.request.infer(input_feed).values())


def open_openvino(file: str | Path | bytes, *, threads: int = 1) -> OpenVinoSession:
    """OpenVINO's session for a deployed file, on the CPU.

    OpenVINO knows no model-local functions, and does not fold what unpacks a weight: it reads `plain` of the file.

    Raises FileError naming the operators and nodes that OpenVINO cannot run, ImportError without OpenVINO.
    """
    required("openvino", PACKAGE)
    model = plain(file)
    _keep_orders(model)
    try:
        return compiled(model.SerializeToString(), [spec.name for spec in model.graph.input], threads=threads)
    except RuntimeError as error:
        raise FileError(_reason(str(error), model)) from error


def _keep_orders(model: ModelProto) -> None:
    """Rewrites what brings channels into another order so that OpenVINO leaves it alone.

    Where a convolution follows, OpenVINO takes such a Gather for a reversal of the input's channels and reorders the
    convolution's weights instead, by the same order and not its inverse (measured: decision 0010). It does not do so
    for indices of two dimensions.
    """
    onnx = required("onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for position, node in reversed([*enumerate(model.graph.node)]):
        if node.op_type != "Gather" or node.input[1] not in tensors:
            continue
        order = onnx.numpy_helper.to_array(tensors[node.input[1]])
        if order.ndim != 1 or not np.array_equal(np.sort(order), np.arange(len(order))):
            continue
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        output, row, added = node.output[0], f"{node.output[0]}.order", f"{node.output[0]}.axis"
        for name, value in ((row, order[None]), (added, np.array([axis if axis >= 0 else axis - 1]))):
            model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        node.input[1], node.output[0] = row, f"{output}.row"
        squeeze = onnx.helper.make_node("Squeeze", [node.output[0], added], [output], name=f"{output}.squeeze")
        model.graph.node.insert(position + 1, squeeze)


def compiled(source: Path | bytes, names: Sequence[str], *, threads: int = 1) -> OpenVinoSession:
    """OpenVINO's session for what it reads by itself: the path of an IR file, or ONNX. names: of the inputs, in order.

    Raises RuntimeError, in OpenVINO's words, for what it cannot run.
    """
    core = required("openvino", PACKAGE).Core()
    options = {
        # Without this, float32 layers run in bfloat16 where the processor has it.
        "EXECUTION_MODE_HINT": "ACCURACY",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.compile_model(core.read_model(source), "CPU", options)
    return OpenVinoSession(model.create_infer_request(), tuple(map(Input, names)), _kernels(model))


def _kernels(model: Any) -> dict[str, int]:
    """How often each kernel that multiplies weights stands in the compiled graph, by its precision."""
    facts = [operation.get_rt_info() for operation in model.get_runtime_model().get_ops()]
    found = [tuple(fact[key].astype(str) for key in ("layerType", "runtimePrecision")) for fact in facts]
    return dict(Counter(f"{kind} {precision}" for kind, precision in sorted(found) if kind in _WEIGHTED))


def _reason(message: str, model: ModelProto) -> str:
    """One sentence of OpenVINO's report: operators that it has no rule for and where they stand, or its last line."""
    found = re.search(r"No conversion rule found for operations: (.*)", message)
    if found is None:
        line = [line for line in message.splitlines() if line.strip()][-1]
        return f"OpenVINO cannot run the file ({line.strip()}); run it in ONNX Runtime"
    missing = [name.strip() for name in found[1].split(",")]
    nodes = [node for node in model.graph.node if f"{node.domain}.{node.op_type}".lstrip(".") in missing]
    places = ", ".join(node.name or node.output[0] for node in nodes)
    return f"OpenVINO has no operator {', '.join(missing)}, which {places} needs; run the file in ONNX Runtime"
