"""A deployed file as ONNX Runtime runs it: the session it needs, and the kernels that it becomes."""

from __future__ import annotations

import importlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from grainwise.export.manifest import Manifest
from grainwise.plan.profile import CompressionProfile

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

DISABLED = ("WeightBiasQuantization",)
"""Optimisations that must not run. This one quantises float layers that stand between quantised ones, with weights
rounded at load and nothing said: a plan of 10 such convolutions ran as 14.
"""

_WITHOUT_INFO = 3  # log severity: errors only

_Level = Literal["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"]


class FileError(ValueError):
    """A file cannot be run; the message says why."""


class Runner(Protocol):
    """An opened file, as ONNX Runtime's sessions are used here."""

    def get_inputs(self) -> Sequence[Any]:
        """What the file takes, in its order; each has a `name`."""

    def run(self, output_names: None, input_feed: dict[str, Any], /) -> Sequence[Any]:
        """The outputs for arrays by input name."""


def required(name: str, packages: str = "onnx onnxruntime") -> Any:
    """A module that is imported when a file is run. Raises ImportError with the packages to install."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed, and ONNX files need it: run pip install {packages}"
        ) from error


def open_session(
    file: str | Path | bytes, *, threads: int = 1, fused: bool = True, disabled: Sequence[str] = DISABLED
) -> InferenceSession:
    """A session that runs the file as it was measured.

    fused: False runs every node on its own, as the file's text says: slower, and rounded a little differently.
    disabled: optimisations to leave out; none for a file of another tool, which reckons with all of them.
    Raises FileError for what is no ONNX file or keeps tensors outside of itself, ImportError without ONNX Runtime.
    """
    return _session(_content(file), threads, "ORT_ENABLE_ALL" if fused else "ORT_DISABLE_ALL", disabled)


def optimised(file: str | Path | bytes, *, disabled: Sequence[str] = DISABLED) -> ModelProto:
    """The graph that `open_session` really runs: constants folded, nodes fused to kernels."""
    return _rewritten(file, "ORT_ENABLE_ALL", disabled)


def plain(file: str | Path | bytes) -> ModelProto:
    """The same network in ONNX's own operators, for other runtimes: functions written out, constants folded, nothing
    fused to kernels.
    """
    return _rewritten(file, "ORT_ENABLE_BASIC", DISABLED)


def _rewritten(file: str | Path | bytes, level: _Level, disabled: Sequence[str]) -> ModelProto:
    with tempfile.TemporaryDirectory(prefix="grainwise-") as directory:
        path = Path(directory) / "optimised.onnx"
        _session(_content(file), 1, level, disabled, path)
        found: ModelProto = required("onnx").load(path)
    return found


def kernels(file: str | Path | bytes) -> dict[str, int]:
    """How often each kernel stands in the graph that is really run."""
    return dict(Counter(node.op_type for node in optimised(file).graph.node))


def _session(
    content: bytes, threads: int, level: _Level, disabled: Sequence[str], optimised_path: Path | None = None
) -> InferenceSession:
    runtime = required("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _WITHOUT_INFO
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, level)
    # Else the idle threads of one session go on spinning on the cores that the next one in a race is timed on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimised_path is not None:
        options.optimized_model_filepath = str(optimised_path)
    return runtime.InferenceSession(
        content, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )


def _content(file: str | Path | bytes) -> bytes:
    """The file's bytes, after a look at where it keeps its tensors: outside of the file nobody has checked them."""
    onnx = required("onnx")
    content = file if isinstance(file, bytes) else Path(file).read_bytes()
    shown = "the file" if isinstance(file, bytes) else str(file)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except required("google.protobuf.message").DecodeError as error:
        raise FileError(f"{shown} is no ONNX file") from error
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise FileError(f"{shown} keeps tensor {tensor.name!r} in another file; give one that holds all of them")
    return content


def _tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto in a message, wherever it stands: initializers, constants, bodies of functions."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for kind, value in message.ListFields():
        if kind.message_type is not None:
            for part in (value,) if hasattr(value, "DESCRIPTOR") else value:
                yield from _tensors(part)


@dataclass(frozen=True)
class Deployed:
    """An artefact's ONNX file, ready to run; call it with a batch."""

    session: Runner
    profile: CompressionProfile
    manifest: Manifest

    def __call__(self, *inputs: Any, **named: Any) -> NDArray[Any]:
        """Outputs for NumPy arrays or PyTorch tensors, given in the order of the file's inputs or by their names.

        Raises TypeError when there is not one value for each input.
        """
        names = [spec.name for spec in self.session.get_inputs()]
        given = dict(zip(names, inputs, strict=False))
        if len(inputs) > len(names) or given.keys() & named.keys() or {*given, *named} != {*names}:
            raise TypeError(
                f"the network takes {', '.join(names)}; given were {len(inputs)} inputs by position"
                + "".join(f", {name}" for name in named)
            )
        return run(self.session, {**given, **named})


def run(session: Runner, inputs: Mapping[str, Any]) -> NDArray[Any]:
    """The network's output for arrays or tensors by input name; inputs that the file does not have are left out."""
    names = [spec.name for spec in session.get_inputs()]
    outputs: NDArray[Any] = session.run(None, {name: _array(inputs[name]) for name in names})[0]
    return outputs


def _array(value: Any) -> NDArray[Any]:
    plain = value.detach() if hasattr(value, "detach") else value
    return np.ascontiguousarray(plain)
