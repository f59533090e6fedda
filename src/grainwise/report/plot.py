"""Curves over evaluations as one SVG file: a line for the mean of the seeds, a band from their least to their most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10

import numpy as np
from numpy.typing import NDArray

Curves = Mapping[str, Sequence[Sequence[float]]]
"""By name the curve of each seed, `[seeds, evaluations]`; NaN where there is no value yet."""

# Okabe & Ito 2008, distinguishable without full colour vision; dashes tell apart those that share a colour
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP, _LINE = 420, 300, 64, 36, 90, 18


def plot(panels: Mapping[str, tuple[Curves, bool]]) -> str:
    """The SVG document of panels side by side; a panel by its title: curves, and whether its axis is logarithmic."""
    names = list(dict.fromkeys(name for curves, _ in panels.values() for name in curves))
    styles = {name: _style(number) for number, name in enumerate(names)}
    width = _LEFT + len(panels) * (_WIDTH + _GAP)
    height = _TOP + _HEIGHT + 60 + _LINE * ceil(len(names) / 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (title, (curves, logarithmic)) in enumerate(panels.items()):
        inner = _panel(title, curves, styles, logarithmic=logarithmic)
        parts += [f'<g transform="translate({_LEFT + number * (_WIDTH + _GAP)},{_TOP})">', *inner, "</g>"]
    for number, name in enumerate(names):
        x, y = _LEFT + (number % 2) * _WIDTH, _TOP + _HEIGHT + 60 + _LINE * (number // 2)
        parts.append(f'<line x1="{x}" x2="{x + 30}" y1="{y - 4}" y2="{y - 4}" {styles[name]}/>')
        parts.append(f'<text x="{x + 38}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _style(number: int) -> str:
    dash = ("", ' stroke-dasharray="6 3"', ' stroke-dasharray="2 2"')[number // len(_COLOURS) % 3]
    return f'stroke="{_COLOURS[number % len(_COLOURS)]}" stroke-width="2" fill="none"{dash}'


def _panel(title: str, curves: Curves, styles: Mapping[str, str], *, logarithmic: bool) -> list[str]:
    tables = {name: np.array(rows, dtype=np.float64) for name, rows in curves.items()}
    values = np.concatenate([table.ravel() for table in tables.values()])
    values = values[np.isfinite(values) & ((values > 0) | (not logarithmic))]
    longest = max(table.shape[1] for table in tables.values())
    ticks = _ticks(values, logarithmic=logarithmic)

    def down(value: NDArray[np.float64] | float) -> NDArray[np.float64]:
        ends = np.log10([ticks[0], ticks[-1]]) if logarithmic else np.array([ticks[0], ticks[-1]])
        at = np.log10(np.maximum(value, ticks[0])) if logarithmic else np.asarray(value)
        return np.asarray(_HEIGHT * (1 - (at - ends[0]) / (ends[1] - ends[0])))

    parts = [f'<text x="0" y="-14" font-weight="bold">{escape(title)}</text>']
    for tick in ticks:
        y = float(down(tick))
        parts.append(f'<line x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for count in np.unique(np.linspace(1, longest, 5).round().astype(int)).tolist():
        x = _across(count, longest)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT + 18}" text-anchor="middle">{count}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 36}" text-anchor="middle">evaluations</text>')
    for name, table in tables.items():
        known = np.flatnonzero(np.isfinite(table).all(axis=0))  # from where every seed has a value
        if not len(known):
            continue
        places = [_across(int(at) + 1, longest) for at in known]
        low, middle, high = (down(f(table[:, known], axis=0)) for f in (np.min, np.mean, np.max))
        band = [*zip(places, low, strict=True), *reversed(list(zip(places, high, strict=True)))]
        colour = styles[name].split('"')[1]
        parts.append(f'<polygon points="{_points(band)}" fill="{colour}" fill-opacity="0.12"/>')
        parts.append(f'<polyline points="{_points(list(zip(places, middle, strict=True)))}" {styles[name]}/>')
    return parts


def _across(count: int, longest: int) -> float:
    return _WIDTH * (count - 1) / max(1, longest - 1)


def _points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def _ticks(values: NDArray[np.float64], *, logarithmic: bool) -> list[float]:
    """Ascending values of the axis's lines; the first and last enclose the data."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.1, 1.0)
    if logarithmic:
        steps = [m * 10.0**e for e in range(floor(log10(low)) - 1, ceil(log10(high)) + 1) for m in (1, 2, 5)]
        first = max(i for i, step in enumerate(steps) if step <= low)
        last = min((i for i, step in enumerate(steps) if step >= high), default=len(steps) - 1)
        return steps[first : max(last, first + 1) + 1]
    if high - low < 1e-6:
        low, high = low - 0.01, high + 0.01
    unit = 10.0 ** floor(log10(high - low))
    unit *= 0.5 if high - low < 3 * unit else 1
    return [float(tick) for tick in np.arange(floor(low / unit), ceil(high / unit) + 1) * unit]
