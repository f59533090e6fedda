"""The network's ONNX graph with markers in place of layers, exported once, and the file of any candidate."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, OperatorSetIdProto, helper, numpy_helper
from torch import Tensor, nn

from grainwise.export.functions import DOMAIN, IR_VERSION, OPSET
from grainwise.export.layers import GraphWriter
from grainwise.graph.forward import tensors_in
from grainwise.graph.skeleton import POINTS, Skeleton, skeleton_forward
from grainwise.methods.activations import EightBit
from grainwise.plan.layers import LayerGraph
from grainwise.realise.deploy import deploy
from grainwise.realise.norms import FrozenNorm, norms

LAYER, NORM, POINT = "Layer", "Norm", "Point"
OUTPUT = "output"


class ExportError(ValueError):
    """A network cannot be written as ONNX; the message says what is in the way."""


class _Marker(nn.Module):
    """Stands where a layer, norm or point stood, and leaves a node of that kind and name in the exported graph."""

    def __init__(self, kind: str, name: str, replaced: nn.Module) -> None:
        super().__init__()
        self.kind = kind
        self.name = name
        self.replaced = replaced

    def forward(self, x: Tensor) -> Tensor:
        shape = self.replaced(x).shape
        marked: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.kind}", (x,), {"name": self.name, "rank": len(shape)}, dtype=torch.float32, shape=shape
        )
        return marked


@dataclass(frozen=True)
class MarkedGraph:
    """model: ONNX in which every layer, batch norm and point of the skeleton is a marker node."""

    model: ModelProto
    skeleton: Skeleton
    layers: LayerGraph

    @staticmethod
    def export(skeleton: Skeleton, layers: LayerGraph, inputs: Any) -> MarkedGraph:
        """One export by torch.onnx (some seconds). inputs: a batch of at least 2 samples. Raises ExportError."""
        marked = copy.deepcopy(skeleton.module)
        for name in skeleton.units:
            marked.set_submodule(name, _Marker(LAYER, name, marked.get_submodule(name)))
        for name, norm in list(norms(marked)):
            marked.set_submodule(name, _Marker(NORM, name, norm))
        for name in skeleton.points:
            path = f"{POINTS}.{name}"
            marked.set_submodule(path, _Marker(POINT, name, marked.get_submodule(path)))
        tensors = tuple(tensors_in(inputs))
        sizes = tuple(_varying(t) for t in tensors)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports packages that nobody needs
                program = torch.onnx.export(
                    marked,
                    tensors,
                    dynamo=True,
                    opset_version=OPSET,
                    dynamic_shapes=(sizes,),
                    input_names=list(skeleton.inputs),
                    output_names=[OUTPUT],
                    verbose=False,
                )
        except Exception as error:  # the exporter has no common error class
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ExportError(f"torch.onnx cannot export this network: {first}") from error
        assert program is not None
        return MarkedGraph(_cleaned(program.model_proto), skeleton, layers)

    def write_reference(self) -> ModelProto:
        """The file of the uncompressed network, its batch norms folded with the statistics that they have."""
        model = copy.deepcopy(self.skeleton.module)
        deploy(model, self.skeleton, (), skeleton_forward)
        return self.write(model, {})

    def free_norms(self) -> tuple[str, ...]:
        """Batch norms that follow no layer directly, so that they stay a scale and a shift."""
        folded = {unit.norm for unit in self.skeleton.units.values()}
        marked = (_name(node) for node in self.model.graph.node if (node.domain, node.op_type) == (DOMAIN, NORM))
        return tuple(name for name in marked if name not in folded)

    def imports(self, *, functions: bool) -> list[OperatorSetIdProto]:
        """Operator sets of a candidate's file; functions: whether it has functions of our own."""
        others = [found for found in self.model.opset_import if found.domain != DOMAIN]
        return [*others, helper.make_opsetid(DOMAIN, 1)] if functions else others

    def write(self, model: nn.Module, metadata: Mapping[str, str]) -> ModelProto:
        """The file of a candidate that was built on the skeleton and deployed.

        Raises ExportError when the candidate changed something that the graph does not show as a tensor of its own.
        """
        writer = GraphWriter()
        aliases: dict[str, str] = {}
        for template in self.model.graph.node:
            node = _renamed(template, aliases)
            if node.domain == DOMAIN:
                self._replace(writer, model, node, aliases)
            else:
                writer.nodes.append(node)
        for output in self.model.graph.output:
            if output.name in aliases:
                writer.nodes.append(helper.make_node("Identity", [aliases[output.name]], [output.name]))
        self._keep(writer, model)
        graph = helper.make_graph(
            writer.nodes, "grainwise", self.model.graph.input, self.model.graph.output, list(writer.tensors.values())
        )
        file = helper.make_model(
            graph,
            functions=list(writer.functions.values()),
            opset_imports=self.imports(functions=bool(writer.functions)),
            ir_version=IR_VERSION,
            producer_name="grainwise",
        )
        helper.set_model_props(file, dict(metadata))
        return file

    def _replace(self, writer: GraphWriter, model: nn.Module, node: NodeProto, aliases: dict[str, str]) -> None:
        name, x, y = _name(node), node.input[0], node.output[0]
        if node.op_type == LAYER:
            unit = self.skeleton.units[name]
            module = model.get_submodule(name)
            writer.layer(module, x, y, name, self.layers.layer(name).geometry, unit.source)
            return
        module = model.get_submodule(f"{POINTS}.{name}" if node.op_type == POINT else name)
        match module:
            case EightBit():
                writer.point(module, x, y, name)
            case FrozenNorm():
                writer.norm(module, x, y, name, _attributes(node)["rank"])
            case nn.Identity():
                aliases[y] = x
            case _:
                raise ExportError(f"{name} is a {type(module).__name__}: only a deployed candidate can be written")

    def _keep(self, writer: GraphWriter, model: nn.Module) -> None:
        """The tensors beside layers, norms and points, at the widths that the candidate left them."""
        state = dict(model.state_dict(keep_vars=True))
        used = {name for node in writer.nodes for name in node.input}
        shown = set()
        for tensor in self.model.graph.initializer:
            if tensor.name not in used:
                continue
            found = state.get(tensor.name)
            shown.add(tensor.name)
            if found is not None and list(found.shape) != list(tensor.dims):
                writer.array(tensor.name, found.detach().numpy())
            else:
                writer.tensors[tensor.name] = tensor
        for name, before in self.skeleton.module.state_dict().items():
            path = name.rpartition(".")[0]
            own = (
                path in self.skeleton.units
                or path.startswith(POINTS)
                or isinstance(_module(model, path), FrozenNorm | nn.Identity)
            )
            if not own and name in state and state[name].shape != before.shape and name not in shown:
                raise ExportError(
                    f"{name} was narrowed from {[*before.shape]} to {[*state[name].shape]}, but the exported graph "
                    "holds it in another form: keep the channels that it belongs to"
                )


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _name(node: NodeProto) -> str:
    """The name that a marker stands for."""
    name: bytes = _attributes(node)["name"]
    return name.decode()


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _varying(tensor: Tensor) -> dict[int, Any]:
    dims = range(1 if tensor.is_floating_point() else tensor.dim())
    return {dim: torch.export.Dim.DYNAMIC if dim == 0 else torch.export.Dim.AUTO for dim in dims}


