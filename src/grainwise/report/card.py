"""The model card of an artefact, and its figures as text."""

from __future__ import annotations

from collections.abc import Mapping

from grainwise.evaluate.timing import NOISY
from grainwise.plan.choices import UNCOMPRESSED, Entry
from grainwise.plan.layers import Layer
from grainwise.plan.space import SearchSpace
from grainwise.plan.target import Target

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
    file = "ONNX file, bytes" if "onnx_size_bytes" in figures else "weights file, bytes"
    for name, label in (("size_bytes", file), ("macs", "multiply-accumulates")):
        full, left = number(figures, f"reference_{name}"), number(figures, name)
        rows.append((label, f"{full:,.0f}", f"{left:,.0f}", f"x {left / full:.4f}"))
    if "latency_ratio" in figures:
        full, left = number(figures, "reference_latency_ms"), number(figures, "latency_ms")
        spread = number(figures, "latency_noise")
        change = f"x {number(figures, 'latency_ratio'):.3f} ± {spread:.3f}{' (noisy)' if spread > NOISY else ''}"
        rows.append(("milliseconds, p50, batch 1", f"{full:.3f}", f"{left:.3f}", change))
    return rows


def model_card(space: SearchSpace, entries: Mapping[str, Entry], figures: Figures, target: Target) -> str:
    """Markdown: figures, what was done to each layer and what it brings on the target, how to load it."""
    table = "\n".join(f"| {' | '.join(row)} |" for row in comparison(figures))
    packed = target.runtime == "torch"
    rows = []
    for layer in space.layers:
        entry = entries.get(layer.name, UNCOMPRESSED)
        rows.append(f"| `{layer.name}` | {entry} | {how_it_runs(target, layer, entry)} |")
    layers = "\n".join(rows)
    return f"""# Compressed by grainwise

| | reference | compressed | change |
|---|---|---|---|
{table}

Found in {figures["trials"]} trials for the target `{target.name}`. {_PACKED if packed else _timed(figures)}
{_recovered(figures) if "recovery_epochs" in figures else ""}

## Load

{_LOAD_PACKED if packed else _LOAD_ONNX}
Every file is checked against `manifest.json` (SHA-256) first; nothing is unpickled.

## What was done

| layer | entry | runs as |
|---|---|---|
{layers}
"""


def how_it_runs(target: Target, layer: Layer, entry: Entry) -> str:
    """The realisation of an entry in words, and whether it is for size alone."""
    found = dict.fromkeys(target.realisations(layer.geometry, entry.structure, entry.precision))
    words = ", ".join(str(how) for how in found)
    alone = entry != UNCOMPRESSED and not target.faster(layer.geometry, entry.structure, entry.precision)
    return f"{words} (size only, no speed-up)" if alone else words


_PACKED = """Every byte is counted in `model.safetensors` as it lies on disk. Packed weights are
unpacked when the network is loaded: they make the file smaller, not this network faster; multiply-accumulates are
counted for what is really computed."""

_LOAD_PACKED = """```python
import grainwise as gw

model = gw.load("this directory", your_uncompressed_model).model
```
"""

_LOAD_ONNX = """```python
import grainwise as gw

network = gw.load("this directory")  # ONNX Runtime; call it with arrays or tensors
model = gw.load("this directory", your_uncompressed_model).model  # the same network in PyTorch
```

Without grainwise: `onnxruntime.InferenceSession("model.onnx", disabled_optimizers=["WeightBiasQuantization"])`. Without
that option ONNX Runtime also rounds layers that this profile leaves in float32.
"""


def _recovered(figures: Figures) -> str:
    before, after = number(figures, "unrecovered_search_accuracy"), number(figures, "search_accuracy")
    return f"""
Fine-tuned afterwards by distillation from the uncompressed network, {number(figures, "recovery_epochs"):.0f} epochs in
{number(figures, "recovery_minutes"):.1f} minutes: metric on the search split {before:.4f} before and {after:.4f} after,
divergence {number(figures, "unrecovered_divergence"):.4f} and {number(figures, "divergence"):.4f}. The profile alone
does not give these weights.
"""


def _timed(figures: Figures) -> str:
    weights, size = number(figures, "onnx_tensor_bytes"), number(figures, "onnx_size_bytes")
    p95, its_p95 = number(figures, "latency_p95_ms"), number(figures, "reference_latency_p95_ms")
    agreement, counted = 100 * number(figures, "top1_agreement"), figures["kernels"] or "none"
    return f"""The file's bytes are {weights:,.0f} of tensors and {size - weights:,.0f} of graph.
Times are of {figures["latency_runtime"]} on {figures["latency_device"]}, {figures["latency_threads"]} thread, batch 1,
p95 {p95:.3f} ms against {its_p95:.3f} ms; the ratio is of processor time, taken side by side, and ± is the spread
of the reference against itself. File and PyTorch module differ by {number(figures, "max_abs_difference"):.2g} at most
and agree on {agreement:.2f} % of first answers. 8-bit kernels: {counted}."""
