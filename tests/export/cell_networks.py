"""Small networks that hold every kind of layer, each traced and exported once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grainwise.export.graph import MarkedGraph
from grainwise.graph.forward import default_forward
from grainwise.graph.skeleton import build_skeleton
from grainwise.graph.trace import trace
from grainwise.methods.layers import geometry_of
from grainwise.plan.choices import NONE, STRUCTURES, Choice
from grainwise.plan.cost import CostModel
from grainwise.plan.layers import Block, Coupling, Geometry, Kind, Layer, LayerGraph
from grainwise.plan.space import SearchSpace
from grainwise.plan.target import TARGETS
from grainwise.realise.library import VariantLibrary
from grainwise.realise.reference import Reference

VNNI, AVX2, FLOAT = (TARGETS[f"ort-cpu-{name}"] for name in ("vnni", "avx2", "float"))
CALIBRATION = 8


class Residual(nn.Module):
    """conv-norm-relu-conv-norm around which the input is added, then a strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(16, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 16, 1, bias=False),
            nn.BatchNorm2d(16),
        )
        self.last = nn.Conv2d(16, 24, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(x + self.block(x)))


class Signals(nn.Module):
    """The same over signals; the sum has no activation, and the last layer is grouped and has a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(12, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(16)
        self.second = nn.Conv1d(16, 12, 3, dilation=2, padding=2)
        self.second_norm = nn.BatchNorm1d(12)
        self.last = nn.Conv1d(12, 16, 3, groups=2)
        self.last_norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return self.last_norm(self.last(self.second_norm(self.second(y)) + x))


class Separable(nn.Module):
    """Pointwise, depthwise and pointwise convolution with clipped activations, the input added, as in MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Sequential(nn.Conv2d(12, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.filter = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(24, 12, 1, bias=False), nn.BatchNorm2d(12))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.filter(self.widen(x)))


class Reader(nn.Module):
    """Token vectors of a width that is no whole number of bytes at 2 bits, one layer with bias and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 42)
        self.hidden = nn.Linear(42, 24)
        self.out = nn.Linear(24, 10, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.embed(tokens))))


class Clipped(nn.Module):
    """Activations that the kernel takes over, one written as a function, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(3 * self.b(F.relu6(20 * self.a(x))))
        return self.c(x).clamp(0.0, 0.7)


class Perceptron(nn.Module):
    """Two layers over tokens, one over their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(36, 40)
        self.down = nn.Linear(40, 24, bias=False)
        self.out = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.down(torch.relu(self.up(x)))).mean(1))


@dataclass(frozen=True)
class Network:
    """make: builds it. sample: shape of one sample's input, or the tokens it is made of. led: couplings that can be
    narrowed with their widths. blocks: what can be distilled.
    """

    make: Callable[[], nn.Module]
    sample: tuple[int, ...]
    led: Mapping[str, int] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    structures: tuple[Choice, ...] = STRUCTURES

    def inputs(self, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if any(g.kind is Kind.EMBEDDING for g in self.geometries.values()):
            return torch.randint(0, 50, (count, *self.sample), generator=generator)
        return torch.randn(count, *self.sample, generator=generator)

    @cached_property
    def space(self) -> SearchSpace:
        """The space as it follows from what is declared here, without a trace."""
        layers = tuple(Layer(n, geometry, 1, 1) for n, geometry in self.geometries.items())
        couplings = tuple(Coupling(name, width, ()) for name, width in self.led.items())
        return SearchSpace.of(LayerGraph(layers, couplings, self.blocks))

    @cached_property
    def geometries(self) -> Mapping[str, Geometry]:
        kinds = nn.Conv1d | nn.Conv2d | nn.Linear | nn.Embedding
        return {name: geometry_of(module) for name, module in self.make().named_modules() if isinstance(module, kinds)}


_BLOCK = (Block("block", "block.0", ("block.0", "block.3")),)

NETWORKS = {
    "conv2d": Network(lambda: nn.Sequential(nn.Conv2d(9, 20, 3, padding=1)), (9, 8, 8)),
    "conv1d": Network(lambda: nn.Sequential(nn.Conv1d(13, 20, 5, 2, padding=2)), (13, 20)),
    "depthwise": Network(lambda: nn.Sequential(nn.Conv2d(20, 20, 5, padding=2, groups=20, bias=False)), (20, 8, 8)),
    "linear": Network(lambda: nn.Sequential(nn.Linear(39, 44)), (39,)),
    "linear of tokens": Network(lambda: nn.Sequential(nn.Linear(39, 44)), (5, 39)),
    "embedding": Network(lambda: nn.Sequential(nn.Embedding(50, 36)), (6,)),
    "long rows": Network(lambda: nn.Sequential(nn.Linear(1100, 12)), (1100,), structures=(NONE,)),
    "long kernels": Network(lambda: nn.Sequential(nn.Conv2d(116, 12, 3)), (116, 4, 4), structures=(NONE,)),
    "tall": Network(lambda: nn.Sequential(nn.Linear(24, 256)), (5, 24), structures=STRUCTURES[:9]),
    "residual": Network(Residual, (16, 8, 8), {"block.0": 24}, _BLOCK),
    "signals": Network(Signals, (12, 16), {"first": 16}),
    "clipped": Network(Clipped, (3, 8, 8), {"a": 8, "b": 8}, structures=(NONE,)),
    "separable": Network(Separable, (12, 8, 8), {"widen.0": 24}),
    "perceptron": Network(Perceptron, (5, 36), {"up": 40, "down": 24}),
    "reader": Network(Reader, (6,), {"embed": 42, "hidden": 24}),
}


@dataclass(frozen=True)
class Prepared:
    """A network that was traced and exported once, with a library for each target."""

    network: Network
    graph: LayerGraph
    marked: MarkedGraph
    libraries: Mapping[str, VariantLibrary]

    @cached_property
    def cost(self) -> CostModel:
        return CostModel(self.space, {})

    @cached_property
    def space(self) -> SearchSpace:
        return SearchSpace.of(self.graph)


@cache
def prepared(name: str) -> Prepared:
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = network.make().eval()
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if key.endswith(("bias", "running_mean")):
            tensor.data.normal_(0, 0.3)
        if key.endswith("running_var"):
            tensor.data.uniform_(0.5, 2)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.weight.data.uniform_(-0.3, 1.5)  # some mirror their channel
    example, calibration = network.inputs(2, 1), [network.inputs(CALIBRATION, 2)]
    graph = trace(model, example)
    skeleton = build_skeleton(model, example, default_forward, graph)
    marked = MarkedGraph.export(skeleton, graph, example)
    first = Reference.gather(model, graph, calibration, default_forward, VNNI, skeleton)
    libraries = {t.name: VariantLibrary(replace(first, target=t)) for t in (VNNI, AVX2, FLOAT)}
    return Prepared(network, graph, marked, libraries)
