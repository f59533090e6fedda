"""A realised layer as ONNX nodes: tensors as the file keeps them, and the call of the function that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from grainwise.export import functions
from grainwise.export.functions import DOMAIN, Weight
from grainwise.methods.activations import EightBit, StaticConv1d, StaticConv2d
from grainwise.methods.layers import Ghost, geometry_of, realisation_of
from grainwise.methods.storage import CENTRE, PackedWeight, decode_support, pack_bits
from grainwise.plan.choices import Granularity
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.shapes import group_size
from grainwise.plan.target import Realisation
from grainwise.realise.norms import FrozenNorm


class GraphWriter:
    """Collects the nodes, tensors and functions of one file."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}
        self.functions: dict[str, FunctionProto] = {}

    def call(self, function: FunctionProto, inputs: Sequence[str], output: str, name: str, **attributes: Any) -> str:
        """One call of a local function; attributes that equal the function's default are left out."""
        self.functions.setdefault(function.name, function)
        for node in function.node:
            if node.domain == DOMAIN:
                self.functions.setdefault(node.op_type, functions.INNER[node.op_type])
        defaults = {a.name: helper.get_attribute_value(a) for a in function.attribute_proto}
        given = {key: value for key, value in attributes.items() if defaults.get(key) != value}
        self.nodes.append(helper.make_node(function.name, list(inputs), [output], name=name, domain=DOMAIN, **given))
        return output

    def array(self, name: str, value: NDArray[Any]) -> str:
        """A tensor of the file. Raises ValueError for a name that is taken."""
        if name in self.tensors:
            raise ValueError(f"the file has a tensor {name} already")
        self.tensors[name] = numpy_helper.from_array(np.array(value, order="C"), name)
        return name

    def nibbles(self, name: str, codes: NDArray[np.int8]) -> str:
        """A tensor of signed 4-bit integers, two a byte."""
        packed = pack_bits(torch.from_numpy((codes.reshape(-1) & 15).astype(np.uint8)), 4)
        raw = packed.numpy().tobytes()
        self.tensors[name] = TensorProto(name=name, data_type=TensorProto.INT4, dims=codes.shape, raw_data=raw)
        return name

    # -- layers

    def layer(self, module: nn.Module, x: str, y: str, name: str, geometry: Geometry, source: str | None) -> None:
        """A realised layer that reads value x and makes value y.

        geometry: of the layer that it replaces. source: name of the 8-bit point that x comes from, if any.
        """
        match module:
            case Ghost():
                axis = module.dim
                kept = self._stage(module.primary, x, f"{name}.kept", f"{name}.primary", None)
                picked = self.take(kept, f"{name}.picked", f"{name}.source", module.source, axis)
                made = self._stage(module.cheap, picked, f"{name}.made", f"{name}.cheap", None)
                joined = f"{name}.joined"
                self.nodes.append(helper.make_node("Concat", [kept, made], [joined], name=joined, axis=axis))
                self.take(joined, y, f"{name}.order", module.order, axis)
            case nn.Sequential():
                for number, part in enumerate(module):
                    output = y if number == len(module) - 1 else f"{name}.{number}.out"
                    if isinstance(part, EightBit):
                        source = f"{name}.{number}"
                        x = self.point(part, x, output, source)
                    else:
                        x = self._stage(part, x, output, f"{name}.{number}", source)
            case _:
                self._stage(module, x, y, name, source, geometry)

    def point(self, module: EightBit, x: str, y: str, name: str) -> str:
        """A value kept in 8 bits; its scale and zero are tensors `name.y_scale`, `name.y_zero`."""
        scale = self.array(f"{name}.y_scale", module.scale.numpy())
        zero = self.array(f"{name}.y_zero", module.zero.numpy().astype(np.uint8))
        return self.call(functions.eight_bit(), [x, scale, zero], y, f"{name}.eight_bit")

    def norm(self, module: FrozenNorm, x: str, y: str, name: str, rank: int) -> None:
        """A scale and a shift for each channel of a value of `rank` dimensions."""
        shape = (-1, *(1,) * (rank - 2))
        scale = self.array(f"{name}.scale", module.weight.numpy().reshape(shape))
        shift = self.array(f"{name}.shift", module.bias.numpy().reshape(shape))
        self.call(functions.norm(), [x, scale, shift], y, name)

    def take(self, x: str, y: str, name: str, index: Tensor, axis: int) -> str:
        stored = self.array(name, index.numpy().astype(np.uint16))
        return self.call(functions.take(axis), [x, stored], y, f"{name}.take")

    def _stage(
        self, module: nn.Module, x: str, y: str, name: str, source: str | None, geometry: Geometry | None = None
    ) -> str:
        g = geometry_of(module) if geometry is None else _narrowed(geometry, module)
        packed = getattr(module, "packed", None)
        if not isinstance(packed, PackedWeight):
            return self._float(module, g, x, y, name)
        how = realisation_of(module)
        if how is Realisation.SPARSE:
            return self._sparse(module, packed, x, y, name)
        weight, shape = _described(packed)
        inputs = self._weight(packed, weight, name, planar=how is Realisation.GATHERED)
        biases = [self._bias(module, name, how)] if isinstance(module.bias if g.bias else None, Tensor) else []
        static = how is Realisation.STATIC
        x_scale = [f"{source}.y_scale"] if static else []
        attributes: dict[str, Any] = dict(shape)
        match g.kind:
            case Kind.CONV1D | Kind.CONV2D:
                function = functions.convolution(weight, len(g.kernel), bias=bool(biases), static=static)
                attributes |= _convolution(g)
            case Kind.LINEAR if g.groups > 1:
                function = functions.grouped_linear(weight, bias=bool(biases))
                attributes["blocks"] = [g.groups, g.outputs // g.groups, g.inputs // g.groups]
            case Kind.LINEAR:
                function = functions.linear(weight, bias=bool(biases), dynamic=how is Realisation.DYNAMIC)
            case Kind.EMBEDDING:
                gathered = how is Realisation.GATHERED
                function = functions.embedding(weight, gathered=gathered)
                attributes = {} if gathered else attributes
        return self.call(function, [x, *x_scale, *inputs, *biases], y, name, **attributes)

    def _float(self, module: nn.Module, g: Geometry, x: str, y: str, name: str) -> str:
        """An ordinary layer, its weight float32."""
        assert isinstance(module.weight, Tensor)
        weight = self.array(f"{name}.weight", module.weight.numpy())
        bias = getattr(module, "bias", None)
        biases = [self.array(f"{name}.bias", bias.numpy())] if isinstance(bias, Tensor) else []
        plain = Weight(0)
        match g.kind:
            case Kind.CONV1D | Kind.CONV2D:
                node = helper.make_node("Conv", [x, weight, *biases], [y], name=name, **_convolution(g))
                self.nodes.append(node)
            case Kind.LINEAR if g.groups > 1:
                blocks = [g.groups, g.outputs // g.groups, g.inputs // g.groups]
                self.call(
                    functions.grouped_linear(plain, bias=bool(biases)), [x, weight, *biases], y, name, blocks=blocks
                )
            case Kind.LINEAR:
                self.call(functions.linear(plain, bias=bool(biases), dynamic=False), [x, weight, *biases], y, name)
            case Kind.EMBEDDING:
                self.nodes.append(helper.make_node("Gather", [weight, x], [y], name=name))
        return y

    def _sparse(self, module: nn.Module, packed: PackedWeight, x: str, y: str, name: str) -> str:
        rows, tile = packed.stage.geometry.rows, packed.stage.tile_rows
        assert packed.support is not None
        columns = packed.support.reshape(rows // tile, -1)
        dense = packed.unpack().reshape(rows // tile, tile, -1)
        picked = dense.gather(2, columns.long()[:, None].expand(-1, tile, -1))
        inputs = [
            self.array(f"{name}.weight", picked.numpy()),
            self.array(f"{name}.columns", columns.numpy().astype(np.uint16)),
        ]
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            inputs.append(self.array(f"{name}.bias", bias.numpy()))
        return self.call(functions.block_sparse_linear(bias=isinstance(bias, Tensor)), [x, *inputs], y, name)

    def _bias(self, module: nn.Module, name: str, how: Realisation) -> str:
        assert isinstance(module.bias, Tensor)
        if how is not Realisation.STATIC:
            return self.array(f"{name}.bias", module.bias.numpy())
        assert isinstance(module, StaticConv1d | StaticConv2d) and isinstance(module.packed, PackedWeight)
        sums = (module.bias / (module.x_scale * module.packed.row_scale())).round()
        return self.array(f"{name}.bias", sums.numpy().astype(np.int32))

    def _weight(self, packed: PackedWeight, weight: Weight, name: str, *, planar: bool) -> list[str]:
        """The stored tensors of a packed weight, as `weight.inputs` lists them."""
        g = packed.stage.geometry
        shape = g.weight_shape if weight.support == "all" else (packed.kept,)
        stored = f"{name}.weight"
        if not weight.bits:
            self.array(stored, packed.weight.numpy().reshape(shape))
        elif planar and weight.bits < 8:
            self.array(stored, _planar(packed.codes().reshape(g.rows, g.columns), weight.bits))
        elif weight.bits == 2:
            self.array(stored, packed.weight.numpy())
        else:
            codes = (packed.codes().to(torch.int16) - int(CENTRE[weight.bits])).to(torch.int8).numpy().reshape(shape)
            self.nibbles(stored, codes) if weight.bits == 4 else self.array(stored, codes)
        inputs = [stored]
        if packed.scale is not None:
            sizes = {"one": (), "row": (g.rows,), "group": (g.rows, -1)}[weight.sharing]
            inputs.append(self.array(f"{name}.scale", packed.scale.numpy().reshape(sizes)))
        if packed.support is not None:
            kept = decode_support(packed.support, packed.stage)
            kept = kept[:: packed.stage.tile_rows] if packed.stage.tile_rows else kept
            inputs.append(self.array(f"{name}.mask", pack_bits(kept.reshape(-1).to(torch.uint8), 1).numpy()))
        return inputs


def _described(packed: PackedWeight) -> tuple[Weight, dict[str, list[int]]]:
    """How a packed weight is stored, and the attributes that a call must set for it."""
    stage, g = packed.stage, packed.stage.geometry
    sharing = {Granularity.LAYER: "one", Granularity.CHANNEL: "row", Granularity.BLOCK: "group"}
    found: Any = sharing[packed.precision.granularity] if packed.precision.granularity else "one"
    support: Any = "all" if stage.kept is None else "tiles" if stage.tile_rows else "mask"
    weight = Weight(packed.bits, found, support, group_size(g.columns) if found == "group" else 0)
    shapes = {
        "shape": list(g.weight_shape),
        "tiles": [g.rows // max(1, stage.tile_rows), 1, g.columns],
        "repeat": [1, stage.tile_rows, 1],
    }
    return weight, {name: shapes[name] for name in weight.attributes}


def _narrowed(geometry: Geometry, module: nn.Module) -> Geometry:
    """The replaced layer's geometry at the module's widths: a module may give its padding as a word."""
    match module:
        case nn.Conv1d() | nn.Conv2d():
            found = geometry.resized(inputs=module.in_channels, outputs=module.out_channels)
            return found.resized(bias=module.bias is not None)
        case _:
            return geometry_of(module)


def _convolution(g: Geometry) -> dict[str, Any]:
    return {
        "strides": list(g.stride),
        "pads": [*g.padding, *g.padding],
        "dilations": list(g.dilation),
        "group": g.groups,
    }


def _planar(codes: Tensor, bits: int) -> NDArray[np.uint8]:
    """Codes `[R, C]` to uint8 `[R, C bits / 8]`: byte j of a row holds dimensions j, j + n, j + 2n .., lowest first."""
    planes = codes.reshape(len(codes), 8 // bits, -1).to(torch.int32)
    shifts = (torch.arange(8 // bits, dtype=torch.int32) * bits)[None, :, None]
    packed: NDArray[np.uint8] = torch.bitwise_left_shift(planes, shifts).sum(1).to(torch.uint8).numpy()
    return packed
