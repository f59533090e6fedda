"""Every legal cell of structure x precision: its file computes what its module computes, on the kernels meant for it.

A cell is an entry given to every layer of a small network that takes it. Bounds, as shares of the largest output: float
kernels 1e-4; 8-bit kernels 1e-4 where the range is that of the call, and 1e-5 where it was set beforehand, but that one
value in a thousand may differ by one step of its grid.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from zlib import crc32

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from _pytest.mark import ParameterSet
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn

from grainwise.export.graph import MarkedGraph
from grainwise.export.runtime import open_session, optimised, run
from grainwise.graph.forward import default_forward
from grainwise.graph.skeleton import build_skeleton, skeleton_forward
from grainwise.graph.trace import trace
from grainwise.methods.activations import DynamicLinear, EightBit
from grainwise.methods.layers import geometry_of
from grainwise.plan.choices import NONE, PRECISIONS, STRUCTURES, UNCOMPRESSED, Choice, Entry, Granularity, Method
from grainwise.plan.cost import CostModel
from grainwise.plan.layers import Block, Coupling, Geometry, Kind, Layer, LayerGraph
from grainwise.plan.projection import Projection
from grainwise.plan.shapes import Stage, stages
from grainwise.plan.space import SearchSpace, narrows
from grainwise.plan.target import EIGHT_BIT, TARGETS, Realisation, Target
from grainwise.realise.build import build
from grainwise.realise.deploy import deploy
from grainwise.realise.library import VariantLibrary
from grainwise.realise.reference import Reference
from grainwise.search.walks import sample, uniform

VNNI, AVX2, FLOAT = (TARGETS[f"ort-cpu-{name}"] for name in ("vnni", "avx2", "float"))
CALIBRATION, BATCH = 8, 4


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


@dataclass(frozen=True)
class Cell:
    """entries: the entry at every layer that takes it; its precision alone at layers that take no more."""

    network: str
    target: Target
    entry: Entry
    entries: Mapping[str, Entry]

    def __str__(self) -> str:
        return f"{self.network}-{self.target.name.removeprefix('ort-cpu-')}-{self.entry}"

    @property
    def reaches_further(self) -> bool:
        """8-bit weights in 8-bit kernels, of which a processor without VNNI multiplies only those to 63 exactly."""
        return self.entry.precision.level == 8 and self.rounds

    @property
    def rounds(self) -> bool:
        """Some activations are rounded to 8 bits."""
        geometries = NETWORKS[self.network].geometries
        found = (
            how
            for name, entry in self.entries.items()
            for how in self.target.realisations(geometries[name], entry.structure, entry.precision)
        )
        return any(how in EIGHT_BIT for how in found)


def cells_of(name: str) -> Iterator[Cell]:
    """The first two targets have one table; what sets them apart is the reach of 8-bit weights in 8-bit kernels. The
    third sets itself apart where they round activations.
    """
    assert VNNI.quantised == AVX2.quantised
    network, space = NETWORKS[name], NETWORKS[name].space
    pairs = [space.pairs(index) for index in range(len(space.layers))]
    for structure in network.structures:
        for precision in PRECISIONS:
            entry, s, p = Entry(structure, precision), STRUCTURES.index(structure), PRECISIONS.index(precision)
            taken = {
                layer.name: entry if pairs[index][s, p] else Entry(precision=precision)
                for index, layer in enumerate(space.layers)
                if pairs[index][s, p] or pairs[index][0, p]
            }
            cell = Cell(name, VNNI, entry, taken)
            if entry in taken.values():
                yield cell
                if cell.reaches_further:
                    yield replace(cell, target=AVX2)
                if cell.rounds:
                    yield replace(cell, target=FLOAT)


CELLS = [cell for name in NETWORKS for cell in cells_of(name)]


def asked(cell: Cell) -> ParameterSet:
    """A structure or a precision alone is always run, of those that are combined a third, chosen by name."""
    combined = cell.entry.structure != NONE and cell.entry.precision != NONE
    marks = [pytest.mark.full] if combined and crc32(str(cell).encode()) % 3 else []
    return pytest.param(cell, id=str(cell), marks=marks)


@cache
def has_vnni() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set()
    return bool(flags & {"avx512_vnni", "avx_vnni"})


def skip_what_saturates(cell: Cell) -> None:
    if cell.target is VNNI and cell.reaches_further and not has_vnni():
        pytest.skip("without VNNI the kernel adds two products of 8-bit weights in 16 bits, which overflow beyond 63")


def deployed(found: Prepared, target: Target, entries: Mapping[str, Entry]) -> tuple[nn.Module, ModelProto]:
    library = found.libraries[target.name]
    model = copy.deepcopy(build(library, entries))
    skeleton = found.marked.skeleton
    deploy(model, skeleton, library.reference.calibration, skeleton_forward)
    return model, found.marked.write(model, {})


@pytest.mark.parametrize("cell", [asked(cell) for cell in CELLS])
def test_cell(cell: Cell) -> None:
    skip_what_saturates(cell)
    found = prepared(cell.network)
    model, file = deployed(found, cell.target, cell.entries)
    compare(found, model, file)
    count(found, cell.target, cell.entries, file)


def outputs(
    found: Prepared, model: nn.Module, file: ModelProto, *, fused: bool = True, seed: int = 3
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of the file and of the module."""
    x = found.network.inputs(BATCH, seed)
    with torch.inference_mode():
        wanted = skeleton_forward(model, x).numpy()
    (name,) = found.marked.skeleton.inputs
    return run(open_session(file.SerializeToString(), fused=fused), {name: x}), wanted


