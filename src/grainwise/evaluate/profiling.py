"""Kernel times of single layers: many independent branches in one ONNX file, run under ONNX Runtime's own profiler."""

from __future__ import annotations

import importlib
import json
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import nn

from grainwise.export.functions import DOMAIN, IR_VERSION, OPSET
from grainwise.export.layers import GraphWriter
from grainwise.export.runtime import DISABLED, open_session
from grainwise.methods.activations import EightBit
from grainwise.methods.layers import Ghost
from grainwise.methods.storage import PackedWeight
from grainwise.plan.layers import Geometry, Kind
from grainwise.realise.deploy import stages_of
from grainwise.realise.norms import FrozenNorm

RUNS = 32  # profiled runs
FASTEST = 8  # of them that count, for each kernel: their mean is finer than the profiler's whole microseconds
WARM_UP = 4

CONVERSIONS = ("ReorderInput", "ReorderOutput", "QuantizeLinear", "DequantizeLinear", "Transpose")
"""What ONNX Runtime puts between kernels of different kinds: not a part of the layer between them."""

_CONVOLUTIONS = (Kind.CONV1D, Kind.CONV2D)


@dataclass(frozen=True, slots=True)
class Branch:
    """One realised layer to be timed.

    shape: of its input, without the batch. static: it reads and writes values of 8 bits. normed: a batch norm that
    cannot be folded into it follows. clip: the operator of `places.CLIPS` that follows then, or nothing.
    """

    module: nn.Module
    geometry: Geometry
    shape: tuple[int, ...]
    static: bool = False
    normed: bool = False
    clip: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """A kernel that ran. ms: its time, with what the profiler adds to it. elements: numbers that it wrote."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ms: float
    elements: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Kernels of one branch.

    ms: their time, without the conversions at both ends. kernels: how many they are. reads_blocked, writes_blocked:
    input and output are float32 in blocks of channels, ONNX Runtime's own layout for convolutions.
    """

    ms: float
    kernels: int = 1
    reads_blocked: bool = False
    writes_blocked: bool = False


Feeds = Mapping[str, NDArray[Any]]


