"""What a deployment runtime makes of each entry: which kernel runs, with which numerics, and what only saves bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from grainwise.plan.choices import NONE, Choice, Entry, Granularity, Method
from grainwise.plan.layers import Geometry, Kind
from grainwise.plan.shapes import TALL_TILE, Stage, stages


class Realisation(StrEnum):
    """How one stage of a layer runs."""

    FLOAT = "float"
    """The plain float32 kernel."""
    FOLDED = "unpacked at load"
    """Stored packed, unpacked once when the network is loaded, then the plain float32 kernel: size only."""
    STATIC = "static int8"
    """8-bit kernel: activations in 8 bits with ranges found beforehand, weights of 8, 4 or 2 bits."""
    DYNAMIC = "dynamic int8"
    """8-bit kernel: activations take the range of each call, weights of 8, 4 or 2 bits."""
    SPARSE = "gathered columns"
    """Tall tiles that were pruned are left out: their columns are gathered and multiplied densely."""
    GATHERED = "unpacked rows"
    """Rows stay packed in memory; those that are looked up are unpacked: size only."""


EIGHT_BIT = (Realisation.STATIC, Realisation.DYNAMIC)
FAST = (*EIGHT_BIT, Realisation.SPARSE)

WIDEST: dict[int, float] = {8: 127.0, 4: 7.0, 2: 1.5}
"""Largest distance of a code from that of zero, by bits: symmetric, so one code of 8 and 4 bits is never used."""

SHORT_REACH = 63
"""Largest code of an 8-bit weight of which two products fit 16 bits."""

_EVERY = tuple(Granularity)
_SHARED = (Granularity.LAYER, Granularity.CHANNEL)  # one scale serves a whole row, so sums of products stay integers


def _table(*rows: tuple[Kind, Iterable[Granularity], Realisation]) -> dict[tuple[Kind, Granularity], Realisation]:
    return {(kind, granularity): how for kind, grains, how in rows for granularity in grains}


_ONNXRUNTIME = _table(
    (Kind.CONV1D, _SHARED, Realisation.STATIC),
    (Kind.CONV2D, _SHARED, Realisation.STATIC),
    (Kind.LINEAR, _SHARED, Realisation.DYNAMIC),
    (Kind.EMBEDDING, _EVERY, Realisation.GATHERED),
)

_FLOAT = _table((Kind.EMBEDDING, _EVERY, Realisation.GATHERED))


@dataclass(frozen=True, slots=True)
class Target:
    """A deployment runtime on a kind of processor.

    quantised: how a quantised stage of a kind at a granularity runs; what is not listed is unpacked at load.
    reach: largest absolute code of an 8-bit weight in an 8-bit kernel. 127, or SHORT_REACH on processors whose kernels
        add two products in 16 bits, where 127 overflows.
    runtime: the program that runs the file, or `torch` when there is no file but the packed weights.
    """

    name: str
    runtime: str
    quantised: Mapping[tuple[Kind, Granularity], Realisation]
    reach: int = 127

    def realisation(self, stage: Stage, precision: Choice, *, routed: bool = False) -> Realisation:
        """How a stage at a precision runs. routed: it belongs to a ghost module, whose channels are gathered."""
        g = stage.geometry
        if precision.method is not Method.QUANTIZE:
            if stage.kept is None:
                return Realisation.FLOAT
            tall = stage.tile_rows == TALL_TILE and 2 * stage.kept <= g.weights
            return Realisation.SPARSE if tall and self.quantised else Realisation.FOLDED
        assert precision.granularity is not None and precision.level is not None
        how = self.quantised.get((g.kind, precision.granularity), Realisation.FOLDED)
        whole_bytes = g.columns * int(precision.level) % 8 == 0  # a row of a table starts at a byte
        if how is Realisation.GATHERED and (stage.kept is not None or not whole_bytes):
            return Realisation.FOLDED
        return Realisation.FOLDED if routed or (g.kind is Kind.LINEAR and g.groups > 1) else how

    def largest_code(self, how: Realisation, bits: int) -> float:
        """Largest code of a weight, counted from the code of zero."""
        return min(WIDEST[bits], float(self.reach)) if how in EIGHT_BIT else WIDEST[bits]

    def realisations(self, geometry: Geometry, structure: Choice, precision: Choice) -> tuple[Realisation, ...]:
        """How each stage that an entry gives runs."""
        routed = (structure.method, structure.granularity) == (Method.DISTILL, Granularity.CHANNEL)
        return tuple(self.realisation(s, precision, routed=routed) for s in stages(geometry, structure))

    def static(self, geometry: Geometry, structure: Choice, precision: Choice) -> bool:
        """True when the layer reads and writes activations of 8 bits."""
        return Realisation.STATIC in self.realisations(geometry, structure, precision)

    def faster(self, geometry: Geometry, structure: Choice, precision: Choice) -> bool:
        """False when the entry saves bytes alone: no kernel of this runtime computes less or in fewer bits for it, or
        none that does is fast.
        """
        found = self.realisations(geometry, structure, precision)
        if (structure, precision) == (NONE, NONE):
            return False
        parts = (stage.geometry for stage in stages(geometry, structure))
        # Several outputs for each input of a depthwise stage: measured 6 times slower in 8 bits than in float32.
        if Realisation.STATIC in found and any(g.depthwise and g.outputs > g.inputs for g in parts):
            return False
        zeros = structure.method is Method.PRUNE and structure.granularity is not Granularity.CHANNEL
        return any(how in FAST for how in found) or not (structure == NONE or zeros)


PACKED = Target("packed", "torch", {})
"""PyTorch itself: weights are stored packed and unpacked at load; nothing but fewer multiplications makes it faster."""

TARGETS: dict[str, Target] = {
    "packed": PACKED,
    "ort-cpu-avx2": Target("ort-cpu-avx2", "onnxruntime", _ONNXRUNTIME, reach=SHORT_REACH),
    "ort-cpu-vnni": Target("ort-cpu-vnni", "onnxruntime", _ONNXRUNTIME, reach=127),
    # Weights alone are quantised. Rounding activations to 8 bits behind float layers makes results depend on the last
    # bit of a sum, which no two runtimes share; here they differ by rounding alone. No layer is faster for fewer bits.
    "ort-cpu-float": Target("ort-cpu-float", "onnxruntime", _FLOAT),
}

_CPUINFO = Path("/proc/cpuinfo")
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})


class ProcessorError(ValueError):
    """What was asked for runs wrongly on this processor; the message says why and what to do."""


def _processor_flags() -> set[str]:
    return set(_CPUINFO.read_text(encoding="utf-8").split()) if _CPUINFO.exists() else set()


def check_processor(target: str | Target, entries: Iterable[Entry] | None = None) -> None:
    """Raises ProcessorError when 8-bit sums of the target's files overflow on this processor: an x86 one without VNNI,
    whose kernels add two products in 16 bits, and weights of codes beyond 63. One that cannot be told passes.

    target: itself, or its name; a name that is not in TARGETS passes. entries: of the file; without them of any file.
    """
    if isinstance(target, str):
        if target not in TARGETS:
            return
        target = TARGETS[target]
    eight_bit = any(how in EIGHT_BIT for how in target.quantised.values())
    wide = entries is None or any(e.precision.level == 8 and e.precision.granularity in _SHARED for e in entries)
    flags = _processor_flags()
    if eight_bit and wide and target.reach > SHORT_REACH and "ssse3" in flags and not _VNNI & flags:
        raise ProcessorError(
            f"files for {target.name} compute wrongly on this processor: it has no VNNI, and sums of 8-bit weights "
            "overflow; take the target ort-cpu-avx2, whose weights of 7 bits run everywhere"
        )


def resolve_target(name: str | Target) -> Target:
    """A target by name; `ort-cpu` is the one that fits this processor. Raises ValueError for an unknown name."""
    if isinstance(name, Target):
        return name
    if name == "ort-cpu":
        name = "ort-cpu-vnni" if _VNNI & _processor_flags() else "ort-cpu-avx2"
    if name not in TARGETS:
        raise ValueError(f"no target is called {name!r}; give ort-cpu or one of {', '.join(TARGETS)}")
    return TARGETS[name]
