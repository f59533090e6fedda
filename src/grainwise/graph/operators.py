"""The table of ATen operators: how each relates the atoms of its inputs to those of its outputs.

Letters: B batch, I input channels, O output channels, S spatial dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from grainwise.graph import reshaping
from grainwise.graph.atoms import AtomArray, Dims, Tagged
from grainwise.graph.call import FIXED, Call

Rule = Callable[[Call], list[Dims]]
"""(call) -> atoms of each output; joins and freezes in `call.atoms` on the way."""


def elementwise(call: Call) -> list[Dims]:
    """Operands are aligned at their last dimension; dimensions that meet are joined, a size 1 broadcasts."""
    shape = call.shapes[0]
    operands = call.tensors()
    dims: list[AtomArray | None] = []
    for back in range(len(shape), 0, -1):
        size = shape[-back]
        met = [(t.dims[-back], t.shape[-back]) for t in operands if len(t.shape) >= back]
        for array, own in met:
            if own != size:
                call.atoms.freeze(array, "a single channel is broadcast")
        dims.append(call.join([array for array, own in met if own == size], size))
    return [tuple(dims)]


def follow(call: Call) -> list[Dims]:
    """The result has the shape and the atoms of the first tensor."""
    return [call.tensors()[0].dims]


def constant(call: Call) -> list[Dims]:
    """A new tensor that takes nothing but its type from the arguments."""
    return call.free_outputs()


def opaque(reason: str) -> Rule:
    """A rule that freezes whatever comes in."""

    def rule(call: Call) -> list[Dims]:
        call.freeze_all(reason)
        return call.free_outputs()

    return rule


def unknown(call: Call) -> list[Dims]:
    """An operator that is not in the table."""
    return opaque(f"used by {call.name}, whose channels are not understood")(call)


def _contract(call: Call, x: AtomArray | None, weight: Tagged, dim: int, *, plain: bool) -> None:
    """Sum over `x` and dimension `dim` of `weight`; only a stored weight (`plain`) can lose units without a trace."""
    side = weight.dims[dim]
    if plain:
        call.atoms.mark_read(side)
        call.atoms.meet(x, side, "fed by a tensor of fixed width")
        return
    reason = "multiplied with channels that are computed too (attention)"
    call.atoms.freeze(x, reason)
    call.atoms.freeze(side, reason)


def _add_bias(call: Call, out: AtomArray | None) -> None:
    bias = call.optional("bias")
    if bias is not None and bias.shape and bias.shape[-1] > 1:
        call.atoms.meet(out, bias.dims[-1], FIXED)


def convolution(call: Call) -> list[Dims]:
    """conv1d..3d: weight [O, I/groups, S...], input [B, I, S...] or [I, S...]; a depthwise one ties O to I."""
    x, weight = call.tensor("input"), call.tensor("weight")
    groups, channel = int(call.args["groups"]), len(x.shape) - len(weight.shape) + 1
    inputs, out = x.dims[channel], weight.dims[0]
    if groups == 1:
        _contract(call, inputs, weight, 1, plain=weight.weight)
    elif groups == x.shape[channel] and weight.weight:
        repeated = None if inputs is None else np.repeat(inputs, weight.shape[0] // groups)
        call.atoms.meet(repeated, out, "a depthwise convolution of the network's inputs")
    else:
        for array in (inputs, out):
            call.atoms.freeze(array, "grouped convolution: a channel cannot leave its group")
    _add_bias(call, out)
    return [(*x.dims[:channel], out, *[None] * (len(weight.shape) - 2))]


def transposed_convolution(call: Call) -> list[Dims]:
    """conv_transpose1d..3d: weight [I, O/groups, S...]."""
    x, weight = call.tensor("input"), call.tensor("weight")
    channel = len(x.shape) - len(weight.shape) + 1
    if int(call.args["groups"]) != 1:
        call.freeze_all("grouped transposed convolution")
        return call.free_outputs()
    _contract(call, x.dims[channel], weight, 0, plain=weight.weight)
    _add_bias(call, weight.dims[1])
    return [(*x.dims[:channel], weight.dims[1], *[None] * (len(weight.shape) - 2))]


def linear(call: Call) -> list[Dims]:
    """weight [O, I]."""
    x, weight = call.tensor("input"), call.tensor("weight")
    _contract(call, x.dims[-1], weight, 1, plain=weight.weight)
    _add_bias(call, weight.dims[0])
    return [(*x.dims[:-1], weight.dims[0])]


def _product(call: Call, first: Tagged, second: Tagged) -> Dims:
    """first [..., N, K] x second [..., K, M]; vectors lose N or M."""
    rows, columns = first.dims[-2:-1], second.dims[-1:] if len(second.shape) > 1 else ()
    inner = -2 if len(second.shape) > 1 else -1
    if first.weight and not second.weight:
        _contract(call, second.dims[inner], first, -1, plain=True)
    else:
        _contract(call, first.dims[-1], second, inner, plain=second.weight)
    batch: list[AtomArray | None] = []
    for k in range(max(len(first.shape), len(second.shape)), 2, -1):
        met = [(t.dims[-k], t.shape[-k]) for t in (first, second) if len(t.shape) >= k]
        size = max(own for _, own in met)
        batch.append(call.join([array for array, own in met if own == size], size))
    return (*batch, *rows, *columns)


def matmul(call: Call) -> list[Dims]:
    """mm, bmm, mv and matmul."""
    first, second = call.tensors()[:2]
    return [_product(call, first, second)]


def addmm(call: Call) -> list[Dims]:
    """addmm, baddbmm: self + mat1 x mat2."""
    bias, first, second = call.tensors()[:3]
    dims = _product(call, first, second)
    for back in range(1, min(len(bias.shape), len(dims)) + 1):
        if bias.shape[-back] > 1:
            call.atoms.meet(dims[-back], bias.dims[-back], FIXED)
    return [dims]


def embedding(call: Call) -> list[Dims]:
    """weight [vocabulary, O], indices of any shape."""
    weight, indices = call.tensor("weight"), call.tensor("indices")
    call.atoms.freeze(weight.dims[0], "rows of an embedding are looked up by number")
    return [(*indices.dims, weight.dims[1])]


def channel_norm(call: Call) -> list[Dims]:
    """batch_norm, instance_norm, prelu: one number per channel, which is dimension 1."""
    x = call.tensors()[0]
    channel = x.dims[1] if len(x.dims) > 1 else None
    for parameter in call.tensors()[1:]:
        if parameter.shape and parameter.shape[0] > 1:
            channel = call.atoms.meet(channel, parameter.dims[0], "normalises the network's inputs")
    dims: Dims = (x.dims[0], channel, *x.dims[2:]) if len(x.dims) > 1 else x.dims
    return [dims, *call.free_outputs()[1:]]


def _freeze_dims(call: Call, x: Tagged, dims: list[int], reason: str) -> Dims:
    for d in dims:
        call.atoms.freeze(x.dims[d], reason)
    return tuple(None if d in dims else array for d, array in enumerate(x.dims))


def along(reason: str, argument: str = "dim") -> Rule:
    """An operator that reorders or mixes the values along some dimensions."""

    def rule(call: Call) -> list[Dims]:
        x = call.tensors()[0]
        return [_freeze_dims(call, x, call.dims_of(argument, x), reason)] * len(call.shapes)

    return rule


def softmax(call: Call) -> list[Dims]:
    """Frozen atoms stay on the result, so that what meets it later is told the same reason."""
    x = call.tensor("self")
    _freeze_dims(call, x, call.dims_of("dim", x), "softmax over these channels: its sum would change")
    return [x.dims]


def layer_norm(call: Call) -> list[Dims]:
    """layer_norm and rms_norm over the last dimensions: without a channel their statistics would change."""
    x = call.tensor("input")
    last = len(call.args["normalized_shape"])
    reason = f"{call.name} over these channels: its statistics would change"
    _freeze_dims(call, x, list(range(len(x.shape) - last, len(x.shape))), reason)
    for parameter in call.tensors()[1:]:
        for back in range(1, last + 1):
            call.atoms.meet(x.dims[-back], parameter.dims[-back], reason)
    return [x.dims, *call.free_outputs()[1:]]


def group_norm(call: Call) -> list[Dims]:
    """Channels are dimension 1; without one the statistics of its group would change."""
    x = call.tensor("input")
    reason = "group_norm over these channels: its statistics would change"
    _freeze_dims(call, x, [1], reason)
    for parameter in call.tensors()[1:]:
        call.atoms.meet(x.dims[1], parameter.dims[0], reason)
    return [x.dims]


def reduction(call: Call) -> list[Dims]:
    """mean, sum, max ...: dimensions that are reduced must be free; max(x, y) is elementwise."""
    if "other" in call.args:
        return elementwise(call)
    x = call.tensor("self")
    reduced = call.dims_of("dim", x)
    dims = _freeze_dims(call, x, reduced, f"{call.name} runs over these channels")
    kept = dims if bool(call.args.get("keepdim", False)) else tuple(a for d, a in enumerate(dims) if d not in reduced)
    return [kept] * len(call.shapes)


def spatial(rank: int) -> Rule:
    """Pooling and interpolation over the last `rank` dimensions."""

    def rule(call: Call) -> list[Dims]:
        x = call.tensors()[0]
        last = list(range(len(x.shape) - rank, len(x.shape)))
        return [_freeze_dims(call, x, last, f"{call.name} runs over these channels")] * len(call.shapes)

    return rule


def pad(call: Call) -> list[Dims]:
    """pad: pairs of numbers from the last dimension backwards; channels must not be padded."""
    x, amounts = call.tensor("self"), list(call.args["pad"])
    padded = [len(x.shape) - 1 - k // 2 for k, amount in enumerate(amounts) if amount]
    return [_freeze_dims(call, x, padded, "channels are padded with constants")]


def glu(call: Call) -> list[Dims]:
    """glu halves a dimension: unit i of the first half goes with unit i of the second."""
    x = call.tensor("self")
    d = int(call.args["dim"]) % len(x.shape)
    array = x.dims[d]
    if array is None:
        return [x.dims]
    first, second = np.split(array, 2)
    call.atoms.unify(first, second)
    return [(*x.dims[:d], first, *x.dims[d + 1 :])]


ELEMENTWISE = """abs acos add addcdiv addcmul and asin atan atan2 bitwise_and bitwise_not bitwise_or ceil celu clamp
clamp_max clamp_min copy cos cosh div divide elu eq erf erfc exp expm1 floor floor_divide fmod ge gelu greater gt
hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan le leaky_relu lerp log log10 log1p log2 log_sigmoid
logical_and logical_not logical_or logit lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg or pow
reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign silu sin sinh softplus softshrink sqrt square
sub subtract tan tanh tanhshrink threshold true_divide trunc where xor"""

FOLLOW = """alias alpha_dropout clone contiguous detach dropout empty_like feature_alpha_dropout feature_dropout fill
full_like lift_fresh_copy lift_fresh native_dropout ones_like rand_like randn_like requires_grad to to_copy type_as zero
zeros_like"""

REDUCTIONS = "all amax amin any argmax argmin linalg_vector_norm logsumexp max mean min norm prod std sum var var_mean"

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(FOLLOW.split(), follow),
    **dict.fromkeys(REDUCTIONS.split(), reduction),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), transposed_convolution),
    **dict.fromkeys(("mm", "bmm", "mv", "matmul"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    **dict.fromkeys(("batch_norm", "instance_norm", "prelu"), channel_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    **dict.fromkeys(("softmax", "log_softmax"), softmax),
    **dict.fromkeys(("cumsum", "cumprod", "sort", "topk"), along("summed or sorted along these channels")),
    **dict.fromkeys(("flip", "roll"), along("flipped or rolled along these channels", "dims")),
    **{
        f"{kind}{rank}d": spatial(rank)
        for rank in (1, 2, 3)
        for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool", "upsample_nearest")
    },
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest_exact2d"), spatial(2)),
    **dict.fromkeys(("max_pool2d_with_indices",), spatial(2)),
    "upsample_linear1d": spatial(1),
    "upsample_trilinear3d": spatial(3),
    **dict.fromkeys(("view", "view_as", "unsafe_view", "reshape", "reshape_as"), reshaping.reshape),
    **dict.fromkeys(("flatten", "unflatten", "squeeze", "unsqueeze"), reshaping.reshape),
    **dict.fromkeys(("transpose", "t"), reshaping.transpose),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), reshaping.expand),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), reshaping.split),
    **dict.fromkeys(("select", "unbind"), reshaping.select),
    **dict.fromkeys(("cat", "concat", "concatenate"), reshaping.cat),
    **dict.fromkeys(("new_empty", "new_full", "new_ones", "new_zeros"), constant),
    "permute": reshaping.permute,
    "slice": reshaping.slice_,
    "narrow": reshaping.narrow,
    "stack": reshaping.stack,
    "linear": linear,
    "embedding": embedding,
    "group_norm": group_norm,
    "glu": glu,
    "pad": pad,
    "constant_pad_nd": pad,
    "scaled_dot_product_attention": opaque("attention heads need all of their channels"),
}
"""Rules by operator name; underscores around a name (in-place and private variants) are stripped before the look-up."""
