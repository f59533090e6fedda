"""Which kernel an entry becomes, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from grainwise.plan import target as targets
from grainwise.plan.choices import NONE, Choice, Granularity, Method
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.target import PACKED, TARGETS, Realisation, resolve_target

VNNI = TARGETS["ort-cpu-vnni"]
CONV = Geometry(Kind.CONV2D, 16, 16, (3, 3), (1, 1), (1, 1), (1, 1))
LINEAR = Geometry(Kind.LINEAR, 256, 256, bias=True)
TABLE = Geometry(Kind.EMBEDDING, 100, 32)


def _bits(granularity: Granularity, bits: float = 8) -> Choice:
    return Choice(Method.QUANTIZE, granularity, bits)


@pytest.mark.parametrize(
    ("geometry", "structure", "precision", "expected"),
    [
        (CONV, NONE, NONE, (Realisation.FLOAT,)),
        (CONV, NONE, _bits(Granularity.CHANNEL, 4), (Realisation.STATIC,)),
        (CONV, NONE, _bits(Granularity.BLOCK, 4), (Realisation.FOLDED,)),
        (CONV, Choice(Method.PRUNE, Granularity.LAYER, 0.5), _bits(Granularity.LAYER), (Realisation.STATIC,)),
        (CONV, Choice(Method.FACTORIZE, Granularity.LAYER, 0.5), _bits(Granularity.LAYER), (Realisation.STATIC,) * 2),
        (CONV, Choice(Method.DISTILL, Granularity.CHANNEL, 0.5), _bits(Granularity.LAYER), (Realisation.FOLDED,) * 2),
        (LINEAR, NONE, _bits(Granularity.CHANNEL), (Realisation.DYNAMIC,)),
        (LINEAR, Choice(Method.PRUNE, Granularity.BLOCK, 0.5), NONE, (Realisation.SPARSE,)),
        (LINEAR, Choice(Method.PRUNE, Granularity.BLOCK, 0.3), NONE, (Realisation.FOLDED,)),
        (TABLE, NONE, _bits(Granularity.CHANNEL, 4), (Realisation.GATHERED,)),
    ],
)
def test_realisations_by_hand(
    geometry: Geometry, structure: Choice, precision: Choice, expected: tuple[Realisation, ...]
) -> None:
    assert VNNI.realisations(geometry, structure, precision) == expected
    assert set(PACKED.realisations(geometry, structure, precision)) <= {Realisation.FLOAT, Realisation.FOLDED}


def test_what_saves_bytes_alone_is_not_called_faster() -> None:
    assert not VNNI.faster(CONV, NONE, _bits(Granularity.BLOCK, 4))
    assert not VNNI.faster(CONV, Choice(Method.PRUNE, Granularity.LAYER, 0.5), NONE)
    assert not VNNI.faster(CONV, NONE, NONE)
    assert VNNI.faster(CONV, NONE, _bits(Granularity.CHANNEL, 2))
    assert VNNI.faster(CONV, Choice(Method.PRUNE, Granularity.CHANNEL, 0.5), NONE)


def test_eight_bits_reach_less_far_where_the_kernel_would_overflow() -> None:
    narrow = TARGETS["ort-cpu-avx2"]
    assert narrow.largest_code(Realisation.STATIC, 8) == 63
    assert narrow.largest_code(Realisation.FOLDED, 8) == VNNI.largest_code(Realisation.STATIC, 8) == 127
    assert narrow.largest_code(Realisation.STATIC, 4) == 7


@pytest.mark.parametrize(("flags", "name"), [("avx2", "ort-cpu-avx2"), ("avx2 avx512_vnni", "ort-cpu-vnni")])
def test_the_processor_decides(flags: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(targets, "_CPUINFO", tmp_path / "cpuinfo")
    assert resolve_target("ort-cpu").name == name
    with pytest.raises(ValueError, match="no target is called 'tpu'"):
        resolve_target("tpu")
