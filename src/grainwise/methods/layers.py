"""Deployable modules: ordinary layers whose weight is unpacked from what is stored, grouped Linear, ghost module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grainwise.methods.activations import DynamicLinear, StaticConv1d, StaticConv2d
from grainwise.methods.storage import PackedWeight
from grainwise.plan.choices import NONE, Choice
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.shapes import Stage
from grainwise.plan.target import PACKED, Realisation


class GroupedLinear(nn.Module):
    """A Linear whose inputs and outputs fall into groups that do not see each other, like a grouped convolution.

    weight: `[O, I/G]`; bias: `[O]` or None. Input `[..., I]`, output `[..., O]`.
    """

    def __init__(self, in_features: int, out_features: int, groups: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(out_features, in_features // groups))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(*x.shape[:-1], self.groups, 1, -1)  # [..., G, 1, I/G]
        weight = self.weight.reshape(self.groups, -1, self.weight.shape[1]).transpose(1, 2)  # [G, I/G, O/G]
        y = torch.matmul(parts, weight).flatten(-3)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, groups={self.groups}, bias={self.bias is not None}"


class Ghost(nn.Module):
    """Some output channels are computed, each of the others from one of them (GhostNet, Han et al. 2020).

    primary: layer with P outputs; cheap: per-channel map of the ghosts; source: int16 `[ghosts]` primary of each ghost;
    order: int16 `[O]` where each output channel stands in (primaries, ghosts). dim: the channel dimension, 1 or -1.
    """

    source: Tensor
    order: Tensor

    def __init__(self, primary: nn.Module, cheap: nn.Module, ghosts: int, outputs: int, dim: int) -> None:
        super().__init__()
        self.primary = primary
        self.cheap = cheap
        self.dim = dim
        self.register_buffer("source", torch.zeros(ghosts, dtype=torch.int16))
        self.register_buffer("order", torch.zeros(outputs, dtype=torch.int16))

    def forward(self, x: Tensor) -> Tensor:
        kept = self.primary(x)
        ghosts = self.cheap(kept.index_select(self.dim, self.source.long()))
        return torch.cat((kept, ghosts), self.dim).index_select(self.dim, self.order.long())


def plain_layer(geometry: Geometry, realisation: Realisation = Realisation.FLOAT) -> nn.Module:
    """The ordinary layer of a geometry, its parameters zero."""
    g = geometry
    with torch.no_grad(), torch.device("meta"):
        layer = _on_meta(g, realisation)
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


_CONVOLUTIONS = {
    (Kind.CONV1D, False): nn.Conv1d,
    (Kind.CONV2D, False): nn.Conv2d,
    (Kind.CONV1D, True): StaticConv1d,
    (Kind.CONV2D, True): StaticConv2d,
}


def _on_meta(g: Geometry, realisation: Realisation) -> nn.Module:
    match g.kind:
        case Kind.CONV1D | Kind.CONV2D:
            kind: Any = _CONVOLUTIONS[g.kind, realisation is Realisation.STATIC]
            layer: nn.Module = kind(g.inputs, g.outputs, g.kernel, g.stride, g.padding, g.dilation, g.groups, g.bias)
            return layer
        case Kind.LINEAR if g.groups > 1:
            return GroupedLinear(g.inputs, g.outputs, g.groups, g.bias)
        case Kind.LINEAR:
            linear = DynamicLinear if realisation is Realisation.DYNAMIC else nn.Linear
            return linear(g.inputs, g.outputs, g.bias)
        case Kind.EMBEDDING:
            return nn.Embedding(g.inputs, g.outputs)


def geometry_of(module: nn.Module) -> Geometry:
    """Geometry of an ordinary layer, packed or not. Raises ValueError for any other module."""
    match module:
        case nn.Conv1d() | nn.Conv2d():
            if isinstance(module.padding, str) or module.padding_mode != "zeros":
                raise ValueError(
                    f"padding {module.padding!r} ({module.padding_mode}) is not given in zeros and numbers"
                )
            kind = Kind.CONV1D if isinstance(module, nn.Conv1d) else Kind.CONV2D
            shape = (module.kernel_size, module.stride, module.padding, module.dilation)
            return Geometry(
                kind, module.in_channels, module.out_channels, *shape, module.groups, module.bias is not None
            )
        case GroupedLinear():
            return Geometry(
                Kind.LINEAR, module.in_features, module.out_features, groups=module.groups, bias=module.bias is not None
            )
        case nn.Linear():
            return Geometry(Kind.LINEAR, module.in_features, module.out_features, bias=module.bias is not None)
        case nn.Embedding():
            return Geometry(Kind.EMBEDDING, module.num_embeddings, module.embedding_dim)
        case _:
            raise ValueError(f"{type(module).__name__} is not a layer of this library")


def refresh(layer: nn.Module, _incompatible: object = None) -> None:
    """Unpacks the stored weight into the dense one, in place, so that its memory format stays."""
    assert isinstance(layer.packed, PackedWeight) and isinstance(layer.weight, Tensor)
    with torch.no_grad():
        layer.weight.copy_(layer.packed.unpack().reshape(layer.weight.shape))


def empty_stage(stage: Stage, precision: Choice = NONE, realisation: Realisation | None = None) -> nn.Module:
    """The module that keeps `stage` at `precision`, all zero; by default realised as the packed target does.

    With full support in float32 it is the ordinary layer. Else the ordinary layer's `weight` is a buffer outside of the
    state dict, and a child `packed` holds what is stored; loading a state dict unpacks it.
    """
    how = realisation or PACKED.realisation(stage, precision)
    layer = plain_layer(stage.geometry, how)
    if stage.kept is None and precision == NONE:
        return layer
    dense = layer.weight
    assert isinstance(dense, nn.Parameter)
    del layer.weight
    layer.register_buffer("weight", dense.detach().clone(), persistent=False)
    layer.packed = PackedWeight(stage, precision)
    if how is Realisation.STATIC:
        layer.register_buffer("x_scale", torch.zeros(()))
        layer.register_buffer("y_scale", torch.zeros(()))
    layer.realisation = how  # type: ignore[assignment]  # nn.Module types every attribute as a tensor or module
    layer.register_load_state_dict_post_hook(refresh)  # type: ignore[no-untyped-call]
    return layer


def realisation_of(layer: nn.Module) -> Realisation:
    """How a stage's module runs."""
    found = getattr(layer, "realisation", Realisation.FLOAT)
    assert isinstance(found, Realisation)
    return found


