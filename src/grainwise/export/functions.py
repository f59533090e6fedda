"""Model-local ONNX functions: how a packed weight is unpacked and used, one function for each way of doing it.

ONNX Runtime inlines the functions, folds at load all that depends on constants alone, and then fuses what is left into
one kernel (measured: docs/decisions/0006). A layer is thus one readable node in the file, and costs about 120 bytes.

Letters: R x C the weight matrix, N kept weights, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike
from onnx import AttributeProto, FunctionProto, TensorProto, helper, numpy_helper

DOMAIN = "grainwise"
OPSET = 21
IR_VERSION = 10

_KINDS = {"value_ints": AttributeProto.INTS, "value_int": AttributeProto.INT, "group": AttributeProto.INT}


class Body:
    """Nodes of a function while it is written; names are numbers, since nobody reads them."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._nested = False
        self._count = 0

    def name(self) -> str:
        self._count += 1
        return f"t{self._count}"

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output and returns the output's name."""
        output = self.name()
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, value: ArrayLike, dtype: DTypeLike) -> str:
        return self.op("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))

    def integers(self, *values: int) -> str:
        return self.constant(list(values), np.int64)

    def attribute(self, name: str, kind: Literal["value_ints", "value_int"] = "value_ints") -> str:
        """A constant made of an attribute of the call."""
        output = self.op("Constant")
        self.refer(name, kind)
        return output

    def refer(self, name: str, attribute: str | None = None) -> None:
        """Gives the last node an attribute that the call sets."""
        kind = _KINDS.get(attribute or name, AttributeProto.INTS)
        self.nodes[-1].attribute.append(AttributeProto(name=attribute or name, ref_attr_name=name, type=kind))

    def inner(self, function: FunctionProto, *inputs: str) -> str:
        """A call of another local function."""
        self._nested = True
        return self.op(function.name, *inputs, domain=DOMAIN)

    def function(
        self, name: str, inputs: Sequence[str], output: str, attributes: Sequence[str], defaults: dict[str, Any]
    ) -> FunctionProto:
        self.nodes[-1].output[0] = output
        opset = [helper.make_opsetid("", OPSET), *([helper.make_opsetid(DOMAIN, 1)] if self._nested else [])]
        given = [helper.make_attribute(key, value) for key, value in defaults.items()]
        return helper.make_function(DOMAIN, name, list(inputs), [output], self.nodes, opset, list(attributes), given)


@dataclass(frozen=True, slots=True)
class Weight:
    """How a weight is stored, as far as the function that reads it must know.

    bits: of a code; 0 for float32 values. sharing: one scale for all, for each row, or for each group of a row.
    support: all weights are kept, or a bitmask over weights or over tiles marks those that are.
    group: weights of a row that share a scale; 0 unless sharing is `group`.
    """

    bits: int
    sharing: Literal["one", "row", "group"] = "one"
    support: Literal["all", "mask", "tiles"] = "all"
    group: int = 0

    @property
    def word(self) -> str:
        """What distinguishes the functions that read it, as part of their names."""
        kept = "" if self.support == "all" else f"_{self.support}"
        shared = {"one": "_one", "row": "", "group": f"_group{self.group}"}[self.sharing] if self.bits else ""
        return f"{f'int{self.bits}' if self.bits else 'float'}{shared}{kept}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Tensors that are stored for it."""
        return ("weight", *(("scale",) if self.bits else ()), *(("mask",) if self.support != "all" else ()))

    @property
    def attributes(self) -> tuple[str, ...]:
        """Attributes that a call must set: the dense shape where the stored tensor does not have it."""
        shape = ("shape",) if self.bits == 2 or self.support != "all" else ()
        return (*shape, *(("tiles", "repeat") if self.support == "tiles" else ()))


def _levels(body: Body, weight: Weight) -> str:
    """Codes counted from the code of zero as int8 (2 bits: doubled, so that they are whole), or float32 values; of the
    dense shape.
    """
    values = "weight"
    if weight.bits == 4:
        values = body.op("Cast", values, to=TensorProto.INT8)
    if weight.bits == 2:
        values = body.inner(UNPACK, values)
    if weight.support == "all":
        if weight.bits != 2:
            return values
        shape = body.attribute("shape")
        count = body.op("ReduceProd", shape, keepdims=1)
        return body.op("Reshape", body.op("Slice", values, body.integers(0), count), shape)
    padded = body.op("Concat", body.constant([0], np.int8 if weight.bits else np.float32), values, axis=0)
    kept = body.inner(BITS, "mask")
    if weight.support == "tiles":
        tiles = body.attribute("tiles")  # [R / t, 1, C]
        kept = body.op("Slice", kept, body.integers(0), body.op("ReduceProd", tiles, keepdims=1))
        spread = body.op("Expand", body.op("Reshape", kept, tiles), body.attribute("repeat"))  # [1, t, 1]
        kept = body.op("Reshape", spread, body.integers(-1))
    return body.inner(SCATTER, padded, kept, body.attribute("shape"))


def _unpack() -> FunctionProto:
    """uint8 with four 2-bit codes a byte to int8 levels -3, -1, 1, 3 (possibly some more than there are weights)."""
    body = Body()
    parted = body.op("Div", body.op("Unsqueeze", "x", body.integers(1)), body.constant([1, 4, 16, 64], np.uint8))
    codes = body.op("Cast", body.op("Mod", parted, body.constant(4, np.uint8)), to=TensorProto.INT8)
    doubled = body.op("Sub", body.op("Add", codes, codes), body.constant(3, np.int8))
    body.op("Reshape", doubled, body.integers(-1))
    return body.function("Unpack2", ["x"], "y", (), {})


def _bits() -> FunctionProto:
    """Bits of uint8 to int32 0 or 1, the lowest bit first."""
    body = Body()
    bits = body.constant([1, 2, 4, 8, 16, 32, 64, 128], np.uint8)
    parted = body.op("BitwiseAnd", body.op("Unsqueeze", "x", body.integers(1)), bits)
    marked = body.op("Cast", body.op("Cast", parted, to=TensorProto.BOOL), to=TensorProto.INT32)
    body.op("Reshape", marked, body.integers(-1))
    return body.function("Bits", ["x"], "y", (), {})


def _scatter() -> FunctionProto:
    """Values after a leading zero to the places that `kept` marks, in a tensor of `shape`."""
    body = Body()
    kept = body.op("Slice", "kept", body.integers(0), body.op("ReduceProd", "shape", keepdims=1))
    index = body.op("Mul", body.op("CumSum", kept, body.constant(0, np.int64)), kept)
    body.op("Reshape", body.op("Gather", "values", index), "shape")
    return body.function("Scatter", ["values", "kept", "shape"], "y", (), {})


def _groups() -> FunctionProto:
    """Scales `[.., G]` to one for each of the `width` weights of a row; the last group of `size` may be shorter."""
    body = Body()
    wide = body.op("Expand", body.op("Unsqueeze", "scale", body.integers(-1)), "size")
    rows = body.op("Shape", "scale", start=0, end=-1)
    flat = body.op("Reshape", wide, body.op("Concat", rows, body.integers(-1), axis=0))
    body.op("Slice", flat, body.integers(0), "width", body.integers(-1))
    return body.function("Groups", ["scale", "size", "width"], "y", (), {})


UNPACK, BITS, SCATTER, GROUPS = _unpack(), _bits(), _scatter(), _groups()
INNER = {function.name: function for function in (UNPACK, BITS, SCATTER, GROUPS)}
"""Functions that other functions call, by name."""


def _scale(body: Body, weight: Weight) -> str:
    """The stored float16 scale as float32, for the levels as `_levels` gives them."""
    wide = body.op("Cast", "scale", to=TensorProto.FLOAT)
    return body.op("Mul", wide, body.constant(0.5, np.float32)) if weight.bits == 2 else wide


def _dense(body: Body, weight: Weight, rank: int) -> str:
    """The float32 weight of the dense shape, of `rank` dimensions."""
    levels = _levels(body, weight)
    if not weight.bits:
        return levels
    values, scale = body.op("Cast", levels, to=TensorProto.FLOAT), _scale(body, weight)
    if weight.sharing == "row":
        scale = body.op("Reshape", scale, body.integers(-1, *(1,) * (rank - 1)))
    if weight.sharing != "group":
        return body.op("Mul", values, scale)
    rows = body.op("Flatten", values, axis=1)
    wide = body.inner(GROUPS, scale, body.integers(weight.group), body.op("Shape", rows, start=1))
    return body.op("Reshape", body.op("Mul", rows, wide), body.op("Shape", values))


def _call(name: str, body: Body, weight: Weight, inputs: Sequence[str], output: str, **defaults: Any) -> FunctionProto:
    return body.function(name, inputs, output, weight.attributes, defaults)


def convolution(weight: Weight, dims: int, *, bias: bool, static: bool) -> FunctionProto:
    """Conv1d or Conv2d of a packed weight. static: x lies on the 8-bit grid of `x_scale`, the bias is int32 on the grid
    of the sums, and the result goes to a point of 8 bits: ONNX Runtime makes a QLinearConv of it.
    """
    body = Body()
    extra = ["x_scale"] if static else []
    inputs = ["x", *extra, *weight.inputs, *(["bias"] if bias else [])]
    if static:
        scale = _scale(body, weight)
        operands = [body.op("DequantizeLinear", _levels(body, weight), scale, axis=0)]
        if bias:
            operands.append(body.op("DequantizeLinear", "bias", body.op("Mul", "x_scale", scale), axis=0))
    else:
        operands = [_dense(body, weight, dims + 2), *(["bias"] if bias else [])]
    body.op("Conv", "x", *operands)
    defaults = {"strides": [1] * dims, "pads": [0] * 2 * dims, "dilations": [1] * dims, "group": 1}
    for attribute in defaults:
        body.refer(attribute)
    name = f"Conv{dims}d_{weight.word}{'_static' if static else ''}{'_bias' if bias else ''}"
    return _call(name, body, weight, inputs, "y", **defaults)


def linear(weight: Weight, *, bias: bool, dynamic: bool) -> FunctionProto:
    """x `[.., C]` times a packed weight `[R, C]`. dynamic: x is rounded to 8 bits by its own range; ONNX Runtime makes
    a DynamicQuantizeMatMul of it.
    """
    body = Body()
    inputs = ["x", *weight.inputs, *(["bias"] if bias else [])]
    if dynamic:
        codes = body.op("Transpose", _levels(body, weight), perm=[1, 0])
        x, x_scale, zero = (body.name() for _ in range(3))
        body.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], [x, x_scale, zero]))
        sums = body.op("Cast", body.op("MatMulInteger", x, codes, zero), to=TensorProto.FLOAT)
        product = body.op("Mul", sums, body.op("Mul", x_scale, _scale(body, weight)))
    else:
        product = body.op("MatMul", "x", body.op("Transpose", _dense(body, weight, 2), perm=[1, 0]))
    if bias:
        body.op("Add", product, "bias")
    name = f"Linear_{weight.word}{'_dynamic' if dynamic else ''}{'_bias' if bias else ''}"
    return _call(name, body, weight, inputs, "y")


