"""Tables and plots of what is trained: recovery, and compression during training."""

from __future__ import annotations

import statistics
from typing import Any

from bench import markdown
from grainwise.plan.profile import entries_from_json
from grainwise.report.timeline import timeline


def recover() -> str:
    """One row a recovery: the file before and after, and the epochs and minutes that lie between."""
    if not markdown.made("recover"):
        return "No results yet: `python -m bench.recover`."
    return "\n\n".join(_recovered(task) for task in markdown.read("recover").values() if task.get("command"))


def _recovered(task: dict[str, Any]) -> str:
    def drop(figures: dict[str, Any]) -> float:
        return float(100 * (figures["reference_accuracy"] - figures["onnx_accuracy"]))

    def shares(figures: dict[str, Any], name: str) -> str:
        return f"{figures[name] / figures[f'reference_{name}']:.4f}"

    rows = [
        [
            row["name"],
            f"{row['after']['size_bytes']:,}",
            shares(row["after"], "size_bytes"),
            shares(row["after"], "macs"),
            f"{100 * row['before']['onnx_accuracy']:.2f} %",
            f"{100 * row['after']['onnx_accuracy']:.2f} %",
            f"{drop(row['before']):.2f}",
            f"{drop(row['after']):.2f}",
            f"{row['before']['divergence']:.4f}",
            f"{row['after']['divergence']:.4f}",
            f"{row['after']['recovery_minutes']:.0f}",
        ]
        for row in task["rows"]
    ]
    head = ["recovery", "bytes", "size", "MACs", "test before", "test after", "drop before", "drop after"]
    asked = ", ".join(f"{name} ≤ {share:g}" for name, share in task["constraints"].items())
    by_epochs: dict[int, list[float]] = {}
    for row in task["rows"]:
        by_epochs.setdefault(row["epochs"], []).append(drop(row["after"]))
    means = "; ".join(
        f"epochs {epochs}: drop {statistics.mean(drops):.2f}"
        + (f" ± {statistics.stdev(drops):.2f} points, seeds {len(drops)}" if len(drops) > 1 else " points, one seed")
        for epochs, drops in by_epochs.items()
    )
    note = (
        f"Asked: {asked}, and a drop of at most {task['most']} points. {means}. Drops in points of the test split, "
        f"divergence on the search split in nats, minutes of training on a shared core; `{task['command']}` on "
        f"{task['machine']}."
    )
    return f"{markdown.table([*head, 'divergence before', 'after', 'minutes'], rows)}\n\n{note}"


WAYS = {
    "adaptive": "compressed while training",
    "recovered": "trained, searched, recovered",
    "fixed": "one profile from the start, found before training",
    "hindsight": "one profile from the start, the adaptive one's last",
    "plain": "trained, uncompressed",
}


def adaptive() -> str:
    """One table a task: a row a way to come to a compressed network, means over the seeds."""
    if not markdown.made("adaptive"):
        return "No results yet: `python -m bench.adaptive`."
    return "\n\n".join(_trained(task) for task in markdown.read("adaptive").values())


def _trained(task: dict[str, Any]) -> str:
    found = {way: [row for row in task["rows"] if row["technique"] == way] for way in WAYS}

    def text(way: str, name: str, scale: float, digits: int) -> str:
        values = [scale * row[name] for row in found[way]]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    rows = [
        [words, str(len(found[way])), text(way, "accuracy", 100, 2), text(way, "size", 1, 4), text(way, "macs", 1, 3)]
        for way, words in WAYS.items()
        if found[way]
    ]
    mine = found["adaptive"]
    asked = ", ".join(f"{name} ≤ {share:g}" for name, share in task["constraints"].items())
    shares = ", ".join(f"{100 * row['changed_after_third']:.0f} %" for row in mine)
    note = (
        f"Asked: {asked}; {task['epochs']} epochs in all, mean ± deviation over seeds, accuracy of the file on the "
        f"test split. The search between training and recovery has {task['evaluations']} evaluations and all methods. "
        f"Entries that changed after the first third of the epochs: {shares} of the layers. {_overhead(found)}"
        f"`{task['command']}` on {task['machine']}."
    )
    head = ["way", "seeds", "test accuracy, %", "size", "MACs"]
    return f"### {task['title']}\n\n{markdown.table(head, rows)}\n\n{note}"


def _overhead(found: dict[str, list[dict[str, Any]]]) -> str:
    """What adaptive training takes beyond plain training, for the seeds that have both."""
    plain = {row["seed"]: row["train_seconds"] for row in found["plain"]}
    mine = [row for row in found["adaptive"] if row["seed"] in plain]
    if not mine:
        return ""
    whole = sum(plain[row["seed"]] for row in mine) / 100
    steps = sum(row["train_seconds"] - plain[row["seed"]] for row in mine) / whole
    hook, first = (sum(row[f"{part}_seconds"] for row in mine) / whole for part in ("hook", "prepare"))
    return (
        f"Beyond the processor time of plain training: decisions {hook:.1f} %, slower steps {steps:.1f} %, what is "
        f"prepared before the first epoch {first:.1f} %. "
    )


def timelines() -> dict[str, str]:
    """By file in docs/, the plot of an adaptive run of each task."""
    if not markdown.made("adaptive"):
        return {}
    found = {}
    for name, task in markdown.read("adaptive").items():
        row = next((row for row in task["rows"] if row["technique"] == "adaptive"), None)
        if row is None or name == "overhead":
            continue
        found[f"adaptive-{name}.svg"] = timeline(
            row["layers"], [entries_from_json(epoch["entries"]) for epoch in row["epochs"]]
        )
    return found