def compare(found: Prepared, model: nn.Module, file: ModelProto) -> None:
    given, wanted = outputs(found, model, file)
    assert given.shape == wanted.shape and given.dtype == wanted.dtype
    difference, largest = np.abs(given - wanted), float(np.abs(wanted).max())
    points = [m for m in model.modules() if isinstance(m, EightBit)]
    if points:
        differing = difference > 1e-5 * largest
        assert differing.mean() <= 1e-3
        assert difference.max() <= max(float(p.scale) for p in points) * 1.01
        return
    if any(isinstance(m, DynamicLinear) for m in model.modules()) and difference.max() > 1e-4 * largest:
        # A value half-way between two codes may round either way behind a float sum, which moves all that follows by a
        # code of 255; few inputs have such values, a wrong kernel is wrong for all.
        assert difference.max() <= 0.005 * largest
        given, wanted = outputs(found, model, file, seed=4)
        difference, largest = np.abs(given - wanted), float(np.abs(wanted).max())
    assert difference.max() <= 1e-4 * largest


KERNELS = {
    "QLinearConv": "static",
    "DynamicQuantizeMatMul": "dynamic",
    "MatMulIntegerToFloat": "dynamic",
    "QLinearAdd": "sum",
    "Conv": "convolution",
    "FusedConv": "convolution",
    "MatMul": "product",
    "FusedMatMul": "product",
    "Gemm": "product",
    "QuantizeLinear": "to 8 bits",
    "DequantizeLinear": "to float",
}
"""What a kernel is counted as."""

LAYOUT = {"Transpose", "ReorderInput", "ReorderOutput"}
OWN = {"Relu", "Clip", "Tanh", "Gelu", "ReduceMean", "Mul", "Add"}  # of the networks; Add is a bias too
GROUPED = {"Shape", "Concat", "Reshape"}
GHOST = {"Gather", "Concat", "Mul"}  # Mul of the norm that stays
COLUMNS = {"Shape", "Concat", "Flatten", "Gather", "Reshape"}
ROWS = {"BitShift", "BitwiseAnd", "Cast", "Concat", "Expand", "Mul", "Reshape", "Shape", "Slice", "Sub", "Unsqueeze"}


@dataclass
class Expected:
    """counted: kernels by what they are counted as. beside: what else may stand in the graph that is run. again: values
    that ONNX Runtime may bring to float, back to the same 8 bits and to float once more: what an 8-bit kernel makes for
    a sum in float, when it moves the change of layout behind the change to float.
    """

    counted: Counter[str] = field(default_factory=Counter)
    again: int = 0
    beside: set[str] = field(default_factory=lambda: LAYOUT | OWN)

    def add(self, stage: Stage, how: Realisation) -> None:
        g = stage.geometry
        match how, g.kind:
            case Realisation.STATIC, _:
                self.counted["static"] += 1
            case Realisation.DYNAMIC, _:
                self.counted["dynamic"] += 1
            case Realisation.GATHERED, _:
                self.beside |= {"Gather", *ROWS}
            case ((Realisation.FLOAT | Realisation.FOLDED), Kind.EMBEDDING):
                self.beside |= {"Gather"}
            case ((Realisation.FLOAT | Realisation.FOLDED), (Kind.CONV1D | Kind.CONV2D)):
                self.counted["convolution"] += 1
            case ((Realisation.FLOAT | Realisation.FOLDED | Realisation.SPARSE), Kind.LINEAR):
                self.counted["product"] += 1
                self.beside |= GROUPED if g.groups > 1 else COLUMNS if how is Realisation.SPARSE else set()


def expected(found: Prepared, target: Target, entries: Mapping[str, Entry]) -> Expected:
    """What the plan says of the graph that is run: each stage is the kernel of its realisation, and values change
    between float and 8 bits where the kernels on both sides differ, nowhere else.
    """
    result, static, cost = Expected(), set(), found.cost
    widths = cost.widths(entries)
    for layer in found.space.layers:
        entry = entries.get(layer.name, UNCOMPRESSED)
        structure = NONE if narrows(entry.structure) else entry.structure
        narrowed = cost.narrowed(layer, widths)
        hows = target.realisations(narrowed, structure, entry.precision)
        for stage, how in zip(stages(narrowed, structure), hows, strict=True):
            result.add(stage, how)
        if (structure.method, structure.granularity) == (Method.DISTILL, Granularity.CHANNEL):
            result.beside |= GHOST
        if Realisation.STATIC in hows:
            static.add(layer.name)
    skeleton = found.marked.skeleton
    active = skeleton.active(static)
    sums = {join.name for join in skeleton.joins if {*join.operands, join.result} <= active}
    result.counted["sum"] = len(sums)
    for point in (skeleton.points[name] for name in active):
        result.counted["to 8 bits"] += point.maker not in static | sums
        result.counted["to float"] += point.floats or not static | sums >= set(point.readers)
        result.again += point.maker in static and any(
            point.name in join.operands and join.name not in sums for join in skeleton.joins
        )
    return result


