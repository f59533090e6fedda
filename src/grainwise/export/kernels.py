"""Which 8-bit kernels a deployed module plans, which its file becomes, and whose layers are not as planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from onnx import GraphProto, NodeProto
from torch import Tensor, nn

from grainwise.export.steps import words
from grainwise.graph.skeleton import JOINS, POINTS, Skeleton
from grainwise.methods.activations import DynamicLinear, EightBit, EightBitSum, StaticConv1d, StaticConv2d

CONVOLUTION, SUM, LINEAR = "QLinearConv", "QLinearAdd", "DynamicQuantizeMatMul"

_COUNTED = {
    CONVOLUTION: CONVOLUTION,
    SUM: SUM,
    LINEAR: LINEAR,
    "MatMulIntegerToFloat": LINEAR,  # where several layers read one value, which is then rounded once for all
    "QGemm": "QGemm",
    "QLinearMatMul": "QLinearMatMul",
    "MatMulNBits": "MatMulNBits",
}
"""Kernels by the name that they are counted under. The last three are in no plan: they round what it leaves alone."""

_PLANNED: tuple[tuple[type[nn.Module], str], ...] = (
    (StaticConv1d, CONVOLUTION),
    (StaticConv2d, CONVOLUTION),
    (EightBitSum, SUM),
    (DynamicLinear, LINEAR),
)

_RESULT_SCALE = 6  # position of the result's scale among the inputs of QLinearConv and QLinearAdd


def planned_kernels(model: nn.Module, tensors: Sequence[Tensor]) -> Counter[str]:
    """How often 8-bit modules run in one pass over a batch."""
    planned: Counter[str] = Counter()

    def count(kernel: str) -> Any:
        return lambda *_: planned.update([kernel])

    handles = [
        module.register_forward_hook(count(kernel))
        for module in model.modules()
        for kind, kernel in _PLANNED
        if isinstance(module, kind)
    ]
    try:
        with torch.no_grad():
            model(*tensors)
    finally:
        for handle in handles:
            handle.remove()
    return planned


def found_kernels(graph: GraphProto) -> Counter[str]:
    """Kernels of an optimised graph that round to 8 bits or fewer."""
    return Counter(_COUNTED[node.op_type] for node in graph.node if node.op_type in _COUNTED)


def misplaced(graph: GraphProto, model: nn.Module, skeleton: Skeleton, kernel: str) -> str:
    """Words for the layers that should run as `kernel` and do not in an optimised graph, or the other way round."""
    nodes = [node for node in graph.node if _COUNTED.get(node.op_type) == kernel]
    if kernel in (CONVOLUTION, SUM):
        planned = dict(_planned_results(model, skeleton, kernel))
        found = {node.input[_RESULT_SCALE].removesuffix(".y_scale") for node in nodes}
        missing = [owner for point, owner in planned.items() if point not in found]
        extra = [_maker(point, skeleton) for point in sorted(found - planned.keys())]
    else:
        dynamic = [path for path, m in model.named_modules() if isinstance(m, DynamicLinear) and kernel == LINEAR]
        missing = [words(path, skeleton) for path in dynamic if not any(_reads(node, path) for node in nodes)]
        extra = [_owner(node, skeleton) for node in nodes if not any(_reads(node, path) for path in dynamic)]
    said = [f"{place} does not run so" for place in missing] + [f"{place} should not run so" for place in extra]
    return ", ".join(said) or "a layer runs several times"


def _planned_results(model: nn.Module, skeleton: Skeleton, kernel: str) -> Iterator[tuple[str, str]]:
    """(name of the point that takes the result, words for the layer or sum) for each that should run as `kernel`."""
    if kernel == SUM:
        for join in skeleton.joins:
            if isinstance(model.get_submodule(f"{JOINS}.{join.name}"), EightBitSum):
                yield join.result, words(join.name, skeleton)
        return
    for unit in skeleton.units.values():
        module = model.get_submodule(unit.layer)
        parts = list(module) if isinstance(module, nn.Sequential) else [module]
        for number, part in enumerate(parts):
            if isinstance(part, StaticConv1d | StaticConv2d):
                inner = number + 1 < len(parts) and isinstance(parts[number + 1], EightBit)
                yield f"{unit.layer}.{number + 1}" if inner else str(unit.result), words(unit.layer, skeleton)


def _maker(point: str, skeleton: Skeleton) -> str:
    return words(f"{POINTS}.{point}", skeleton) if point in skeleton.points else f"what makes {point}"


def _owner(node: NodeProto, skeleton: Skeleton) -> str:
    """The layer whose stored tensors a kernel reads."""
    return next((words(name, skeleton) for name in skeleton.units if _reads(node, name)), node.name or node.op_type)


def _reads(node: NodeProto, path: str) -> bool:
    return any(name.startswith(f"{path}.") for name in node.input)
