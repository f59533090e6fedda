"""What a target makes of an entry, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from grainwise.plan import target as targets
from grainwise.plan.choices import NONE, PRECISIONS, STRUCTURES, Choice, Entry, Granularity, Method
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.shapes import Stage
from grainwise.plan.target import PACKED, TARGETS, ProcessorError, Realisation, Target, check_processor, resolve_target

VNNI, AVX2 = TARGETS["ort-cpu-vnni"], TARGETS["ort-cpu-avx2"]
FLOAT, FOLDED, STATIC, DYNAMIC, SPARSE, GATHERED = Realisation

CONV1D = Geometry(Kind.CONV1D, 16, 32, (3,), (1,), (1,), (1,))
CONV2D = Geometry(Kind.CONV2D, 16, 32, (3, 3), (1, 1), (1, 1), (1, 1))
DEPTHWISE = Geometry(Kind.CONV2D, 16, 16, (3, 3), (1, 1), (1, 1), (1, 1), groups=16)
LINEAR = Geometry(Kind.LINEAR, 64, 256)
GROUPED = Geometry(Kind.LINEAR, 64, 256, groups=4)
EMBEDDING = Geometry(Kind.EMBEDDING, 100, 42)


def bits(granularity: Granularity, level: int) -> Choice:
    return Choice(Method.QUANTIZE, granularity, level)


def choice(text: str) -> Choice:
    return next(c for c in (*STRUCTURES, *PRECISIONS) if str(c) == text)


@pytest.mark.parametrize(
    ("geometry", "shared", "grouped"),
    [
        (CONV1D, STATIC, FOLDED),
        (CONV2D, STATIC, FOLDED),
        (DEPTHWISE, STATIC, FOLDED),
        (LINEAR, DYNAMIC, FOLDED),
        (GROUPED, FOLDED, FOLDED),
        (EMBEDDING, GATHERED, GATHERED),
    ],
)
@pytest.mark.parametrize("target", [VNNI, AVX2], ids=lambda t: t.name)
def test_the_table(target: Target, geometry: Geometry, shared: Realisation, grouped: Realisation) -> None:
    """shared: one scale for a tensor or a row. grouped: one for each group of a row."""
    stage = Stage(geometry)
    assert target.realisation(stage, NONE) is FLOAT
    for level in (8, 4):
        assert target.realisation(stage, bits(Granularity.LAYER, level)) is shared
        assert target.realisation(stage, bits(Granularity.CHANNEL, level)) is shared
        assert target.realisation(stage, bits(Granularity.BLOCK, level)) is grouped
        assert target.realisation(stage, bits(Granularity.LAYER, level), routed=True) is FOLDED
        assert PACKED.realisation(stage, bits(Granularity.LAYER, level)) is FOLDED


@pytest.mark.parametrize("geometry", [CONV1D, CONV2D, DEPTHWISE, LINEAR, GROUPED])
def test_activations_may_stay_float(geometry: Geometry) -> None:
    target = TARGETS["ort-cpu-float"]
    for precision in PRECISIONS[1:]:
        assert target.realisations(geometry, NONE, precision) == (FOLDED,)
        assert not target.faster(geometry, NONE, precision)
    assert target.realisations(EMBEDDING, NONE, bits(Granularity.CHANNEL, 8)) == (GATHERED,)
    assert target.realisations(LINEAR, choice("prune/block/0.7"), NONE) == (SPARSE,)  # faster, and nothing is rounded


def test_rows_of_a_table_that_do_not_start_at_a_byte_are_unpacked_at_load() -> None:
    """42 codes of 2 bits are 10.5 bytes; a table of which rows are left out has no rows to speak of."""
    four, two = bits(Granularity.CHANNEL, 4), bits(Granularity.CHANNEL, 2)
    assert VNNI.realisation(Stage(EMBEDDING), four) is GATHERED
    assert VNNI.realisation(Stage(EMBEDDING), two) is FOLDED
    assert VNNI.realisation(Stage(EMBEDDING.resized(outputs=44)), two) is GATHERED
    assert VNNI.realisation(Stage(EMBEDDING, kept=100), four) is FOLDED


def test_pruned_weights_in_float() -> None:
    """Only tall tiles, at least half of them gone, are left out of the product; elsewhere zeros come back at load."""
    half = LINEAR.weights // 2
    assert VNNI.realisation(Stage(LINEAR, kept=half, tile_rows=128), NONE) is SPARSE
    assert VNNI.realisation(Stage(LINEAR, kept=half + 128, tile_rows=128), NONE) is FOLDED
    assert VNNI.realisation(Stage(LINEAR, kept=half, tile_rows=16), NONE) is FOLDED
    assert VNNI.realisation(Stage(LINEAR, kept=half), NONE) is FOLDED
    assert PACKED.realisation(Stage(LINEAR, kept=half, tile_rows=128), NONE) is FOLDED
    assert VNNI.realisation(Stage(LINEAR, kept=half, tile_rows=128), bits(Granularity.LAYER, 8)) is DYNAMIC


@pytest.mark.parametrize(
    ("target", "how", "expected"),
    [
        (VNNI, STATIC, (127, 7, 1.5)),
        (VNNI, FOLDED, (127, 7, 1.5)),
        (AVX2, STATIC, (63, 7, 1.5)),
        (AVX2, DYNAMIC, (63, 7, 1.5)),
        (AVX2, FOLDED, (127, 7, 1.5)),
        (AVX2, GATHERED, (127, 7, 1.5)),
        (PACKED, FOLDED, (127, 7, 1.5)),
    ],
)
def test_the_largest_code_is_that_of_the_kernel(target: Target, how: Realisation, expected: tuple[float, ...]) -> None:
    assert tuple(target.largest_code(how, level) for level in (8, 4, 2)) == expected


def test_two_products_of_the_largest_codes_fit_16_bits() -> None:
    """The reason for 63: u8 x s8 products are added in pairs in 16 bits on processors without VNNI."""
    assert 2 * 255 * AVX2.reach < 2**15 <= 2 * 255 * (AVX2.reach + 2)


def test_stages_of_a_structure_each_have_their_realisation() -> None:
    tucker, ghost = choice("factorize/channel/0.5"), choice("distill/channel/0.5")
    eight, groups = bits(Granularity.CHANNEL, 8), bits(Granularity.BLOCK, 8)
    assert VNNI.realisations(CONV2D, tucker, eight) == (STATIC, STATIC, STATIC)
    assert VNNI.realisations(CONV2D, tucker, NONE) == (FLOAT, FLOAT, FLOAT)
    assert VNNI.realisations(CONV2D, ghost, eight) == (FOLDED, FOLDED)
    assert VNNI.realisations(LINEAR, choice("factorize/block/0.5"), eight) == (DYNAMIC, FOLDED)
    assert VNNI.realisations(EMBEDDING, choice("factorize/layer/0.5"), eight) == (GATHERED, DYNAMIC)
    assert VNNI.static(CONV2D, tucker, eight) and VNNI.static(CONV1D, NONE, eight)
    floats = ((CONV2D, ghost, eight), (CONV2D, NONE, groups), (LINEAR, NONE, eight))
    assert not any(VNNI.static(*entry) for entry in floats)


SIZE_ONLY = {
    CONV2D: {"prune/layer", "prune/block", "quantize/block"},
    LINEAR: {"prune/layer", "prune/block/0.1", "prune/block/0.3", "quantize/block"},
    EMBEDDING: {"prune/layer", "quantize/layer", "quantize/channel", "quantize/block"},
}
"""Choices, or method and granularity of choices, that only save bytes."""
_OF_TABLES = ((Method.PRUNE, Granularity.LAYER), (Method.FACTORIZE, Granularity.LAYER))


@pytest.mark.parametrize("geometry", SIZE_ONLY, ids=lambda g: g.kind)
def test_faster_is_false_for_what_only_saves_bytes(geometry: Geometry) -> None:
    assert not VNNI.faster(geometry, NONE, NONE)
    for c in STRUCTURES[1:]:
        if geometry is not EMBEDDING or (c.method, c.granularity) in _OF_TABLES:
            only = {str(c), f"{c.method}/{c.granularity}"} & SIZE_ONLY[geometry]
            assert VNNI.faster(geometry, c, NONE) != bool(only)
    for c in PRECISIONS[1:]:
        assert VNNI.faster(geometry, NONE, c) != (f"{c.method}/{c.granularity}" in SIZE_ONLY[geometry])


def test_faster_of_pairs() -> None:
    sparse, eight, groups = choice("prune/layer/0.5"), bits(Granularity.CHANNEL, 8), bits(Granularity.BLOCK, 4)
    low_rank = choice("factorize/layer/0.25")
    assert VNNI.faster(CONV2D, sparse, eight)
    assert not VNNI.faster(CONV2D, sparse, groups)
    assert VNNI.faster(CONV2D, low_rank, groups)
    assert PACKED.faster(CONV2D, low_rank, eight) and not PACKED.faster(CONV2D, NONE, eight)
    assert not PACKED.faster(LINEAR, choice("prune/block/0.7"), NONE)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("fpu avx2 fma", "ort-cpu-avx2"),
        ("fpu avx2 avx512f avx512_vnni", "ort-cpu-vnni"),
        ("fpu avx2 avx_vnni", "ort-cpu-vnni"),
        ("fpu avx2 avx_vnni_int8", "ort-cpu-avx2"),  # another instruction
        (None, "ort-cpu-avx2"),
    ],
)
def test_the_processor_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None, name: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"model name\t: some\nflags\t\t: {flags}\n\nflags\t\t: {flags}\n")
    monkeypatch.setattr(targets, "_CPUINFO", cpuinfo)
    assert resolve_target("ort-cpu") is TARGETS[name]


@pytest.mark.parametrize(
    ("flags", "target", "precision", "refused"),
    [
        ("ssse3 avx2", VNNI, bits(Granularity.CHANNEL, 8), True),
        ("ssse3 avx2", VNNI, bits(Granularity.CHANNEL, 4), False),  # codes up to 7
        ("ssse3 avx2", VNNI, bits(Granularity.BLOCK, 8), False),  # unpacked to float32
        ("ssse3 avx2", AVX2, bits(Granularity.CHANNEL, 8), False),
        ("ssse3 avx2", TARGETS["ort-cpu-float"], bits(Granularity.CHANNEL, 8), False),
        ("ssse3 avx2 avx_vnni", VNNI, bits(Granularity.CHANNEL, 8), False),
        ("fp asimd", VNNI, bits(Granularity.CHANNEL, 8), False),  # not an x86 one
    ],
)
def test_files_that_overflow_on_this_processor_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, target: Target, precision: Choice, refused: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(targets, "_CPUINFO", cpuinfo)
    if refused:
        with pytest.raises(ProcessorError, match="ort-cpu-vnni compute wrongly .* take the target ort-cpu-avx2"):
            check_processor(target, [Entry(), Entry(precision=precision)])
        with pytest.raises(ProcessorError, match="no VNNI"):
            check_processor(target.name)
    else:
        check_processor(target, [Entry(), Entry(precision=precision)])


def test_a_target_of_the_user_s_own_is_known_by_itself_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t\t: ssse3\n")
    monkeypatch.setattr(targets, "_CPUINFO", tmp_path / "cpuinfo")
    check_processor("mine")
    with pytest.raises(ProcessorError, match="files for mine"):
        check_processor(Target("mine", "onnxruntime", VNNI.quantised))


def test_targets_by_name() -> None:
    assert {name: resolve_target(name) for name in TARGETS} == TARGETS
    assert all(name == target.name for name, target in TARGETS.items())
    own = Target("mine", "onnxruntime", {})
    assert resolve_target(own) is own
    with pytest.raises(ValueError, match="no target is called 'tpu'; give ort-cpu or one of packed, ort-cpu-avx2"):
        resolve_target("tpu")


def test_a_separable_student_in_8_bits_has_no_fast_kernel() -> None:
    """ONNX Runtime has none for several outputs of each input: measured 6 times slower than in float32."""
    wide = Geometry(Kind.CONV2D, 32, 32, (3, 3), (1, 1), (1, 1), (1, 1))
    student, eight = Choice(Method.DISTILL, Granularity.LAYER, 0.5), Choice(Method.QUANTIZE, Granularity.CHANNEL, 8)
    assert not TARGETS["ort-cpu-vnni"].faster(wide, student, eight)
    assert TARGETS["ort-cpu-vnni"].faster(wide, student, NONE)
