"""What a choice makes of a layer's shape and what that costs: the one place where ranks, widths and bytes are set.

`methods` builds exactly these shapes, so a candidate's cost is known before it is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from grainwise.plan.choices import Choice, Granularity, Method
from grainwise.plan.layers import Geometry, Kind

WIDTH_MULTIPLE = 8  # other widths waste most of the gain in every CPU kernel
TILE_ROWS = (16, 8, 4)
TALL_TILE = 128  # rows of a tile that a gather and a dense product outrun the dense layer with
ROW_BLOCKS = (4, 2)


@dataclass(frozen=True, slots=True)
class Stage:
    """One primitive layer that a structure consists of.

    geometry: its shape. at_input: True when it runs at the layer's input positions (before the strided convolution).
    kept: values stored for each row-major weight matrix, when fewer than all. tile_rows: rows of one tile (`block`
        pruning), else 0: kept values are then marked by a bitmask when `kept` is set.
    """

    geometry: Geometry
    at_input: bool = False
    kept: int | None = None
    tile_rows: int = 0


def kept_width(width: int, level: float) -> int:
    """Units left of `width` after removing the share `level`, rounded to a multiple of 8 and at least 8."""
    return max(1, round((1 - level) * width / WIDTH_MULTIPLE)) * WIDTH_MULTIPLE


def group_size(columns: int) -> int:
    """Weights along the input that share a scale at granularity `block`; a row's last group may be shorter."""
    return 32 if columns <= 1024 else 128


def tile_rows(geometry: Geometry) -> int:
    """Height of the tiles of `prune/block`, tall ones for a Linear if they fit; 0 when no height divides the rows."""
    heights = (TALL_TILE, *TILE_ROWS) if geometry.kind is Kind.LINEAR else TILE_ROWS
    return next((t for t in heights if geometry.rows % t == 0), 0)


