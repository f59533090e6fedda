"""Every legal cell of structure x precision: its file computes what its module computes, on the kernels meant for it.

A cell is an entry given to every layer of a small network that takes it. Bounds, as shares of the largest output: float
kernels 1e-4; 8-bit kernels 1e-4 where the range is that of the call, and 1e-5 where it was set beforehand, but that one
value in a thousand may differ by one step of its grid.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import onnx
import pytest
import torch
from _pytest.mark import ParameterSet
from numpy.typing import NDArray
from onnx import ModelProto
from torch import nn

from grainwise.export.runtime import open_session, optimised, run
from grainwise.graph.skeleton import skeleton_forward
from grainwise.methods.activations import DynamicLinear, EightBit
from grainwise.plan.choices import NONE, PRECISIONS, STRUCTURES, UNCOMPRESSED, Choice, Entry, Granularity, Method
from grainwise.plan.layers import Kind
from grainwise.plan.projection import Projection
from grainwise.plan.shapes import Stage, stages
from grainwise.plan.space import narrows
from grainwise.plan.target import EIGHT_BIT, Realisation, Target
from grainwise.realise.build import build
from grainwise.realise.deploy import deploy
from grainwise.search.walks import sample, uniform
from tests.export.cell_networks import AVX2, FLOAT, NETWORKS, VNNI, Prepared, prepared

BATCH = 4


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
