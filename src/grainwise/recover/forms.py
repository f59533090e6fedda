"""What a layer computes with while its network trains compressed: a form of its dense weight.

Letters: O, I channels, R x C the layer's weight matrix (`plan.layers.Geometry`) once channels are removed, S scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grainwise.methods.layers import realisation_of
from grainwise.methods.quantize import sharing_rows, to_codes
from grainwise.methods.storage import CENTRE, PackedWeight, decode_support, spread_scales, storable
from grainwise.plan.choices import UNCOMPRESSED, Entry, Granularity, Method
from grainwise.plan.layers import Geometry, Kind, Layer
from grainwise.realise.build import kept_units
from grainwise.realise.channels import Kept
from grainwise.realise.library import VariantLibrary

METHODS = (Method.PRUNE, Method.QUANTIZE)
"""Methods that have a form in the dense weight. Factors and students have parameters of their own, which a user's
optimiser does not know, and a decision for them could not be taken back.
"""


@dataclass(frozen=True, slots=True)
class Grid:
    """Quantisation whose scales follow the weights: the largest weight that shares a scale is always on the largest
    code, so that whoever quantises the result anew finds the same scales and codes.

    geometry: of the matrix. reach: largest distance of a code from that of zero. clip: `[S]` what the largest code is
    worth, as a share of the largest weight: so little above 1, at most, that this weight is rounded to that code.
    """

    geometry: Geometry
    granularity: Granularity
    bits: int
    reach: float
    clip: Tensor

    @staticmethod
    def of(packed: PackedWeight, reach: float, matrix: Tensor) -> Grid:
        """The grid of `packed`, which was made of `matrix` `[R, C]`."""
        granularity = packed.precision.granularity
        assert packed.scale is not None and granularity is not None
        geometry = packed.stage.geometry
        clip = packed.scale.float() * reach / _largest(matrix, geometry, granularity)
        return Grid(geometry, granularity, packed.bits, reach, clip.clamp(max=0.999 * reach / (reach - 0.5)))

    def __call__(self, matrix: Tensor) -> Tensor:
        """`[R, C]` on the grid."""
        scale = storable(_largest(matrix, self.geometry, self.granularity) * self.clip / self.reach)
        wide = spread_scales(scale, self.geometry, self.granularity)
        return (to_codes(matrix, wide, self.bits, self.reach) - CENTRE[self.bits]) * wide


def _largest(matrix: Tensor, geometry: Geometry, granularity: Granularity) -> Tensor:
    """`[S]`: the largest weight of those that share a scale."""
    return sharing_rows(matrix, geometry, granularity).abs().amax(1)


@dataclass(frozen=True, slots=True)
class Form:
    """From a dense weight to what its entry leaves of it, of the same shape: removed channels are not read, pruned
    weights are zero, the others lie on a grid. Which ones was decided; where they lie follows the dense weight.

    shape: `[R, C]`. places: int64 `[R * C]` of the matrix in the flat weight, None for all of it. dead: bool, in the
    weight's shape, what is zero.
    """

    shape: tuple[int, int]
    places: Tensor | None = None
    dead: Tensor | None = None
    grid: Grid | None = None

    def dense(self, weight: Tensor) -> Tensor:
        """The weight before it is rounded."""
        return weight if self.dead is None else weight.masked_fill(self.dead, 0.0)

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> Tensor:
        dense = self.dense(weight)
        if self.grid is None:
            return dense
        flat = dense.reshape(-1)
        matrix = self.grid((flat if self.places is None else flat[self.places]).reshape(self.shape))
        return self.placed(weight, matrix)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors for safetensors, and a body for JSON."""
        tensors = {"places": self.places, "dead": self.dead, "clip": None if self.grid is None else self.grid.clip}
        grid = None if self.grid is None else {**asdict(self.grid), "clip": None}
        return {name: t for name, t in tensors.items() if t is not None}, {"shape": self.shape, "grid": grid}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> Form:
        """Inverse of `state`."""
        grid, (rows, columns) = body["grid"], body["shape"]
        if grid is not None:
            geometry: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in grid["geometry"].items()}
            how = Granularity(grid["granularity"])
            grid = Grid(Geometry(**geometry), how, grid["bits"], grid["reach"], tensors["clip"])
        return Form((rows, columns), tensors.get("places"), tensors.get("dead"), grid)

    def placed(self, weight: Tensor, matrix: Tensor) -> Tensor:
        """The weight with `matrix` in its places and zero where it is dead, in the weight's memory format."""
        flat = matrix.reshape(-1)
        if self.places is not None:
            flat = weight.reshape(-1).clone()
            flat[self.places] = matrix.reshape(-1)
        return self.dense(torch.empty_like(weight).copy_(flat.reshape(weight.shape)))