def filled_stage(
    stage: Stage,
    precision: Choice,
    values: Tensor,
    *,
    scale: Tensor | None = None,
    support: Tensor | None = None,
    bias: Tensor | None = None,
    realisation: Realisation | None = None,
) -> nn.Module:
    """A stage's module with its contents; `values`, `scale`, `support` as `PackedWeight.store` takes them."""
    layer = empty_stage(stage, precision, realisation)
    with torch.no_grad():
        if isinstance(layer.bias if stage.geometry.bias else None, Tensor) and bias is not None:
            layer.bias.copy_(bias)  # type: ignore[operator]
        if isinstance(packed := getattr(layer, "packed", None), PackedWeight):
            packed.store(values, scale, support)
            refresh(layer)
        else:
            assert isinstance(layer.weight, nn.Parameter)
            layer.weight.copy_(values.reshape(layer.weight.shape))
    return layer


@torch.no_grad()
def scale_outputs(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Change a stage's module in place so that it gives y * scale + shift for each output channel.

    scale, shift: `[O]`. Codes stay, or change sign; scales are rounded to float16 again, one for each row where one
    served the whole tensor.
    """
    old = layer.bias
    bias = shift.clone() if old is None else torch.addcmul(shift, old, scale)  # type: ignore[arg-type]
    layer.bias = nn.Parameter(bias, requires_grad=False)
    packed = getattr(layer, "packed", None)
    if not isinstance(packed, PackedWeight):
        assert isinstance(layer.weight, nn.Parameter)
        layer.weight.mul_(scale.reshape(-1, *(1,) * (layer.weight.dim() - 1)))
        return
    layer.packed = packed.scaled_rows(scale)
    refresh(layer)