def count(found: Prepared, target: Target, entries: Mapping[str, Entry], file: ModelProto) -> None:
    kernels = Counter(node.op_type for node in optimised(file.SerializeToString()).graph.node)
    wanted = expected(found, target, entries)
    counted: Counter[str] = Counter()
    for kernel, number in kernels.items():
        counted[KERNELS.get(kernel, "beside")] += number
    del counted["beside"]
    again = counted["to float"] - wanted.counted["to float"]
    assert 0 <= again <= wanted.again
    assert counted == wanted.counted + Counter({"to 8 bits": again, "to float": again})
    assert kernels.keys() - KERNELS.keys() <= wanted.beside


@pytest.mark.parametrize("name", NETWORKS)
def test_the_cells_are_those_of_the_traced_network(name: str) -> None:
    space, declared = prepared(name).space, NETWORKS[name].space
    assert [layer.name for layer in space.layers] == [layer.name for layer in declared.layers]
    assert [layer.geometry for layer in space.layers] == [layer.geometry for layer in declared.layers]
    for index in range(len(space.layers)):
        assert (space.pairs(index) == declared.pairs(index)).all()
    for cell in CELLS:
        if cell.network == name and cell.entry.precision in PRECISIONS[:2]:
            space.check(cell.entries)
    assert not prepared(name).marked.skeleton.missing


def test_depthwise_layers_may_keep_float_activations() -> None:
    found = prepared("separable")
    layers = [layer for layer in found.graph.layers if layer.geometry.depthwise]
    eight = Choice(Method.QUANTIZE, Granularity.BLOCK, 8)
    assert layers
    for layer in layers:
        assert (layer.name, eight) not in found.space.reasons
        assert VNNI.realisations(layer.geometry, NONE, eight) == (Realisation.FOLDED,)


def test_every_realisation_and_every_choice_is_among_the_cells() -> None:
    hows = {
        how
        for cell in CELLS
        for name, entry in cell.entries.items()
        for how in cell.target.realisations(NETWORKS[cell.network].geometries[name], entry.structure, entry.precision)
    }
    assert hows == set(Realisation)
    assert {cell.entry.structure for cell in CELLS} == set(STRUCTURES)
    assert {cell.entry.precision for cell in CELLS} == set(PRECISIONS)
    for kind in Kind:  # alone in its network, and with others
        alone = [len(n.geometries) == 1 for n in NETWORKS.values() if kind in {g.kind for g in n.geometries.values()}]
        assert {True, False} == set(alone)


MIXED = [(name, seed) for name in ("residual", "signals", "separable", "perceptron", "reader") for seed in range(4)]


@pytest.mark.parametrize(("name", "seed"), MIXED)
def test_layers_of_different_entries_meet(name: str, seed: int) -> None:
    """Random legal profiles, each of the layers with its own entry; the reach is that of any processor."""
    found, rng = prepared(name), np.random.default_rng(seed)
    (entries,) = sample(Projection(found.cost, {}), 1, uniform, rng)
    model, file = deployed(found, AVX2, entries)
    compare(found, model, file)
    count(found, AVX2, entries, file)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_says_what_the_kernels_do(name: str) -> None:
    """Run node by node, as its text says, the file gives the same, but that sums in float32 round some values to the
    next step. A kernel may overlook what the text says, for instance along which axis a scale lies.
    """
    found = prepared(name)
    for cell in CELLS:
        if (cell.network, cell.entry.structure, cell.target) == (name, NONE, VNNI):
            model, file = deployed(found, AVX2 if cell.entry.precision.level == 8 else VNNI, cell.entries)
            onnx.checker.check_model(file, full_check=True)
            given, wanted = outputs(found, model, file, fused=False)
            steps = [float(m.scale) for m in model.modules() if isinstance(m, EightBit)]
            difference = np.abs(given - wanted)
            assert difference.max() <= 1e-4 * np.abs(wanted).max() + 2 * max(steps, default=0.0), cell.entry
            assert (difference > 1e-4 * np.abs(wanted).max()).mean() <= 0.05, cell.entry


def test_batches_of_any_size_run() -> None:
    found = prepared("residual")
    entries = {
        name: Entry(precision=Choice(Method.QUANTIZE, Granularity.CHANNEL, 4)) for name in found.network.geometries
    }
    model, file = deployed(found, AVX2, entries)
    session = open_session(file.SerializeToString())
    for size in (1, 2, 7):
        x = found.network.inputs(size, 4)
        (name,) = found.marked.skeleton.inputs
        with torch.inference_mode():
            np.testing.assert_allclose(run(session, {name: x}), skeleton_forward(model, x), atol=1e-5)
