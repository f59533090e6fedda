"""Modules of this package as JSON-able data and back, without running anything that the data names."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from grainwise.methods.activations import EightBit
from grainwise.methods.layers import Ghost, GroupedLinear, empty_stage, geometry_of, realisation_of
from grainwise.methods.storage import PackedWeight
from grainwise.plan.choices import NONE, Choice, Granularity, Method
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.shapes import Stage
from grainwise.plan.target import Realisation

__all__ = ["Ghost", "GroupedLinear", "construct", "describe", "effective_matrix"]

LARGEST = 2**31  # weights of one layer; a spec that asks for more is damaged or hostile

Positive = Annotated[int, Field(ge=1, lt=LARGEST)]
Natural = Annotated[int, Field(ge=0, lt=LARGEST)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerSpec(_Spec):
    """One stage: its geometry, and how it is stored (`plan.shapes.Stage`, `plan.choices.Choice`)."""

    type: Literal["layer"] = "layer"
    kind: Kind
    inputs: Positive
    outputs: Positive
    kernel: tuple[Positive, ...] = ()
    stride: tuple[Positive, ...] = ()
    padding: tuple[Natural, ...] = ()
    dilation: tuple[Positive, ...] = ()
    groups: Positive = 1
    bias: bool = False
    kept: Natural | None = None
    tile_rows: Literal[0, 4, 8, 16, 128] = 0
    bits: Literal[8, 4, 2] | None = None
    sharing: Granularity | None = None
    realisation: Realisation | None = None

    def build(self) -> nn.Module:
        stage, precision = self._stage(), self._precision()
        if (self.realisation is Realisation.DYNAMIC) > (self.kind is Kind.LINEAR and self.groups == 1):
            raise ValueError(f"a {self.kind} layer of {self.groups} groups does not run in {self.realisation}")
        return empty_stage(stage, precision, self.realisation)

    def _stage(self) -> Stage:
        dims = {Kind.CONV1D: 1, Kind.CONV2D: 2}.get(self.kind, 0)
        if any(len(part) != dims for part in (self.kernel, self.stride, self.padding, self.dilation)):
            raise ValueError(f"a {self.kind} layer has {dims} numbers in kernel, stride, padding and dilation")
        if self.kind is Kind.EMBEDDING and (self.bias or self.groups > 1):
            raise ValueError("an Embedding has neither bias nor groups")
        shape = (self.kernel, self.stride, self.padding, self.dilation)
        g = Geometry(self.kind, self.inputs, self.outputs, *shape, self.groups, self.bias)
        kept = g.weights if self.kept is None else self.kept
        if g.weights >= LARGEST or kept > g.weights:
            raise ValueError(f"{kept} of {g.weights} weights cannot be kept")
        if self.tile_rows and (self.kept is None or g.rows % self.tile_rows or kept % g.rows):
            raise ValueError(
                f"tiles of {self.tile_rows} rows do not give {self.kept} of {g.rows} x {g.columns} weights"
            )
        return Stage(g, kept=self.kept, tile_rows=self.tile_rows)

    def _precision(self) -> Choice:
        if (self.bits is None) != (self.sharing is None):
            raise ValueError("bits and sharing go together")
        return NONE if self.bits is None else Choice(Method.QUANTIZE, self.sharing, self.bits)


class PointSpec(_Spec):
    """A value between two stages that is kept in 8 bits."""

    type: Literal["eight_bit"] = "eight_bit"

    def build(self) -> nn.Module:
        return EightBit()


_Part = Annotated[LayerSpec | PointSpec, Field(discriminator="type")]


class SequenceSpec(_Spec):
    """Stages that run one after the other."""

    type: Literal["sequence"] = "sequence"
    stages: Annotated[tuple[_Part, ...], Field(min_length=1, max_length=8)]

    def build(self) -> nn.Module:
        return nn.Sequential(*(stage.build() for stage in self.stages))


class GhostSpec(_Spec):
    """Primary channels and the cheap maps that make ghosts of them."""

    type: Literal["ghost"] = "ghost"
    primary: LayerSpec
    cheap: LayerSpec

    def build(self) -> nn.Module:
        if self.primary.kind is not self.cheap.kind or self.cheap.inputs != self.cheap.outputs:
            raise ValueError("the cheap part of a ghost module has the kind of its primary and one input an output")
        ghosts = self.cheap.outputs
        dim = -1 if self.primary.kind is Kind.LINEAR else 1
        return Ghost(self.primary.build(), self.cheap.build(), ghosts, self.primary.outputs + ghosts, dim)


_ADAPTER: TypeAdapter[LayerSpec | SequenceSpec | GhostSpec] = TypeAdapter(
    Annotated[LayerSpec | SequenceSpec | GhostSpec, Field(discriminator="type")]
)


def describe(module: nn.Module) -> dict[str, Any]:
    """JSON-able description of any module that `realise` returns; `construct` builds the empty module from it.

    Raises ValueError for other modules.
    """
    match module:
        case nn.Sequential():
            return {"type": "sequence", "stages": [_describe_layer(stage) for stage in module]}
        case Ghost():
            return {
                "type": "ghost",
                "primary": _describe_layer(module.primary),
                "cheap": _describe_layer(module.cheap),
            }
        case _:
            return _describe_layer(module)


def _describe_layer(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, EightBit):
        return PointSpec().model_dump(mode="json")
    g = geometry_of(layer)
    packed = getattr(layer, "packed", None)
    storage: dict[str, Any] = {}
    if isinstance(packed, PackedWeight):
        storage = {"kept": packed.stage.kept, "tile_rows": packed.stage.tile_rows}
        storage["realisation"] = realisation_of(layer)
        if packed.bits:
            storage |= {"bits": packed.bits, "sharing": packed.precision.granularity}
    spec = LayerSpec(
        kind=g.kind,
        inputs=g.inputs,
        outputs=g.outputs,
        kernel=g.kernel,
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
        groups=g.groups,
        bias=g.bias,
        **storage,
    )
    return {"type": "layer", **spec.model_dump(mode="json", exclude_defaults=True)}


def construct(spec: dict[str, Any]) -> nn.Module:
    """The module that `describe` described, all zero, with the same state dict keys and shapes.

    Raises ValueError, in one sentence, for a spec that is not valid.
    """
    try:
        return _ADAPTER.validate_python(spec).build()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"module spec is not valid at {place or 'its root'}: {first['msg']}") from None


@torch.no_grad()
def effective_matrix(module: nn.Module, geometry: Geometry) -> Tensor:
    """`[O, K]` (Embedding: `[tokens, width]`) that a module without its bias applies to the unfolded inputs of a layer.

    Found by running the module on one-hot windows, placed where padding does not cut them. Raises ValueError for a
    ghost module, whose cheap maps look at neighbouring outputs, so that no such matrix exists.
    """
    if isinstance(module, Ghost):
        raise ValueError("a ghost module is not one matrix on the layer's windows")
    if geometry.kind is Kind.EMBEDDING:
        vectors: Tensor = module(torch.arange(geometry.inputs))
        return vectors
    if geometry.kind is Kind.LINEAR:
        images = module(_one_hot_windows(geometry)) - module(torch.zeros(1, geometry.inputs))
        return _rows(images)
    places = [ceil(p / s) for p, s in zip(geometry.padding, geometry.stride, strict=True)]
    windows = _one_hot_windows(geometry)
    start = [o * s - p for o, s, p in zip(places, geometry.stride, geometry.padding, strict=True)]
    reach = [s + d * (k - 1) + 1 for s, d, k in zip(start, geometry.dilation, geometry.kernel, strict=True)]
    pictures = torch.zeros(geometry.fan_in, geometry.inputs, *reach)
    inside = tuple(slice(s, None, d) for s, d in zip(start, geometry.dilation, strict=True))
    pictures[(slice(None), slice(None), *inside)] = windows.reshape(-1, geometry.inputs, *geometry.kernel)
    images = module(pictures) - module(torch.zeros_like(pictures[:1]))
    return _rows(images[(slice(None), slice(None), *places)])


def _one_hot_windows(geometry: Geometry) -> Tensor:
    """`[K, I T]`: window k has a one at column k of every group."""
    return torch.eye(geometry.fan_in).repeat(1, geometry.groups)


def _rows(images: Tensor) -> Tensor:
    """Images `[K, O]` of the one-hot windows as the weight matrix `[O, K]`."""
    return images.T.contiguous()