def grouped_linear(weight: Weight, *, bias: bool) -> FunctionProto:
    """x `[.., G I]` in G groups times a packed weight `[G O, I]`; attribute `blocks` is [G, O, I]."""
    body = Body()
    inputs = ["x", *weight.inputs, *(["bias"] if bias else [])]
    blocks = body.attribute("blocks")
    dense = body.op("Transpose", body.op("Reshape", _dense(body, weight, 2), blocks), perm=[0, 2, 1])  # [G, I, O]
    leading = body.op("Shape", "x", start=0, end=-1)
    apart = body.op(
        "Concat", leading, body.op("Slice", blocks, body.integers(0), body.integers(1)), body.integers(1, -1), axis=0
    )
    products = body.op("MatMul", body.op("Reshape", "x", apart), dense)  # [.., G, 1, O]
    joined = body.op("Reshape", products, body.op("Concat", leading, body.integers(-1), axis=0))
    if bias:
        body.op("Add", joined, "bias")
    name = f"GroupedLinear_{weight.word}{'_bias' if bias else ''}"
    return body.function(name, inputs, "y", ("blocks", *weight.attributes), {})


def block_sparse_linear(*, bias: bool) -> FunctionProto:
    """x `[.., C]` times tiles of t rows by one column: `weight` `[R/t, t, n]`, `columns` uint16 `[R/t, n]` of each
    block row. Columns of x are gathered and multiplied densely.
    """
    body = Body()
    flat = body.op("Flatten", "x", axis=-1)
    gathered = body.op(
        "Gather", body.op("Transpose", flat, perm=[1, 0]), body.op("Cast", "columns", to=TensorProto.INT32)
    )
    products = body.op("MatMul", "weight", gathered)  # [R/t, t, M]
    transposed = body.op("Transpose", body.op("Flatten", products, axis=2), perm=[1, 0])  # [M, R]
    shape = body.op("Concat", body.op("Shape", "x", start=0, end=-1), body.integers(-1), axis=0)
    joined = body.op("Reshape", transposed, shape)
    if bias:
        body.op("Add", joined, "bias")
    inputs = ["x", "weight", "columns", *(["bias"] if bias else [])]
    return body.function(f"BlockSparseLinear{'_bias' if bias else ''}", inputs, "y", (), {})