def _renamed(node: NodeProto, aliases: Mapping[str, str]) -> NodeProto:
    """The node, reading what its inputs are aliases of."""
    if not any(name in aliases for name in node.input):
        return node
    changed = NodeProto()
    changed.CopyFrom(node)
    for position, name in enumerate(node.input):
        changed.input[position] = aliases.get(name, name)
    return changed


def _cleaned(model: ModelProto) -> ModelProto:
    """The graph without the exporter's notes and without tensors that no node reads; what a marker makes is called
    after what it stands for.
    """
    graph = model.graph
    _free_flattened(graph)
    fixed = {value.name for value in (*graph.input, *graph.output)}
    names: dict[str, str] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)
        if node.domain == DOMAIN and node.output[0] not in fixed:
            new = f"{_name(node)}.y" if node.op_type == POINT else _name(node)
            names[node.output[0]] = node.output[0] = new
        del node.metadata_props[:]
        node.doc_string = ""
        node.name = node.name.removeprefix("node_")
    del graph.value_info[:]
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    for tensor in kept:
        array = numpy_helper.to_array(tensor)
        graph.initializer.append(numpy_helper.from_array(np.array(array, order="C"), tensor.name))
    for value in (*graph.input, *graph.output):
        del value.metadata_props[:]
    return model


def _free_flattened(graph: onnx.GraphProto) -> None:
    """Flattening to a written-out width becomes flattening to whatever is left of it, so that channels can be cut."""
    shapes = {v.name: v.type.tensor_type.shape.dim for v in (*graph.input, *graph.value_info)}
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT64}
    flattened = "flattened_shape"
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[0] not in shapes or node.input[1] not in constants:
            continue
        dims, target = shapes[node.input[0]], constants[node.input[1]].tolist()
        widths = [d.dim_value for d in dims[1:]]
        if len(target) == 2 and dims[0].dim_param and all(widths) and target[1] == math.prod(widths):
            node.input[1] = flattened
            del node.attribute[:]  # without `allowzero` a 0 keeps the batch
            if flattened not in {t.name for t in graph.initializer}:
                graph.initializer.append(numpy_helper.from_array(np.array([0, -1], dtype=np.int64), flattened))


def file_bytes(model: ModelProto) -> int:
    """Bytes of the file that `onnx.save` writes."""
    return int(model.ByteSize())


def tensor_bytes(model: ModelProto) -> int:
    """Bytes of the file's tensors without their names and shapes: the weights' share."""
    return sum(len(t.raw_data) for t in model.graph.initializer)
