"""What was decided for each layer after each epoch, as one SVG picture: a row a layer, a column an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from grainwise.plan.choices import LEVELS, NONE, UNCOMPRESSED, Choice, Entry, Method

# Okabe & Ito 2008: one colour a method, the stronger the harder
_COLOURS = {
    Method.PRUNE: "#D55E00",
    Method.QUANTIZE: "#0072B2",
    Method.FACTORIZE: "#009E73",
    Method.DISTILL: "#CC79A7",
}
_CELL, _ROW, _LEFT, _TOP = 84, 22, 170, 30


def timeline(layers: Sequence[str], epochs: Sequence[Mapping[str, Entry]]) -> str:
    """The SVG document. A cell's left half is the structure and its right half the precision, each as granularity and
    level, coloured by method, the darker the harder; a frame marks an entry that is another one than the epoch before.
    """
    width, height = _LEFT + _CELL * len(epochs) + 10, _TOP + _ROW * len(layers) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for column in range(len(epochs)):
        x = _LEFT + _CELL * column + _CELL / 2
        parts.append(f'<text x="{x:g}" y="{_TOP - 8}" text-anchor="middle">epoch {column + 1}</text>')
    for row, layer in enumerate(layers):
        y, before = _TOP + _ROW * row, UNCOMPRESSED
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(layer)}</text>')
        for column, entries in enumerate(epochs):
            entry, x = entries.get(layer, UNCOMPRESSED), _LEFT + _CELL * column
            parts += [*_half(entry.structure, x, y), *_half(entry.precision, x + _CELL // 2, y)]
            frame = ("black", 1.5) if entry != before else ("white", 1)
            parts.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{_CELL - 2}" height="{_ROW - 2}" fill="none" '
                f'stroke="{frame[0]}" stroke-width="{frame[1]}"/>'
            )
            before = entry
    for number, (method, colour) in enumerate(_COLOURS.items()):
        x, y = _LEFT + 100 * number, _TOP + _ROW * len(layers) + 14
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 18}" y="{y + 10}">{method}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _half(choice: Choice, x: int, y: int) -> list[str]:
    area = f'x="{x}" y="{y}" width="{_CELL // 2}" height="{_ROW}"'
    if choice == NONE:
        return [f'<rect {area} fill="#eee"/>']
    assert choice.level is not None
    levels = LEVELS[choice.method]
    strength = 0.35 + 0.65 * levels.index(choice.level) / (len(levels) - 1)
    words = (
        f'<text x="{x + _CELL // 4}" y="{y + 14}" text-anchor="middle">{choice.granularity:.2} {choice.level:g}</text>'
    )
    return [f'<rect {area} fill="{_COLOURS[choice.method]}" fill-opacity="{strength:.2f}"/>', words]


def changed_share(layers: Sequence[str], epochs: Sequence[Mapping[str, Entry]], after: int) -> float:
    """Share of the layers whose last entry is another one than that after epoch `after` (1, 2, ...)."""
    then, last = epochs[after - 1], epochs[-1]
    moved = [name for name in layers if then.get(name, UNCOMPRESSED) != last.get(name, UNCOMPRESSED)]
    return len(moved) / len(layers)
