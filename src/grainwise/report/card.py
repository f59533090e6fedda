"""The model card of an artefact, and its figures as text."""

from __future__ import annotations

from collections.abc import Mapping

from grainwise.plan.choices import UNCOMPRESSED, Entry
from grainwise.plan.space import SearchSpace

Figures = Mapping[str, float | int | str | None]


def number(figures: Figures, name: str) -> float:
    """A figure that must be a number."""
    value = figures[name]
    assert isinstance(value, int | float)
    return float(value)


def comparison(figures: Figures) -> list[tuple[str, str, str, str]]:
    """Rows (what, reference, compressed, change) of the three figures that a user decides by."""
    before, after = number(figures, "reference_accuracy"), number(figures, "accuracy")
    rows = [("metric on the test split", f"{before:.4f}", f"{after:.4f}", f"{100 * (after - before):+.2f} points")]
    for name, label in (("size_bytes", "weights file, bytes"), ("macs", "multiply-accumulates")):
        full, left = number(figures, f"reference_{name}"), number(figures, name)
        rows.append((label, f"{full:,.0f}", f"{left:,.0f}", f"x {left / full:.4f}"))
    return rows


def model_card(space: SearchSpace, entries: Mapping[str, Entry], figures: Figures) -> str:
    """Markdown: figures, what was done to each layer, how to load it, and what the size means for speed."""
    table = "\n".join(f"| {' | '.join(row)} |" for row in comparison(figures))
    layers = "\n".join(f"| `{la.name}` | {entries.get(la.name, UNCOMPRESSED)} |" for la in space.layers)
    return f"""# Compressed by grainwise

| | reference | compressed | change |
|---|---|---|---|
{table}

Found in {figures["trials"]} trials. Every byte is counted in `model.safetensors` as it lies on disk. Packed weights are
unpacked when the network is loaded: they make the file smaller, not this network faster; multiply-accumulates are
counted for what is really computed.

## Load

```python
import grainwise as gw

model = gw.load("this directory", your_uncompressed_model).model
```

Every file is checked against `manifest.json` (SHA-256) first; nothing is unpickled.

## What was done

| layer | entry |
|---|---|
{layers}
"""
