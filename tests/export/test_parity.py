from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from onnx import ModelProto

from examples import resnet20
from grainwise.export import parity, runtime
from grainwise.export.parity import Bounds, Difference, ParityError, check_parity
from grainwise.plan.choices import Entry
from tests.export.candidates import PLANS, Source, images, quantised, tiny_candidate, tiny_source, with_fault

KERNELS = {
    "float": {},
    "int8": {"QLinearConv": 4, "QLinearAdd": 1, "DynamicQuantizeMatMul": 1},
    "int4": {"QLinearConv": 4, "QLinearAdd": 1, "DynamicQuantizeMatMul": 1},
    "int2": {"QLinearConv": 4, "QLinearAdd": 1, "DynamicQuantizeMatMul": 1},
    "mixed": {"QLinearConv": 2, "QLinearAdd": 1},
    "factorized": {"QLinearConv": 6},
    "ghost": {"QLinearConv": 1},
    "bitmask": {"QLinearConv": 1, "DynamicQuantizeMatMul": 1},
    "narrowed": {"QLinearConv": 1},
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_right_file_passes(plan: str) -> None:
    model, file = tiny_candidate(plan)
    found = check_parity(file, model, tiny_source().skeleton, images(96, 3))
    assert dict(found.kernels) == KERNELS[plan]
    assert found.worst.share < 1e-5
    assert found.torch.share < 2e-3 and found.torch.agreement > 0.98  # one value between two codes moves the range
    assert (found.torch.answers, found.unfused.answers) == (96, 96)
    assert found.figures()["max_abs_difference"] == found.torch.largest


def test_a_trained_network_passes() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(40, 3, 8, 8, generator=generator)
    inputs = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear", align_corners=False)
    source = Source.of(resnet20.pretrained(), [inputs[:16]], inputs[:2])
    *convolutions, classifier = [layer.name for layer in source.graph.layers]
    every = dict.fromkeys([*convolutions, classifier], Entry(precision=quantised(8)))
    half = {name: Entry(precision=quantised(4)) for name in convolutions[::2]}
    for entries, kernels in ((every, 21), (half, 11)):
        model, file = source.candidate(entries)
        found = check_parity(file, model, source.skeleton, [inputs[16:]])
        assert found.kernels["QLinearConv"] == kernels
        assert found.worst.share < 1e-5


@pytest.mark.parametrize(
    "plan, tensor, factor, place",
    [
        ("int8", "stem.weight", None, "layer stem"),
        ("int4", "block.0.weight", None, "layer block.0"),
        ("int8", "down.scale", 1.25, "layer down"),
        ("int8", "down.bias", 2, "layer down"),
        ("int8", "relu_1.y_scale", 1.01, "layer block.0"),
        ("int8", "relu_2.y_scale", 1.25, "sum add"),
        ("int8", "input_1.y_scale", 0.5, "value input_1"),
        ("int8", "fc.weight", None, "layer fc"),
        ("mixed", "block.0.weight", 1.01, "layer block.0"),
        ("factorized", "down.2.weight", None, "layer down"),
        ("factorized", "block.0.3.y_scale", 1.25, "layer block.0"),
        ("ghost", "block.0.cheap.scale", 1.25, "layer block.0"),
        ("ghost", "block.1.scale", 1.25, "norm block.1"),
        ("bitmask", "fc.weight", None, "layer fc"),
    ],
)
def test_a_fault_is_found_where_it_is(plan: str, tensor: str, factor: float | None, place: str) -> None:
    model, file = tiny_candidate(plan)
    with pytest.raises(ParityError, match=f"the file computes {place} otherwise.*% is allowed$"):
        check_parity(with_fault(file, tensor, factor=factor), model, tiny_source().skeleton, images(64, 3))


def test_kernels_beyond_the_plan_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for opener in (runtime.open_session, runtime.optimised):  # as if the optimisation were left on
        monkeypatch.setitem(opener.__kwdefaults__, "disabled", ())
    model, file = tiny_candidate("mixed")
    with pytest.raises(ParityError, match="3 QLinearConv where the plan has 2: layer block.0 should not run so$"):
        check_parity(file, model, tiny_source().skeleton, images(16, 3))


def test_outputs_out_of_bounds_are_refused_with_the_worst_layer() -> None:
    model, file = tiny_candidate("float")
    arguments = (file, model, tiny_source().skeleton, images(64, 3))
    for bounds, said in (
        (Bounds(difference=0, noise=0), "of the torch module by .* 0.00% is allowed; of all layers (layer|the|value) "),
        (Bounds(unfused=0, noise=0), "of the file run node by node"),
    ):
        with pytest.raises(ParityError, match=said):
            check_parity(*arguments, bounds)


def test_answers_that_differ_are_refused() -> None:
    model, file = tiny_candidate("float")
    skeleton, batches = tiny_source().skeleton, images(96, 3)
    other = with_fault(file, "fc.weight", factor=-1.0)
    loose = Bounds(step=9, difference=9, unfused=9, noise=0)
    with pytest.raises(ParityError, match=r"of 96 answers .*99.50% is the least allowed; of all layers .*fc differs"):
        check_parity(other, model, skeleton, batches, loose)
    found = check_parity(other, model, skeleton, batches, Bounds(9, 9, None, 9, 0))
    assert found.torch.agreement < 0.9 and found.worst.place in ("layer fc", "the output")


def test_a_file_of_one_batch_size_is_refused() -> None:
    model, file = tiny_candidate("float")
    fixed = ModelProto()
    fixed.CopyFrom(file)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = parity.SAMPLES
    batches = [images(8, 3)[0]]
    with pytest.raises(ParityError, match="the file does not run on a batch of 1"):
        check_parity(fixed, model, tiny_source().skeleton, batches)


def test_outputs_that_depend_on_the_rest_of_the_batch_are_refused() -> None:
    file = tiny_candidate("mixed")[1]
    session = runtime.open_session(file.SerializeToString())
    (batch,) = images(16, 3)
    shifted = np.roll(runtime.run(session, {"input": batch}), 1, axis=0)
    with pytest.raises(
        ParityError, match=r"in a batch of 1 the outputs differ by .* in a batch of 16, 0.50% is allowed"
    ):
        parity._check_batches(session, {"input": batch}, shifted, 0.005)
    parity._check_batches(session, {"input": batch}, shifted, None)  # shapes alone
    with pytest.raises(ParityError, match=r"makes \[1, 4\] of a batch of 1 instead of \[1, 3\]"):
        parity._check_batches(session, {"input": batch}, shifted[:, :3], None)


def test_differences_by_hand() -> None:
    first = np.array([[0.0, 2.0], [4.0, 2.0]], np.float32)
    second = np.array([[1.0, 0.0], [4.0, 2.5]], np.float32)
    found = Difference.between(first, second)
    assert (found.mean, found.largest, found.agreement, found.answers) == (3.5 / 4, 2.0, 0.5, 2)
    assert math.isclose(found.share, 0.875 / math.sqrt(2))
    assert Difference.between(first * 0, first * 0).share == 0
    assert Difference.between(first * 0, first).share == math.inf
    assert math.isnan(Difference.between(first * math.nan, first).share)


@pytest.mark.parametrize(
    "differ, answers, passes",
    [(1, 10, True), (2, 10, False), (1, 200, True), (2, 200, False), (2, 400, True), (3, 400, False)],
)
def test_one_answer_may_always_differ(differ: int, answers: int, passes: bool) -> None:
    assert Difference(0, 0, 1, 1 - differ / answers, answers).agrees(0.995) is passes


@pytest.mark.parametrize("wrong", [{"step": -1}, {"agreement": 1.5}, {"noise": math.nan}])
def test_bounds_are_shares(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"the bound {next(iter(wrong))} is a share"):
        Bounds(**wrong)


def test_something_must_be_run() -> None:
    model, file = tiny_candidate("float")
    with pytest.raises(ValueError, match="at least one batch"):
        check_parity(file, model, tiny_source().skeleton, [])