def row_blocks(rows: int) -> int:
    """Number of row blocks of `factorize/block`; 0 when the rows cannot be cut."""
    return next((b for b in ROW_BLOCKS if rows % b == 0 and rows // b >= 4), 0)


def rank(geometry: Geometry, level: float) -> int:
    """Kept rank of the `[O, K]` weight matrix: `level` of the full rank, at least 1."""
    return max(1, round(level * min(geometry.rows, geometry.columns)))


def _factor_stages(g: Geometry, choice: Choice) -> tuple[Stage, ...]:
    assert choice.level is not None
    r = rank(g, choice.level)
    if g.kind is Kind.EMBEDDING:  # tokens x r, then r x width
        return (
            Stage(Geometry(Kind.EMBEDDING, g.inputs, r)),
            Stage(Geometry(Kind.LINEAR, r, g.outputs)),
        )
    if choice.granularity is Granularity.LAYER:
        return Stage(g.resized(outputs=r, bias=False)), Stage(g.pointwise(r, g.outputs, bias=g.bias))
    if choice.granularity is Granularity.BLOCK:
        blocks = row_blocks(g.rows)
        hidden = max(1, round(choice.level * min(g.rows // blocks, g.columns))) * blocks
        return (
            Stage(g.resized(outputs=hidden, bias=False)),
            Stage(g.pointwise(hidden, g.outputs, bias=g.bias, groups=blocks)),
        )
    inner_in = max(1, round(choice.level * g.inputs))
    inner_out = max(
        1, min(round(choice.level * g.outputs), inner_in * g.taps)
    )  # no more rows than the core has columns
    return (
        Stage(g.pointwise(g.inputs, inner_in, bias=False), at_input=True),
        Stage(g.resized(inputs=inner_in, outputs=inner_out, bias=False)),
        Stage(g.pointwise(inner_out, g.outputs, bias=g.bias)),
    )


def depth_multiplier(g: Geometry, level: float) -> int:
    """Depthwise filters per input channel of a separable student, so that it has `level` of the layer's weights."""
    return max(1, int(level * g.taps * g.outputs / (g.taps + g.outputs)))


def _student_stages(g: Geometry, choice: Choice) -> tuple[Stage, ...]:
    assert choice.level is not None
    if choice.granularity is Granularity.CHANNEL:  # ghost: primary channels, then cheap per-channel maps of them
        primary = max(1, round(choice.level * g.outputs))
        ghosts = g.outputs - primary
        per_channel = (3,) * len(g.kernel)
        ones = (1,) * len(g.kernel)
        cheap = Geometry(
            g.kind, ghosts, ghosts, per_channel, ones, ones if g.kernel else (), ones, groups=ghosts, bias=g.bias
        )
        return Stage(g.resized(outputs=primary)), Stage(cheap)
    if g.taps > 1:
        m = depth_multiplier(g, choice.level)
        spatial = Geometry(
            g.kind, g.inputs, g.inputs * m, g.kernel, g.stride, g.padding, g.dilation, groups=g.inputs, bias=False
        )
        return Stage(spatial), Stage(g.pointwise(g.inputs * m, g.outputs, bias=g.bias))
    hidden = rank(g, choice.level)
    return Stage(g.resized(outputs=hidden, bias=False)), Stage(g.pointwise(hidden, g.outputs, bias=g.bias))


@lru_cache(maxsize=1024)  # prices ask for them at every precision, and for each of several reasons
def stages(geometry: Geometry, structure: Choice) -> tuple[Stage, ...]:
    """The primitive layers that `structure` puts in a layer's place, in the order in which they run.

    `prune/channel` and `distill/block` act through the layer's widths: `geometry` is then the narrowed layer and one
    stage is left.
    """
    match structure.method, structure.granularity:
        case Method.PRUNE, Granularity.LAYER:
            assert structure.level is not None
            return (Stage(geometry, kept=geometry.weights - round(structure.level * geometry.weights)),)
        case Method.PRUNE, Granularity.BLOCK:
            assert structure.level is not None
            kept_columns = geometry.columns - round(structure.level * geometry.columns)
            return (Stage(geometry, kept=kept_columns * geometry.rows, tile_rows=tile_rows(geometry)),)
        case Method.FACTORIZE, _:
            return _factor_stages(geometry, structure)
        case Method.DISTILL, Granularity.LAYER | Granularity.CHANNEL:
            return _student_stages(geometry, structure)
        case _:
            return (Stage(geometry),)


def scale_count(geometry: Geometry, granularity: Granularity) -> int:
    """Scales of a quantised weight matrix: one, one per row, or one per group of a row."""
    match granularity:
        case Granularity.LAYER:
            return 1
        case Granularity.CHANNEL:
            return geometry.rows
        case Granularity.BLOCK:
            return geometry.rows * ceil(geometry.columns / group_size(geometry.columns))


def stage_tensors(stage: Stage, precision: Choice) -> dict[str, int]:
    """Bytes of each tensor that is stored for a stage: weight (float32, or packed bits), scale (float16), support
    (bitmask, or int16 column numbers of the kept tiles), bias (float32).
    """
    g = stage.geometry
    kept = g.weights if stage.kept is None else stage.kept
    tensors: dict[str, int] = {}
    if precision.method is Method.QUANTIZE:
        assert precision.level is not None and precision.granularity is not None
        tensors["weight"] = ceil(kept * int(precision.level) / 8)
        tensors["scale"] = 2 * scale_count(g, precision.granularity)
    else:
        tensors["weight"] = 4 * kept
    if stage.tile_rows:
        tensors["support"] = 2 * kept // stage.tile_rows
    elif stage.kept is not None:
        tensors["support"] = ceil(g.weights / 8)
    if g.bias:
        tensors["bias"] = 4 * g.outputs
    return tensors


def routing_tensors(geometry: Geometry, structure: Choice) -> dict[str, int]:
    """Bytes of what a ghost module needs beside its stages: `source` (int16, the primary channel of each ghost) and
    `order` (int16, where each output channel stands among primaries and ghosts).
    """
    if structure.method is not Method.DISTILL or structure.granularity is not Granularity.CHANNEL:
        return {}
    primary, cheap = (s.geometry.outputs for s in stages(geometry, structure))
    return {"source": 2 * cheap, "order": 2 * (primary + cheap)}


def stage_macs(stage: Stage, positions_in: int, positions_out: int) -> int:
    """Multiply-accumulates of a stage per sample. Zeros that a bitmask or tiles leave out are still multiplied."""
    if stage.geometry.kind is Kind.EMBEDDING:
        return 0
    return stage.geometry.weights * (positions_in if stage.at_input else positions_out)
