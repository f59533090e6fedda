from math import nan
from xml.etree import ElementTree

import pytest

from grainwise.report.plot import _HEIGHT, _WIDTH, _ticks, plot

SPACE = "{http://www.w3.org/2000/svg}"


def _points(document: ElementTree.Element, kind: str) -> list[list[tuple[float, ...]]]:
    found = document.iter(f"{SPACE}{kind}")
    return [[tuple(map(float, pair.split(","))) for pair in one.attrib["points"].split()] for one in found]


def test_the_line_is_the_mean_and_the_band_least_and_most_from_where_all_seeds_have_values() -> None:
    curves = {"a <&> b": [[nan, 3.0, 2.0], [nan, 1.0, 0.0]]}
    document = ElementTree.fromstring(plot({"title": (curves, False)}))
    (line,), (band,) = _points(document, "polyline"), _points(document, "polygon")
    top = _ticks(__import__("numpy").array([3.0, 2.0, 1.0, 0.0]), logarithmic=False)[-1]
    middle = _WIDTH / 2
    expected = [(middle, _HEIGHT * (1 - 2 / top)), (_WIDTH, _HEIGHT * (1 - 1 / top))]
    assert line == pytest.approx([pytest.approx(p, abs=0.06) for p in expected])
    assert [x for x, _ in band] == pytest.approx([middle, _WIDTH, _WIDTH, middle], abs=0.06)
    assert band[0][1] == pytest.approx(_HEIGHT * (1 - 1 / top), abs=0.06)  # the least, lower down
    assert band[-1][1] == pytest.approx(_HEIGHT * (1 - 3 / top), abs=0.06)
    assert any("a <&> b" == text.text for text in document.iter(f"{SPACE}text"))


def test_a_logarithmic_axis_puts_decades_at_equal_distances() -> None:
    document = ElementTree.fromstring(plot({"t": ({"a": [[1.0, 0.1, 0.01]]}, True)}))
    (((_, first), (_, second), (_, third)),) = _points(document, "polyline")
    assert second - first == pytest.approx(third - second, abs=0.11)
    assert first < second < third


@pytest.mark.parametrize("rows", [[[nan, nan]], [[0.5, 0.5]], [[0.0, 0.0]]])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_curves_without_a_range_are_drawn_all_the_same(rows: list[list[float]], logarithmic: bool) -> None:
    text = plot({"t": ({"a": rows}, logarithmic), "u": ({"b": rows}, logarithmic)})
    ElementTree.fromstring(text)
    assert "nan" not in text


def test_ticks_enclose_the_values() -> None:
    import numpy as np

    for low, high in ((0.003, 0.7), (0.5, 0.5), (0.91, 0.93), (2.0, 900.0)):
        for logarithmic in (False, True):
            ticks = _ticks(np.array([low, high]), logarithmic=logarithmic)
            assert ticks[0] <= low and high <= ticks[-1] and len(ticks) > 1
            assert ticks == sorted(ticks)
