"""A file and its module compared layer by layer, each layer of the module reading what the file computed before it.

Compared as a whole, two right runs of a network with 8-bit values may part: a float layer rounds its last bit
otherwise, a value between two codes falls to the other side, and from there on each 8-bit layer makes more of it, up to
what rounding changes anyway (4 % of the outputs' standard deviation in a half-quantised EfficientNet). Step by step
nothing grows, so a fault stands out where it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from torch import Tensor, nn

from grainwise.export.functions import DOMAIN
from grainwise.export.runtime import open_session
from grainwise.graph.skeleton import POINTS, Skeleton
from grainwise.methods.activations import DynamicLinear, StaticConv1d, StaticConv2d


@dataclass(frozen=True, slots=True)
class Step:
    """place: the layer or value, in words. share: mean absolute difference of its result in the file and in the module,
    as a share of the result's standard deviation.
    """

    place: str
    share: float


def steps(file: ModelProto, model: nn.Module, skeleton: Skeleton, tensors: Sequence[Tensor]) -> list[Step]:
    """All layers and 8-bit values of one batch in running order, the network's output last."""
    results, inputs = _run_once(_results(file, model)), _run_once(_dynamic_inputs(file, model))
    output = file.graph.output[0].name
    names = list(dict.fromkeys([*results.values(), *inputs.values(), output]))
    found = _values(file, names, dict(zip(skeleton.inputs, tensors, strict=True)))
    seen: list[Step] = []

    def compare(place: str, ours: Tensor, name: str) -> Tensor:
        theirs = found[name]
        seen.append(Step(place, _share(ours.numpy(), theirs)))
        return torch.from_numpy(theirs.copy()) if theirs.shape == tuple(ours.shape) else ours

    def on_result(place: str, name: str) -> Any:
        return lambda module, given, result: compare(place, result, name)

    def on_input(place: str, name: str) -> Any:
        return lambda module, given: (compare(place, given[0], name), *given[1:])

    handles = [
        model.get_submodule(p).register_forward_hook(on_result(words(p, skeleton), n)) for p, n in results.items()
    ]
    handles += [
        model.get_submodule(p).register_forward_pre_hook(on_input(f"the input of {words(p, skeleton)}", n))
        for p, n in inputs.items()
    ]
    try:
        with torch.no_grad():
            compare("the output", model(*tensors), output)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _run_once(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Without modules that run several times: their calls could not be told apart."""
    listed = list(pairs)
    times = Counter(path for path, _ in listed)
    return {path: name for path, name in listed if times[path] == 1}


def _results(file: ModelProto, model: nn.Module) -> Iterator[tuple[str, str]]:
    """(path of a module, name of its result in the file), in running order. Results of 8-bit convolutions are left out:
    inside of a kernel they exist as the 8-bit value behind them only.
    """
    modules = dict(model.named_modules())
    for node in file.graph.node:
        point = node.name.removesuffix(".eight_bit")
        candidates = (f"{POINTS}.{point}", point) if point != node.name else (node.name.removesuffix(".order.take"),)
        path = next((name for name in candidates if name in modules), None)
        layer = node.domain == DOMAIN or node.op_type in ("Conv", "Gather")
        if path and layer and not isinstance(modules[path], StaticConv1d | StaticConv2d):
            yield path, node.output[0]


def _dynamic_inputs(file: ModelProto, model: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, name of its input in the file) of layers that round their input by the range of the call: means of 8-bit
    values often lie between two codes, so the last bit of the mean must not be counted as the layer's fault.
    """
    modules = dict(model.named_modules())
    for node in file.graph.node:
        if isinstance(modules.get(node.name), DynamicLinear):
            yield node.name, node.input[0]


def _values(file: ModelProto, names: list[str], feed: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Values inside of the file, run with fused kernels: a copy of it gives them as outputs."""
    shown = ModelProto()
    shown.CopyFrom(file)
    given = {value.name for value in (*shown.graph.output, *shown.graph.input)}
    shown.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in given
    )
    session = open_session(shown.SerializeToString())
    arrays = {spec.name: np.ascontiguousarray(feed[spec.name]) for spec in session.get_inputs()}
    wanted = [name for name in names if name not in arrays]
    return arrays | dict(zip(wanted, session.run(wanted, arrays), strict=True))


def _share(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    mean, spread = float(np.abs(ours - theirs).mean()), float(ours.std())
    return mean / spread if spread else (0.0 if mean == 0 else float("inf"))


def words(path: str, skeleton: Skeleton) -> str:
    """A module's path as a person knows it: a point by what makes its value, a stage by its layer."""
    if path.startswith(f"{POINTS}."):
        name = path.removeprefix(f"{POINTS}.")
        maker = skeleton.points[name].maker
        return f"value {name}" if maker is None else words(maker, skeleton)
    if path in {join.name for join in skeleton.joins}:
        return f"sum {path}"
    layers = [name for name in skeleton.units if path == name or path.startswith(f"{name}.")]
    return f"layer {max(layers, key=len)}" if layers else f"norm {path}"
