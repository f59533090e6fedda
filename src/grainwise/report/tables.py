"""Tables for the terminal and the same facts as JSON: layers, legal choices, results."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Column, Table

from grainwise.plan.choices import PRECISIONS, STRUCTURES, Entry
from grainwise.plan.layers import Layer
from grainwise.plan.space import SearchSpace
from grainwise.plan.target import Target
from grainwise.report.card import Figures, comparison, number


def inspection(space: SearchSpace, statistics: list[list[float]], target: Target) -> dict[str, Any]:
    """Everything `inspect` knows; statistics: mean, variance and entropy (nats) of each layer's output."""
    layers = [
        _layer(space, index, layer, row, target)
        for index, (layer, row) in enumerate(zip(space.layers, statistics, strict=True))
    ]
    return {
        "target": target.name,
        "layers": layers,
        "parameters": sum(layer["weights"] for layer in layers if not layer["tied_to"]),
        "macs": sum(layer["macs"] for layer in layers) + space.graph.other_macs,
        "other_macs": space.graph.other_macs,
        "couplings": [
            {
                "name": c.name,
                "width": c.width,
                "producers": c.producers(),
                "consumers": c.consumers(),
                "frozen": c.frozen,
            }
            for c in space.graph.couplings
        ],
        "blocks": [{"name": b.name, "decided_at": b.coupling, "layers": b.layers} for b in space.graph.blocks],
        "notes": space.graph.notes,
    }


def _layer(space: SearchSpace, index: int, layer: Layer, statistics: list[float], target: Target) -> dict[str, Any]:
    legal = [str(c) for s, c in enumerate(STRUCTURES) if space.structures[index, s]]
    legal += [str(c) for p, c in enumerate(PRECISIONS) if p and space.precisions[index, p]]
    refused: dict[str, list[str]] = {}
    for choice in (*STRUCTURES[1:], *PRECISIONS[1:]):
        if reason := space.reasons.get((layer.name, choice)):
            refused.setdefault(reason, []).append(str(choice))
    geometry = layer.geometry
    entries = [Entry(structure=c) for s, c in enumerate(STRUCTURES) if s and space.structures[index, s]]
    entries += [Entry(precision=c) for p, c in enumerate(PRECISIONS) if p and space.precisions[index, p]]
    slow = [str(e) for e in entries if not target.faster(geometry, e.structure, e.precision)]
    return {
        "name": layer.name,
        "kind": str(geometry.kind),
        "shape": geometry.weight_shape,
        "groups": geometry.groups,
        "weights": geometry.weights,
        "macs": layer.macs,
        "tied_to": layer.tied_to,
        "mean": statistics[0],
        "variance": statistics[1],
        "entropy": statistics[2],
        "legal": legal,
        "size_only": slow,
        "refused": refused,
    }


def show_inspection(facts: dict[str, Any], console: Console) -> None:
    table = Table("layer", "kind", "weight", "weights", "MACs", "mean", "variance", "entropy", "legal choices")
    for layer in facts["layers"]:
        table.add_row(
            layer["name"],
            layer["kind"],
            "x".join(map(str, layer["shape"])),
            f"{layer['weights']:,}",
            f"{layer['macs']:,}",
            *(f"{layer[name]:.3g}" for name in ("mean", "variance", "entropy")),
            _summary(layer["legal"]),
        )
    console.print(table)
    console.print(f"{facts['parameters']:,} weights in layers, {facts['macs']:,} multiply-accumulates per sample")
    for layer in facts["layers"]:
        for reason, choices in layer["refused"].items():
            console.print(f"[dim]{layer['name']}: not {_summary(choices)}: {reason}[/dim]", highlight=False)
    for layer in facts["layers"]:
        if layer["size_only"]:
            text = f"{layer['name']}: size only, no speed-up on {facts['target']}: {_summary(layer['size_only'])}"
            console.print(f"[dim]{text}[/dim]", highlight=False)
    for note in facts["notes"]:
        console.print(f"note: {note}", highlight=False)


def _summary(choices: list[str]) -> str:
    """`prune/layer 0.1 0.3, quantize/channel 8 4 2` instead of one word for each level."""
    levels: dict[str, list[str]] = {}
    for choice in choices:
        kind, _, level = choice.rpartition("/")
        if kind:
            levels.setdefault(kind, []).append(level)
    return ", ".join(f"{kind} {' '.join(found)}" for kind, found in levels.items()) or "none"


def show_figures(figures: Figures, console: Console) -> None:
    table = Table("", "reference", "compressed", "change")
    for row in comparison(figures):
        table.add_row(*row)
    console.print(table)
    if "openvino_version" in figures:
        console.print(_in_openvino(figures), highlight=False)


def _in_openvino(figures: Figures) -> str:
    """One sentence about the same file in the other runtime."""
    metric, agreement = number(figures, "openvino_accuracy"), 100 * number(figures, "openvino_top1_agreement")
    largest, mean = (number(figures, f"openvino_{name}_abs_difference") for name in ("max", "mean"))
    ratio, spread = number(figures, "openvino_latency_ratio"), number(figures, "openvino_latency_noise")
    return (
        f"The same file in OpenVINO {figures['openvino_version']}: metric {metric:.4f}; outputs differ from those of "
        f"ONNX Runtime by {mean:.2g} on average and {largest:.2g} at most, {agreement:.2f} % of first answers are "
        f"the same; x {ratio:.3f} ± {spread:.3f} of ONNX Runtime's time; kernels: {figures['openvino_kernels']}"
    )


def show_contest(facts: dict[str, Any], console: Console) -> None:
    """Files side by side, as `bench.Contest.standings` gives them."""
    table = Table(Column("file", overflow="fold"), "metric", "bytes", "size", "p50, ms", "p95, ms", "time")
    for row in facts["files"]:
        table.add_row(
            row["name"],
            f"{row['metric']:.4f}",
            f"{row['size_bytes']:,}",
            f"x {row['size_ratio']:.4f}",
            f"{row['p50_ms']:.3f}",
            f"{row['p95_ms']:.3f}",
            f"x {row['latency_ratio']:.3f}",
        )
    console.print(table)
    for row in facts["files"]:
        console.print(f"{row['name']}: 8-bit kernels: {row['kernels'] or 'none'}", highlight=False, markup=False)
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    console.print(
        f"Batch {facts['batch']}, {threads}, {facts['runtime']} on {facts['device']}; "
        f"{facts['rounds']} calls of each file, in turn. The time is the median ratio of the "
        f"{facts['clock']} to that of the first file, which against itself is off by {facts['noise']:.3f}"
        f"{': noisy, smaller differences mean nothing' if facts['noisy'] else ''}.",
        highlight=False,
    )