class BranchWriter:
    """A file of branches that share nothing but their inputs."""

    def __init__(self) -> None:
        self.writer = GraphWriter()
        self.feeds: dict[str, NDArray[Any]] = {}
        self.outputs: list[str] = []
        self._generator = np.random.default_rng(0)

    def input(self, shape: Sequence[int], *, kind: Kind = Kind.CONV2D, own: str = "") -> str:
        """Name of an input of batch 1, one for each shape; tokens for an Embedding. own: not shared with others."""
        tokens = kind is Kind.EMBEDDING
        name = "_".join(["tokens" if tokens else "x", *map(str, shape), *([own] if own else [])])
        if name not in self.feeds:
            self.feeds[name] = (
                self._generator.integers(0, 2, (1, *shape))
                if tokens
                else self._generator.standard_normal((1, *shape)).astype(np.float32)
            )
        return name

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.writer.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def _tensor(self, name: str, value: Any) -> str:
        return name if name in self.writer.tensors else self.writer.array(name, value)

    def point(self, x: str, y: str) -> str:
        """A value kept in 8 bits."""
        self.writer.point(_calibrated(EightBit()), x, y, y)
        return y

    def output(self, value: str, rank: int) -> None:
        """Ends a branch: one number of its value becomes the output, so that its memory is free for the next branch, as
        in a network. The cut moves up before conversions, which are not counted for a branch.
        """
        bounds = [self._tensor(f"bounds_{at}_{rank}", np.full(rank, at, dtype=np.int64)) for at in (0, 1)]
        self.outputs.append(self.node("Slice", [value, *bounds], f"{value}.end"))

    def add(self, branch: Branch, *, whole: bool = False) -> str:
        """Name of the branch's output. whole: its whole value becomes an output, so that conversions at its end run on
        all of it.
        """
        number = len(self.outputs)
        name, g = f"branch{number}", branch.geometry
        convolved = g.kind in _CONVOLUTIONS
        # Kernels that quantise their input themselves would share that work on a shared input.
        x = self.input(branch.shape, kind=g.kind, own="" if convolved else name)
        value, source = f"{name}.y", None
        if branch.static:
            x = source = f"{x}.point"
            if source not in {out for node in self.writer.nodes for out in node.output}:
                self.point(x.removesuffix(".point"), source)
        self.writer.layer(_filled(branch.module), x, value, name, g, source)
        rank = len(branch.shape) + 1 + (g.kind is Kind.EMBEDDING)
        if branch.normed:
            self.writer.norm(FrozenNorm(g.outputs), value, f"{value}.n", f"{name}.norm", rank)
            value = f"{value}.n"
        if branch.clip:
            bounds = [self._tensor(f"clip_{at}", np.float32(at)) for at in (0, 6)] if branch.clip == "Clip" else []
            value = self.node(branch.clip, [value, *bounds], f"{value}.c")
        if branch.static:
            value = self.point(value, f"{value}.point")
        self.outputs.append(value) if whole else self.output(value, rank)
        return self.outputs[-1]

    def file(self) -> ModelProto:
        types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
        inputs = [helper.make_tensor_value_info(n, types[v.dtype], v.shape) for n, v in self.feeds.items()]
        outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in self.outputs]
        graph = helper.make_graph(self.writer.nodes, "branches", inputs, outputs, list(self.writer.tensors.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        functions = list(self.writer.functions.values())
        return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=IR_VERSION)


def _calibrated(point: EightBit) -> EightBit:
    point.scale.fill_(0.05)
    point.zero.fill_(128)
    return point


def _filled(module: nn.Module) -> nn.Module:
    """The module, in place, ready to be written: points between its stages have a range, kept tiles differ."""
    for part in stages_of(module):
        packed = getattr(part, "packed", None)
        if isinstance(part, EightBit):
            _calibrated(part)
        elif isinstance(packed, PackedWeight) and packed.support is not None and packed.stage.tile_rows:
            columns, blocks = packed.stage.geometry.columns, packed.stage.geometry.rows // packed.stage.tile_rows
            kept = packed.support.numel() // blocks
            packed.support.copy_((torch.arange(blocks)[:, None] + torch.arange(kept)).remainder(columns).reshape(-1))
    if isinstance(module, Ghost):
        module.source.copy_(torch.arange(len(module.source)).remainder(len(module.order) - len(module.source)))
        module.order.copy_(torch.arange(len(module.order)))
    return module.requires_grad_(False)


def profiler_cost(threads: int) -> float:
    """Milliseconds that the profiler adds to each kernel: the difference for a chain of kernels with next to no work,
    the least of some attempts on either side.
    """
    writer = BranchWriter()
    value = writer.input((16,))
    for number in range(_CHAIN):
        value = writer.node(("Neg", "Abs")[number % 2], [value], f"link{number}")
    writer.outputs.append(value)
    content = writer.file().SerializeToString()
    profiled = min(float(_profiled(content, writer.feeds, threads)[1].sum()) for _ in range(_ATTEMPTS))
    plain = min(_plain_ms(content, writer.feeds, threads) for _ in range(_ATTEMPTS))
    return max(0.0, (profiled - plain) / _CHAIN)


def profile(file: ModelProto, feeds: Feeds, *, threads: int) -> tuple[Node, ...]:
    """Kernels in the order in which they run."""
    nodes, spent, sizes = _profiled(file.SerializeToString(), feeds, threads)
    return tuple(
        Node(n.op_type, tuple(n.input), tuple(n.output), float(ms), size if n.op_type in _BYTES else size // 4)
        for n, ms, size in zip(nodes, spent, sizes, strict=True)
    )


_ATTEMPTS = 5
_CHAIN = 256
_BYTES = ("QuantizeLinear", "Transpose", "QLinearConv", "QLinearAdd")
"""Kernels whose output numbers take one byte in the files that are timed here."""


def _profiled(content: bytes, feeds: Feeds, threads: int) -> tuple[list[NodeProto], NDArray[np.float64], list[int]]:
    """Nodes of the graph that really runs, their milliseconds with what the profiler adds, and bytes they write."""
    runtime = importlib.import_module("onnxruntime")
    with tempfile.TemporaryDirectory(prefix="grainwise-") as directory:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(directory) / "optimised.onnx")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(directory) / "profile")
        session = runtime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(DISABLED)
        )
        for _ in range(WARM_UP + RUNS):
            _run(session, feeds)
        text = Path(session.end_profiling()).read_text(encoding="utf-8")
        nodes = list(onnx.load(options.optimized_model_filepath).graph.node)
    events = [line for line in text.splitlines() if '_kernel_time"' in line]  # an event is a line
    last = [json.loads(line.rstrip().rstrip(",]"))["args"] for line in events[-len(nodes) :]]
    if len(events) != len(nodes) * (WARM_UP + RUNS) or [args["op_name"] for args in last] != [n.op_type for n in nodes]:
        raise RuntimeError("ONNX Runtime ran its graph in another order than it wrote it: kernels cannot be told apart")
    microseconds = [int(found[1]) for line in events if (found := _DURATION.search(line))]
    spent = np.array(microseconds, dtype=np.float64).reshape(-1, len(nodes))[WARM_UP:] / 1e3
    fastest = np.sort(spent, axis=0)[:FASTEST].mean(axis=0)
    return nodes, fastest, [int(args.get("output_size", 0)) for args in last]


