"""What a network is made of, as plain data: layers, couplings, blocks. `graph` fills these records from a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum


class Kind(StrEnum):
    """Layer kinds whose weight can be compressed."""

    CONV1D = "conv1d"
    CONV2D = "conv2d"
    LINEAR = "linear"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of one layer. `kernel`, `stride`, `padding`, `dilation` have one number per spatial dimension, none for
    Linear and Embedding. For an Embedding `inputs` is the vocabulary and `outputs` the embedding width.
    """

    kind: Kind
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = False

    def __post_init__(self) -> None:
        if min(self.inputs, self.outputs, self.groups) < 1 or self.inputs % self.groups or self.outputs % self.groups:
            raise ValueError(f"{self.inputs} inputs and {self.outputs} outputs do not fit {self.groups} groups")

    @property
    def taps(self) -> int:
        """Weights that one output channel has for one input channel: the kernel's area."""
        return math.prod(self.kernel)

    @property
    def fan_in(self) -> int:
        """K: length of one row of the weight matrix `[O, K]`."""
        return self.inputs // self.groups * self.taps

    @property
    def rows(self) -> int:
        """Rows of the weight matrix: output channels; for an Embedding its tokens (each row is one vector)."""
        return self.inputs if self.kind is Kind.EMBEDDING else self.outputs

    @property
    def columns(self) -> int:
        """Columns of the weight matrix: K; for an Embedding the width of a vector."""
        return self.outputs if self.kind is Kind.EMBEDDING else self.fan_in

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight as torch stores it."""
        if self.kind is Kind.EMBEDDING:
            return self.inputs, self.outputs
        return self.outputs, self.inputs // self.groups, *self.kernel

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.inputs

    def pointwise(self, inputs: int, outputs: int, *, bias: bool, groups: int = 1) -> Geometry:
        """A 1x1 layer of the same kind (a Linear for a Linear): stride 1, no padding."""
        ones, zeros = (1,) * len(self.kernel), (0,) * len(self.kernel)
        return Geometry(self.kind, inputs, outputs, ones, ones, zeros, ones, groups, bias)

    def resized(self, *, inputs: int | None = None, outputs: int | None = None, bias: bool | None = None) -> Geometry:
        """The same layer with other widths; a depthwise layer keeps one group per input channel."""
        new_inputs = self.inputs if inputs is None else inputs
        return replace(
            self,
            inputs=new_inputs,
            outputs=self.outputs if outputs is None else outputs,
            groups=new_inputs if self.depthwise else self.groups,
            bias=self.bias if bias is None else bias,
        )


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight that can be compressed, in the order in which the network runs it.

    name: path of the module in the network.
    positions_in, positions_out: places (pixels, tokens) a sample's input and output have: spatial size, sequence
        length, or 1.
    output_coupling: name of the coupling its outputs belong to, or None when they cannot be narrowed.
    input_couplings: names of the couplings that feed it.
    tied_to: name of the earlier layer that owns the same weight tensor, or None.
    blocked: why it takes no compression at all (for instance its module is never called), or None.
    """

    name: str
    geometry: Geometry
    positions_in: int
    positions_out: int
    output_coupling: str | None = None
    input_couplings: tuple[str, ...] = ()
    tied_to: str | None = None
    blocked: str | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample; an Embedding looks up and multiplies nothing."""
        return 0 if self.geometry.kind is Kind.EMBEDDING else self.geometry.weights * self.positions_out


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a coupling's units sit in one parameter or buffer.

    parameter: its name in the state dict. dim: the dimension that is cut.
    indices: for each unit the positions along `dim` that go with it (several when a flattened map feeds a Linear).
    produces: True where the unit leaves a layer (its output dimension), or belongs to a norm or other parameter that
        follows it; False where it enters a layer (its input dimension).
    layer: the layer that owns the parameter, or None (batch norm and the like).
    """

    parameter: str
    dim: int
    indices: tuple[tuple[int, ...], ...]
    produces: bool
    layer: str | None = None


@dataclass(frozen=True, slots=True)
class Coupling:
    """Channels that can only be removed together, wherever they are produced, normalised or read.

    name: the first layer that produces them (the leader), at which the decision is taken.
    width: number of units. frozen: why the units cannot be removed, or None.
    """

    name: str
    width: int
    slots: tuple[Slot, ...]
    frozen: str | None = None

    def producers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s.layer for s in self.slots if s.produces and s.layer))

    def consumers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s.layer for s in self.slots if not s.produces and s.layer))


@dataclass(frozen=True, slots=True)
class Block:
    """A module with one tensor in and one out that wholly encloses a coupling: it can be replaced by a narrower twin.

    name: path of the module. coupling: the enclosed coupling that sets its inner width. layers: layers inside it.
    """

    name: str
    coupling: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerGraph:
    """A network as the search sees it; layers in the order in which the network runs them.

    other_macs: multiply-accumulates per sample outside of the layers (attention products and the like).
    norms: names of the batch-norm modules, whose statistics are estimated anew after compression.
    notes: what could not be seen and what follows from it, in words for people.
    """

    layers: tuple[Layer, ...]
    couplings: tuple[Coupling, ...]
    blocks: tuple[Block, ...]
    other_macs: int = 0
    norms: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def layer(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)

    def coupling(self, name: str) -> Coupling:
        return next(coupling for coupling in self.couplings if coupling.name == name)
