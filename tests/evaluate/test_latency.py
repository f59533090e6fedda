"""The latency table: kernels measured under ONNX Runtime, remembered, added up; what can be checked by hand is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from grainwise.evaluate.calibration import calibration_profiles, random_profile, time_files
from grainwise.evaluate.conversions import Kernel, Line
from grainwise.evaluate.grids import grids
from grainwise.evaluate.kernels import KernelTimes, Key, cache_folder
from grainwise.evaluate.latency import LatencyTable
from grainwise.evaluate.places import Place, clips_of, input_shapes, padding_of
from grainwise.evaluate.profiling import Measured, Node, measured
from grainwise.export.functions import DOMAIN
from grainwise.export.runtime import kernels
from grainwise.plan.choices import NONE, PRECISIONS, Choice, Entry, Granularity, Method
from grainwise.plan.cost import CostModel
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.space import SearchSpace
from grainwise.plan.target import TARGETS
from grainwise.session import Session
from tests.networks import tiny, tiny_data

VNNI = TARGETS["ort-cpu-vnni"]
INT8, INT4, INT2 = (Choice(Method.QUANTIZE, Granularity.CHANNEL, bits) for bits in (8, 4, 2))
BLOCK4 = Choice(Method.QUANTIZE, Granularity.BLOCK, 4)
SPARSE = Choice(Method.PRUNE, Granularity.LAYER, 0.5)
GHOST = Choice(Method.DISTILL, Granularity.CHANNEL, 0.5)
CONV = Geometry(Kind.CONV2D, 16, 16, (3, 3), (1, 1), (1, 1), (1, 1))
POINTWISE = CONV.pointwise(16, 16, bias=False)
PLACE = Place((16, 8, 8), normed=True, clip="Relu")
CONVOLUTIONS = ("stem", "block.0", "block.3", "down")


@pytest.fixture(scope="module")
def deployed() -> Session:
    return Session.prepare(tiny(), tiny_data(), target="ort-cpu-vnni")


class Known(KernelTimes):
    """Times without a clock: 1 ms for 1000 weights; float convolutions read and write blocks from 16 channels on."""

    def __init__(self) -> None:
        super().__init__(VNNI, remember=False)

    def __getitem__(self, key: Key) -> Measured:
        g = key.geometry
        convolved = bool(g.kernel) and key.precision == NONE
        return Measured(g.weights / 1000, 1, convolved and g.inputs >= 16, convolved and g.outputs >= 16)

    def ensure(self, keys: Any) -> int:
        return len({key.text for key in keys})

    def line(self, kernel: Kernel) -> Line:
        return Line(0.5, 0.001) if kernel in (Kernel.REORDER_INPUT, Kernel.REORDER_OUTPUT) else Line(0.25, 0.0)


def table_of(session: Session, times: KernelTimes, most: int | None = None) -> LatencyTable:
    marked, reference = session.evaluator.marked, session.reference
    assert marked is not None
    shapes = input_shapes(reference.model, session.example, reference.forward, reference.graph)
    return LatencyTable(marked, shapes, grids(session.space, most), times)


def key(structure: Choice, precision: Choice, geometry: Geometry = CONV, place: Place = PLACE) -> Key:
    return Key.of(VNNI, geometry, structure, precision, place)


# -- what shares a measurement


def test_what_only_saves_bytes_shares_a_measurement() -> None:
    assert key(NONE, INT8) == key(NONE, INT4) == key(NONE, INT2) == key(SPARSE, INT8)
    assert key(NONE, BLOCK4) == key(SPARSE, BLOCK4) == key(SPARSE, NONE) == key(NONE, NONE) != key(NONE, INT8)
    assert key(NONE, NONE, replace(CONV, bias=True)) == key(NONE, NONE)  # the norm is folded into a bias anyway
    assert key(Choice(Method.PRUNE, Granularity.CHANNEL, 0.5), NONE) == key(NONE, NONE)


def test_what_runs_differently_does_not() -> None:
    linear, place = Geometry(Kind.LINEAR, 384, 1536, bias=True), Place((128, 384))
    tall = Choice(Method.PRUNE, Granularity.BLOCK, 0.7)
    found = [key(s, NONE, linear, place) for s in (NONE, tall, Choice(Method.PRUNE, Granularity.BLOCK, 0.5))]
    assert len(set(found)) == 3
    table, tokens = Geometry(Kind.EMBEDDING, 100, 64), Place((12,))
    assert len({key(NONE, precision, table, tokens) for precision in PRECISIONS}) == len(PRECISIONS)
    assert key(GHOST, NONE) != key(GHOST, NONE, place=Place((16, 8, 8), clip="Relu"))  # its norm cannot be folded
    assert key(NONE, NONE) == key(NONE, NONE, place=Place((16, 8, 8), clip="Relu"))


def test_keys_follow_the_narrowed_layer() -> None:
    narrowed = key(NONE, NONE, CONV.resized(inputs=8))
    assert narrowed.shape == (8, 8, 8)
    assert key(NONE, NONE, Geometry(Kind.LINEAR, 64, 8), Place((5, 96))).shape == (5, 64)
    padded = key(
        NONE, NONE, replace(CONV, padding=(0, 0)), Place((16, 10, 10), normed=True, clip="Relu", padded=(1, 1))
    )
    assert padded == key(NONE, NONE)
    assert key(NONE, INT8).clip == ""  # 8-bit kernels clip for free
    assert narrowed.macs == 64 * 8 * 16 * 9


# -- measuring


def test_a_branch_ends_at_its_own_kernels() -> None:
    nodes = [
        Node("ReorderInput", ("x",), ("a",), 0.5, 8),
        Node("Conv", ("a", "w"), ("b",), 1.0, 8),
        Node("ReorderOutput", ("b",), ("c",), 2.0, 8),
        Node("Gather", ("c", "i"), ("d",), 4.0, 8),
        Node("ReorderInput", ("d",), ("e",), 8.0, 8),
        Node("Conv", ("e", "v"), ("f",), 16.0, 8),
        Node("ReorderOutput", ("f",), ("g",), 32.0, 8),
        Node("Slice", ("g", "s", "t"), ("end",), 64.0, 1),
        Node("Conv", ("a", "u"), ("other",), 128.0, 8),
    ]
    assert measured(nodes, "end", ["x"], convolved=True) == Measured(31.0, 5, True, True)
    assert measured(nodes, "other", ["x"], convolved=True) == Measured(128.0, 1, True, False)


def test_kernels_are_measured_once_and_remembered(tmp_path: Path) -> None:
    keys = [key(NONE, p, g) for g in (CONV, POINTWISE) for p in (NONE, INT8, INT4)]
    times = KernelTimes(VNNI, folder=tmp_path)
    assert times.ensure(keys) == 4
    assert all(times[k].ms > 0 for k in keys)
    assert times[key(NONE, NONE)].writes_blocked and not times[key(NONE, INT8)].writes_blocked
    assert times.line(Kernel.QUANTIZE).of(100_000) > times.line(Kernel.QUANTIZE).of(1000) > 0
    again = KernelTimes(VNNI, folder=tmp_path)
    assert again.ensure(keys) == 0
    assert [again[k] for k in keys] == [times[k] for k in keys]
    assert again.line(Kernel.ADD) == times.line(Kernel.ADD)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"times": {}}', '{"times": {"a": 1}, "lines": {}}'])
def test_a_damaged_cache_counts_as_none(tmp_path: Path, damaged: str) -> None:
    times = KernelTimes(VNNI, folder=tmp_path)
    assert times.path is not None
    times.path.write_text(damaged, encoding="utf-8")
    assert KernelTimes(VNNI, folder=tmp_path).ensure([]) == 0


def test_caches_are_apart_by_target_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [KernelTimes(TARGETS[t], threads=n, folder=tmp_path) for t in ("ort-cpu-avx2", VNNI.name) for n in (1, 2)]
    assert len({times.path for times in found}) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "grainwise"
    with pytest.raises(ValueError, match="ONNX Runtime"):
        KernelTimes(TARGETS["packed"])


# -- where layers stand


def test_shapes_and_clips_of_a_network(deployed: Session) -> None:
    places = table_of(deployed, Known()).places
    assert places["block.3"] == Place((32, 8, 8), normed=True)
    assert places["stem"] == Place((3, 8, 8), normed=True, clip="Relu")
    assert places["fc"] == Place((32,))


def test_padding_counts_when_both_sides_have_as_much() -> None:
    def padded(pads: list[int]) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Pad", ["x", "pads"], ["p"]),
            helper.make_node("Layer", ["p"], ["y"], domain=DOMAIN, name="conv"),
            helper.make_node("Clip", ["y"], ["c"]),
            helper.make_node("Point", ["c"], ["z"], domain=DOMAIN, name="hardtanh"),
        ]
        for node in nodes[1::2]:
            node.attribute.append(helper.make_attribute("name", node.name))
        tensor = numpy_helper.from_array(np.array(pads), "pads")
        return helper.make_model(helper.make_graph(nodes, "g", [], [], [tensor]))

    assert padding_of(padded([0, 0, 1, 2, 0, 0, 1, 2])) == {"conv": (1, 2)}
    assert padding_of(padded([0, 0, 0, 0, 0, 0, 1, 1])) == {}
    assert clips_of(padded([0] * 8)) == {"hardtanh": "Clip"}


# -- adding up


def test_layers_by_hand(deployed: Session) -> None:
    table = table_of(deployed, Known(), most=2)
    layer = deployed.space.graph.layer("block.0")
    assert table.layer_ms(layer, layer.geometry, NONE, NONE) == pytest.approx(16 * 32 * 9 / 1000)
    narrowed = layer.geometry.resized(inputs=8, outputs=24)  # measured at 8 and 32 outputs
    between = 8 * (8 + 2 / 3 * 24) * 9 / 1000
    assert table.layer_ms(layer, narrowed, NONE, INT8) == pytest.approx(between)
    # in float the usual input comes in blocks, which 8 channels are not read in
    reordered = 0.5 + 0.001 * 8 * 64
    assert table.layer_ms(layer, layer.geometry.resized(inputs=8), NONE, NONE) == pytest.approx(
        8 * 32 * 9 / 1000 + reordered
    )
    assert table.layer_ms(replace(layer, name="elsewhere"), layer.geometry, NONE, NONE) == 0.0


def test_boundaries_by_hand(deployed: Session) -> None:
    table = table_of(deployed, Known())
    assert table.boundary_ms(()) == pytest.approx(0.5 + 0.001 * 32 * 16)  # what is averaged comes out of blocks
    everywhere = 5 * 0.25  # quantise and turn the input, one sum, turn and dequantise the end
    assert table.boundary_ms(CONVOLUTIONS) == pytest.approx(everywhere)


def test_a_profile_is_the_sum_of_its_parts(deployed: Session) -> None:
    table, cost = table_of(deployed, Known()), CostModel(deployed.space, {})
    plain = sum(la.geometry.weights for la in deployed.space.layers) / 1000
    assert table.sum_ms({}, cost) == pytest.approx(plain + table.boundary_ms(()))
    assert table.predict_ms({}, cost) == pytest.approx(table.sum_ms({}, cost))
    halved = {"block.0": Entry(Choice(Method.PRUNE, Granularity.CHANNEL, 0.5))}
    assert table.predict_ms(halved, cost) == pytest.approx(plain - 16 * 16 * 9 * 2 / 1000 + table.boundary_ms(()))


def test_calibration_puts_all_parts_on_its_line(deployed: Session) -> None:
    table, cost = table_of(deployed, Known()), CostModel(deployed.space, {})
    profiles = list(calibration_profiles(deployed.space, np.random.default_rng(0)).values())
    found = table.calibrated(cost, [(profile, 2 * table.sum_ms(profile, cost) + 3) for profile in profiles])
    assert found.offset_ms == pytest.approx(3)
    assert found.boundary_ms(()) == pytest.approx(2 * table.boundary_ms(()))
    assert found.sum_ms(profiles[-1], cost) == pytest.approx(2 * table.sum_ms(profiles[-1], cost) + 3)


def test_random_profiles_are_legal_and_repeat(deployed: Session) -> None:
    space: SearchSpace = deployed.space
    drawn = [random_profile(space, np.random.default_rng(seed)) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    for profile in drawn:
        space.check(profile)


# -- the runtime itself


def test_conversions_are_those_of_the_optimised_file(deployed: Session, tmp_path: Path) -> None:
    """Every set of 8-bit convolutions: ONNX Runtime puts in exactly the kernels that are counted."""
    table = table_of(deployed, KernelTimes(VNNI, folder=tmp_path))
    for count in range(len(CONVOLUTIONS) + 1):
        for static in itertools.combinations(CONVOLUTIONS, count):
            file = deployed.evaluator.finish({name: Entry(precision=INT8) for name in static}).file
            assert file is not None
            ran = kernels(file.SerializeToString())
            counted = table.conversions(static)
            assert {k: counted[k] for k in Kernel if counted[k]} == {k: ran[k] for k in Kernel if k in ran}, static


def test_a_prepared_table_measures_nothing_more(deployed: Session, tmp_path: Path) -> None:
    times = KernelTimes(VNNI, folder=tmp_path)
    table = table_of(deployed, times, most=2)
    assert table.prepare(deployed.space) > 50
    before = len(times)
    cost = CostModel(deployed.space, {})
    profile = random_profile(deployed.space, np.random.default_rng(3))
    assert 0 < table.sum_ms(profile, cost) < 10
    assert len(times) == before
    assert table.prepare(deployed.space) == 0


def test_files_are_timed_in_turn(deployed: Session) -> None:
    file = deployed.evaluator.finish({}).file
    assert file is not None
    inputs = {"input": torch.randn(1, 3, 8, 8)}
    found = time_files({"a": file.SerializeToString(), "b": file.SerializeToString()}, inputs, rounds=3)
    assert found["a"].runs == 3 and found["b"].cpu_median_ms > 0