_DURATION = re.compile(r'"dur"\s*:\s*(\d+)')


def _run(session: Any, feeds: Feeds) -> None:
    session.run([session.get_outputs()[0].name], dict(feeds))  # all nodes run, whatever is fetched


def _plain_ms(content: bytes, feeds: Feeds, threads: int) -> float:
    """Milliseconds of a run without the profiler: the mean of the fastest."""
    session = open_session(content, threads=threads)
    spent = []
    for _ in range(WARM_UP + RUNS):
        start = time.perf_counter_ns()
        _run(session, feeds)
        spent.append((time.perf_counter_ns() - start) / 1e6)
    return float(np.sort(spent[WARM_UP:])[:FASTEST].mean())


def measured(nodes: Sequence[Node], end: str, inputs: Iterable[str], *, convolved: bool) -> Measured:
    """The kernels that only the branch ending in value `end` runs.

    convolved: the branch is a convolution, so that conversions at its ends are not its own.
    """
    makers = {out: node for node in nodes for out in node.outputs}
    given = set(inputs)
    last = makers[end]
    blocked_output = False
    stripped = (*CONVERSIONS, "Slice") if convolved else ("Slice",)
    while last.kind in stripped:
        blocked_output |= last.kind == "ReorderOutput"
        last = makers[last.inputs[0]]
    blocked_input, total, kernels = False, 0.0, 0
    waiting, seen = [last], {id(last)}
    while waiting:
        node = waiting.pop()
        if convolved and _at_start(node, makers, given):
            blocked_input |= node.kind == "ReorderInput"
            continue
        total, kernels = total + node.ms, kernels + 1
        for name in node.inputs:
            maker = makers.get(name)
            if maker is not None and id(maker) not in seen:
                seen.add(id(maker))
                waiting.append(maker)
    return Measured(total, kernels, blocked_input, blocked_output)


def _at_start(node: Node, makers: Mapping[str, Node], given: set[str]) -> bool:
    """True for a conversion between the input and the branch's first own kernel."""
    while node.kind in CONVERSIONS:
        if node.inputs[0] in given:
            return True
        maker = makers.get(node.inputs[0])
        if maker is None:
            return False
        node = maker
    return False


def profile_branches(branches: Sequence[Branch], *, threads: int) -> list[Measured]:
    """Times of the branches, in their order, with what the profiler adds."""
    writer = BranchWriter()
    for branch in branches:
        writer.add(branch)
    nodes = profile(writer.file(), writer.feeds, threads=threads)
    return [
        measured(nodes, end, writer.feeds, convolved=branch.geometry.kind in _CONVOLUTIONS)
        for branch, end in zip(branches, writer.outputs, strict=True)
    ]