def embedding(weight: Weight, *, gathered: bool) -> FunctionProto:
    """Rows of a packed table by token `x`. gathered: only the rows that are looked up are unpacked; a row's codes are
    planar then: byte j holds the codes of dimensions j, j + n, j + 2n .. of n bytes a row.
    """
    body = Body()
    if not gathered:
        body.op("Gather", _dense(body, weight, 2), "x")
        return _call(f"Embedding_{weight.word}", body, weight, ["x", *weight.inputs], "y")
    rows = body.op("Gather", "weight", "x")
    if weight.bits == 8:
        levels = body.op("Cast", rows, to=TensorProto.FLOAT)
    else:
        most, centre = 2**weight.bits - 1, {4: 8.0, 2: 1.5}[weight.bits]
        # Masked before they are shifted: OpenVINO shifts by dividing, and rounds what a shift drops (decision 0010).
        planes = [
            body.op(
                "BitShift",
                body.op("BitwiseAnd", rows, body.constant(most << shift, np.uint8)),
                body.constant(shift, np.uint8),
                direction="RIGHT",
            )
            for shift in range(0, 8, weight.bits)
        ]
        codes = body.op("Cast", body.op("Concat", *planes, axis=-1), to=TensorProto.FLOAT)
        levels = body.op("Sub", codes, body.constant(centre, np.float32))
    scale = "scale" if weight.sharing == "one" else body.op("Gather", "scale", "x")
    wide = body.op("Cast", scale, to=TensorProto.FLOAT)
    if weight.sharing == "row":
        wide = body.op("Unsqueeze", wide, body.integers(-1))
    if weight.sharing == "group":
        wide = body.inner(GROUPS, wide, body.integers(weight.group), body.op("Shape", levels, start=-1))
    body.op("Mul", levels, wide)
    return body.function(f"Embedding_{weight.word}_rows", ["x", *weight.inputs], "y", (), {})


def eight_bit() -> FunctionProto:
    """A value rounded to 8 bits, between kernels that keep it so."""
    body = Body()
    body.op("DequantizeLinear", body.op("QuantizeLinear", "x", "scale", "zero"), "scale", "zero")
    return body.function("EightBit", ["x", "scale", "zero"], "y", (), {})


def norm() -> FunctionProto:
    """x * scale + shift for each channel; scale and shift `[C, 1, ..]`."""
    body = Body()
    body.op("Add", body.op("Mul", "x", "scale"), "shift")
    return body.function("Norm", ["x", "scale", "shift"], "y", (), {})


def take(axis: int) -> FunctionProto:
    """Channels of x by number, uint16."""
    body = Body()
    body.op("Gather", "x", body.op("Cast", "index", to=TensorProto.INT32), axis=axis)
    return body.function(f"Take_axis{axis % 10 if axis >= 0 else 'last'}", ["x", "index"], "y", (), {})
