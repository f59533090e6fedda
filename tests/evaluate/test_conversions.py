"""What runs between layers, counted by hand on a residual block: x -> a -> b, a + b -> c."""

from __future__ import annotations

import pytest

from grainwise.evaluate.conversions import Circuit, Form, Kernel, Line, fit_line
from grainwise.graph.skeleton import Join, Point, Unit

BLOCKED = Form(True, True)
CIRCUIT = Circuit(
    {"a": Unit("a", "x", "p"), "b": Unit("b", "p", "q"), "c": Unit("c", "s", "y")},
    (Join("sum", ("p", "q"), "s"),),
    {
        "x": Point("x", None, ("a",), False, 12),
        "p": Point("p", "a", ("b", "sum"), False, 64),
        "q": Point("q", "b", ("sum",), False, 64),
        "s": Point("s", "sum", ("c",), False, 64),
        "y": Point("y", "c", (), True, 32),
    },
    frozenset({"s"}),
)
FORMS = {"a": Form(False, True), "b": BLOCKED, "c": BLOCKED}

QUANTIZE_X = "Quantize x, Transpose x"
BACK_Y = "Transpose y, Dequantize y"
OUT_Y = "ReorderOutput y"


def active(static: set[str]) -> set[str]:
    found = {p for n in static for p in (CIRCUIT.units[n].source, CIRCUIT.units[n].result) if p}
    return found | ({"s"} if {"p", "q"} <= found else set())


@pytest.mark.parametrize(
    ("static", "expected"),
    [
        ("", OUT_Y),
        ("abc", f"{QUANTIZE_X}, QLinearAdd s, {BACK_Y}"),
        ("ab", f"{QUANTIZE_X}, QLinearAdd s, Transpose s, Dequantize s, ReorderInput s, {OUT_Y}"),
        ("c", f"ReorderOutput s, Quantize s, Transpose s, {BACK_Y}"),
        # p is quantised in plain order, so the sum is plain too, and what c reads must be turned
        ("bc", f"ReorderOutput p, Quantize p, Transpose p, Transpose q, QLinearAdd s, Transpose s, {BACK_Y}"),
        (
            "b",
            "ReorderOutput p, Quantize p, Transpose p, Transpose q, "
            f"QLinearAdd s, Dequantize s, ReorderInput s, {OUT_Y}",
        ),
        # each float reader of p dequantises for itself
        (
            "a",
            f"{QUANTIZE_X}, Transpose p, 2 Dequantize p, ReorderInput p, "
            f"ReorderOutput q, Add s, Relu s, ReorderInput s, {OUT_Y}",
        ),
        # the float sum of an 8-bit and a float value is quantised: its operand is rounded once more, nothing clips it
        (
            "ac",
            f"{QUANTIZE_X}, 2 Transpose p, Quantize p, 3 Dequantize p, ReorderInput p, "
            f"ReorderOutput q, Add s, Quantize s, Transpose s, {BACK_Y}",
        ),
    ],
)
def test_conversions_by_hand(static: str, expected: str) -> None:
    found = CIRCUIT.conversions(set(static), active(set(static)), FORMS)
    words = [f"{n} " * (n > 1) + f"{k.value.removesuffix('Linear')} {p}" for (k, p), n in found.items()]
    assert sorted(words) == sorted(expected.split(", "))


def test_a_layer_that_reads_plain_values_needs_them_in_plain_order() -> None:
    forms = {**FORMS, "c": Form(False, False)}
    found = CIRCUIT.conversions((), (), forms)
    assert found == {(Kernel.REORDER_OUTPUT, "s"): 1}
    plain = CIRCUIT.conversions((), (), {**FORMS, "b": Form(True, False)})  # the sum is no longer of blocked values
    assert plain[Kernel.ADD, "s"] == plain[Kernel.RELU, "s"] == plain[Kernel.REORDER_INPUT, "s"] == 1
    assert plain[Kernel.REORDER_OUTPUT, "p"] == 1


def test_widths_go_through_sums() -> None:
    assert CIRCUIT.widths({"a": 0.5, "b": 0.5, "c": 0.25}) == {"p": 0.5, "q": 0.5, "s": 0.5, "y": 0.25}
    assert CIRCUIT.widths({}) == {"s": 1.0}


def test_lines_are_found_again() -> None:
    line = fit_line([(1000, 0.003), (2000, 0.005), (10000, 0.021)])
    assert (line.base_ms, line.element_ms) == (pytest.approx(1e-3), pytest.approx(2e-6))
    assert line.of(5000) == pytest.approx(0.011)


def test_lines_are_never_negative() -> None:
    falling = fit_line([(1000, 0.02), (10000, 0.01)])
    assert falling.element_ms == 0.0 and 0.01 < falling.base_ms < 0.02
    steep = fit_line([(1000, 0.005), (10000, 0.1)])
    assert steep.base_ms == 0.0 and steep.element_ms > 0
    assert fit_line([(0, 0.0)]) == Line(0.0, 0.0)
    with pytest.raises(ValueError, match="at least one"):
        fit_line([])
