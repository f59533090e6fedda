"""A deployed file as OpenVINO runs it: a second executor, whose results are compared, not assumed (decision 0010)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grainwise.export.runtime import FileError, plain, required

if TYPE_CHECKING:
    from onnx import ModelProto

PACKAGE = "grainwise[openvino]"


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a file."""

    name: str


@dataclass(frozen=True, slots=True)
class OpenVinoSession:
    """A compiled network, used as ONNX Runtime's session is, one call at a time. request: OpenVINO's InferRequest."""

    request: Any
    inputs: tuple[Input, ...]

    def get_inputs(self) -> Sequence[Input]:
        return self.inputs

    def run(self, output_names: None, input_feed: dict[str, Any], /) -> Sequence[Any]:
        """All outputs, in the file's order, as arrays of their own."""
        return tuple(self.request.infer(input_feed).values())


def open_openvino(file: str | Path | bytes, *, threads: int = 1) -> OpenVinoSession:
    """OpenVINO's session for a file, on the CPU.

    OpenVINO does not know model-local functions, so it reads `plain` of the file.

    Raises FileError naming the operators and nodes that OpenVINO cannot run, ImportError without OpenVINO.
    """
    openvino = required("openvino", PACKAGE)
    model = plain(file)
    options = {
        # Without this float32 layers run in bfloat16 where the processor has it.
        "EXECUTION_MODE_HINT": "ACCURACY",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    try:
        compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", options)
    except RuntimeError as error:
        raise FileError(_reason(str(error), model)) from error
    inputs = tuple(Input(spec.name) for spec in model.graph.input)
    return OpenVinoSession(compiled.create_infer_request(), inputs)


def _reason(message: str, model: ModelProto) -> str:
    """One sentence of OpenVINO's report: the operators that it has no rule for and where they stand, or its last line."""
    found = re.search(r"No conversion rule found for operations: (.*)", message)
    if found is None:
        line = [line for line in message.splitlines() if line.strip()][-1]
        return f"OpenVINO cannot run the file ({line.strip()}); run it in ONNX Runtime"
    missing = [name.strip() for name in found[1].split(",")]
    nodes = [node for node in model.graph.node if f"{node.domain}.{node.op_type}".lstrip(".") in missing]
    places = ", ".join(node.name or node.output[0] for node in nodes)
    return f"OpenVINO has no operator {', '.join(missing)}, which {places} needs; run the file in ONNX Runtime"
