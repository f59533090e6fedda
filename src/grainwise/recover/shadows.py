"""What is trained of a deployed network: float32 shadows of its values, read through the form they are stored in.

Letters: R x C the weight matrix of a stage, S scales, O output channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from grainwise.methods.activations import rounded
from grainwise.methods.layers import GroupedLinear, realisation_of, refresh
from grainwise.methods.storage import CENTRE, PackedWeight, decode_support, spread_scales, storable
from grainwise.plan.target import Realisation
from grainwise.realise.norms import FrozenNorm

LargestCode = Callable[[Realisation, int], float]
"""(how a stage runs, its bits) -> largest distance of a code from that of zero."""

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Linear, GroupedLinear, nn.Embedding)
_SMALLEST_UNIT = 0.1  # of the tensor's mean size: rows that folding all but switched off can still come back


class Learnt(nn.Module):
    """A tensor that is trained: `start + unit * change`, where `change` begins at zero.

    The unit is the size of the values, so that one learning rate is the same share of every tensor: folded batch norms
    leave rows of one layer with sizes that differ a hundredfold.
    """

    start: Tensor
    unit: Tensor

    def __init__(self, start: Tensor, unit: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.detach().clone())
        self.register_buffer("unit", unit)
        self.change = nn.Parameter(torch.zeros_like(self.start))

    def forward(self) -> Tensor:
        return torch.addcmul(self.start, self.unit, self.change)


def _learnt_rows(weight: Tensor, keep: Tensor | None = None) -> Learnt:
    """A matrix `[R, ...]` in units of its rows; values outside of the bool `keep` stay zero."""
    matrix = weight.detach().flatten(1)
    kept = torch.ones_like(matrix) if keep is None else keep.to(matrix.dtype)
    squares, counts = (matrix.square() * kept).sum(1), kept.sum(1).clamp_min(1)
    whole = (squares.sum() / counts.sum()).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    unit = (squares / counts).sqrt().clamp_min(_SMALLEST_UNIT * whole)
    return Learnt(weight, (unit[:, None] * kept).reshape(weight.shape))


def _learnt_vector(vector: Tensor) -> Learnt:
    """A vector `[O]` in units of its mean size; one of zeros in ones."""
    size = vector.detach().square().mean().sqrt()
    return Learnt(vector, torch.where(size > 0, size, 1.0).expand(vector.shape).clone())


class Shadow(nn.Module):
    """The trained form of one module of a network. path: where that module is."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What the module computes with, by name in the network, with gradients."""

    @abstractmethod
    def store(self) -> None:
        """Write that into the module, in the form in which it is kept."""


class PlainShadow(Shadow):
    """Weight and bias that are kept as they are: those of ordinary layers and of frozen norms."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(path)
        self._module = [module]  # in a list, so that it is no part of this one
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        self.weight = _learnt_vector(weight) if weight.dim() == 1 else _learnt_rows(weight)
        self.bias = _learnt_vector(bias) if isinstance(bias, Tensor) else None

    def tensors(self) -> dict[str, Tensor]:
        found = {f"{self.path}.weight": self.weight()}
        return found if self.bias is None else {**found, f"{self.path}.bias": self.bias()}

    @torch.no_grad()
    def store(self) -> None:
        (module,) = self._module
        for name, value in self.tensors().items():
            getattr(module, name.removeprefix(f"{self.path}.")).copy_(value)


class PackedShadow(Shadow):
    """The weight of a stage that is stored packed, with its scales, and its bias. Pruned weights stay pruned.

    largest: distance of a code from that of zero. Scales are learnt too (LSQ, Esser et al. 2020), as factors of what
    they are at the start, and read as float16 keeps them. A step of a scale moves all of its weights the same way, so
    it is smaller by the root of their number (LSQ, section 2.2).
    """

    keep: Tensor | None

    def __init__(self, path: str, layer: nn.Module, largest: LargestCode) -> None:
        super().__init__(path)
        packed, bias = layer.packed, getattr(layer, "bias", None)
        assert isinstance(packed, PackedWeight)
        self._layer, self._packed = [layer], [packed]
        keep = None if packed.support is None else decode_support(packed.support, packed.stage)
        self.register_buffer("keep", keep)
        self.values = _learnt_rows(packed.unpack(), keep)
        self.bias = _learnt_vector(bias) if isinstance(bias, Tensor) else None
        self.scale = None
        if packed.scale is not None:
            self._largest = largest(realisation_of(layer), packed.bits)
            start = packed.scale.float().log()
            self.scale = Learnt(start, torch.full_like(start, (len(start) / packed.kept) ** 0.5))

    def _levels(self, wide: Tensor) -> Tensor:
        """`[R, C]`: codes counted from that of zero; wide: the scale of each weight."""
        centre = CENTRE[self._packed[0].bits]
        codes = rounded(self.values() / wide + centre).clamp(centre - self._largest, centre + self._largest)
        return codes - centre if self.keep is None else (codes - centre) * self.keep

    def tensors(self) -> dict[str, Tensor]:
        (layer,), (packed,) = self._layer, self._packed
        found = {} if self.bias is None else {f"{self.path}.bias": self.bias()}
        if self.scale is None:
            dense = self.values()
        else:
            found[f"{self.path}.packed.scale"] = scale = _as_stored(self.scale().exp())
            assert packed.precision.granularity is not None
            wide = spread_scales(scale, packed.stage.geometry, packed.precision.granularity)
            dense = self._levels(wide) * wide
        assert isinstance(layer.weight, Tensor)
        shaped = dense.reshape(layer.weight.shape)
        pictures = shaped.dim() == 4
        found[f"{self.path}.weight"] = shaped.contiguous(memory_format=torch.channels_last) if pictures else shaped
        return found

    @torch.no_grad()
    def store(self) -> None:
        (layer,), (packed,) = self._layer, self._packed
        if self.scale is None:
            packed.store(self.values(), None, self.keep)
        else:
            assert packed.precision.granularity is not None
            scale = _as_stored(self.scale().exp())
            wide = spread_scales(scale, packed.stage.geometry, packed.precision.granularity)
            codes = self._levels(wide) + CENTRE[packed.bits]
            packed.store(codes.to(torch.uint8), scale.half(), self.keep)
        refresh(layer)
        if self.bias is not None:
            layer.bias.copy_(self.bias())  # type: ignore[operator]


class _AsStored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, scale: Tensor) -> Tensor:
        return storable(scale)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def _as_stored(scale: Tensor) -> Tensor:
    """`storable`, with the gradient passed on as it is."""
    found: Tensor = _AsStored.apply(scale)  # type: ignore[no-untyped-call]
    return found


def shadows_of(network: nn.Module, layers: Collection[str], largest: LargestCode) -> list[Shadow]:
    """Shadows of all stages of the named layers and of all frozen norms of a deployed network, in its order."""
    return list(_shadows(network, tuple(layers), largest))


def _shadows(network: nn.Module, layers: tuple[str, ...], largest: LargestCode) -> Iterator[Shadow]:
    inside = tuple(f"{name}." for name in layers)
    for path, module in network.named_modules():
        if isinstance(module, FrozenNorm):
            yield PlainShadow(path, module)
        elif not isinstance(module, _PLAIN) or not (path in layers or path.startswith(inside)):
            continue
        elif isinstance(getattr(module, "packed", None), PackedWeight):
            yield PackedShadow(path, module, largest)
        else:
            yield PlainShadow(path, module)
