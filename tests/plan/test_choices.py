from __future__ import annotations

import pytest

from grainwise.plan.choices import NONE, PRECISIONS, STRUCTURES, Choice, Entry, Granularity, Method


def test_vocabulary_has_every_cell_once() -> None:
    assert len(STRUCTURES) == len(set(STRUCTURES)) == 1 + 12 + 9 + 6
    assert len(PRECISIONS) == len(set(PRECISIONS)) == 1 + 9
    assert STRUCTURES[0] == PRECISIONS[0] == NONE


@pytest.mark.parametrize(
    "arguments",
    [
        (Method.PRUNE, None, 0.5),
        (Method.PRUNE, Granularity.LAYER, 0.4),
        (Method.QUANTIZE, Granularity.LAYER, 3),
        (Method.NONE, Granularity.LAYER, None),
    ],
)
def test_what_is_not_in_the_vocabulary_is_refused(arguments: tuple[Method, Granularity | None, float | None]) -> None:
    with pytest.raises(ValueError, match="none takes no|needs a granularity"):
        Choice(*arguments)


def test_an_entry_keeps_structure_and_precision_apart() -> None:
    with pytest.raises(ValueError, match="is a precision"):
        Entry(structure=PRECISIONS[1])
    with pytest.raises(ValueError, match="is a structure"):
        Entry(precision=STRUCTURES[1])
    assert str(Entry(STRUCTURES[1], PRECISIONS[1])) == "prune/layer/0.1 + quantize/layer/8"
    assert str(Entry()) == "none"