def forms_of(library: VariantLibrary, entries: Mapping[str, Entry]) -> dict[str, Form]:
    """The form of every layer that `entries` change, by name.

    Raises ValueError for a method that has none (`METHODS`).
    """
    kept = kept_units(library, entries)
    return {layer.name: _form(library, layer, entry, kept) for layer, entry in _changed(library, entries, kept)}


@torch.no_grad()
def begin(network: nn.Module, library: VariantLibrary, entries: Mapping[str, Entry]) -> dict[str, Form]:
    """`forms_of` the entries, and the dense weights of `network` set to where training under them starts: those of the
    library's reference, re-fitted to the channels that are left. What the forms give is then the library's variant.
    """
    kept, forms = kept_units(library, entries), forms_of(library, entries)
    for name, form in forms.items():
        weight = network.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        weight.copy_(form.placed(weight, library.problem(library.reference.graph.layer(name), kept).matrix))
    return forms


def _changed(library: VariantLibrary, entries: Mapping[str, Entry], kept: Kept) -> Iterator[tuple[Layer, Entry]]:
    for layer in library.reference.graph.layers:
        entry = entries.get(layer.name, UNCOMPRESSED)
        if entry.structure.method not in (Method.NONE, *METHODS):
            raise ValueError(f"layer {layer.name!r} cannot take {entry} while it trains: use {' and '.join(METHODS)}")
        if layer.blocked or layer.tied_to:
            continue
        if entry != UNCOMPRESSED or any(part is not None for part in library.positions(layer, kept)):
            yield layer, entry


def _form(library: VariantLibrary, layer: Layer, entry: Entry, kept: Kept) -> Form:
    matrix, module = library.problem(layer, kept).matrix, library.layer(layer, entry, kept)
    places, dead = _places(layer, *library.positions(layer, kept))
    shape, packed = (matrix.shape[0], matrix.shape[1]), getattr(module, "packed", None)
    if not isinstance(packed, PackedWeight):
        return Form(shape, places, dead)
    if packed.support is not None:
        support = decode_support(packed.support, packed.stage)
        dead = torch.zeros(layer.geometry.weight_shape, dtype=torch.bool) if dead is None else dead
        dead.view(-1)[torch.arange(dead.numel()) if places is None else places] = ~support.reshape(-1)
        matrix = matrix * support
    if not packed.bits:
        return Form(shape, places, dead)
    reach = library.reference.target.largest_code(realisation_of(module), packed.bits)
    return Form(shape, places, dead, Grid.of(packed, reach, matrix))


def _places(layer: Layer, inputs: Tensor | None, outputs: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(places, dead) of a `Form` whose layer keeps these channels and prunes nothing."""
    shape = layer.geometry.weight_shape
    numbers = torch.arange(layer.geometry.weights).reshape(shape)
    if layer.geometry.kind is Kind.EMBEDDING:  # the width of its vectors is the second dimension
        return (None if outputs is None else numbers[:, outputs].reshape(-1)), None
    if outputs is not None:
        numbers = numbers[outputs]
    if inputs is None or layer.geometry.depthwise:
        return (None if outputs is None else numbers.reshape(-1)), None
    dead = torch.ones(shape, dtype=torch.bool)
    dead[:, inputs] = False
    return numbers[:, inputs].reshape(-1), dead


class _Straight(torch.autograd.Function):
    """A form; its gradient passes through the rounding as it is (Bengio et al. 2013) and ends at what is dead."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, form: Form) -> Tensor:
        ctx.form = form
        return form(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.form.dense(gradient), None


class Dress:
    """Forms worn by the layers of a user's own network. Its parameters, their names and its state dict stay what they
    are; copies of the network are dense.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.forms: Mapping[str, Form] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def wear(self, forms: Mapping[str, Form]) -> None:
        """Put on these forms in place of those that are worn."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forms = dict(forms)
        for name, form in forms.items():
            layer = self.network.get_submodule(name)
            self._handles += [
                layer.register_forward_pre_hook(_before(layer, form)),
                layer.register_forward_hook(_after, always_call=True),
            ]

    @torch.no_grad()
    def settle(self) -> None:
        """Write what the layers compute with into their weights, and take the forms off: the network computes the same
        without them.
        """
        for name, form in self.forms.items():
            weight = self.network.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter)
            weight.copy_(form(weight))
        self.wear({})


def _before(worn_by: nn.Module, form: Form) -> Any:
    """A module's own dictionary is looked up before its parameters: `layer.weight` is the form while `layer` runs."""

    def hook(layer: nn.Module, inputs: Any) -> None:
        if layer is worn_by:  # a copy of the network has the hooks, too
            layer.__dict__["weight"] = _Straight.apply(layer._parameters["weight"], form)  # type: ignore[no-untyped-call]

    return hook


def _after(layer: nn.Module, inputs: Any, output: Any) -> None:
    layer.__dict__.pop("weight", None)
